"""What nodes cost on a machine, between the sizes that were measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from vlac.work import Piece, StageWork

CACHED = 8 << 20
"""Weights of a stage that are smaller may stay in a cache from run to run."""


@dataclass
class Costs:
    """Seconds by kind, of one thread count on one engine. port: an input or output of a stage.
    node: what a node costs among others, beyond what it costs among its like; first: as much more in the
    first, second, ... run after another stage's, with cold caches.

    linear: format -> width -> rows -> seconds of one. attention: operands -> [(MAC, seconds)],
    ascending; engines may treat one with a mask otherwise.
    op: kind -> (seconds of a small one, its bytes, seconds of a large one, its bytes). call: starting a stage.
    """

    linear: dict[str, dict[int, dict[int, float]]] = field(default_factory=dict)
    attention: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    op: dict[str, tuple[float, int, float, int]] = field(default_factory=dict)
    call: float = 0.0
    port: float = 0.0
    node: float = 0.0
    first: tuple[float, ...] = ()
    stream_bytes_s: float = math.inf

    def piece(self, p: Piece) -> float:
        """Seconds of one node."""
        if p.op == "linear" and p.format in self.linear:
            return self._linear(p)
        if p.op == "attention" and p.operands in self.attention:
            return _along(self.attention[p.operands], float(p.macs))
        kind = "index" if p.index else p.op
        small, small_bytes, large, large_bytes = self.op.get(kind) or self.op["add"]
        slope = max(0.0, (large - small) / (large_bytes - small_bytes))
        return max(small * 0.5, small + slope * (p.value_bytes - small_bytes))

    def _linear(self, p: Piece) -> float:
        """By rows along each width that was measured, then between widths by multiply-accumulates of one row."""
        grid = self.linear[p.format]
        points = [
            (float(width * width), _along(sorted((float(m), t) for m, t in rows.items()), float(p.rows)))
            for width, rows in sorted(grid.items())
        ]
        return _along(points, p.macs / p.rows)

    def once(self, s: StageWork) -> float:
        """Seconds of one run that follows another of the same stage."""
        around = self.call + self.port * max(0, s.ports - 3)
        # fetching weights that no cache holds did not overlap with computing where it was measured
        fetched = s.weight_bytes / self.stream_bytes_s if s.weight_bytes > CACHED else 0.0
        return around + fetched + sum(self.piece(p) for p in s.pieces) + self.node * len(s.pieces)

    def stage(self, s: StageWork) -> float:
        """Seconds of all runs for one chunk; the first ones find cold caches."""
        return s.runs * self.once(s) + sum(self.first[: s.runs]) * len(s.pieces)


def _along(points: list[tuple[float, float]], x: float) -> float:
    """Seconds between measured points, straight in logarithms; beyond the last in proportion, before the first flat."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    if x >= xs[-1]:
        return ys[-1] * x / xs[-1]
    return float(np.exp(np.interp(math.log(max(x, 1.0)), np.log(xs), np.log(ys))))
