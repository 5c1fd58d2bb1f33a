"""Rounding weights to 4 bits with care: scales searched, errors fed back. Plain functions on arrays.

Codes are -8..7 with one float16 scale per group of inputs: what Q4_0 blocks and ONNX int4 blocks of 32 hold, so that a
weight that has been rounded here is stored without being rounded again (vlac.formats, vlac.layouts).
Scores of every recipe on a synthetic layer: tests/test_pass_quantize_weights.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlac.ops import NpArray

FACTORS = np.linspace(0.5, 1.05, 24)
LOW, HIGH = -8, 7
LAZY = 128
"""Columns after which GPTQ applies what it has collected to the rest."""


# --- scales ----------------------------------------------------------------------------------------------------


def search_scales(
    weight: NpArray, group: int, importance: NpArray | None = None, signs: Sequence[float] = (1.0, -1.0)
) -> NpArray:
    """Scale of every group of `group` inputs: [n, k] -> [n, ceil(k/group)], float64 values that float16 holds.

    Minimises sum_i h_i (w_i - q_i s)^2 over s = +-max|w|/7 * (0.5 .. 1.05), 24 factors, then twice refits
    s = sum(h w q) / sum(h q^2). `importance` h [k]: mean squares of the inputs; None: all 1. `signs`: (1,) where a
    container takes positive scales only.
    """
    n, k = weight.shape
    pad = -k % group
    w = np.pad(weight.astype(np.float64), ((0, 0), (0, pad))).reshape(-1, group)
    h = np.ones(k) if importance is None else np.maximum(importance, 1e-12 * max(float(importance.max()), 1e-30))
    h = np.tile(np.pad(h, (0, pad)).reshape(-1, group), (n, 1))
    result = np.empty(len(w))
    step = max(1, (1 << 18) // group)
    for i in range(0, len(w), step):
        result[i : i + step] = _best_scale(w[i : i + step], h[i : i + step], signs)
    return result.reshape(n, -1)


def _best_scale(w: NpArray, h: NpArray, signs: Sequence[float]) -> NpArray:
    peak = np.maximum(np.abs(w).max(axis=1), 1e-7)
    best, chosen = np.full(len(w), np.inf), np.ones(len(w))

    def consider(s: NpArray) -> None:
        s = _float16(s)
        error = (h * (w - _codes(w, s) * s[:, None]) ** 2).sum(axis=1)
        better = error < best
        best[better], chosen[better] = error[better], s[better]

    for sign in signs:
        for factor in FACTORS:
            consider(sign * peak / 7 * factor)
    for _ in range(2):
        q = _codes(w, chosen)
        square = (h * q * q).sum(axis=1)
        consider(np.where(square > 0, (h * w * q).sum(axis=1) / np.maximum(square, 1e-300), chosen))
    return chosen


def _float16(s: NpArray) -> NpArray:
    """Rounded to float16, never to zero."""
    half = np.clip(s, -65504, 65504).astype(np.float16).astype(np.float64)
    return np.asarray(np.where(half == 0, np.copysign(6e-8, s), half).astype(np.float16).astype(np.float64))


def _codes(w: NpArray, s: NpArray) -> NpArray:
    return np.asarray(np.clip(np.rint(w / s[:, None]), LOW, HIGH))


def round_to_scales(weight: NpArray, scales: NpArray, group: int) -> NpArray:
    """Every value to the nearest code of its group, as float32 values code * scale."""
    spread = np.repeat(scales, group, axis=1)[:, : weight.shape[1]]
    return np.asarray(np.clip(np.rint(weight / spread), LOW, HIGH) * spread, dtype=np.float32)


# --- error feedback --------------------------------------------------------------------------------------------


def gptq(weight: NpArray, gram: NpArray, scales: NpArray, group: int, damping: float = 0.05) -> NpArray:
    """GPTQ (Frantar et al. 2022, arXiv 2210.17323) on fixed scales: float32 [n, k], every value code * scale.

    gram [k, k] = x^T x of the layer's inputs. Columns are taken by falling importance; the rounding error of each is
    made up for by those not yet rounded. Inputs that were always 0 give weights 0.
    """
    n, k = weight.shape
    h = gram.astype(np.float64)
    dead = np.diag(h) <= 0
    h[dead, dead] = 1.0
    h[np.diag_indices(k)] += damping * np.diag(h).mean()
    order = np.argsort(-np.diag(h), kind="stable")
    inverse = np.linalg.inv(h[np.ix_(order, order)])
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
    w = np.where(dead, 0.0, weight.astype(np.float64))[:, order]
    spread = np.repeat(scales, group, axis=1)[:, :k][:, order]
    result = np.empty((n, k))
    for start in range(0, k, LAZY):
        stop = min(k, start + LAZY)
        errors = np.empty((n, stop - start))
        for j in range(start, stop):
            s = spread[:, j]
            result[:, j] = np.clip(np.rint(w[:, j] / s), LOW, HIGH) * s
            errors[:, j - start] = e = (w[:, j] - result[:, j]) / upper[j, j]
            w[:, j:stop] -= np.outer(e, upper[j, j:stop])
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    back = np.empty((n, k), dtype=np.float32)
    back[:, order] = result
    return back
