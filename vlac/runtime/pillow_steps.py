"""Image steps that policies of the Hugging Face kind were trained with: Pillow's own resize, to the byte.

Pictures are float32 [3, H, W] holding k/255; a resize goes back to the bytes, as the original does. Another library's
bicubic gives other bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vlac.errors import InputError

Array = npt.NDArray[np.float32]

FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's filters; torchvision's interpolation numbers 0, 1, 2, 3, 4, 5 mean them in this order."""


def square(x: Array, *, fill: Sequence[int]) -> Array:
    """x [3, H, W] padded to a square by floor((longer - shorter) / 2) on both sides: an odd difference leaves it one
    pixel short. fill: bytes of one pixel."""
    h, w = x.shape[1:]
    above, left = (max(h, w) - h) // 2, (max(h, w) - w) // 2
    result = np.empty((3, h + 2 * above, w + 2 * left), dtype=np.float32)
    result[:] = (np.asarray(fill, dtype=np.float32) / np.float32(255))[:, None, None]
    result[:, above : above + h, left : left + w] = x
    return result


def pillow_resize(x: Array, *, size: Sequence[int] | int, filter: str) -> Array:
    """x [3, H, W] resized on bytes by Pillow. size: (height, width), or a number for the shorter side, the longer one
    truncated."""
    from PIL import Image

    h, w = x.shape[1:]
    if isinstance(size, int):
        size = (size, int(size * w / h)) if h <= w else (int(size * h / w), size)
    if min(size) < 1:
        raise InputError(f"{w}x{h} pixels are too thin to be resized to {size[1]}x{size[0]}", remedy="check the crop")
    if (h, w) == tuple(size):
        return _from_bytes(_to_bytes(x))
    kind = Image.Resampling[filter.upper()]
    picture = Image.fromarray(_to_bytes(x)).resize((size[1], size[0]), kind)
    return _from_bytes(np.asarray(picture))


def pillow_fit(x: Array, *, size: int, filter: str) -> Array:
    """x [3, H, W] fitted into size x size on bytes by Pillow, aspect kept and sizes truncated, black on both sides; an
    odd rest lies right and below (openpi's client). A picture of the right size is not touched."""
    h, w = x.shape[1:]
    if (h, w) == (size, size):
        return x
    ratio = max(w, h) / size
    small = pillow_resize(x, size=(int(h / ratio), int(w / ratio)), filter=filter)
    top, left = (size - small.shape[1]) // 2, (size - small.shape[2]) // 2
    result = np.zeros((x.shape[0], size, size), dtype=np.float32)
    result[:, top : top + small.shape[1], left : left + small.shape[2]] = small
    return result


def _to_bytes(x: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(np.rint(np.clip(x, 0, 1) * np.float32(255)).astype(np.uint8).transpose(1, 2, 0))


def _from_bytes(x: npt.NDArray[np.uint8]) -> Array:
    return np.ascontiguousarray(x.transpose(2, 0, 1)).astype(np.float32) / np.float32(255)


def centre_crop(x: Array, *, height: int, width: int) -> Array:
    """The middle of x [3, H, W]; where nothing lies in the middle exactly, Python's round decides."""
    h, w = x.shape[1:]
    if h < height or w < width:
        raise InputError(f"{w}x{h} pixels hold no {width}x{height}", remedy="check the crop")
    top, left = round((h - height) / 2), round((w - width) / 2)
    return x[:, top : top + height, left : left + width]


def top_left(x: Array, *, height: int, width: int) -> Array:
    """The first rows and columns: what a convolution without padding sees of a picture that is no whole number of
    patches."""
    return x[:, :height, :width]


def stack_normalised(x: Array, *, mean: Sequence[Sequence[float]], std: Sequence[Sequence[float]]) -> Array:
    """(x - mean) / std per channel, once for each row of `mean` and `std`: [3, H, W] -> [3 * towers, H, W]."""
    parts = [
        (x - np.asarray(m, np.float32)[:, None, None]) / np.asarray(s, np.float32)[:, None, None]
        for m, s in zip(mean, std, strict=True)
    ]
    return np.concatenate(parts, axis=0)
