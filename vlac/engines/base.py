"""What an engine is: it opens an artifact and runs its stages on numpy arrays. It knows ops and formats, no family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from vlac.artifact import Artifact
from vlac.errors import Unsupported
from vlac.graph import Repeat

NpArray = np.ndarray[Any, Any]
Values = Mapping[str, NpArray]


class EngineSession(ABC):
    """Stages of one artifact, ready to run.

    Arrays passed in are never modified by the engine, and the caller never modifies one after passing it: an engine
    may recognise an unchanged input by identity and skip its transfer. Returned arrays belong to the caller.
    """

    engine: str
    one_graph = False
    """Whether `run_all` makes the whole chunk."""
    info: dict[str, Any]
    """Versions, provider, CPU features, threads: what a bench report should name."""
    profiling = False
    """Set by the option "profile": runs are slower, and `op_times` tells."""

    @abstractmethod
    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        """Run one stage for one bucket. `inputs` holds at least the stage's inputs, by name, with the dtypes and shapes
        of `program.bind(symbols)`; returns its outputs by name. The session has checked both; ids are within range."""

    def repeat(self, step: Repeat, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        """A whole `Repeat`; engines override it where they can do better than one `run` per turn."""
        env = dict(inputs)
        for _, into, initial in step.carry:
            env[into] = inputs[initial]
        out: dict[str, NpArray] = {}
        turns: list[dict[str, NpArray]] = []
        for i in range(step.times):
            env[step.index] = np.array([i], dtype=np.int32)
            out = self.run(step.stage, env, symbols)
            turns.append({name: out[name] for name, _ in step.collect})
            for name, into, _ in step.carry:
                env[into] = out[name]
            if step.until and int(out[step.until][0]) in step.stop:
                break
        return {**out, **gathered(step, turns)}

    def run_all(self, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray] | None:
        """The whole schedule at once, for artifacts that are one graph: {result's name: normalised chunk}; None where
        stages are run one by one. `inputs` holds the runtime inputs; pixels as f32 [C, 3, S, S], zeros where absent."""
        return None

    def op_times(self) -> dict[str, dict[str, float]]:
        """Stage -> kind of op, as the engine names it -> milliseconds of all runs so far; empty without the option
        "profile", and where the engine does not tell. After it the session may not be run again."""
        return {}

    def close(self) -> None:
        """Frees native memory; the session cannot be used afterwards. Engines with nothing to free inherit this."""
        self.info = {}


def gathered(step: Repeat, turns: Sequence[Mapping[str, NpArray]]) -> dict[str, NpArray]:
    """What `step.collect` asks for: its outputs of the turns that were run joined along axis 0, zeros for the rest."""
    missing = step.times - len(turns)
    return {
        name: np.concatenate([t[out] for t in turns] + [np.zeros_like(turns[0][out])] * missing, axis=0)
        for out, name in step.collect
    }


class Engine(ABC):
    """An engine that may or may not be installed."""

    name: str
    parity_options: ClassVar[Mapping[str, Any]] = {}
    """Options under which it computes the same on every CPU, as far as it can; `vlac parity` asks so, robots do not."""

    @abstractmethod
    def missing(self) -> str:
        """Empty when it can be used here, else why not and how to install it. Imports nothing heavy."""

    @abstractmethod
    def open(
        self, artifact: Artifact, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> EngineSession:
        """Loads the artifact. Raises EngineError (missing, self-test, unknown op) before native code can abort."""


NAMES = {
    "onnxruntime": "vlac.engines.onnxruntime_engine",
    "openvino": "vlac.engines.openvino_engine",
    "ggml": "vlac.engines.ggml_engine",
    "torch": "vlac.engines.torch_engine",
    "numpy": "vlac.engines.numpy_engine",
    "tensorrt": "vlac.engines.tensorrt_engine",
}


def get_engine(name: str) -> Engine:
    """The engine of that name (each module has `ENGINE`); Unsupported names those there are."""
    import importlib

    if name not in NAMES:
        raise Unsupported(f"no engine {name!r}; there are: {', '.join(NAMES)}")
    engine = importlib.import_module(NAMES[name]).ENGINE
    assert isinstance(engine, Engine)
    return engine
