"""Recorder: what a policy saw and did, as a LeRobotDataset, without ever holding up the loop that acts.

A step is put into a bounded queue and written by a thread of its own; when that falls behind, steps are dropped and it
says so. Episodes are committed when the loop ends them, after a pause, or when they become long; a kill loses those
that are open.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from vlac.datasets.episode import OpenEpisode
from vlac.datasets.layout import INFO
from vlac.datasets.tables import need
from vlac.datasets.writer import Writer
from vlac.errors import InputError, VlacWarning

NpArray = np.ndarray[Any, Any]

TIME = "recorded.time"
"""Seconds since the episode began when a step was handed over: a dataset's own timestamps are frame number / fps, which
says nothing about a loop that stumbles or steps that were dropped."""
EPISODE_BYTES = 256 << 20
"""An open episode that holds more pictures than this is committed, and the next begins."""


@dataclass(frozen=True)
class _Step:
    source: str
    at: float
    frame: Mapping[str, Any]
    task: str


@dataclass(frozen=True)
class _End:
    source: str
    keep: bool = True


@dataclass
class _Open:
    episode: OpenEpisode
    begun: float
    last: float


@dataclass
class Counts:
    """What became of the steps: `steps` handed over, `recorded` in committed episodes, `dropped` because the queue was
    full, `refused` because they did not fit (`reason`: the last one's); `failed` says why recording has ended."""

    steps: int = 0
    recorded: int = 0
    dropped: int = 0
    refused: int = 0
    episodes: int = 0
    reason: str = ""
    failed: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **changes: int) -> None:
        with self.lock:
            for name, by in changes.items():
                setattr(self, name, getattr(self, name) + by)


class Recorder:
    """Records the steps of one loop, or of many (`source`), into one dataset.

    Args:
        path: a new folder, or a dataset to go on with (what a killed recording left uncommitted is removed first).
        fps: how often the loop steps, whole; it becomes the dataset's fps.
        pictures: "image" keeps them exactly (PNG), "video" small (H.264).
        backlog: steps that may wait; when that many do, further ones are dropped.
        idle_s: an episode without a step for so long is committed.
        max_frames: an episode this long is committed, and the next begins: a kill loses no more.
        robot_type: a note in the dataset.

    Features are those of the first step (or of the dataset gone on with). Thread-safe.
    Raises: DatasetError, InputError, VlacError at once when the folder is taken or pyarrow is missing. Later nothing is
    raised: a robot's loop must not end because a disk is full. `counts` tells, and a VlacWarning says it once.
    """

    def __init__(
        self,
        path: str | Path,
        fps: int,
        *,
        pictures: str = "image",
        backlog: int = 64,
        idle_s: float = 10.0,
        max_frames: int = 1000,
        robot_type: str | None = None,
    ) -> None:
        if pictures not in ("image", "video"):
            raise InputError(f"pictures={pictures!r}, expected 'image' or 'video'")
        if isinstance(fps, bool) or not isinstance(fps, int) or fps < 1:
            raise InputError(f"fps={fps!r}, expected a whole number of steps per second")
        self.path, self.fps, self.counts = Path(path), fps, Counts()
        self._pictures, self._backlog, self._idle_s = pictures, backlog, idle_s
        self._max_frames, self._robot_type = max_frames, robot_type
        need("pyarrow.parquet")
        if pictures == "video":
            need("av")
        self._writer: Writer | None = None
        if (self.path / INFO).is_file():
            self._writer = Writer.resume(self.path)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"{self.path} exists and is no dataset", remedy="give a new folder to record to")
        self._queue: queue.SimpleQueue[_Step | _End | None] = queue.SimpleQueue()
        self._open: dict[str, _Open] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="vlac-recorder", daemon=True)
        self._thread.start()

    # --- the loop's side ---

    def step(
        self,
        images: Mapping[str, NpArray],
        state: Any,
        action: Any,
        task: str,
        *,
        source: str = "",
        extra: Mapping[str, Any] | None = None,
    ) -> bool:
        """Hands one step over and returns; False when it is not taken (see `counts`).

        Args:
            images: camera key ("observation.images.top", or "top") -> uint8 [H, W, 3]; copied.
            state: numbers [S], or None. action: numbers [A], or None.
            task: the instruction.
            source: whose episode it belongs to, where several loops record into one dataset.
            extra: further features, key -> numbers [d].
        """
        if self._closed or self.counts.failed:
            self.counts.add(steps=1, dropped=1)
            return False
        self.counts.add(steps=1)
        if self._queue.qsize() >= self._backlog:
            self.counts.add(dropped=1)
            self._say_dropped()
            return False
        numbers = {"observation.state": state, "action": action, **(extra or {})}
        try:
            frame: dict[str, Any] = {_camera_key(k): np.array(v) for k, v in images.items()}
            frame |= {k: np.array(v, dtype=np.float32) for k, v in numbers.items() if v is not None and np.size(v)}
        except (ValueError, TypeError) as error:
            self._refuse(f"no arrays of numbers: {error}")
            return False
        self._queue.put(_Step(source, _now(), frame, task))
        return True

    def end_episode(self, source: str = "") -> None:
        """The episode of `source` is over (the environment was reset, the client has gone); it is committed soon."""
        self._queue.put(_End(source))

    def discard_episode(self, source: str = "") -> None:
        """The open episode of `source` is not worth keeping."""
        self._queue.put(_End(source, keep=False))

    def close(self, timeout: float | None = None) -> Counts:
        """Writes what is waiting, commits open episodes and ends; what became of the steps."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        self._thread.join(timeout)
        return self.counts

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _refuse(self, reason: str) -> None:
        self.counts.add(refused=1)
        if not self.counts.reason:
            warnings.warn(f"recording to {self.path}: a step is left out: {reason}", VlacWarning, stacklevel=3)
        self.counts.reason = reason

    def _say_dropped(self) -> None:
        n = self.counts.dropped
        if n & (n - 1) == 0:  # at 1, 2, 4, 8, ...
            warnings.warn(
                f"recording to {self.path} falls behind: {n} of {self.counts.steps} steps dropped so far",
                VlacWarning,
                stacklevel=3,
            )

    # --- the writing thread ---

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # whatever it is: the loop goes on, and is told
            self.counts.failed = str(error) or type(error).__name__
            warnings.warn(f"recording to {self.path} has ended: {self.counts.failed}", VlacWarning, stacklevel=1)
        finally:
            if self._writer is not None:
                self._writer.close()

    def _work(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=min(1.0, max(self._idle_s / 4, 0.01)))
            except queue.Empty:
                self._commit_idle(time.monotonic())
                continue
            if item is None:
                break
            if isinstance(item, _End):
                self._end(item.source, item.keep)
            else:
                self._commit_idle(item.at)  # by the loop's clock: steps that waited here are no pause
                self._add(item)
        for source in list(self._open):
            self._end(source, True)

    def _add(self, step: _Step) -> None:
        try:
            if self._writer is None:
                self._writer = Writer(self.path, self._features(step.frame), self.fps, robot_type=self._robot_type)
            if step.source not in self._open:
                self._open[step.source] = _Open(self._writer.begin(), step.at, step.at)
            held = self._open[step.source]
            frame = dict(step.frame)
            if TIME in self._writer.features:
                frame[TIME] = np.array([step.at - held.begun])
            held.episode.add(frame, task=step.task)
        except InputError as error:
            self._refuse(error.message)
            return
        held.last = step.at
        if len(held.episode) >= self._max_frames or held.episode.nbytes >= EPISODE_BYTES:
            self._end(step.source, True)

    def _features(self, frame: Mapping[str, NpArray]) -> dict[str, Any]:
        features: dict[str, Any] = {}
        for key, value in frame.items():
            features[key] = {"dtype": self._pictures if value.ndim == 3 else "float32", "shape": list(value.shape)}
        return features | {TIME: {"dtype": "float64", "shape": [1]}}

    def _end(self, source: str, keep: bool) -> None:
        held = self._open.pop(source, None)
        if held is None or self._writer is None:
            return
        if not keep or not len(held.episode):
            self._writer.discard(held.episode)
            return
        self._writer.commit(held.episode)
        self.counts.add(recorded=len(held.episode), episodes=1)

    def _commit_idle(self, now: float) -> None:
        for source in [s for s, held in self._open.items() if now - held.last > self._idle_s]:
            self._end(source, True)


def _now() -> float:
    return time.monotonic()


def _camera_key(name: str) -> str:
    return name if name.startswith("observation.") else f"observation.images.{name}"
