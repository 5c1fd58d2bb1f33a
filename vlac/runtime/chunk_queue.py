"""Chunks between a policy and a robot loop: two queues with the semantics of LeRobot 0.6.1's, for several threads.

`ChunkQueue` is for one loop that counts its own steps, with real-time chunking or without (LeRobot's ActionQueue);
`StepQueue` is for actions with a step number each, of overlapping chunks (the queue of LeRobot's RobotClient).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from vlac.errors import InputError

NpArray = np.ndarray[Any, Any]
Aggregate = Callable[[NpArray, NpArray], NpArray]

AGGREGATES: Mapping[str, Aggregate] = MappingProxyType(
    {
        "weighted_average": lambda old, new: 0.3 * old + 0.7 * new,
        "latest_only": lambda old, new: new,
        "average": lambda old, new: 0.5 * old + 0.5 * new,
        "conservative": lambda old, new: 0.7 * old + 0.3 * new,
    }
)
"""What becomes of an action that is queued when a newer one for the same step arrives, under LeRobot's names."""


class ChunkQueue:
    """The actions a robot executes next, and the same ones as the policy made them, for `act(prev_chunk=)`.

    A robot loop takes one action per control step with `get`; another thread calls `act` and then `replace` (a new
    chunk takes over, its first rows being late) or `append` (a new chunk is for after the old one). Any method may be
    called from any thread; rows that come out are the caller's own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._robot: NpArray | None = None
        self._normalised: NpArray | None = None
        self._next = 0

    def get(self) -> NpArray | None:
        """The next action in the robot's units, f32 [action_dim]; None when there is none."""
        with self._lock:
            if self._robot is None or self._next >= len(self._robot):
                return None
            self._next += 1
            return np.array(self._robot[self._next - 1])

    def replace(self, chunk: Any, normalised: Any, delay: int = 0) -> None:
        """The new chunk instead of the old one, without its first `delay` rows (of control steps that have passed since
        its observation; below 0 counts as 0, beyond the end nothing is left).

        chunk: [N, action_dim], from `Session.act`. normalised: its `Session.normalised`, [N, any].
        """
        robot, own = _pair(chunk, normalised)
        late = max(0, min(int(delay), len(robot)))
        with self._lock:
            self._robot, self._normalised, self._next = robot[late:], own[late:], 0

    def append(self, chunk: Any, normalised: Any) -> None:
        """The new chunk behind what is left of the old one."""
        robot, own = _pair(chunk, normalised)
        with self._lock:
            if self._robot is not None and self._normalised is not None:
                if (self._robot.shape[1], self._normalised.shape[1]) != (robot.shape[1], own.shape[1]):
                    raise InputError(f"a chunk {list(robot.shape)} behind one with {self._robot.shape[1]} columns")
                robot = np.concatenate([self._robot[self._next :], robot])
                own = np.concatenate([self._normalised[self._next :], own])
            self._robot, self._normalised, self._next = robot, own, 0

    @property
    def taken(self) -> int:
        """Actions taken since the last `replace` or `append`: its difference over an inference is the delay."""
        with self._lock:
            return self._next

    def left(self) -> NpArray | None:
        """Normalised rows that are not executed yet, [n, any], for `act(prev_chunk=)`; None before the first chunk."""
        with self._lock:
            return None if self._normalised is None else self._normalised[self._next :].copy()

    def left_for_robot(self) -> NpArray | None:
        """The same rows in the robot's units."""
        with self._lock:
            return None if self._robot is None else self._robot[self._next :].copy()

    def clear(self) -> None:
        """Forgets everything, as before the first chunk."""
        with self._lock:
            self._robot = self._normalised = None
            self._next = 0

    def __len__(self) -> int:
        with self._lock:
            return 0 if self._robot is None else len(self._robot) - self._next


def _pair(chunk: Any, normalised: Any) -> tuple[NpArray, NpArray]:
    """Own copies; InputError when they are not two views of the same rows."""
    robot, own = (np.array(v, dtype=np.float32, order="C") for v in (chunk, normalised))
    if robot.ndim != 2 or own.ndim != 2 or len(robot) != len(own):
        raise InputError(f"a chunk {list(robot.shape)} with normalised rows {list(own.shape)}, expected [N, A] each")
    return robot, own


class StepQueue:
    """Actions by the number of their control step, from chunks that overlap.

    A new chunk replaces the queue: its rows for steps that have been taken are dropped, a row for a step that is queued
    is aggregated with it, and queued steps that the new chunk does not reach are gone.
    """

    def __init__(self, aggregate: str | Aggregate = "weighted_average") -> None:
        """aggregate: one of AGGREGATES, or a function (queued, new) -> [action_dim]."""
        if isinstance(aggregate, str) and aggregate not in AGGREGATES:
            raise InputError(f"aggregate {aggregate!r}; there are {', '.join(AGGREGATES)}")
        self._aggregate = AGGREGATES[aggregate] if isinstance(aggregate, str) else aggregate
        self._lock = threading.Lock()
        self._actions: dict[int, NpArray] = {}
        self._taken = -1

    def put(self, chunk: Any, first: int) -> None:
        """A chunk [N, action_dim] whose row i is for step `first` + i."""
        rows = np.array(chunk, dtype=np.float32)
        if rows.ndim != 2:
            raise InputError(f"a chunk {list(rows.shape)}, expected [N, action_dim]")
        with self._lock:
            queued, self._actions = self._actions, {}
            for step, new in enumerate(rows, first):
                if step > self._taken:
                    old = queued.get(step)
                    self._actions[step] = new if old is None else np.asarray(self._aggregate(old, new), np.float32)

    def get(self) -> tuple[int, NpArray] | None:
        """(step, action f32 [action_dim]) of the next step that is queued, which is then taken; None when empty."""
        with self._lock:
            if not self._actions:
                return None
            self._taken = next(iter(self._actions))
            return self._taken, self._actions.pop(self._taken).copy()

    @property
    def taken(self) -> int:
        """The last step taken, -1 before."""
        with self._lock:
            return self._taken

    def __len__(self) -> int:
        with self._lock:
            return len(self._actions)
