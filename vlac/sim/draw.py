"""Anti-aliased pictures of discs and turned squares by coverage: plain numpy, the same bytes on every platform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Window:
    """The square part of the table that a picture shows: its centre and side, in table units; y points up."""

    x: float
    y: float
    side: float


class Canvas:
    """A square RGB picture of `size` pixels of what lies in `window`; shapes are painted over one another."""

    def __init__(self, size: int, window: Window, background: Colour):
        self.pixel = window.side / size
        offsets = (np.arange(size, dtype=np.float32) + np.float32(0.5 - size / 2)) * np.float32(self.pixel)
        self._x = (offsets + np.float32(window.x))[None, :]
        self._y = (np.float32(window.y) - offsets)[:, None]
        self._rgb = np.empty((size, size, 3), np.float32)
        self._rgb[:] = background

    def square(self, x: float, y: float, half: float, cosine: float, sine: float, colour: Colour) -> None:
        """A square of half side `half`, turned by the angle of (cosine, sine)."""
        box = self._box(x, y, half * 1.5)
        if box is None:
            return
        dx, dy = self._x[:, box[1]] - np.float32(x), self._y[box[0]] - np.float32(y)
        u = np.abs(dx * np.float32(cosine) + dy * np.float32(sine))
        v = np.abs(dy * np.float32(cosine) - dx * np.float32(sine))
        self._paint(box, np.maximum(u, v) - np.float32(half), colour)

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """A disc."""
        box = self._box(x, y, radius)
        if box is None:
            return
        dx, dy = self._x[:, box[1]] - np.float32(x), self._y[box[0]] - np.float32(y)
        self._paint(box, np.sqrt(dx * dx + dy * dy) - np.float32(radius), colour)

    def pixels(self) -> npt.NDArray[np.uint8]:
        """The picture, u8 [size, size, 3]."""
        return np.clip(np.rint(self._rgb), 0, 255).astype(np.uint8)

    def _box(self, x: float, y: float, reach: float) -> tuple[slice, slice] | None:
        """Rows and columns that the shape can touch; None when it lies outside."""
        near_x = np.flatnonzero(np.abs(self._x[0] - np.float32(x)) <= reach + self.pixel)
        near_y = np.flatnonzero(np.abs(self._y[:, 0] - np.float32(y)) <= reach + self.pixel)
        if not len(near_x) or not len(near_y):
            return None
        return slice(int(near_y[0]), int(near_y[-1]) + 1), slice(int(near_x[0]), int(near_x[-1]) + 1)

    def _paint(self, box: tuple[slice, slice], distance: Array, colour: Colour) -> None:
        """Blends by how much of each pixel the shape covers; `distance` to its edge, negative inside."""
        cover = np.clip(np.float32(0.5) - distance / np.float32(self.pixel), 0, 1)[..., None]
        part = self._rgb[box]
        part += cover * (np.array(colour, np.float32) - part)
