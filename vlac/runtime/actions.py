"""From a normalised action chunk to robot units: the steps of `IO.action_steps` by name, on [N, A] float32."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vlac.errors import InputError
from vlac.io import Step
from vlac.runtime.fast import fast_decode
from vlac.runtime.observation import Array, StepFunction, apply_steps, clamp, span, statistics
from vlac.runtime.token_bins import token_bins


def take(x: Array, *, size: int) -> Array:
    """The first `size` columns: x [N, A] -> [N, size]."""
    return x[:, :size]


def take_rows(x: Array, *, count: int) -> Array:
    """The first `count` rows: x [N, A] -> [count, A]."""
    return x[:count]


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


def unnormalise_rows(x: Array, *, low: Sequence[Sequence[float]], high: Sequence[Sequence[float]]) -> Array:
    """(x + 1) / 2 * (high - low) + low with a range for every entry of x [N, d]; low and high have at least N rows."""
    a, b = (np.asarray(v, dtype=np.float32)[: len(x)] for v in (low, high))
    return (x + np.float32(1)) / np.float32(2) * (b - a) + a


def add_state(
    x: Array, *, columns: Sequence[int], state: Array | None = None, state_columns: Sequence[int] | None = None
) -> Array:
    """Actions relative to the robot's present pose: its raw state [state_dim] is added to these columns of x.

    state_columns: which of the state, in order; None = the same columns.
    """
    if state is None:
        raise InputError("this policy's actions are relative to the state, and no state is given", remedy="give state=")
    y = np.array(x)
    y[:, list(columns)] += state[list(columns if state_columns is None else state_columns)]
    return y


ACTION_STEPS: dict[str, StepFunction] = {
    "take": take,
    "take_rows": take_rows,
    "clamp": clamp,
    "unnormalise_rows": unnormalise_rows,
    "unnormalise": unnormalise,
    "add_state": add_state,
    "token_bins": token_bins,
    "fast_decode": fast_decode,
}


def needs_state(steps: Iterable[Step]) -> bool:
    """Whether actions are relative to the state."""
    return any(s.step == "add_state" for s in steps)


def apply_action_steps(steps: Iterable[Step], chunk: Array, state: Array | None = None) -> Array:
    """A normalised chunk [N, max_action_dim] -> float32 [N, action_dim], contiguous and the caller's own.

    state: the raw state [state_dim], for steps that add it (`Prepared.state`).
    """
    given = [Step(s.step, {**s.params, "state": state}) if s.step == "add_state" else s for s in steps]
    with np.errstate(over="ignore"):  # a chunk that is not finite is refused by the session
        return np.array(apply_steps(ACTION_STEPS, given, chunk), dtype=np.float32, order="C")
