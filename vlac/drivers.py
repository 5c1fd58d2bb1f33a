"""What can drive a robot in closed loop: an artifact on an engine, or an untouched checkpoint in fp32.

A driver answers `act(observation) -> [N, A]` and draws the sampler's noise from the observation's "moment" (seed of the
episode, step), so that two drivers meet the same noise at the same moment.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlac.errors import InputError, VlacWarning
from vlac.facts import is_artifact
from vlac.runtime.actions import apply_action_steps
from vlac.runtime.inputs import samples
from vlac.runtime.rtc import closed_loop
from vlac.runtime.session import Session, execute, load, prepare
from vlac.runtime.tokenizer import load_tokenizer

NpArray = np.ndarray[Any, Any]
Observation = dict[str, Any]
_SALT = 0x636C6F73


class Policy(Protocol):
    """Anything that answers an observation {"images", "state", "task", "moment"} with a chunk, float [N, A]."""

    def act(self, observation: Observation) -> NpArray: ...


def noise_at(moment: tuple[int, int], shape: tuple[int, ...]) -> NpArray:
    """Standard normal float32 of the given shape, the same for everyone at (seed of the episode, step)."""
    rng = np.random.Generator(np.random.PCG64([_SALT, *moment]))
    return np.asarray(rng.standard_normal(shape), dtype=np.float32)


class ArtifactDriver:
    """An artifact on an engine, its way from camera to action as on a robot."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.io = session.io
        self._samples = samples(session.artifact.program)
        self.facts = {"target": session.hparams.target, "engine": session.hparams.engine, "name": session.hparams.name}

    def act(self, observation: Observation) -> NpArray:
        """float32 [chunk_size, action_dim] in the robot's units.

        With "replayed" = (rows of the last chunk that have been executed, how many more will be until this one is
        there) the chunk goes on from the last one, as `closed_loop` says; "rtc" is what else `Session.act` is told.
        Where "images" is None, "source" says whose frames `Session.observe` was given.
        """
        noise = noise_at(observation["moment"], self.io.noise_shape) if self._samples else None
        images = observation["images"]
        if images is None and "source" in observation:
            frames = {"images": None, "source": observation["source"]}
        else:
            frames = {"images": images, "task": observation["task"] if self.io.text_steps else None}
        rtc: dict[str, Any] = dict(observation.get("rtc", {}))
        if "replayed" in observation and self.session.normalised is not None:
            done, delay = observation["replayed"]
            usual = closed_loop(delay, rtc.get("displacements", ()))
            rtc = {**usual, **rtc, "prev_chunk": self.session.normalised[done:]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VlacWarning)  # a prompt that is cut is said when compiling
            return self.session.act(state=observation["state"], noise=noise, **frames, **rtc)

    def close(self) -> None:
        """Frees the engine's memory."""
        self.session.close()


class CheckpointDriver:
    """An untouched checkpoint: its family's program as drawn, in fp32, before any pass or rewrite."""

    def __init__(self, checkpoint: str, threads: int) -> None:
        from vlac.api import draw
        from vlac.checkpoint import read_policy
        from vlac.goldens import reference_session

        self._policy = read_policy(checkpoint)
        self.io = self._policy.io
        self._program = draw(self._policy)
        self._engine = reference_session(self._program, threads)
        self._samples = samples(self._program)
        stored = self._policy.tokenizer
        self._tokenizer = load_tokenizer(stored, f"{checkpoint}: tokenizer") if stored else None
        self.facts = {"target": "checkpoint, fp32", "engine": self._engine.engine, "name": self._policy.name}

    def act(self, observation: Observation) -> NpArray:
        """float32 [chunk_size, action_dim] in the robot's units."""
        ready = prepare(
            self.io,
            self._tokenizer,
            self._program,
            images=observation["images"],
            state=observation["state"],
            task=observation["task"] if self.io.text_steps else None,
            noise=noise_at(observation["moment"], self.io.noise_shape) if self._samples else None,
        )
        x = execute(self._program, self._engine, ready.env, ready.symbols)
        return apply_action_steps(self.io.action_steps, x, ready.state)

    def close(self) -> None:
        """Frees the engine's memory."""
        self._engine.close()


Driver = ArtifactDriver | CheckpointDriver


def open_driver(path: str | Path, engine: str | None = None, threads: int | None = None) -> Driver:
    """The driver of an artifact, a checkpoint folder, a hub id or a bundled checkpoint's name.

    Raises InputError for a policy that knows normalised units only: a simulator takes the robot's.
    """
    if is_artifact(path):
        driver: Driver = ArtifactDriver(load(path, engine=engine, threads=threads))
    else:
        if engine is not None:
            raise InputError(f"--engine belongs to artifacts; {path} is a checkpoint and runs on the reference engine")
        driver = CheckpointDriver(str(path), threads or 1)
    if driver.io.units != "robot":
        driver.close()
        raise InputError(
            f"{path} was compiled without statistics: its actions are not in the robot's units",
            remedy="compile with --stats-key or --stats-from",
        )
    return driver
