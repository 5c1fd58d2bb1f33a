"""Keys and values in few bits: what the ops pack_codes, unpack_codes and column_mean compute, in numpy.

TurboQuant's mean-square variant (Zandieh et al. 2025, arXiv 2504.19874): a vector of one head is rotated by a Hadamard
matrix with seeded signs, scaled to unit variance, and every entry becomes the nearest of 2^bits levels, which are
optimal for the entries of random unit vectors (Lloyd-Max). Two changes, both free: the scale that is stored is the one
that keeps the norm (keys) or is best in least squares (values), and a mean over rows may be taken off first.
One head of one row is ceil(d*bits/32) words of codes and one word that holds the scale as float16.
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


@lru_cache(maxsize=64)
def levels(bits: int, d: int) -> NpArray:
    """The 2^bits levels, ascending, float64, for entries of unit vectors in d dimensions times sqrt(d)."""
    table = json.loads(Path(__file__).with_name("codebooks.json").read_text(encoding="utf-8"))
    positive = np.array(table.get(f"d{d}", table["gaussian"])[str(bits)], dtype=np.float64)
    return np.concatenate([-positive[::-1], positive])


@lru_cache(maxsize=64)
def thresholds(bits: int, d: int) -> NpArray:
    """Half-way points between levels, [2^bits - 1]: value <= thresholds[i] and above the one before has code i."""
    at = levels(bits, d)
    return np.asarray((at[1:] + at[:-1]) / 2)


def words(bits: int, d: int) -> int:
    """32-bit words of one head of one row, scale included."""
    return -(-d * bits // 32) + 1


def encode(x: NpArray, mean: NpArray | None, bits: int, d: int, seed: int, scale: str) -> NpArray:
    """f32 [n, G*d] -> i32 [n, G*words]."""
    n = len(x)
    v = x.astype(np.float64) - (0.0 if mean is None else mean.astype(np.float64))
    v = v.reshape(n, -1, d) @ rotation(d, seed)
    norm = np.sqrt((v * v).sum(-1, keepdims=True))
    y = np.divide(v * math.sqrt(d), norm, out=np.zeros_like(v), where=norm > 0)
    codes: NpArray = np.searchsorted(thresholds(bits, d), y).astype(np.uint8)
    q = levels(bits, d)[codes]
    square = (q * q).sum(-1)
    if scale == "norm":
        s = norm[..., 0] / np.sqrt(square)
    elif scale == "least_squares":
        s = norm[..., 0] * (q * y).sum(-1) / (math.sqrt(d) * square)
    else:
        s = norm[..., 0] / math.sqrt(d)
    half = np.minimum(s, 65504.0).astype(np.float16).view(np.uint16).astype(np.uint32)
    stream: NpArray = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits].reshape(n, -1, d * bits)
    stream = np.pad(stream, ((0, 0), (0, 0), (0, -(d * bits) % 32)))
    packed = np.packbits(stream, axis=-1, bitorder="little").view("<u4")
    both = np.concatenate([packed, half[..., None]], axis=-1)
    return np.ascontiguousarray(both.reshape(n, -1)).view(np.int32)


def decode(codes: NpArray, mean: NpArray | None, bits: int, d: int, seed: int) -> NpArray:
    """Inverse of encode: i32 [n, G*words] -> f32 [n, G*d]."""
    n, count = len(codes), words(bits, d)
    parts = np.ascontiguousarray(codes, dtype=np.int32).view(np.uint32).reshape(n, -1, count)
    scale = parts[..., -1:].astype(np.uint16).view(np.float16).astype(np.float64)
    packed = np.ascontiguousarray(parts[..., :-1]).astype("<u4").view(np.uint8)
    stream = np.unpackbits(packed, axis=-1, bitorder="little")[..., : d * bits].reshape(n, -1, d, bits)
    q = levels(bits, d)[(stream << np.arange(bits, dtype=np.uint8)).sum(-1)]
    x = ((q * scale) @ rotation(d, seed).T).reshape(n, -1)
    return np.asarray(x if mean is None else x + mean.astype(np.float64), dtype=np.float32)


def column_mean(x: NpArray, valid: NpArray | None) -> NpArray:
    """Mean of the valid rows, f32 [1, W]; zeros where no row is valid."""
    rows = x.astype(np.float64) if valid is None else x[valid].astype(np.float64)
    total = rows.sum(axis=0, keepdims=True)
    return np.asarray(total / max(len(rows), 1), dtype=np.float32)
