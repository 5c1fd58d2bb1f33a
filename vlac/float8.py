"""float8 E4M3FN in numpy: 1 sign, 4 exponent (bias 7) and 3 mantissa bits; largest 448, no infinity, 0x7F is NaN.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433. Rounding is to nearest, ties to even; what
lies beyond the largest becomes the largest, as QuantizeLinear with saturate=1 has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NpArray = np.ndarray[Any, Any]

LARGEST = 448.0
_LEAST_EXPONENT, _MOST_EXPONENT = -6, 8


def round_e4m3(x: NpArray) -> NpArray:
    """The nearest E4M3 value of each number, float64 of the same shape."""
    v = np.asarray(x, dtype=np.float64)
    _, exponent = np.frexp(v)  # v = m * 2^exponent with 0.5 <= |m| < 1
    step = np.exp2(np.clip(exponent - 1, _LEAST_EXPONENT, _MOST_EXPONENT) - 3.0)
    return np.asarray(np.clip(np.rint(v / step) * step, -LARGEST, LARGEST))


def encode_e4m3(x: NpArray) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Codes, uint8 of the same shape, of the nearest E4M3 values."""
    values = round_e4m3(x)
    size = np.abs(values)
    _, exponent = np.frexp(size)
    power = np.clip(exponent - 1, _LEAST_EXPONENT, _MOST_EXPONENT)
    eighths = np.rint(size / np.exp2(power - 3.0)).astype(np.int64)  # 8..15 with the hidden bit, below: subnormal
    code = eighths + np.where(eighths >= 8, (power - _LEAST_EXPONENT) * 8, 0)
    return np.asarray(code + 128 * np.signbit(values), dtype=np.uint8)


def decode_e4m3(codes: NpArray) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The float32 values of codes."""
    return np.asarray(_VALUES[np.asarray(codes, dtype=np.uint8)], dtype=np.float32)


def _table() -> np.ndarray[Any, np.dtype[np.float32]]:
    code = np.arange(128)
    power, eighths = code >> 3, code & 7
    size = np.where(power > 0, (8 + eighths) * np.exp2(power - 10.0), eighths * 2.0**-9)
    size[127] = np.nan
    return np.asarray(np.concatenate([size, -size]), dtype=np.float32)


_VALUES = _table()
