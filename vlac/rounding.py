"""Rounding weights to 4 or 8 bits with care: scales searched, errors fed back, codes revised. Functions on arrays.

Codes are -8 .. 7 or -127 .. 127 with one float16 scale per group of inputs: what Q4_0 and Q8_0 blocks and ONNX blocks
hold, so that a weight rounded here is stored without being rounded again (vlac.formats, vlac.layouts). Functions with
zero points (`affine_scales`, `hqq`) make what Q4_1 blocks hold: value = (code - zero) * scale with codes 0 .. 2^b-1.
Groups are runs of `group` inputs of a row, 0: the whole row. Scores of every recipe: tests/test_rounding.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import numpy as np

from vlac.ops import NpArray

FACTORS = np.linspace(0.5, 1.05, 24)
LAZY = 128
"""Columns after which GPTQ applies what it has collected to the rest."""
PIECE = 1 << 18
"""Values of groups that are searched at a time."""


def limits(bits: int) -> tuple[int, int]:
    """Lowest and highest code; 8 bits leave -128 out, as every container does."""
    high = 2 ** (bits - 1) - 1
    return (-high if bits == 8 else -high - 1), high


def grouped(weight: NpArray, group: int) -> NpArray:
    """[n, k] -> [n, ceil(k/group), group], float64, zeros at the end of a row that does not fill its last group."""
    n, k = weight.shape
    size = group or k
    return np.pad(weight.astype(np.float64), ((0, 0), (0, -k % size))).reshape(n, -1, size)


def spread(scales: NpArray, group: int, inputs: int) -> NpArray:
    """A value per group [n, g] as one per input [n, k]."""
    return np.repeat(scales, group or inputs, axis=1)[:, :inputs]


def _float16(s: NpArray) -> NpArray:
    """Rounded to float16, never to zero."""
    half = np.clip(s, -65504, 65504).astype(np.float16).astype(np.float64)
    return np.asarray(np.where(half == 0, np.copysign(6e-8, s), half).astype(np.float16).astype(np.float64))


# --- scales ------------------------------------------------------------------------------------------------------


def absmax_scales(weight: NpArray, group: int, bits: int = 4) -> NpArray:
    """The largest magnitude of a group becomes the highest code: [n, k] -> [n, g]."""
    return _float16(np.abs(grouped(weight, group)).max(axis=2) / limits(bits)[1])


def signed_scales(weight: NpArray, group: int, bits: int = 4) -> NpArray:
    """The value of largest magnitude becomes the lowest code, whatever its sign (Q4_0): all codes are used."""
    blocks = grouped(weight, group)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    return _float16(peak / limits(bits)[0])


def search_scales(
    weight: NpArray,
    group: int,
    importance: NpArray | None = None,
    signs: Sequence[float] = (1.0, -1.0),
    bits: int = 4,
) -> NpArray:
    """Scale of every group of `group` inputs: [n, k] -> [n, ceil(k/group)], float64 values that float16 holds.

    Minimises sum_i h_i (w_i - q_i s)^2 over s = +-max|w|/highest code * (0.5 .. 1.05), 24 factors, then twice refits
    s = sum(h w q) / sum(h q^2). `importance` h [k]: mean squares of the inputs; None: all 1. `signs`: (1,) where a
    container takes positive scales only.
    """
    n, k = weight.shape
    size = group or k
    w = grouped(weight, group).reshape(-1, size)
    h = np.ones(k) if importance is None else np.maximum(importance, 1e-12 * max(float(importance.max()), 1e-30))
    h = np.pad(h, (0, -k % size)).reshape(-1, size)
    result = np.empty(len(w))
    step = len(h) * max(1, PIECE // (size * len(h)))  # whole rows
    for i in range(0, len(w), step):
        part = w[i : i + step]
        result[i : i + step] = _best_scale(part, np.tile(h, (len(part) // len(h), 1)), signs, bits)
    return result.reshape(n, -1)


def _best_scale(w: NpArray, h: NpArray, signs: Sequence[float], bits: int) -> NpArray:
    peak = np.maximum(np.abs(w).max(axis=1), 1e-7)
    best, chosen = np.full(len(w), np.inf), np.ones(len(w))

    def consider(s: NpArray) -> None:
        s = _float16(s)
        error = (h * (w - _codes(w, s[:, None], bits) * s[:, None]) ** 2).sum(axis=1)
        better = error < best
        best[better], chosen[better] = error[better], s[better]

    for sign in signs:
        for factor in FACTORS:
            consider(sign * peak / limits(bits)[1] * factor)
    for _ in range(2):
        q = _codes(w, chosen[:, None], bits)
        square = (h * q * q).sum(axis=1)
        consider(np.where(square > 0, (h * w * q).sum(axis=1) / np.maximum(square, 1e-300), chosen))
    return chosen


def _codes(w: NpArray, s: NpArray, bits: int) -> NpArray:
    return np.asarray(np.clip(np.rint(w / s), *limits(bits)))


def round_to_scales(weight: NpArray, scales: NpArray, group: int, bits: int = 4) -> NpArray:
    """Every value to the nearest code of its group, as float32 values code * scale."""
    s = spread(scales, group, weight.shape[1])
    return np.asarray(_codes(weight, s, bits) * s, dtype=np.float32)


# --- zero points -------------------------------------------------------------------------------------------------


def affine_scales(weight: NpArray, group: int, bits: int = 4) -> tuple[NpArray, NpArray]:
    """Scales and whole zero points [n, g] that span each group from its smallest to its largest value."""
    blocks = grouped(weight, group)
    low, high = blocks.min(axis=2), blocks.max(axis=2)
    scales = _float16(np.maximum((high - low) / (2**bits - 1), 1e-7))
    return scales, np.rint(-low / scales)


def round_affine(weight: NpArray, scales: NpArray, zeros: NpArray, group: int, bits: int = 4) -> NpArray:
    """Every value to the nearest (code - zero) * scale, float32."""
    k = weight.shape[1]
    s, z = spread(scales, group, k), spread(zeros, group, k)
    return np.asarray((np.clip(np.rint(weight / s + z), 0, 2**bits - 1) - z) * s, dtype=np.float32)


def hqq(weight: NpArray, group: int, bits: int = 4) -> tuple[NpArray, NpArray]:
    """Half-quadratic quantisation (Badri and Shaji 2023, "HQQ"): scales and real zero points, no data.

    Minimises |W - W_r|^0.7 by moving the zero points alone: the residual is shrunk, e = sign(d) max(0, |d| -
    |d|^(p-1)/beta), z = mean(q - (w - e)/s) in each group; beta 10, 1 % more each turn, until the error stops falling.
    """
    blocks = grouped(weight, group)
    low, high = blocks.min(axis=2, keepdims=True), blocks.max(axis=2, keepdims=True)
    s = _float16(np.maximum((high - low) / (2**bits - 1), 1e-7))
    z, best = np.rint(-low / s), np.inf
    beta, p, kept = 10.0, 0.7, z
    for _ in range(20):
        q = np.clip(np.rint(blocks / s + z), 0, 2**bits - 1)
        d = blocks - (q - z) * s
        error = float(np.abs(d).mean())
        if error >= best:
            break
        best, kept = error, z
        size = np.maximum(np.abs(d), 1e-12)
        e = np.sign(d) * np.maximum(size - size ** (p - 1) / beta, 0)
        z = (q - (blocks - e) / s).mean(axis=2, keepdims=True)
        beta *= 1.01
    return s[..., 0], kept[..., 0]


# --- error feedback ----------------------------------------------------------------------------------------------

Scales = Union[NpArray, tuple[NpArray, NpArray], None]
"""One per group, or with zero points, or None: absmax of what a group has become when its turn comes."""


def damped(gram: NpArray, damping: float) -> NpArray:
    """The Gram matrix with a share of its mean diagonal added to it; inputs that were always 0 count as 1."""
    h = gram.astype(np.float64)
    dead = np.diag(h) <= 0
    h[dead, dead] = 1.0
    h[np.diag_indices(len(h))] += damping * np.diag(h).mean()
    return h


def gptq(
    weight: NpArray,
    gram: NpArray,
    scales: Scales,
    group: int,
    damping: float = 0.05,
    bits: int = 4,
    by_importance: bool = True,
) -> NpArray:
    """GPTQ (Frantar et al. 2022, arXiv 2210.17323): float32 [n, k], every value on its group's grid.

    gram [k, k] = x^T x of the layer's inputs. Columns are taken by falling importance, or as they stand; the rounding
    error of each is made up for by those not yet rounded. Inputs that were always 0 give weights 0.
    """
    n, k = weight.shape
    dead = np.diag(gram) <= 0
    h = damped(gram, damping)
    order = np.argsort(-np.diag(h), kind="stable") if by_importance and scales is not None else np.arange(k)
    inverse = np.linalg.inv(h[np.ix_(order, order)])
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
    w = np.where(dead, 0.0, weight.astype(np.float64))[:, order]
    grid = _Grid(scales, group, bits, order, n)
    result = np.empty((n, k))
    for start in range(0, k, LAZY):
        stop = min(k, start + LAZY)
        errors = np.empty((n, stop - start))
        for j in range(start, stop):
            if scales is None and j % (group or k) == 0:
                grid.follow(w[:, j : j + (group or k)])
            result[:, j] = grid.nearest(w[:, j], j)
            errors[:, j - start] = e = (w[:, j] - result[:, j]) / upper[j, j]
            w[:, j:stop] -= np.outer(e, upper[j, j:stop])
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    back = np.empty((n, k), dtype=np.float32)
    back[:, order] = result
    return back


class _Grid:
    """The nearest value of a column's grid; columns by their place in GPTQ's order."""

    def __init__(self, scales: Scales, group: int, bits: int, order: NpArray, rows: int) -> None:
        k = len(order)
        self.bits = bits
        self.current: NpArray = np.ones(rows)
        self.scales = self.zeros = None
        if isinstance(scales, tuple):
            self.scales, self.zeros = (spread(x, group, k)[:, order] for x in scales)
        elif scales is not None:
            self.scales = spread(scales, group, k)[:, order]

    def follow(self, columns: NpArray) -> None:
        """A group begins: its scale is that of what it has become."""
        self.current = absmax_scales(columns, 0, self.bits)[:, 0]

    def nearest(self, w: NpArray, j: int) -> NpArray:
        s = self.current if self.scales is None else self.scales[:, j]
        if self.zeros is None:
            return np.asarray(_codes(w, s, self.bits) * s)
        z = self.zeros[:, j]
        return np.asarray((np.clip(np.rint(w / s + z), 0, 2**self.bits - 1) - z) * s)


def revise(
    weight: NpArray, found: NpArray, gram: NpArray, scales: NpArray, group: int, bits: int = 4, rounds: int = 2
) -> NpArray:
    """Codes and scales of a rounded weight moved, in turn, to where |x (W - W')^T|^2 falls: float32 [n, k].

    Each round takes every column once, at its best code given all others (coordinate descent, QuantEase, Behdin et al.
    2023, arXiv 2309.01885), then solves for all scales of a row at once given its codes (least squares under the Gram
    matrix, already damped). The error never rises but for float16.
    """
    w, value = weight.astype(np.float64), found.astype(np.float64)
    k = w.shape[1]
    s = scales.copy()
    diagonal, order = np.diag(gram), np.argsort(-np.diag(gram), kind="stable")
    for _ in range(rounds):
        each = spread(s, group, k)
        pull = (w - value) @ gram
        for j in order:
            best = _codes(value[:, j] + pull[:, j] / diagonal[j], each[:, j], bits) * each[:, j]
            moved = np.flatnonzero(best != value[:, j])
            if len(moved):
                pull[moved] -= np.outer(best[moved] - value[moved, j], gram[j])
                value[moved, j] = best[moved]
        codes = np.rint(value / each)
        s = _refitted(w, codes, gram, s, group)
        value = codes * spread(s, group, k)
    return np.asarray(value, dtype=np.float32)


def _refitted(w: NpArray, codes: NpArray, gram: NpArray, scales: NpArray, group: int) -> NpArray:
    """Least-squares scales of every row: (Q H Q^T) s = Q H w, Q [g, k] the row's codes, each group in its own line."""
    n, k = w.shape
    size, count = group or k, scales.shape[1]
    pulled = grouped((w @ gram) * codes, size).sum(axis=2)
    system = np.empty((n, count, count))
    for a in range(count):  # line a: codes of group a times H, times the row's codes, summed over each group
        columns = slice(a * size, min((a + 1) * size, k))
        system[:, a] = grouped((codes[:, columns] @ gram[columns]) * codes, size).sum(axis=2)
    alive = np.abs(codes).sum(axis=1) > 0
    system += 1e-9 * np.trace(system, axis1=1, axis2=2)[:, None, None] * np.eye(count) / count
    system[~alive] = np.eye(count)
    found = _float16(np.linalg.solve(system, pulled[..., None])[..., 0])
    usable = np.isfinite(found) & (np.abs(found) > 1e-7) & (np.sign(found) == np.sign(scales))
    return np.asarray(np.where(usable & alive[:, None], found, scales))


# --- moving difficulty -------------------------------------------------------------------------------------------


def awq_factors(weight: NpArray, inputs: NpArray, group: int, bits: int = 4, gram: NpArray | None = None) -> NpArray:
    """Factors t [k] of AWQ (Lin et al. 2023, arXiv 2306.00978): W t is rounded and x / t is read.

    t = (mean |x|)^a over sqrt(max t * min t), the a of 0, 0.05, ..., 0.95 with which rounding to nearest gives the
    smallest |x W^T - (x/t) Q(W t)^T|^2. inputs: mean |x| [k]; gram [k, k] = x^T x.
    """
    size = np.maximum(inputs.astype(np.float64), 1e-12 * max(float(inputs.max()), 1e-30))
    best, chosen = np.inf, np.ones(len(size))
    h = np.diag(size * size) if gram is None else gram
    for a in np.arange(0, 1, 0.05):
        t = size**a
        t = t / np.sqrt(t.max() * t.min())
        scaled = weight * t
        d = weight - round_to_scales(scaled, absmax_scales(scaled, group, bits), group, bits) / t
        error = float(((d @ h) * d).sum())
        if error < best:
            best, chosen = error, t
    return chosen


def smooth_factors(largest: NpArray, weight: NpArray, alpha: float) -> NpArray:
    """Factors t [k] of SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): x / t and W t, t = max|x|^a / max|W|^(1-a)."""
    columns = np.maximum(np.abs(weight.astype(np.float64)).max(axis=0), 1e-12)
    t = np.maximum(largest.astype(np.float64), 1e-12) ** alpha / columns ** (1 - alpha)
    return np.asarray(np.clip(t, 1e-5 * t.max(), None))


# --- activations -------------------------------------------------------------------------------------------------


def int8_tokens(x: NpArray) -> NpArray:
    """Every row on its own grid of 8 bits, scale max|row| / 127."""
    s = np.maximum(np.abs(x).max(axis=-1, keepdims=True) / 127, 1e-30)
    return np.asarray(np.rint(x / s) * s)


def int8_blocks(x: NpArray, block: int = 32) -> NpArray:
    """Every run of `block` values of a row on its own grid, as ggml's Q8_0 and MatMulNBits with integers do."""
    k = x.shape[-1]
    return int8_tokens(grouped(x, block)).reshape(len(x), -1)[:, :k]


def int8_tensor(x: NpArray, largest: float) -> NpArray:
    """All values on one grid that was fixed beforehand, scale largest / 127; what lies beyond is cut."""
    s = largest / 127
    return np.asarray(np.clip(np.rint(x / s), -128, 127) * s)
