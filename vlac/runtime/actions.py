"""From a normalised action chunk to robot units: the steps of `IO.action_steps` by name, on [N, A] float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from vlac.io import Step
from vlac.runtime.observation import Array, StepFunction, apply_steps, span, statistics


def take(x: Array, *, size: int) -> Array:
    """The first `size` columns: x [N, A] -> [N, size]."""
    return x[:, :size]


def unnormalise(x: Array, *, mode: str, eps: float = 1e-8, **stats: Any) -> Array:
    """Inverse of `observation.normalise` on the columns of x [N, action_dim], as LeRobot writes it.

    MEAN_STD: x * std + mean (no eps). MIN_MAX, QUANTILES, QUANTILE10: (x + 1) / 2 * D + low with D = high - low, eps
    where that is 0. IDENTITY: x. No clamping.
    """
    if mode == "IDENTITY":
        return x
    if mode == "MEAN_STD":
        mean, std = statistics(mode, stats)
        return x * std + mean
    low, width = span(mode, eps, stats)
    return (x + np.float32(1)) / np.float32(2) * width + low


ACTION_STEPS: dict[str, StepFunction] = {"take": take, "unnormalise": unnormalise}


def apply_action_steps(steps: Iterable[Step], chunk: Array) -> Array:
    """A normalised chunk [N, max_action_dim] -> float32 [N, action_dim], contiguous and the caller's own."""
    with np.errstate(over="ignore"):  # a chunk that is not finite is refused by the session
        return np.array(apply_steps(ACTION_STEPS, steps, chunk), dtype=np.float32, order="C")
