"""Golden observations: what the untouched checkpoint answers in fp32, kept in every artifact as its proof.

Made at compile time from given observations, or from seeded ones (block pictures, states drawn from the statistics)
when there are none. The reference is the family's program as drawn, before passes and rewrites.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlac.artifact import TOKENS, Golden
from vlac.engines.base import EngineSession
from vlac.graph import Program, Repeat, Schedule, check
from vlac.io import IO
from vlac.policy import Policy
from vlac.registry import Progress, families
from vlac.runtime.actions import apply_action_steps
from vlac.runtime.inputs import Prepared, prepared, samples
from vlac.runtime.schedule import generated
from vlac.runtime.session import execute

NpArray = np.ndarray[Any, Any]

TASKS = ("pick up the red cube", "put the block into the box on the left")
MAX_TAP_BYTES = 1 << 20
"""Larger stage outputs are not stored as taps; a full run against --reference compares them all."""


MAX_REFERENCE_BYTES = 3 << 30
"""A model whose float32 weights take more is read anew for every use, so that compiling fits a small machine."""

REFERENCE_THREADS = 2
"""Threads of the reference, whatever the machine has and OMP_NUM_THREADS says: their number decides how sums are split,
and compiling twice must give the same bytes."""


def fits(program: Program) -> bool:
    """Whether the reference keeps all weights in memory."""
    return sum(4 * math.prod(p.shape) for p in program.params.values()) <= MAX_REFERENCE_BYTES


def reference_session(program: Program, threads: int = REFERENCE_THREADS) -> EngineSession:
    """The fp32 engine on a program with weights: torch where installed, else numpy (slow, same meaning)."""

    def weight(name: str) -> NpArray:
        return program.weights[name].load()

    if importlib.util.find_spec("torch") is not None:
        from vlac.engines.torch_engine import TorchSession

        return TorchSession(program, weight, threads=threads, keep_weights=fits(program))
    from vlac.engines.numpy_engine import NumpySession

    return NumpySession(program, weight)


def block_picture(rng: np.random.Generator, height: int, width: int) -> NpArray:
    """A uint8 [H, W, 3] picture of random coloured blocks with a gradient: structured, and small when compressed."""
    cell = max(4, min(height, width) // 12)
    small = rng.integers(0, 192, (height // cell + 1, width // cell + 1, 3))
    big = small.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    ramp = (np.arange(height) * 63 // max(1, height - 1))[:, None, None]
    return np.asarray(big + ramp, dtype=np.uint8)


def sample_state(io: IO, rng: np.random.Generator) -> NpArray:
    """A raw state [state_dim] that is typical under the policy's own statistics."""
    z = rng.standard_normal(io.state_dim) * 0.7
    for step in io.state_steps:
        p: Mapping[str, Any] = step.params
        if step.step != "normalise":
            continue
        if "mean" in p:
            z = np.asarray(p["mean"]) + z * np.asarray(p["std"])
        else:
            low, high = next(
                (np.asarray(p[a]), np.asarray(p[b]))
                for a, b in (("min", "max"), ("q01", "q99"), ("q10", "q90"))
                if a in p
            )
            z = low + (np.tanh(z) + 1) / 2 * (high - low)
    return np.asarray(z, dtype=np.float32)


def synthetic(io: IO, count: int, seed: int = 0) -> tuple[Golden, ...]:
    """Seeded observations (no chunks yet) that fit `io`; the same on every platform."""
    result = []
    for i in range(count):
        rng = np.random.Generator(np.random.PCG64([seed, i]))
        images = {
            c.key: block_picture(rng, *(min(max(int(d), 8), 1080) for d in c.shape[1:]))
            for c in io.cameras
            if not c.optional
        }
        if not images:
            c = io.cameras[0]
            images = {c.key: block_picture(rng, 480, 640)}
        noise = rng.standard_normal(io.noise_shape).astype(np.float32)
        empty = np.zeros((0, 0), np.float32)
        result.append(Golden(images, sample_state(io, rng), TASKS[i % len(TASKS)], noise, empty, empty))
    return tuple(result)


def answer(
    policy: Policy, observations: Sequence[Golden], progress: Progress
) -> tuple[tuple[Golden, ...], dict[str, float]]:
    """Observations with the fp32 reference's chunks and taps, and the sampler-noise floor.

    The floor says how far two noise seeds of the reference lie apart on one observation: cosine and relative L2 of the
    chunk in the artifact's units. A drift far below it is lost in the policy's own randomness.
    """
    program = check(families.get(policy.family).build(policy))
    session = reference_session(program)
    result: list[Golden] = []
    floor: dict[str, float] = {}
    what = "fp32 reference on golden observations"
    try:
        for obs in observations:
            progress(what, len(result), len(observations))
            ready = prepared(policy.io, policy.tokenizer, program, obs)
            taps: dict[str, NpArray] = {}
            x = execute(program, session, ready.env, ready.symbols, taps=taps)
            chunk = apply_action_steps(policy.io.action_steps, x, ready.state)
            if not floor and samples(program):
                floor = _noise_floor(policy, program, session, ready, taps, chunk)
            chunk_n = apply_action_steps(policy.io.normalised_action_steps, x, ready.state)
            kept, ids = _kept(taps), generated(program, taps)
            if ids is not None:
                kept[TOKENS] = ids
            result.append(dataclasses.replace(obs, chunk=chunk, chunk_normalised=chunk_n, taps=kept))
        progress(what, len(observations), len(observations))
    finally:
        session.close()
    return tuple(result), floor


def _kept(taps: Mapping[str, NpArray]) -> dict[str, NpArray]:
    """Taps worth storing: float, not too large, and of the prefix the first and last layer: enough to tell where a
    drift begins."""
    kept = {k: np.asarray(v) for k, v in taps.items() if v.nbytes <= MAX_TAP_BYTES and v.dtype == np.float32}
    prefix = [k for k in kept if k != "image_tokens" and not k.startswith("x_after_step")]
    for name in prefix[2:-2]:
        del kept[name]
    return kept


def _noise_floor(
    policy: Policy,
    program: Program,
    session: EngineSession,
    ready: Prepared,
    taps: Mapping[str, NpArray],
    chunk: NpArray,
) -> dict[str, float]:
    """Only the steps that noise reaches run again, on the values that the first run left."""
    steps = program.schedule.steps
    sampler = next((i for i, s in enumerate(steps) if isinstance(s, Repeat)), 0)
    tail = program.replace(schedule=Schedule(steps[sampler:], program.schedule.result))
    rng = np.random.Generator(np.random.PCG64([7, 7]))
    noise = np.asarray(rng.standard_normal(ready.env["noise"].shape), dtype=np.float32)
    x = execute(tail, session, {**ready.env, **taps, "noise": noise}, ready.symbols)
    a = apply_action_steps(policy.io.action_steps, x, ready.state).astype(np.float64).ravel()
    b = chunk.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return {
        "cosine": float(a @ b / norms) if norms else 1.0,
        "relative_l2": float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30)),
    }
