"""How large the values of an activation are, collected run after run, and the fixed 8-bit scale that suits them."""

from __future__ import annotations

import numpy as np

from vlac.ops import NpArray

BINS = 8192
"""32 of a code's steps at the largest limit: fine enough to tell what small values lose."""
ENOUGH = 1 << 19
"""Values of one run that are counted: of larger ones every second, third, ... row."""
LIMITS = np.linspace(0.25, 1.0, 31)
"""Shares of the largest value that are tried."""


class Magnitudes:
    """A histogram of |x| whose range doubles when a value is beyond it; exact largest value and mean squares.

    Attributes: largest (float); squares: float64 [k], sums of squares per channel; rows: how many were seen.
    """

    def __init__(self, channels: int) -> None:
        self.largest, self.rows = 0.0, 0
        self.squares = np.zeros(channels)
        self._top, self._counts = 0.0, np.zeros(BINS)

    def add(self, x: NpArray) -> None:
        """Takes in x [rows, channels]."""
        size = np.abs(x.astype(np.float64))
        self.squares += (size * size).sum(axis=0)
        self.rows += len(x)
        most = float(size.max(initial=0.0))
        self.largest = max(self.largest, most)
        if most and not self._top:
            self._top = most
        while self._top < most:
            self._counts = np.concatenate([self._counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2)])
            self._top *= 2
        if self._top:
            every = max(1, size.size // ENOUGH)
            self._counts += every * np.histogram(size[::every], bins=BINS, range=(0.0, self._top))[0]

    def limit(self) -> float:
        """The magnitude that becomes code 127: of the shares of the largest value, that with the least square error.

        Few values lie near the largest of millions. Cutting them costs less than the finer scale gains for the rest
        (Migacz, "8-bit inference with TensorRT", 2017, chooses by divergence what is chosen by square error here).
        """
        found, least = self.largest, np.inf
        at = (np.arange(BINS) + 0.5) * (self._top / BINS)
        used = self._counts > 0
        at, counts = at[used], self._counts[used]
        for share in LIMITS:
            step = share * self.largest / 127
            error = float((counts * (at - np.minimum(np.rint(at / max(step, 1e-300)), 127) * step) ** 2).sum())
            if error <= least:
                found, least = share * self.largest, error
        return float(found)
