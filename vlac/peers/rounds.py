"""Turns: one process for each contender stays, and all answer the same observation, one after the other.

A machine that slows down slows everybody. Ours answer two more, right after the first, as a robot would ask: one
in which only one of the cameras is new, and one in which only state and noise are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlac.artifact import open_artifact
from vlac.errors import EngineError, VlacError
from vlac.io import IO
from vlac.machine import memory, read_text
from vlac.peers.contenders import BASE, Contender
from vlac.registry import Progress, silent

Array = np.ndarray[Any, Any]
CASES = ("cold", "camera", "state")
HELD = 0.5
"""Share of the machine's memory that processes may hold together once they are loaded: they grow with their first
answers, and files that are mapped must stay in memory while others have their turns."""
TASK = "pick up the red cube and place it in the box"


class Process:
    """A worker: its first line tells how long loading took, then one line of JSON answers one of JSON."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.start = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                reply: dict[str, Any] = json.loads(line)
                return reply
        code = self._process.wait()
        self._errors.seek(0)
        noise = self._errors.read().decode("utf-8", "replace").strip()
        raise EngineError(f"the process ended with {code}: {noise[-600:] or 'it said nothing'}")

    def resident(self) -> int:
        """Bytes of memory that it holds now; 0 where the system does not tell."""
        status = read_text(f"/proc/{self._process.pid}/status").splitlines()
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:")), 0)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process; every round must be over."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(60)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


@dataclass
class Measured:
    """What is known of a contender; `failed` says why it stopped taking part."""

    contender: Contender
    process: Process | None = None
    cold_load_s: float | None = None
    replies: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {case: [] for case in CASES})
    drift: list[tuple[float, float]] = field(default_factory=list)
    failed: str = ""


def command_of(c: Contender, threads: int) -> list[str]:
    """What starts its process."""
    if c.artifact is None:
        return [*c.command, str(threads)]
    options = json.dumps(dict(c.options))
    return [sys.executable, "-m", "vlac.peers.serve", str(c.artifact), c.engine, options, str(threads)]


@contextmanager
def started(contenders: Sequence[Contender], threads: int, progress: Progress = silent) -> Iterator[list[Measured]]:
    """A process for each; ours are started twice, first after their files were dropped from the page cache.

    The first two are started in any case, others until memory is held (HELD): fewer than were asked for may come back.
    """
    from vlac.bench import drop_page_cache

    found: list[Measured] = []
    shared: dict[tuple[str, ...], Process] = {}
    room = memory().get("total", 0) * HELD
    try:
        for i, c in enumerate(contenders):
            if len(found) > 1 and room and sum(p.resident() for p in shared.values()) > room:
                break
            progress(f"starting {c.name}", i, len(contenders))
            m = Measured(c)
            found.append(m)
            try:
                if c.artifact is not None:
                    drop_page_cache(open_artifact(c.artifact))
                    first = Process(command_of(c, threads))
                    m.cold_load_s = first.start["load_s"]
                    first.close()
                key = tuple(command_of(c, threads)) if c.artifact is None else (c.name,)
                if key not in shared:
                    shared[key] = Process(command_of(c, threads))
                m.process = shared[key]
            except VlacError as error:
                m.failed = error.message
        yield found
    finally:
        for process in shared.values():
            process.close()


def observation(rng: np.random.Generator, io: IO) -> dict[str, Any]:
    """Blocky pictures of 480 x 640 (noise of single pixels would be smoothed away by the resize)."""
    small = {f"image/{c.key}": rng.integers(0, 256, (10, 13, 3), dtype=np.uint8) for c in io.cameras}
    pictures = {k: v.repeat(50, 0).repeat(50, 1)[:480, :640].copy() for k, v in small.items()}
    state = (rng.standard_normal(io.state_dim) * 12).astype(np.float32)
    noise = rng.standard_normal(io.noise_shape).astype(np.float32)
    return {**pictures, "state": state, "noise": noise, "task": TASK}


def changed(base: Mapping[str, Any], new: Mapping[str, Any], case: str) -> dict[str, Any]:
    """`new`, but what the case keeps is the base's: all cameras but the last, or all of them."""
    pictures = [k for k in base if k.startswith("image/")]
    kept = pictures if case == "state" else pictures[:-1]
    return {**new, **{k: base[k] for k in kept}}


def run(found: Sequence[Measured], rounds: int, io: IO, progress: Progress = silent) -> list[float]:
    """Fills what was measured; returns the load average at the start of every round.

    A round that warms up comes first and is not counted. A contender that fails leaves; so it does when the base does.
    """
    rng, loads = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory(prefix="vlac-peers-") as folder:
        for turn in range(-1, rounds):
            loads.append(os.getloadavg()[0])
            given = {"cold": observation(rng, io)}
            for case in CASES[1:] if len(io.cameras) > 1 else ("state",):
                given[case] = changed(list(given.values())[-1], observation(rng, io), case)
            for case, values in given.items():
                np.savez(Path(folder) / f"{case}.npz", **values)
            reference: Array | None = None
            for m in found:
                for case in given if m.contender.artifact is not None else ("cold",):
                    if m.failed or m.process is None:
                        break
                    progress(f"round {turn + 1} of {rounds}: {m.contender.name} ({case})", turn + 1, rounds + 1)
                    reference = _turn(m, case, turn >= 0, Path(folder), reference)
    return loads[1:]


def _turn(m: Measured, case: str, counts: bool, folder: Path, reference: Array | None) -> Array | None:
    """One answer; returns what the others are compared with."""
    npz, out, prepared = (folder / n for n in (f"{case}.npz", "chunk.npy", "prepared.npz"))
    request: dict[str, Any] = {"npz": str(prepared if m.contender.prepared else npz), "out": str(out)}
    if m.contender.mode:
        request["mode"] = m.contender.mode
    if m.contender.name == BASE:
        request["prepared"] = str(prepared)
    assert m.process is not None
    try:
        reply = m.process.ask(request)
        if reply.get("error"):
            raise EngineError(str(reply["error"]))
        chunk: Array = np.load(out)
    except (VlacError, OSError, ValueError) as error:
        if m.contender.name == BASE:
            raise
        m.failed = str(error)
        return reference
    if counts:
        m.replies[case].append(reply)
    if m.contender.name == BASE:
        return chunk
    if case == "cold" and reference is not None:
        m.drift.append(drift(chunk, reference))
    return reference


def drift(chunk: Array, reference: Array) -> tuple[float, float]:
    """(relative L2, largest difference) over the columns that both give."""
    columns = min(chunk.shape[1], reference.shape[1])
    a, b = chunk[:, :columns].astype(np.float64), reference[:, :columns].astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)), float(np.abs(a - b).max())
