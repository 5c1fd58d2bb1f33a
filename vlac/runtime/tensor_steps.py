"""Image steps of policies that were trained on torchvision tensors: its antialiased bicubic on bytes, to the byte.

torch resizes uint8 with 16 bit integer weights, Pillow with 22 bit ones, so that some pixels differ by one. Pictures
are float32 [3, H, W] holding k/255; each pass of a resize goes back to the bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from vlac.errors import InputError

Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]

SUPPORT, A = 2.0, -0.5
"""Keys' cubic, with the parameter that torch and Pillow take when they antialias."""


def _cubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    x = np.abs(x)
    near = ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * A
    result: npt.NDArray[np.float64] = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    return result


@lru_cache(maxsize=64)
def weights_table(size: int, new_size: int) -> tuple[Integers, Integers, int]:
    """(indices [new_size, k], weights [new_size, k], bits): sample i is sum(weights * x[indices]) >> bits.

    torch's _compute_index_ranges_int16_weights (aten/src/ATen/native/cpu/UpSampleKernel.cpp): windows and weights as
    Pillow's, in float64; `bits` is the most that keeps the largest weight below 2^15.
    """
    scale = size / new_size
    stretch = max(scale, 1.0)
    centre = scale * (np.arange(new_size) + 0.5)
    first = np.maximum((centre - SUPPORT * stretch + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + SUPPORT * stretch + 0.5).astype(np.int64), size)
    offsets = np.arange(int((stop - first).max()))
    inside = offsets < (stop - first)[:, None]
    weight = _cubic((offsets + first[:, None] - centre[:, None] + 0.5) / stretch) * inside
    weight /= weight.sum(axis=1, keepdims=True)
    bits, largest = 0, float(weight.max())
    while bits < 22 and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    scaled = weight * (1 << bits)
    rounded = np.trunc(scaled + np.where(scaled < 0, -0.5, 0.5)).astype(np.int32)
    indices = np.minimum(first[:, None] + offsets, size - 1).astype(np.int32)
    for part in (indices, rounded):
        part.setflags(write=False)
    return indices, rounded, bits


def _along(x: Integers, new_size: int) -> Integers:
    """Bytes x [..., n] resampled along the last axis, clipped to bytes."""
    if x.shape[-1] == new_size:
        return x
    indices, weights, bits = weights_table(x.shape[-1], new_size)
    total = np.full((*x.shape[:-1], new_size), 1 << (bits - 1), dtype=np.int32)
    for index, weight in zip(indices.T, weights.T, strict=True):
        total += x[..., index] * weight
    result: Integers = np.clip(total >> bits, 0, 255)
    return result


def tensor_resize(x: Array, *, height: int, width: int) -> Array:
    """x [3, H, W] resized as torchvision resizes uint8 tensors: bicubic, antialiased, aspect not kept."""
    if x.shape[1:] == (height, width):
        return x
    pixels: Any = np.rint(np.clip(x, 0, 1) * np.float32(255)).astype(np.int32)
    pixels = _along(pixels, width)
    pixels = _along(pixels.transpose(0, 2, 1), height).transpose(0, 2, 1)
    return np.ascontiguousarray(pixels).astype(np.float32) / np.float32(255)


def window(x: Array, *, top: int, left: int, height: int, width: int) -> Array:
    """Rows top, ..., top+height-1 and columns left, ..., left+width-1 of x [3, H, W]."""
    if x.shape[1] < top + height or x.shape[2] < left + width:
        raise InputError(f"{x.shape[2]}x{x.shape[1]} pixels hold no {width}x{height} from ({left}, {top})")
    return x[:, top : top + height, left : left + width]


def to_square(x: Array) -> Array:
    """x [3, H, W] padded with black to a square; an odd difference puts the pixel right or below."""
    h, w = x.shape[1:]
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    return np.pad(x, ((0, 0), (top, side - h - top), (left, side - w - left)))
