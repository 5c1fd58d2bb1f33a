"""Rounding one linear's weight with what it reads (vlac.propagate.Seen), by any method, in any basis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlac.ops import NpArray
from vlac.propagate import Seen
from vlac.rewrites.rotate import factors_of, rotated
from vlac.rounding import (
    absmax_scales,
    damped,
    gptq,
    hqq,
    revise,
    round_affine,
    round_to_scales,
    search_scales,
    signed_scales,
)

METHODS = ("rtn", "clip", "hqq", "awq", "gptq")


@dataclass(frozen=True)
class How:
    """What is done to every weight.

    bits, group (0: a row): the grid. rotate: a wish of vlac.rewrites.rotate, 0 for none. weighted: scales are searched
    with errors weighted by the inputs' mean squares. correct: 0..1, how much of what the inputs have drifted by is made
    up for before rounding (least squares).
    """

    method: str = "gptq"
    bits: int = 4
    group: int = 32
    rotate: int = 0
    weighted: bool = True
    correct: float = 0.5


def damping(rows: int, inputs: int) -> float:
    """More for fewer rows. More, too, than one layer alone would want (0.01 with many rows): rows of one observation
    are alike, and directions that are small in a layer's input may matter later. Chosen on push-cubes."""
    return 0.05 if rows >= 8 * inputs else 0.2 if rows >= 2 * inputs else 0.3


def round_layer(weight: NpArray, seen: Seen, how: How) -> tuple[NpArray, NpArray]:
    """The weight [n, k] on the grid that will be stored, and the weight that was rounded (the given one, or one that
    makes up for drifted inputs); both in the plain basis, float32.

    Runs of columns of which `seen` knows nothing together are rounded one by one.
    """
    k = weight.shape[1]
    w = weight.astype(np.float64)
    if how.method == "hqq":
        return round_affine(w, *hqq(w, how.group, how.bits), how.group, how.bits), weight
    sizes = factors_of(k, how.rotate)
    runs = len(seen.gram)
    if runs > 1 and sizes[0] > 1:
        sizes = (1, sizes[1])  # a rotation across runs would mix what was measured apart
    grams = seen.gram
    share = damping(seen.rows, k // runs)
    if how.correct and how.method != "rtn":
        w = _made_up(w, seen, how.correct, share)
    wanted = w.astype(np.float32)
    if sizes != (1, 1):
        w = rotated(w, sizes)
        grams = np.stack([rotated(rotated(g, sizes).T, sizes) for g in grams])
    width = k // runs
    parts = [_run(w[:, i * width : (i + 1) * width], g, seen.rows, share, how) for i, g in enumerate(grams)]
    found = np.concatenate(parts, axis=1)
    if sizes != (1, 1):
        found = rotated(found, sizes, back=True)
    return found.astype(np.float32), wanted


def _made_up(w: NpArray, seen: Seen, part: float, share: float) -> NpArray:
    """W + a W (X - Y)^T Y (Y^T Y + damping)^-1: of all weights that read the drifted inputs Y, the one nearest to what
    the layer made of X, part of the way there (what GPTAQ, Li et al. 2025, arXiv 2504.02692, does column by column)."""
    n, c = len(w), len(seen.gram)
    columns = w.reshape(n, c, -1)
    moved = [
        np.linalg.solve(damped(g, share), (columns[:, i] @ s).T).T if s.any() else np.zeros_like(columns[:, i])
        for i, (g, s) in enumerate(zip(seen.gram, seen.shift, strict=True))
    ]
    return np.asarray(w + part * np.stack(moved, axis=1).reshape(w.shape))


def _run(w: NpArray, gram: NpArray, rows: int, share: float, how: How) -> NpArray:
    bits, group = how.bits, how.group
    if how.method == "rtn":
        scales = signed_scales(w, group) if bits == 4 else absmax_scales(w, group, bits)
        return round_to_scales(w, scales, group, bits)
    importance = np.diag(gram) / max(rows, 1) if how.weighted else None
    # with as many codes below zero as above, a scale's sign changes nothing
    scales = search_scales(w, group, importance, (1.0,) if bits == 8 else (1.0, -1.0), bits)
    if how.method != "gptq":
        return round_to_scales(w, scales, group, bits)
    found = gptq(w, gram, scales, group, share, bits)
    return revise(w, found, damped(gram, share), scales, group, bits)
