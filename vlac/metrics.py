"""How far two action chunks lie apart, as pure functions of arrays, and the grammar of limits on them.

Chunks are float arrays (observations, horizon, joints) in one unit; results are plain numbers and lists that go into a
report as they are. Everything is computed in float64.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vlac.errors import InputError

Floats = npt.NDArray[np.float64]


def _pair(candidate: npt.ArrayLike, reference: npt.ArrayLike) -> tuple[Floats, Floats]:
    a, b = np.asarray(candidate, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        raise InputError(f"cannot compare shape {a.shape} with {b.shape}")
    return a, b


def cosine(candidate: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """a.b / (|a||b|) over all elements; 1 when both are zero, 0 when one is, NaN when a value is."""
    a, b = _pair(candidate, reference)
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    if scale == 0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(np.vdot(a, b) / scale)


def relative_l2(candidate: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """|a-b| / |b|; 0 when both are zero, inf when only the reference is."""
    a, b = _pair(candidate, reference)
    return _ratio(float(np.linalg.norm(a - b)), float(np.linalg.norm(b)))


def max_relative(candidate: npt.ArrayLike, reference: npt.ArrayLike) -> float:
    """max|a-b| / max|b|, the measure of the golden files; 0 when both are zero."""
    a, b = _pair(candidate, reference)
    if a.size == 0:
        return 0.0
    return _ratio(float(np.abs(a - b).max()), float(np.abs(b).max()))


def _ratio(error: float, scale: float) -> float:
    if scale == 0:
        return 0.0 if error == 0 else math.inf
    return error / scale


def jerk(chunk: npt.ArrayLike) -> float | None:
    """Root mean square of the third difference along the horizon (joints' units per step^3); None below 4 steps."""
    x = np.asarray(chunk, dtype=np.float64)
    if x.shape[-2] < 4:
        return None
    return float(np.sqrt(np.mean(np.diff(x, n=3, axis=-2) ** 2)))


@dataclass(frozen=True)
class Joint:
    """One action dimension: its name, its range in the chunk's units (None: unknown) and where that range is from."""

    name: str
    low: float | None = None
    high: float | None = None
    source: str = ""

    @property
    def span(self) -> float | None:
        """high - low; None when unknown or empty (a joint that never moved in the data)."""
        if self.low is None or self.high is None or not self.high > self.low:
            return None
        return self.high - self.low


def find_gripper(names: Sequence[str]) -> tuple[int, str]:
    """Index of the gripper and how it was found: the name that says so, else the last joint."""
    for i, name in enumerate(names):
        if "gripper" in name.lower():
            return i, f"named {name!r}"
    return len(names) - 1, "taken to be the last joint (no action name says gripper)"


def gripper_flips(candidate: npt.ArrayLike, reference: npt.ArrayLike, threshold: float) -> dict[str, Any]:
    """Steps in which open/closed differs: the two lie on different sides of `threshold` ("closed" is >= threshold)."""
    a, b = _pair(candidate, reference)
    flips = int(np.count_nonzero((a >= threshold) != (b >= threshold)))
    return {"flips": flips, "steps": int(a.size), "threshold": threshold}


def compare(
    candidate: npt.ArrayLike, reference: npt.ArrayLike, joints: Sequence[Joint], n_action_steps: int
) -> dict[str, Any]:
    """Every figure of "what did it cost" for chunks (observations, horizon, joints) in the joints' units.

    Args:
        candidate, reference: same shape (B, N, A).
        joints: A entries, for names and ranges.
        n_action_steps: rows a robot executes; the horizon is reported for them and for the tail apart.

    Returns:
        cosine, relative_l2, max_relative (max|d| / max|reference|), max_abs, worst_sample, joints, horizon, map (error
        by step and joint), gripper, jerk: JSON values; formulas are those of this module's functions.

    Raises:
        InputError: shapes differ or do not fit the joints.
    """
    a, b = _pair(candidate, reference)
    if a.ndim != 3 or a.shape[-1] != len(joints) or a.shape[0] == 0:
        raise InputError(f"chunks have shape {a.shape}, expected (observations, horizon, {len(joints)})")
    d = np.abs(a - b)
    samples = [
        {"observation": i, "cosine": cosine(x, y), "relative_l2": relative_l2(x, y), "max_relative": max_relative(x, y)}
        for i, (x, y) in enumerate(zip(a, b, strict=True))
    ]
    # a NaN is the worst there is; max() alone would not see it
    worst = max(samples, key=lambda s: math.inf if math.isnan(s["relative_l2"]) else s["relative_l2"])
    index, how = find_gripper([j.name for j in joints])
    return {
        "observations": a.shape[0],
        "cosine": cosine(a, b),
        "relative_l2": relative_l2(a, b),
        "max_relative": max_relative(a, b),
        "max_abs": float(d.max()),
        "worst_sample": worst,
        "samples": samples,
        "joints": [_joint(joint, d[:, :, i], (a - b)[:, :, i]) for i, joint in enumerate(joints)],
        "horizon": _horizon(a - b, b, n_action_steps),
        "map": _map(a - b, b, joints),
        "gripper": {
            "joint": joints[index].name,
            "found": how,
            **gripper_flips(a[:, :, index], b[:, :, index], _threshold(joints[index], b[:, :, index])),
        },
        "jerk": _jerk(a, b),
    }


def _joint(joint: Joint, absolute: Floats, difference: Floats) -> dict[str, Any]:
    worst = float(absolute.max())
    return {
        "joint": joint.name,
        "max_abs": worst,
        "mean_abs": float(absolute.mean()),
        "bias": float(difference.mean()),
        "range": joint.span,
        "range_from": joint.source,
        "share_of_range": worst / joint.span if joint.span else None,
    }


def _threshold(joint: Joint, reference: Floats) -> float:
    low, high = (joint.low, joint.high) if joint.span else (float(reference.min()), float(reference.max()))
    assert low is not None and high is not None
    return (low + high) / 2


def _horizon(difference: Floats, reference: Floats, n_action_steps: int) -> dict[str, Any]:
    rms = np.sqrt(np.mean(difference**2, axis=(0, 2)))
    scale = float(np.sqrt(np.mean(reference**2)))

    def over(part: Floats) -> float | None:
        return _ratio(float(np.sqrt(np.mean(part**2))), scale) if part.size else None

    return {
        "unit": "rms of the error over the rms of the reference chunk",
        "per_step": [_ratio(float(v), scale) for v in rms],
        "executed": over(difference[:, :n_action_steps]),
        "executed_steps": min(n_action_steps, difference.shape[1]),
        "tail": over(difference[:, n_action_steps:]),
    }


def _map(difference: Floats, reference: Floats, joints: Sequence[Joint]) -> dict[str, Any]:
    """Error per step and joint: where in the chunk, and in which joint, the drift lies. A joint without a known range
    is measured by what the reference makes of it."""
    spans = [j.span or float(np.ptp(reference[:, :, i])) or 1.0 for i, j in enumerate(joints)]
    return {
        "unit": "rms of the error over the joint's range",
        "values": (np.sqrt(np.mean(difference**2, axis=0)) / np.array(spans)).tolist(),
    }


def _jerk(candidate: Floats, reference: Floats) -> dict[str, Any] | None:
    mine, theirs = jerk(candidate), jerk(reference)
    if mine is None or theirs is None:
        return None
    return {"artifact": mine, "reference": theirs, "ratio": mine / theirs if theirs else None}


def summary(candidate: npt.ArrayLike, reference: npt.ArrayLike) -> dict[str, float]:
    """The three figures that also fit a stage's values: cosine, relative_l2, max_relative."""
    return {
        "cosine": cosine(candidate, reference),
        "relative_l2": relative_l2(candidate, reference),
        "max_relative": max_relative(candidate, reference),
    }


# --- limits ----------------------------------------------------------------------------------------------------

METRICS: Mapping[str, str] = {
    "cos": "cosine",
    "cosine": "cosine",
    "rel_l2": "relative_l2",
    "relative_l2": "relative_l2",
    "max": "max_relative",
    "max_relative": "max_relative",
    "max_abs": "max_abs",
    "joint": "joint_share",
    "joint_share": "joint_share",
    "flips": "gripper_flips",
    "gripper_flips": "gripper_flips",
    "jerk": "jerk_ratio",
    "jerk_ratio": "jerk_ratio",
    "drift": "executed_drift",
    "executed_drift": "executed_drift",
    "worst_cos": "worst_cosine",
    "worst_cosine": "worst_cosine",
}
COMPILER_METRICS = ("cosine", "relative_l2", "max_relative")
_RELATIONS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_LIMIT = re.compile(r"\s*(?:(cost|compiler)\.)?([a-z_0-9]+)\s*(>=|<=|>|<)\s*(\S+)\s*")
_HELP = 'write NAME>=NUMBER or NAME<=NUMBER, such as "cos>=0.999"; names: ' + ", ".join(METRICS)


@dataclass(frozen=True)
class Limit:
    """`metric relation value` on one question: "cost" (artifact against the fp32 reference) or "compiler"."""

    metric: str
    relation: str
    value: float
    question: str = "cost"

    def holds(self, figure: float | None) -> bool:
        """Whether the figure keeps the limit; a missing figure or NaN never does."""
        return figure is not None and not math.isnan(figure) and _RELATIONS[self.relation](figure, self.value)

    def __str__(self) -> str:
        prefix = "compiler." if self.question == "compiler" else ""
        return f"{prefix}{self.metric}{self.relation}{self.value!r}"


def parse_limit(text: str) -> Limit:
    """ "cos>=0.999" -> Limit; "compiler.max<=1e-4" bounds question 1. `parse_limit(str(limit)) == limit`.

    Raises:
        InputError: names what cannot be read.
    """
    m = _LIMIT.fullmatch(text)
    if not m:
        raise InputError(f"--limit {text!r} is not a limit", remedy=_HELP)
    question, name, relation, number = m[1] or "cost", m[2], m[3], m[4]
    if name not in METRICS:
        raise InputError(f"--limit {text!r}: no figure {name!r}", remedy=_HELP)
    try:
        value = float(number)
    except ValueError:
        raise InputError(f"--limit {text!r}: {number!r} is not a number", remedy=_HELP) from None
    if not math.isfinite(value):
        raise InputError(f"--limit {text!r}: the bound must be finite", remedy=_HELP)
    if question == "compiler" and METRICS[name] not in COMPILER_METRICS:
        raise InputError(f"--limit {text!r}: question 1 has only {', '.join(COMPILER_METRICS)}", remedy=_HELP)
    return Limit(METRICS[name], relation, value, question)


def figures(comparison: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of `compare` that a limit can name."""
    shares = [j["share_of_range"] for j in comparison["joints"] if j["share_of_range"] is not None]
    return {
        "cosine": comparison["cosine"],
        "relative_l2": comparison["relative_l2"],
        "max_relative": comparison["max_relative"],
        "max_abs": comparison["max_abs"],
        "joint_share": max(shares) if shares else None,
        "gripper_flips": comparison["gripper"]["flips"],
        "jerk_ratio": comparison["jerk"]["ratio"] if comparison["jerk"] else None,
        "executed_drift": comparison["horizon"]["executed"],
        "worst_cosine": min(s["cosine"] for s in comparison["samples"]),
    }


def judge(limits: Sequence[Limit], values: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Each limit with the figure it met and whether it holds."""
    return [{"limit": str(x), "figure": values.get(x.metric), "ok": x.holds(values.get(x.metric))} for x in limits]
