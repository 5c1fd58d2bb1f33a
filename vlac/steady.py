"""Whether latencies have settled, and whether they stepped or drifted: how a boost clock that ends shows.

A step is one moment that splits the run into two levels; a drift is a line that explains the run better than a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

WINDOW_S, WINDOWS, WITHIN = 10.0, 3, 0.03
"""Settled: the medians of the last three windows of ten seconds lie within 3 % of one another."""
FEWEST = 10
"""Chunks that each side of a step must have at least."""
LEAST_CHANGE, SIGNIFICANT = 0.05, 5.0
"""A change is reported from 5 % on, and from five standard errors of the difference on."""


def settled(ends: Sequence[float], times: Sequence[float], window_s: float = WINDOW_S) -> int | None:
    """Index of the first chunk of the windows that agree, or None while they do not.

    ends: seconds since the run began at which each chunk ended, ascending; times: its milliseconds.
    """
    if not ends or ends[-1] < WINDOWS * window_s:
        return None
    marks = [ends[-1] - k * window_s for k in range(WINDOWS, 0, -1)] + [ends[-1]]
    cuts = [int(np.searchsorted(ends, m, side="right")) for m in marks]
    parts = [times[a:b] for a, b in pairwise(cuts)]
    if any(len(p) < FEWEST // 2 for p in parts):
        return None
    medians = [float(np.median(p)) for p in parts]
    return cuts[0] if max(medians) <= (1 + WITHIN) * min(medians) else None


def course(ends: Sequence[float], times: Sequence[float]) -> dict[str, Any] | str:
    """How latency went over a run: {"kind": "even" | "step" | "drift", ...}, or "not available: why".

    step: at_s, before_ms and after_ms (medians of the two sides) and ratio after / before; drift: before_ms and
    after_ms (of the first and last third) and ratio.
    """
    if len(times) < 2 * FEWEST:
        return f"not available: {len(times)} chunks are too few to tell a step from chance"
    raw = np.asarray(times, dtype=np.float64)
    # single slow chunks must not pass for a level
    y = np.clip(raw, *np.percentile(raw, (2, 98)))
    split, step_error = _best_split(y)
    x = np.asarray(ends, dtype=np.float64)
    line = np.polyval(np.polyfit(x, y, 1), x)
    if float(((y - line) ** 2).sum()) < step_error:
        third = len(y) // 3
        kind, left, right = "drift", y[:third], y[-third:]
    else:
        kind, left, right = "step", y[:split], y[split:]
    before, after = float(np.median(left)), float(np.median(right))
    if abs(after / before - 1) < LEAST_CHANGE or not _differ(left, right):
        return {"kind": "even"}
    where = {"at_s": float(x[split])} if kind == "step" else {}
    return {"kind": kind, **where, "before_ms": before, "after_ms": after, "ratio": after / before}


def _best_split(y: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[int, float]:
    """(first index of the right side, squared error) of the two levels that fit best."""
    n, sums, squares = len(y), np.cumsum(y), np.cumsum(y**2)
    k = np.arange(FEWEST, n - FEWEST + 1)
    left, right = sums[k - 1], sums[-1] - sums[k - 1]
    errors = squares[-1] - left**2 / k - right**2 / (n - k)
    best = int(np.argmin(errors))
    return int(k[best]), float(errors[best])


def _differ(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    """Whether medians differ by more than chance, spread taken from the median absolute deviation."""
    spread = max(1.4826 * float(np.median(np.abs(v - np.median(v)))) for v in (left, right))
    error = spread * float(np.sqrt(1 / len(left) + 1 / len(right)))
    return abs(float(np.median(right) - np.median(left))) > SIGNIFICANT * error
