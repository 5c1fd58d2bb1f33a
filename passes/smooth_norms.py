"""smooth-norms: outlier channels move from activations into the weights that read them, exactly.

For a norm whose results only linears read, gamma_j and beta_j are divided by r_j and column j of every reader is
multiplied by it: the network's function stays. r_j = A_j^alpha / W_j^(1-alpha), A_j how large channel j of the norm's
result gets and W_j the largest weight that reads it (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438), here rounded to
powers of two so that not one bit of a float32 result changes. A_j is 4|gamma_j| + |beta_j| without data, or the largest
value on observations (samples=N). Norms whose channels are alike (max A / median A below `ratio`) are left: smoothing
costs a little accuracy where there is nothing to smooth. It pays where activations are rounded, int8 above all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlac import calibrate
from vlac.errors import Inapplicable
from vlac.graph import Node, Program
from vlac.ops import NpArray
from vlac.policy import Policy
from vlac.registry import Pass, passes
from vlac.weights import Weights

NORMS = ("layer_norm", "rms_norm")
LARGEST = 2.0**20
"""Of a factor: powers of two within this leave no float32 value out of range."""


@dataclass(frozen=True)
class Smoothable:
    """A norm's parameters (weight, and bias if it has one), the weights that read its results, and where these are."""

    params: tuple[str, ...]
    readers: tuple[str, ...]
    values: tuple[tuple[str, str], ...]


def smoothable(program: Program) -> tuple[Smoothable, ...]:
    """Norms with weights of which every result is read by linears only, and those linears' weights by nothing else."""
    found: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    reads: dict[tuple[str, str], list[Node]] = {}
    uses: dict[str, set[tuple[str, str]]] = {}
    for s in program.stages:
        for n in s.nodes:
            if n.op in NORMS and len(n.inputs) > 1:
                found.setdefault(n.inputs[1:], []).append((s.name, n.name))
            for i in n.inputs:
                reads.setdefault((s.name, i), []).append(n)
                if i.startswith("@"):
                    # a linear's weight is known by what it multiplies; any other use by the node itself
                    key = n.inputs[0] if n.op == "linear" and n.inputs[1] == i else f"{n.name} "
                    uses.setdefault(i, set()).add((s.name, key))
    leaving = {(s.name, o) for s in program.stages for o in s.outputs}
    result = []
    for params, values in found.items():
        readers = [n for v in values for n in reads.get(v, ())]
        weights = tuple(dict.fromkeys(n.inputs[1] for n in readers if n.op == "linear"))
        own = all(n.op == "linear" and n.inputs[0] == v[1] for v in values for n in reads.get(v, ()))
        alone = all(uses[w] <= set(values) for w in weights)
        ours = all(uses[p] == {(stage, f"{name} ") for stage, name in values} for p in params)
        if own and alone and ours and weights and not leaving & set(values):
            names = tuple(tuple(x[1:] for x in group) for group in (params, weights))
            result.append(Smoothable(names[0], names[1], tuple(values)))
    return tuple(result)


def factors(size: NpArray, largest: NpArray, alpha: float) -> NpArray:
    """r = size^alpha / largest^(1-alpha) over its geometric mean, to the nearest power of two; 1 for dead channels."""
    alive = (size > 0) & (largest > 0)
    log = np.zeros(len(size))
    log[alive] = alpha * np.log2(size[alive]) - (1 - alpha) * np.log2(largest[alive])
    log -= log[alive].mean() if alive.any() else 0.0
    r = np.exp2(np.rint(log))
    return np.asarray(np.where(alive, np.clip(r, 1 / LARGEST, LARGEST), 1.0), dtype=np.float32)


def _sizes(policy: Policy, norms: tuple[Smoothable, ...], samples: int, path: str) -> list[NpArray]:
    """A_j for each norm, float64 [D]."""
    if not samples:
        result = []
        for norm in norms:
            gamma, *beta = (np.abs(policy.weights[p].load().astype(np.float64)) for p in norm.params)
            result.append(4 * gamma + sum(beta))
        return result
    sizes = [np.zeros(policy.weights[n.params[0]].shape) for n in norms]
    names: dict[str, set[str]] = {}
    for stage, value in (v for n in norms for v in n.values):
        names.setdefault(stage, set()).add(value)

    def see(_: int, stage: str, values: Mapping[str, NpArray]) -> None:
        for i, norm in enumerate(norms):
            for where, value in norm.values:
                if where == stage:
                    sizes[i] = np.maximum(sizes[i], np.abs(values[value]).max(axis=0))

    calibrate.watch(policy, calibrate.observations(policy, samples, path), names, see)
    return sizes


def _requires(policy: Policy, alpha: float, ratio: float, samples: int, observations: str) -> None:
    if not 0 <= alpha <= 1:
        raise Inapplicable(f"alpha={alpha}: 0 (all in the weights' favour) to 1 (all in the activations')")
    if not ratio >= 1:
        raise Inapplicable(f"ratio={ratio}: 1 (smooth every norm) or more")
    if samples < 0:
        raise Inapplicable(f"samples={samples}: 0 (no data) or more")
    if not smoothable(calibrate.draw(policy)):
        raise Inapplicable(f"{policy.family} has no norm with weights that only linears read", remedy="leave it out")


def _apply(
    policy: Policy, alpha: float, ratio: float, samples: int, observations: str
) -> tuple[Policy, Mapping[str, Any]]:
    norms = smoothable(calibrate.draw(policy))
    weights, smoothed, worst, left = policy.weights, 0, 1.0, 1.0
    for norm, size in zip(norms, _sizes(policy, norms, samples, observations), strict=True):
        spread = float(size.max() / max(float(np.median(size)), 1e-30))
        worst = max(worst, spread)
        if spread < ratio:
            left = max(left, spread)
            continue
        largest = np.max([np.abs(policy.weights[w].load()).max(axis=0) for w in norm.readers], axis=0)
        r = factors(size, largest.astype(np.float64), alpha)
        after = size / r
        left = max(left, float(after.max() / max(float(np.median(after)), 1e-30)))
        weights = moved(weights, norm, r)
        smoothed += 1
    figures = {
        "norms": len(norms),
        "smoothed": smoothed,
        "largest_to_median_before": round(worst, 2),
        "largest_to_median_after": round(left, 2),
    }
    return policy.replace(weights=weights), figures


def moved(weights: Weights, norm: Smoothable, r: NpArray) -> Weights:
    """The norm's parameters divided by r, its readers' columns multiplied by it."""
    for p in norm.params:
        weights = weights.map(p, lambda v: (v / r).astype(np.float32))
    for w in norm.readers:
        weights = weights.map(w, lambda v: (v * r).astype(np.float32))
    return weights


SMOOTH_NORMS = passes.add(
    Pass(
        name="smooth-norms",
        apply=_apply,
        params={
            "alpha": (float, 0.5, "0..1: how much of a channel's size moves into the weights"),
            "ratio": (float, 4.0, "norms whose largest channel is below this many medians are left"),
            "samples": (int, 0, "observations to measure channels on; 0: from the norm's own weights"),
            "observations": (str, "", "an .npz file of them; seeded ones without it"),
        },
        requires=_requires,
        doc="Outlier channels of norms move into the weights, exactly.",
    )
)
