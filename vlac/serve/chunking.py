"""Real-time chunking for the clients of a server: each one's next chunk goes on from what it was answered last.

That chunk and what passed since belong to one client; nothing of it is shared, and it is forgotten when the client
goes, begins another episode, or is held by a guard.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlac.errors import InputError
from vlac.runtime.hand_over import check_columns
from vlac.runtime.rtc import STEADY, check_guidable, check_meaning, closed_loop, prefix_weights
from vlac.runtime.session import Session
from vlac.serve.core import Answer, Asked
from vlac.serve.observation import MAX_WEIGHT
from vlac.serve.refusal import Refused

NpArray = np.ndarray[Any, Any]
LATENCIES = 100
"""Chunks of a client whose slowest is taken for the next one's latency, as LeRobot's tracker does."""


@dataclass(frozen=True)
class Rtc:
    """What holds where a client's message does not say otherwise (vlac.runtime.rtc).

    horizon, schedule, most: `execution_horizon`, `schedule`, `max_guidance_weight` of `Session.act`; horizon None: the
        delay (vlac.runtime.rtc.closed_loop).
    delay: control steps that pass until a chunk arrives; None: the slowest of the client's last chunks, from the
        observation's arrival to the answer, in control steps, rounded up.
    executed: actions that a client takes between two observations, where it does not tell.
    displacements: columns of an action that move the robot by so much; chunks are handed over, not guided, then
        (vlac.runtime.hand_over), unless a horizon says so.
    """

    horizon: int | None = None
    schedule: str = "linear"
    most: float = STEADY
    delay: int | None = None
    executed: int | None = None
    displacements: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        prefix_weights(self.schedule, self.delay or 0, self.horizon or 0, 1)
        if not 0 < self.most <= MAX_WEIGHT:
            raise InputError(f"--max-guidance-weight {self.most!r}: a number above 0, at most {MAX_WEIGHT:g}")
        if self.executed is not None and self.executed < 1:
            raise InputError(f"--executed {self.executed!r}: a number of control steps, 1 or more")

    @property
    def guides(self) -> bool:
        """Whether chunks are drawn to what is left of the one before where a message says nothing."""
        return self.horizon is not None or not self.displacements


def rtc_of(asked: bool, given: Mapping[str, Any]) -> Rtc | None:
    """The options of a command line, None = not given; InputError for one that says something without --rtc."""
    given = {k: v for k, v in given.items() if v is not None}
    if asked:
        return Rtc(**given)
    if given:
        flags = {"horizon": "--execution-horizon", "delay": "--inference-delay", "most": "--max-guidance-weight"}
        name = next(iter(given))
        raise InputError(f"{flags.get(name, '--' + name)} belongs to --rtc", remedy="add --rtc")
    return None


@dataclass
class _Client:
    rows: NpArray | None = None
    step: int | None = None
    seed: int = 0
    guided: int = 0
    latencies: deque[float] = dataclasses.field(default_factory=lambda: deque(maxlen=LATENCIES))


class Chunking:
    """The core's `before`, and the last of its `after`; both run in the policy's thread.

    Args:
        session: the policy's; InputError where its chunks cannot go on from another.
        fps: control steps per second.
    """

    def __init__(self, session: Session, rtc: Rtc, fps: int) -> None:
        artifact = session.artifact
        check_columns(session.io, rtc.displacements)
        if rtc.guides and artifact.manifest.get("single_file"):
            raise InputError(f"--rtc: {artifact.path} is one graph, and its loop cannot be guided from outside")
        try:
            if rtc.guides:
                check_guidable(artifact.program, artifact.io, lambda name: artifact.tensors[name].decode())
            check_meaning(artifact.io)
        except InputError as error:
            raise InputError(f"--rtc: {error.message}", remedy=error.remedy) from None
        self.session, self.rtc, self.fps = session, rtc, fps
        self._clients: dict[str, _Client] = {}

    def before(self, asked: Asked) -> dict[str, Any]:
        """The observation with "rtc", the guidance of `Session.act`; empty where an episode begins.

        Raises Refused("input") when it is not told how far the client came along its chunk.
        """
        told = asked.observation.get("rtc", {})
        known = self._clients.setdefault(asked.client, _Client())
        left = self._left(asked, told, known)
        known.guided = 0
        if left is None:
            return {**asked.observation, "rtc": {}}
        delay = told.get("inference_delay", self.rtc.delay)
        if delay is None:
            delay = math.ceil(max(known.latencies, default=0.0) * self.fps / 1e3)
        usual: dict[str, Any] = {"max_guidance_weight": self.rtc.most, "schedule": self.rtc.schedule}
        if self.rtc.horizon is not None:
            usual["execution_horizon"] = self.rtc.horizon
        said = {k: v for k, v in told.items() if k not in ("executed", "reset")}
        guidance = {**closed_loop(delay, self.rtc.displacements), **usual, **said, "prev_chunk": left}
        known.guided = min(len(left), guidance["execution_horizon"])
        return {**asked.observation, "rtc": guidance}

    def _left(self, asked: Asked, told: Mapping[str, Any], known: _Client) -> NpArray | None:
        """Normalised rows that are not executed at this observation; None where there are none to go on from."""
        done = told.get("executed", self.rtc.executed)
        if "executed" not in told and asked.step is not None:
            done = -1 if known.step is None else asked.step - known.step
            if done < 1 or known.seed != asked.observation["moment"][0]:
                return None  # a step that is no later begins another episode
        if done is None and not told.get("reset"):
            raise Refused(
                "input",
                "how many actions were executed since the last observation is not told",
                remedy="send moment [seed, step] or rtc/executed, or start with --executed N",
            )
        if known.rows is None or told.get("reset") or done is None:
            return None
        left = known.rows[done:]
        return left if len(left) or self.rtc.displacements else None  # a robot that stands can be handed a path

    def chunk(self, asked: Asked, answer: Answer) -> Answer:
        """Keeps what leaves; a held robot goes on from nothing."""
        known = self._clients.setdefault(asked.client, _Client())
        known.rows = None if answer.held else self.session.normalised
        known.step, known.seed = asked.step, asked.observation["moment"][0]
        known.latencies.append(answer.timing["total_ms"])
        return dataclasses.replace(answer, guided=known.guided)

    def gone(self, client: str) -> None:
        """Forgets a client."""
        self._clients.pop(client, None)
