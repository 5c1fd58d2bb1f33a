"""quantize-weights: a storage format for the weights whose names match a pattern, over the target's own plan.

Nothing is rounded here: the format joins the policy's precision plan (the last match wins), it lands on the lowered
program, the target stores it, and the census in the manifest says what each tensor became. Patterns are therefore over
the lowered program's names (`vlac inspect --program`), where q, k, v and gate, up are fused; a pattern that acts on
nothing is refused there, with the names there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlac.errors import Inapplicable
from vlac.formats import FORMATS
from vlac.policy import Policy
from vlac.registry import Pass, passes


def _requires(policy: Policy, format: str, match: str) -> None:
    if format not in FORMATS:
        raise Inapplicable(f"no storage format {format!r}; there are: {', '.join(FORMATS)}")
    if not match:
        raise Inapplicable("match= is empty", remedy="leave it out for all weights, or give a pattern: match=expert.*")


def _apply(policy: Policy, format: str, match: str) -> tuple[Policy, Mapping[str, Any]]:
    figures = {"bits_per_value": round(FORMATS[format].bits, 4)}
    return policy.replace(precision=(*policy.precision, (match, format))), figures


QUANTIZE_WEIGHTS = passes.add(
    Pass(
        name="quantize-weights",
        apply=_apply,
        params={
            "format": (str, None, "storage format: " + ", ".join(FORMATS)),
            "match": (str, "*", "shell-style pattern over the lowered program's weight names"),
        },
        requires=_requires,
        doc="A storage format for the weights that match a pattern.",
    )
)
