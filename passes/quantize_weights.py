"""quantize-weights: a storage format for the weights whose names match a pattern, over the target's own plan.

Nothing is rounded here: the format joins the policy's precision plan (the last match wins), the target stores it, and
the census in the manifest says what each tensor became.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from vlac.errors import Inapplicable
from vlac.formats import FORMATS
from vlac.policy import Policy
from vlac.registry import Pass, passes


def _matching(policy: Policy, match: str) -> dict[str, tuple[int, ...]]:
    """Matrices (norms and biases are never quantised) whose names match."""
    return {
        name: tensor.shape
        for name, tensor in policy.weights.items()
        if len(tensor.shape) >= 2 and fnmatchcase(name, match)
    }


def _requires(policy: Policy, format: str, match: str) -> None:
    if format not in FORMATS:
        raise Inapplicable(f"no storage format {format!r}; there are: {', '.join(FORMATS)}")
    if not _matching(policy, match):
        examples = [n for n, t in policy.weights.items() if len(t.shape) >= 2][:: max(1, len(policy.weights) // 5)]
        raise Inapplicable(
            f"match={match!r} fits none of {len(policy.weights)} weights",
            remedy=f"patterns are shell style, over names such as {', '.join(examples[:5])}",
        )


def _apply(policy: Policy, format: str, match: str) -> tuple[Policy, Mapping[str, Any]]:
    shapes = _matching(policy, match)
    values = sum(math.prod(s) for s in shapes.values())
    figures = {
        "tensors": len(shapes),
        "values": values,
        "bits_per_value": round(FORMATS[format].bits, 4),
        "megabytes": round(values * FORMATS[format].bits / 8e6, 3),
    }
    return policy.replace(precision=(*policy.precision, (match, format))), figures


QUANTIZE_WEIGHTS = passes.add(
    Pass(
        name="quantize-weights",
        apply=_apply,
        params={
            "format": (str, None, "storage format: " + ", ".join(FORMATS)),
            "match": (str, "*", "shell-style pattern over weight names"),
        },
        requires=_requires,
        doc="A storage format for the weights that match a pattern.",
    )
)
