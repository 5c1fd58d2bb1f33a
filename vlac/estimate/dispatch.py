"""What the runtime itself costs around an engine: its schedule run with an engine that computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlac.engines.base import EngineSession, NpArray, Values
from vlac.graph import Program, infer_stage
from vlac.ops import DTYPES
from vlac.runtime import schedule
from vlac.runtime.inputs import bind


class Idle(EngineSession):
    """An engine whose stages are done at once: outputs of the right shapes, all zero."""

    engine = "idle"

    def __init__(self, program: Program, symbols: Mapping[str, int]) -> None:
        self.info = {}
        self._made: dict[str, dict[str, NpArray]] = {}
        for stage in program.stages:
            types = infer_stage(stage, program.params)
            self._made[stage.name] = {
                name: np.zeros([bind(d, symbols) for d in types[name].shape], DTYPES[types[name].dtype])
                for name in stage.outputs
            }

    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        return dict(self._made[stage])


def seconds(
    program: Program, env: Mapping[str, Any], symbols: Mapping[str, int], now: Callable[[], float], runs: int = 9
) -> float:
    """Seconds (median) that the runtime spends around the engine in one chunk."""
    engine, took = Idle(program, symbols), []
    for _ in range(runs):
        began = now()
        schedule.execute(program, engine, env, symbols)
        took.append(now() - began)
    return float(np.median(took))
