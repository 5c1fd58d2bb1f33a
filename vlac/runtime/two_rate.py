"""Two rates on one policy: `observe(images, task)` when frames come, `act(state)` when the controller wants actions.

What does not depend on the state (encoding pictures, reading the prompt, keys and values of the prefix) is computed by
`observe`, in the thread that calls it; `act` computes the rest from the newest observation that is complete. Frames
that arrive while `act` runs are for the next one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlac.engines.base import EngineSession, Values
from vlac.graph import Call, Program, Repeat
from vlac.runtime.inputs import Scene
from vlac.runtime.reuse import Reuse
from vlac.runtime.schedule import run_step

NpArray = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Observed:
    """One complete observation: its number (1, 2, ...), the scene, the stage results that are known from it alone, and
    when it was complete (time.perf_counter)."""

    number: int
    scene: Scene
    values: Mapping[str, NpArray]
    at: float


class Gate:
    """One engine for two threads: `act` goes before a waiting `observe`, but only once before each of its stages.

    So `act` waits for two stages at most (of one camera, say), and `observe` for one `act` before each stage.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = False
        self._acts = self._stages = 0
        self._owed = False

    @contextmanager
    def act(self) -> Iterator[None]:
        """The whole of an `act`."""
        with self._changed:
            self._acts += 1
            while self._busy or (self._owed and self._stages):
                self._changed.wait()
            self._acts -= 1
            self._busy, self._owed = True, bool(self._stages)
        yield from self._until_done()

    @contextmanager
    def stage(self) -> Iterator[None]:
        """One stage of an `observe`."""
        with self._changed:
            self._stages += 1
            while self._busy or (self._acts and not self._owed):
                self._changed.wait()
            self._stages -= 1
            self._busy, self._owed = True, False
        yield from self._until_done()

    def _until_done(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()


class Gated(EngineSession):
    """An engine whose every stage waits for its turn at a gate."""

    def __init__(self, engine: EngineSession, gate: Gate) -> None:
        self.engine, self.info, self.one_graph = engine.engine, engine.info, engine.one_graph
        self._inner, self._gate = engine, gate

    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        with self._gate.stage():
            return self._inner.run(stage, inputs, symbols)

    def repeat(self, step: Repeat, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        with self._gate.stage():
            return self._inner.repeat(step, inputs, symbols)


def known_from(program: Program, engine: EngineSession, scene: Scene, reuse: Reuse | None) -> dict[str, NpArray]:
    """Outputs of every stage whose inputs the scene decides, by name; none of an artifact that is one graph."""
    values: dict[str, NpArray] = dict(scene.env)
    made: dict[str, NpArray] = {}
    for step in program.schedule.steps if not engine.one_graph else ():
        stage = program.stage(step.stage)
        if isinstance(step, Call) and all(name in values for name, _ in stage.inputs):
            out = run_step(program, engine, step, values, scene.symbols, reuse)
            values.update(out)
            made.update(out)
    return made


def age_ms(seen: Observed) -> float:
    """Milliseconds since an observation was complete."""
    return (time.perf_counter() - seen.at) * 1e3
