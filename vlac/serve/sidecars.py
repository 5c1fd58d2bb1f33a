"""What else sees every chunk: the recorder, and the shadow that compares every Nth one in a process of its own."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from vlac.errors import VlacError
from vlac.metrics import Joint
from vlac.record import Recorder
from vlac.serve.core import Answer, Asked
from vlac.serve.guard import drift_of

NpArray = np.ndarray[Any, Any]
CHUNK = "served.chunk"
"""Feature of a recording: the whole chunk [N * A] that was answered; "action" is its first row."""


class Recording:
    """Every observation and its chunk become a frame; a client's going, or another seed, ends its episode.

    An `after` of the core: what a guard held is recorded as it left.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._seeds: dict[str, Any] = {}

    def chunk(self, asked: Asked, answer: Answer) -> Answer:
        """Hands the frame over; never waits."""
        seen = asked.observation
        told = seen.get("moment") if asked.step is not None else None
        if told is not None and self._seeds.setdefault(asked.client, told[0]) != told[0]:
            self.recorder.end_episode(asked.client)
            self._seeds[asked.client] = told[0]
        self.recorder.step(
            {k: _pixels(v) for k, v in seen["images"].items()},
            seen["state"],
            answer.chunk[0],
            seen["task"] or "",
            source=asked.client,
            extra={CHUNK: answer.chunk.reshape(-1)},
        )
        return answer

    def gone(self, client: str) -> None:
        """Its episode is over."""
        self._seeds.pop(client, None)
        self.recorder.end_episode(client)


def _pixels(image: NpArray) -> NpArray:
    return image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8)


class Shadow:
    """Compares every Nth chunk with another policy's, which meets the same observation and noise in its own process.

    Never holds up the server: while a comparison runs, further chunks are not compared.

    Args:
        reference: artifact, checkpoint folder or hub id. every: N.
        seen: called with (drift, drift per joint).
        failed: called with the reason when the process has ended; nothing is compared from then on.
    """

    def __init__(
        self,
        reference: str | Path,
        every: int,
        joints: tuple[Joint, ...],
        seen: Callable[[float, list[float]], None],
        failed: Callable[[str], None],
    ) -> None:
        self.every, self._joints, self._seen, self._failed = every, joints, seen, failed
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_reference, args=(theirs, str(reference)), daemon=True, name="vlac-shadow")
        self._process.start()
        theirs.close()
        try:
            problem = self._pipe.recv()
        except EOFError:
            problem = "its process ended while it was loaded"
        if problem:
            raise VlacError(f"--shadow {reference}: {problem}")
        self._free = threading.Event()
        self._free.set()
        self._number = 0
        self.compared = 0

    def chunk(self, asked: Asked, answer: Answer) -> Answer:
        """Sends every Nth chunk over; the answer as it is."""
        self._number += 1
        if (self._number - 1) % self.every == 0 and self._free.is_set():
            self._free.clear()
            chunk, observation = answer.chunk, asked.observation
            threading.Thread(target=self._compare, args=(observation, chunk), daemon=True).start()
        return answer

    def gone(self, client: str) -> None:
        """Nothing is kept of a client."""

    def close(self) -> None:
        """Ends the process."""
        self._free.clear()
        self._process.terminate()
        self._process.join(5)

    def _compare(self, observation: dict[str, Any], chunk: NpArray) -> None:
        try:
            self._pipe.send(observation)
            reference, problem = self._pipe.recv()
        except (EOFError, OSError):
            self._failed("its process has ended")
            return
        if problem or reference.shape != chunk.shape:
            self._failed(problem or f"it answers {reference.shape}, the policy {chunk.shape}")
        else:
            self._seen(*drift_of(chunk, reference, self._joints))
            self.compared += 1
        self._free.set()


def _reference(pipe: Connection, reference: str) -> None:
    """The shadow's process."""
    import signal

    from vlac.drivers import open_driver

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        driver = open_driver(reference, threads=1)
    except VlacError as error:
        pipe.send(str(error))
        return
    pipe.send("")
    while True:
        try:
            observation = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((driver.act(observation), ""))
        except VlacError as error:
            pipe.send((np.zeros((0, 0)), str(error)))
