"""Scales, biases and norms of a rounded policy tuned end to end against the unchanged one: no labels, only its answers.

Distillation as post-training methods do it block by block (OmniQuant, Shao et al. 2023, arXiv 2308.13137; norms alone:
Norm Tweaking, Li et al. 2023, arXiv 2309.02784), here through the whole policy, all turns of its sampler at once. Each
step draws observations, each with a task of some observation (a network may be asked anything about a picture) and
noise of its own. Some observations are held out: what is kept is the best there of the start and what followed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from vlac import calibrate, machine
from vlac.artifact import Golden
from vlac.errors import Inapplicable
from vlac.formats import int4_codes, int8_codes
from vlac.graph import Program, Repeat
from vlac.ops import NpArray
from vlac.passes._stored import Product
from vlac.passes.smooth_norms import NORMS
from vlac.policy import Policy
from vlac.registry import telling
from vlac.rewrites.corrections import bias_name
from vlac.rounding import grouped
from vlac.runtime.inputs import prepared, samples
from vlac.weights import LazyTensor

if TYPE_CHECKING:
    from vlac.engines.torch_tuning import Batch, Coded, Tuner

BATCH = 8
"""Observations of a step."""
FEWEST = 8
"""Observations, of which every eighth is held out."""
NOISES = 4
"""Samples of noise for each observation that is held out, its own among them."""
LOOKS = 5
"""Times that the held-out ones are asked, and once before."""
COPIES = 6
"""Of a policy's float32 numbers that tuning holds at least: two networks, gradients, what is learnt and its means."""
LARGEST = 100_000_000
"""Numbers of a policy that a processor gets through in an hour or so."""


def refuse(policy: Policy, count: int | None) -> None:
    """Inapplicable where tuning makes no sense, with the numbers; count: of observations, None when not yet read."""
    size = calibrate.size(policy)
    free = machine.memory().get("available", 0)
    needs = 4 * COPIES * size
    if size > LARGEST or (free and needs > free):
        raise Inapplicable(
            f"tune= holds {COPIES} float32 copies of {size:,} numbers ({needs / 1e9:.1f} GB, activations aside); free "
            f"are {free / 1e9:.1f} GB, and policies above {LARGEST:,} would take hours",
            remedy="method=gptq without tune=",
        )
    program = calibrate.draw(policy)
    loops = [i for i, s in enumerate(program.schedule.steps) if isinstance(s, Repeat)]
    for i in loops:
        step = program.schedule.steps[i]
        assert isinstance(step, Repeat)
        if step.until or step.collect or i != len(program.schedule.steps) - 1:
            raise Inapplicable(
                f"tune= needs answers that change smoothly; {policy.family} chooses tokens, one after another",
                remedy="method=gptq without tune=",
            )
    if count is not None and count < FEWEST:
        raise Inapplicable(f"tune= holds some observations out and needs at least {FEWEST}; there are {count}")


def tuned(
    before: Policy,
    after: Policy,
    given: Sequence[Golden],
    grids: Mapping[str, tuple[int, int]],
    joined: Mapping[str, Product],
    match: str,
    steps: int,
) -> tuple[Policy, dict[str, Any]]:
    """`after` with scales, biases and norms moved, and figures. grids: weight -> (bits, group); joined: see _stored."""
    from vlac.engines.torch_tuning import Tuner

    refuse(before, len(given))
    program = calibrate.draw(after)
    coded = {n: _coded(after.weights[n].load(), *grid, joined.get(n)) for n, grid in grids.items()}
    free = _free(program, after, match, grids)
    tuner = Tuner(calibrate.draw(before), program, coded, free, before.io.action_dim, steps)
    rng = np.random.default_rng(calibrate.SEED)
    shuffled = [given[i] for i in rng.permutation(len(given))]
    out = max(2, len(given) // 8)
    look = _HeldOut(tuner, _batches(before, program, _noisy(before, program, shuffled[:out], rng)))
    start = best = look.drift()
    found, at = tuner.found(), 0
    show = telling()
    for k in range(steps):
        show("tuning scales, biases and norms", k, steps)
        tuner.step(_batches(before, program, _drawn(before, program, shuffled[out:], rng)))
        if (k + 1) * LOOKS // steps > k * LOOKS // steps and (drift := look.drift()) < best:
            best, found, at = drift, tuner.found(), k + 1
    figures = {
        "tuned_steps": at,
        "held_out_observations": out,
        "held_out_drift_before": round(start, 5),
        "held_out_drift": round(best, 5),
    }
    return (_with(after, coded, *found, joined) if at else after), figures


class _HeldOut:
    """Observations that are not learnt from, with the unchanged policy's chunks."""

    def __init__(self, tuner: Tuner, batches: Sequence[Batch]) -> None:
        self.tuner, self.batches = tuner, batches
        self.wanted = [tuner.chunks(b, wanted=True) for b in batches]

    def drift(self) -> float:
        return calibrate.drift([self.tuner.chunks(b, wanted=False) for b in self.batches], self.wanted)


# --- what is learnt from -----------------------------------------------------------------------------------------


def _noise(policy: Policy, rng: np.random.Generator) -> NpArray:
    return rng.standard_normal(policy.io.noise_shape).astype(np.float32)


def _noisy(policy: Policy, program: Program, pool: Sequence[Golden], rng: np.random.Generator) -> list[Golden]:
    """Each observation with its own noise and with NOISES - 1 other samples of it."""
    times = NOISES - 1 if samples(program) else 0
    return [*pool, *(dataclasses.replace(o, noise=_noise(policy, rng)) for o in pool for _ in range(times))]


def _drawn(policy: Policy, program: Program, pool: Sequence[Golden], rng: np.random.Generator) -> list[Golden]:
    """BATCH observations with tasks and noise drawn anew."""
    result = []
    for _ in range(BATCH):
        obs, other = (pool[int(rng.integers(len(pool)))] for _ in range(2))
        obs = dataclasses.replace(obs, task=other.task)
        result.append(dataclasses.replace(obs, noise=_noise(policy, rng)) if samples(program) else obs)
    return result


def _batches(policy: Policy, program: Program, drawn: Sequence[Golden]) -> list[Batch]:
    """The observations side by side, of one bucket and one set of cameras each."""
    from vlac.engines.torch_tuning import Batch

    groups: dict[Any, list[Any]] = {}
    for obs in drawn:
        ready = prepared(policy.io, policy.tokenizer, program, obs)
        slots = tuple(int(i) for i in np.flatnonzero(ready.env["image_valid"]))
        groups.setdefault((slots, tuple(sorted(ready.symbols.items()))), []).append(ready.env)
    return [
        Batch({n: np.stack([e[n] for e in envs]) for n in envs[0]}, dict(symbols), slots)
        for (slots, symbols), envs in groups.items()
    ]


# --- what is moved -----------------------------------------------------------------------------------------------


def _coded(weight: NpArray, bits: int, group: int, product: Product | None) -> Coded:
    """A weight that is on its grid as codes and scales."""
    from vlac.engines.torch_tuning import Coded

    stored = product.left @ weight.astype(np.float64) if product else weight
    blocks = grouped(stored, group).astype(np.float32)
    found = (int4_codes if bits == 4 else int8_codes)(blocks.reshape(-1, blocks.shape[2]))
    if found is None:
        raise Inapplicable(f"tune=: a weight {list(weight.shape)} is on no grid of {bits} bits", remedy="method=gptq")
    scales, codes = found
    inverse = np.linalg.inv(product.left) if product else None
    return Coded(codes.reshape(blocks.shape), scales.reshape(*blocks.shape[:2], 1), weight.shape[1], inverse)


def _free(program: Program, policy: Policy, match: str, coded: Collection[str]) -> list[str]:
    """Biases of the linears that are rounded, and parameters of norms that match."""
    found: dict[str, None] = {}
    for s in program.stages:
        for n in s.nodes:
            if n.op == "linear" and len(n.inputs) == 3 and n.inputs[1][1:] in coded:
                found[n.inputs[2][1:]] = None
            elif n.op in NORMS:
                found |= dict.fromkeys(i[1:] for i in n.inputs[1:] if fnmatchcase(i[1:], match))
    own = {*policy.weights, *(bias_name(n) for n in policy.biases)}
    return [n for n in found if n in own]


def _with(
    policy: Policy,
    coded: Mapping[str, Coded],
    scales: Mapping[str, NpArray],
    free: Mapping[str, NpArray],
    joined: Mapping[str, Product],
) -> Policy:
    """The policy with what was found."""
    own = {bias_name(n): n for n in policy.biases}
    weights = {n: LazyTensor.of(v, f"{n}, tuned") for n, v in free.items() if n not in own}
    for n, c in coded.items():
        value = (c.codes * scales[n]).reshape(len(c.codes), -1)[:, : c.inputs]
        weights[n] = LazyTensor.of(joined[n].inner(value) if n in joined else value, f"{n}, tuned")
    biases = {own[n]: LazyTensor.of(v, n) for n, v in free.items() if n in own}
    return policy.replace(weights=policy.weights.with_(**weights), biases={**policy.biases, **biases})
