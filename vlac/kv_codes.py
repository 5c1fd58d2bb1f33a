"""Keys and values in few bits: what the ops pack_codes, unpack_codes and column_mean compute, in numpy.

TurboQuant's mean-square variant (Zandieh et al. 2025, arXiv 2504.19874): a vector of one head is rotated by a Hadamard
matrix with seeded signs, scaled to unit variance, and every entry becomes the nearest of 2^bits levels, which are
optimal for the entries of random unit vectors (Lloyd-Max). Changes, all free: the scale that is stored is the one that
keeps the norm (keys) or is best in least squares (values); a mean over rows may be taken off first; and the half of the
scale's word that would be empty holds a correction of four bits for each group of entries, which halves the error.

One head of one row is some 32-bit words: the codes in planes of 1, 2, 4 or 8 bits (3 = 2 + 1, 5 = 4 + 1), lowest bits
first, each plane padded to a word; then nibbles: the scale's logarithm in 16 bits and what the form adds.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vlac.rotations import rotation

NpArray = np.ndarray[Any, Any]

BITS = (1, 2, 3, 4, 5, 8)
SCALES = ("norm", "least_squares", "raw")
FORMS = ("groups", "head", "inner")
"""groups: a scale per head and a 4-bit factor per group of entries. head: the scale alone (TurboQuant). inner: one bit
less for the codes, and one for the signs of a random rotation of what they leave (TurboQuant's unbiased variant)."""

RATIOS = 0.6 * (1.4 / 0.6) ** (np.arange(16) / 15)
"""Factors that a group of entries may have; an optimum in a range of 1 to 8 bits."""

CELLS = 1 << 14
"""Codes are looked up in a table of this many equal cells over the range of the levels: the same in every engine."""

STEPS, ZERO = 1024, 32768
"""A scale s is stored as round(STEPS log2 s) + ZERO in 16 bits: 2^-32 to 2^32 to 0.03 %; 0 means zero."""

SIGNS = 7919
"""Added to the seed for the rotation whose signs the form "inner" keeps."""


@lru_cache(maxsize=64)
def levels(bits: int, d: int) -> NpArray:
    """The 2^bits levels, ascending, float64, for entries of unit vectors in d dimensions times sqrt(d)."""
    table = json.loads(Path(__file__).with_name("codebooks.json").read_text(encoding="utf-8"))
    positive = np.array(table.get(f"d{d}", table["gaussian"])[str(bits)], dtype=np.float64)
    return np.concatenate([-positive[::-1], positive])


@lru_cache(maxsize=64)
def nearest(bits: int, d: int) -> NpArray:
    """Code of the level nearest to the middle of each cell, u8 [CELLS]; cells divide [-top, top], top = levels[-1]."""
    at = levels(bits, d)
    middles = ((np.arange(CELLS) + 0.5) * 2 / CELLS - 1) * at[-1]
    return np.asarray(np.searchsorted((at[1:] + at[:-1]) / 2, middles), dtype=np.uint8)


def groups(d: int) -> int:
    """Groups of equal size in a head: four in 64 entries."""
    return math.gcd(d, 4 * max(1, d // 64))


def planes(bits: int, form: str) -> tuple[int, ...]:
    """Widths of the planes that codes are split into, lowest bits first."""
    if form == "inner":
        return (*planes(bits - 1, "head"), 1)
    return {3: (2, 1), 5: (4, 1)}.get(bits, (bits,))


def nibbles(d: int, form: str) -> int:
    """Nibbles behind the codes: four for each scale, one for each group."""
    return {"groups": 4 + groups(d), "head": 4, "inner": 8}[form]


def words(bits: int, d: int, form: str = "groups") -> int:
    """32-bit words of one head of one row, scales included."""
    return sum(-(-d * w // 32) for w in planes(bits, form)) + -(-nibbles(d, form) // 8)


def turn(d: int, seed: int) -> NpArray:
    """The rotation of a seed; the identity for seed -1, where weights hold the rotation already."""
    return np.eye(d) if seed < 0 else rotation(d, seed)


# --- words -----------------------------------------------------------------------------------------------------


def join(fields: NpArray, width: int) -> NpArray:
    """u32 [..., m] of `width` bits each -> u32 [..., ceil(m * width / 32)], the first field lowest."""
    per = 32 // width
    padded = np.pad(fields, [(0, 0)] * (fields.ndim - 1) + [(0, -fields.shape[-1] % per)])
    parts = padded.astype(np.uint32).reshape(*fields.shape[:-1], -1, per)
    return np.asarray(np.bitwise_or.reduce(parts << (width * np.arange(per, dtype=np.uint32)), axis=-1))


def split(packed: NpArray, width: int, count: int) -> NpArray:
    """Inverse of `join`: the first `count` fields, u32."""
    at = width * np.arange(32 // width, dtype=np.uint32)
    fields = (packed[..., None] >> at) & np.uint32((1 << width) - 1)
    return np.asarray(fields.reshape(*packed.shape[:-1], -1)[..., :count])


def log_scale(s: NpArray) -> NpArray:
    """Scales as 16-bit logarithms, u32."""
    with np.errstate(divide="ignore"):
        c = np.clip(np.rint(STEPS * np.log2(s)) + ZERO, 1, 65535)
    return np.where(s > 0, c, 0).astype(np.uint32)


def from_log(c: NpArray) -> NpArray:
    """Inverse of log_scale."""
    return np.asarray(np.where(c > 0, np.exp2((c.astype(np.float64) - ZERO) / STEPS), 0.0))


# --- codes -----------------------------------------------------------------------------------------------------


def quantise(y: NpArray, bits: int, d: int) -> NpArray:
    """Codes of the levels nearest to y, u8."""
    top = levels(bits, d)[-1]
    return np.asarray(nearest(bits, d)[np.clip((y / top + 1) * (CELLS / 2), 0, CELLS - 1).astype(np.int32)])


def _grouped(y: NpArray, bits: int, d: int) -> tuple[NpArray, NpArray]:
    """(codes, index of each group's factor) with the least square error in each group of y [n, G, d]."""
    parts = y.reshape(*y.shape[:-1], groups(d), -1)
    at, least = levels(bits, d), np.full(parts.shape[:-1], np.inf)
    chosen, codes = np.zeros(parts.shape[:-1], np.uint8), np.zeros(parts.shape, np.uint8)
    for i, ratio in enumerate(RATIOS):
        found = quantise(parts / ratio, bits, d)
        error = ((ratio * at[found] - parts) ** 2).sum(-1)
        better = error < least
        least, chosen = np.where(better, error, least), np.where(better, np.uint8(i), chosen)
        codes = np.where(better[..., None], found, codes)
    return codes.reshape(y.shape), chosen


def encode(x: NpArray, mean: NpArray | None, bits: int, d: int, seed: int, scale: str, form: str = "groups") -> NpArray:
    """f32 [n, G*d] -> i32 [n, G*words]."""
    n = len(x)
    v = x.astype(np.float64) - (0.0 if mean is None else mean.astype(np.float64))
    v = v.reshape(n, -1, d) @ turn(d, seed)
    norm = np.sqrt((v * v).sum(-1, keepdims=True))
    y = np.divide(v * math.sqrt(d), norm, out=np.zeros_like(v), where=norm > 0)
    coarse = bits - 1 if form == "inner" else bits
    codes, ratios = _grouped(y, bits, d) if form == "groups" else (quantise(y, coarse, d), None)
    q = levels(coarse, d)[codes]
    if ratios is not None:
        q = q * np.repeat(RATIOS[ratios], d // groups(d), axis=-1)
    square = (q * q).sum(-1)
    if scale == "norm":
        s = norm[..., 0] / np.sqrt(square)
    elif scale == "least_squares":
        s = norm[..., 0] * (q * y).sum(-1) / (math.sqrt(d) * square)
    else:
        s = norm[..., 0] / math.sqrt(d)
    logs = [log_scale(s)]
    fields = [codes.astype(np.uint32)]
    if form == "inner":
        rest = v - from_log(logs[0])[..., None] * q
        logs.append(log_scale(np.sqrt((rest * rest).sum(-1))))
        fields.append((rest @ rotation(d, abs(seed) + SIGNS) >= 0).astype(np.uint32))
    tail = [split(c[..., None], 4, 4) for c in logs] + ([] if ratios is None else [ratios])
    return _packed(fields, np.concatenate(tail, axis=-1), bits, form)


def _packed(fields: list[NpArray], tail: NpArray, bits: int, form: str) -> NpArray:
    """Codes [n, G, d] (and signs), and the nibbles behind them, as words i32 [n, G*words]."""
    codes, shift, parts = fields[0], 0, []
    for width in planes(bits - 1 if form == "inner" else bits, "head"):
        parts.append(join((codes >> shift) & ((1 << width) - 1), width))
        shift += width
    parts += [join(signs, 1) for signs in fields[1:]]
    both = np.concatenate([*parts, join(tail, 4)], axis=-1)
    return np.ascontiguousarray(both.reshape(len(codes), -1)).view(np.int32)


def decode(codes: NpArray, mean: NpArray | None, bits: int, d: int, seed: int, form: str = "groups") -> NpArray:
    """Inverse of encode: i32 [n, G*words] -> f32 [n, G*d]."""
    n, at, shift = len(codes), 0, 0
    parts = np.ascontiguousarray(codes, dtype=np.int32).view(np.uint32).reshape(n, -1, words(bits, d, form))
    value: NpArray = np.zeros((*parts.shape[:2], d), np.uint32)
    for width in planes(bits, form):
        count = -(-d * width // 32)
        value |= split(parts[..., at : at + count], width, d) << np.uint32(shift)
        at, shift = at + count, shift + width
    tail = split(parts[..., at:], 4, nibbles(d, form))
    logs = range(0, 8 if form == "inner" else 4, 4)
    scales = from_log(np.concatenate([join(tail[..., i : i + 4], 4) for i in logs], axis=-1))
    if form == "inner":
        signs, value = (value >> np.uint32(bits - 1)) * 2.0 - 1, value & np.uint32((1 << (bits - 1)) - 1)
        x = scales[..., :1] * levels(bits - 1, d)[value]
        x = x + scales[..., 1:] * math.sqrt(math.pi / (2 * d)) * (signs @ rotation(d, abs(seed) + SIGNS).T)
    else:
        x = scales * levels(bits, d)[value]
    if form == "groups":
        x = x * np.repeat(RATIOS[tail[..., 4:]], d // groups(d), axis=-1)
    x = (x @ turn(d, seed).T).reshape(n, -1)
    return np.asarray(x if mean is None else x + mean.astype(np.float64), dtype=np.float32)


def column_mean(x: NpArray, valid: NpArray | None) -> NpArray:
    """Mean of the valid rows, f32 [1, W]; zeros where no row is valid."""
    rows = x.astype(np.float64) if valid is None else x[valid].astype(np.float64)
    total = rows.sum(axis=0, keepdims=True)
    return np.asarray(total / max(len(rows), 1), dtype=np.float32)
