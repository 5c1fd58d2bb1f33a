"""Statistics of an episode and their sum over episodes, in LeRobot's form (compute_stats.py of LeRobot 0.6.1).

min, max, mean, std, count and q01 to q99 per column; pictures per channel in [0, 1], shape (3, 1, 1). Differences from
LeRobot: quantiles are exact values of the data (LeRobot's come from a histogram of 5000 bins), and pictures count with
every frame (LeRobot samples frames). Over episodes quantiles are averaged by count, as LeRobot does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NpArray = np.ndarray[Any, Any]
Stats = dict[str, NpArray]

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
LARGE, SMALL = 300, 150
"""Pictures with a side of LARGE or more are thinned to about SMALL first."""


def of_vectors(values: NpArray) -> Stats:
    """Statistics of numbers [n, d] (n >= 1) along the first axis: float64 [d], count int64 [1]."""
    x = values.astype(np.float64)
    levels = np.quantile(x, list(QUANTILES.values()), axis=0, method="inverted_cdf")
    result: Stats = {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}
    result["count"] = np.array([len(x)])
    return result | dict(zip(QUANTILES, levels, strict=True))


class Pictures:
    """Statistics of pictures as they come: a histogram of the 256 levels per channel."""

    def __init__(self) -> None:
        self.histogram = np.zeros((3, 256), np.int64)
        self.count = 0

    def add(self, picture: NpArray) -> None:
        """uint8 [H, W, 3]."""
        height, width = picture.shape[:2]
        step = int(max(height, width) / SMALL) if max(height, width) >= LARGE else 1
        thin = picture[::step, ::step]
        for channel in range(3):
            self.histogram[channel] += np.bincount(thin[..., channel].ravel(), minlength=256)
        self.count += 1

    def result(self) -> Stats:
        """float64 [3, 1, 1] in [0, 1], count int64 [1]."""
        level = np.arange(256) / 255.0
        total = self.histogram.sum(1)
        mean = self.histogram @ level / total
        seen = self.histogram > 0
        stats: Stats = {
            "min": level[seen.argmax(1)],
            "max": level[255 - seen[:, ::-1].argmax(1)],
            "mean": mean,
            "std": np.sqrt(np.maximum(0.0, self.histogram @ level**2 / total - mean**2)),
        }
        below = self.histogram.cumsum(1) / total[:, None]
        for name, q in QUANTILES.items():
            stats[name] = level[(below >= q - 1e-12).argmax(1)]
        return {k: v.reshape(3, 1, 1) for k, v in stats.items()} | {"count": np.array([self.count])}


def together(parts: Sequence[Stats]) -> Stats:
    """Statistics of all parts, weighted by their counts."""
    counts = np.array([int(p["count"][0]) for p in parts], dtype=np.float64)
    weights = counts / counts.sum()

    def mean_of(name: str) -> NpArray:
        return np.asarray(np.tensordot(weights, np.stack([p[name] for p in parts]), 1))

    mean = mean_of("mean")
    spread = np.stack([p["std"] ** 2 + (p["mean"] - mean) ** 2 for p in parts])
    result: Stats = {
        "min": np.min([p["min"] for p in parts], axis=0),
        "max": np.max([p["max"] for p in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(np.tensordot(weights, spread, 1)),
        "count": np.array([int(counts.sum())]),
    }
    return result | {q: mean_of(q) for q in QUANTILES}


def as_lists(stats: Mapping[str, Stats]) -> dict[str, dict[str, Any]]:
    """JSON values, as meta/stats.json holds them."""
    return {key: {name: value.tolist() for name, value in one.items()} for key, one in stats.items()}
