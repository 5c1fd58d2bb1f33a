"""The reference engine: runs any program with the numpy references of the op table. Slow, exact, needs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlac.artifact import Artifact
from vlac.engines.base import Engine, EngineSession, NpArray, Values
from vlac.graph import Program
from vlac.ops import OPS


def run_stage(program: Program, stage: str, inputs: Values, weight: Callable[[str], NpArray]) -> dict[str, NpArray]:
    """Outputs of one stage of a program without symbols; `weight(name)` gives float32 values."""
    s = program.stage(stage)
    env: dict[str, NpArray] = {name: np.asarray(inputs[name]) for name, _ in s.inputs}
    for node in s.nodes:
        operands = [weight(i[1:]) if i.startswith("@") else env[i] for i in node.inputs]
        env[node.name] = OPS[node.op].reference(operands, node.attr)
    return {o: env[o] for o in s.outputs}


class NumpySession(EngineSession):
    """Keeps decoded weights; built from an artifact or straight from a program with weights."""

    engine = "numpy"

    def __init__(self, program: Program, weight: Callable[[str], NpArray]) -> None:
        self.program = program
        self._weight = weight
        self._cache: dict[str, NpArray] = {}
        self.info = {"engine": "numpy", "numpy": np.__version__}

    def weight(self, name: str) -> NpArray:
        if name not in self._cache:
            self._cache[name] = self._weight(name)
        return self._cache[name]

    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        return run_stage(self.program.bind(symbols), stage, inputs, self.weight)


class NumpyEngine(Engine):
    """Always there."""

    name = "numpy"

    def missing(self) -> str:
        return ""

    def open(
        self, artifact: Artifact, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> EngineSession:
        return NumpySession(artifact.program, lambda name: artifact.tensors[name].decode())


ENGINE = NumpyEngine()
