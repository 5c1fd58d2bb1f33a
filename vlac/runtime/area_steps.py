"""Image steps of policies that were trained on OpenCV's area resize, to the byte, without OpenCV.

Shrinking takes means over the cells that an output pixel covers, in float32; growing is linear in 11 bit fixed point,
as cv2.resize does both under INTER_AREA (modules/imgproc/src/resize.cpp). Pictures are float32 [3, H, W] of k/255.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from vlac.errors import InputError

Array = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int32]


@lru_cache(maxsize=64)
def cells(size: int, new_size: int) -> tuple[Integers, Array]:
    """(indices, weights), each [new_size, k]: which samples an output covers and by how much; unused ones weigh 0."""
    scale = size / new_size
    rows: list[list[tuple[int, float]]] = []
    for i in range(new_size):
        start, stop = i * scale, (i + 1) * scale
        width = min(scale, size - start)
        last = min(math.floor(stop), size - 1)
        first = min(math.ceil(start), last)
        row = [(first - 1, (first - start) / width)] if first - start > 1e-3 else []
        row += [(j, 1 / width) for j in range(first, last)]
        rows.append(row + ([(last, min(stop - last, 1.0, width) / width)] if stop - last > 1e-3 else []))
    most = max(map(len, rows))
    padded = [row + [(0, 0.0)] * (most - len(row)) for row in rows]
    indices = np.array([[j for j, _ in row] for row in padded], dtype=np.int32)
    return indices, np.array([[w for _, w in row] for row in padded], dtype=np.float32)


def _shrunk(x: Array, new_size: int) -> Array:
    """x [..., n] -> [..., new_size], means over cells."""
    indices, weights = cells(x.shape[-1], new_size)
    total: Array = np.zeros((*x.shape[:-1], new_size), dtype=np.float32)
    for index, weight in zip(indices.T, weights.T, strict=True):
        total += x[..., index] * weight
    return total


def _neighbours(size: int, new_size: int) -> tuple[Integers, Integers, Integers]:
    """(index, its weight, the next one's weight) in 1/2048 for each output."""
    inverse = new_size / size
    at = np.arange(new_size)
    low = np.floor(at * (1 / inverse)).astype(np.int32)
    part = ((at + 1) - (low + 1) * inverse).astype(np.float32)
    part = np.where((part <= 0) | (low >= size - 1), np.float32(0), part - np.floor(part)).astype(np.float32)
    low = np.minimum(low, size - 1)
    return low, np.rint((1 - part) * 2048).astype(np.int32), np.rint(part * 2048).astype(np.int32)


def _grown(x: Integers, height: int, width: int) -> Integers:
    low, own, after = _neighbours(x.shape[2], width)
    rows = x[..., low] * own + x[..., np.minimum(low + 1, x.shape[2] - 1)] * after
    low, own, after = (v[:, None] if i else v for i, v in enumerate(_neighbours(x.shape[1], height)))
    upper, lower = rows[:, low] >> 4, rows[:, np.minimum(low + 1, x.shape[1] - 1)] >> 4
    both = (((own * upper) >> 16) + ((after * lower) >> 16) + 2) >> 2
    return np.asarray(np.clip(both, 0, 255), dtype=np.int32)


def resize_bytes(x: Integers, height: int, width: int) -> Integers:
    """Bytes x [3, H, W] -> [3, height, width] as cv2.resize with INTER_AREA."""
    h, w = x.shape[1:]
    if h < height or w < width:
        return _grown(x, height, width)
    if h % height == 0 and w % width == 0:
        blocks = x.reshape(3, height, h // height, width, w // width).sum(axis=(2, 4), dtype=np.int32)
        if h == 2 * height and w == 2 * width:
            return np.asarray((blocks + 2) >> 2, dtype=np.int32)
        mean = blocks.astype(np.float32) * np.float32(1 / (h // height * (w // width)))
    else:
        mean = _shrunk(_shrunk(x.astype(np.float32), width).transpose(0, 2, 1), height).transpose(0, 2, 1)
    return np.asarray(np.clip(np.rint(mean), 0, 255), dtype=np.int32)


def area_resize(x: Array, *, shorter: int) -> Array:
    """x [3, H, W], a square, resized so that its sides are `shorter`.

    The original keeps the aspect of other pictures; InputError, because a network is compiled for squares.
    """
    h, w = x.shape[1:]
    if h != w:
        raise InputError(
            f"the picture is {w}x{h}: this policy keeps the aspect, and its artifact takes squares only",
            remedy="cut or pad it to a square as in training",
        )
    if h == shorter:
        return x
    pixels = np.rint(np.clip(x, 0, 1) * np.float32(255)).astype(np.int32)
    return resize_bytes(pixels, shorter, shorter).astype(np.float32) / np.float32(255)
