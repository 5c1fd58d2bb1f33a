"""reduce-visual-tokens: fewer tokens per camera for the language model, by a larger pixel shuffle before the connector.

factor=2 makes one token of each 2 x 2 block of a camera's tokens: their mean. method=pool takes the mean after the
connector, with the weights as they are. method=shuffle enlarges the pixel shuffle before the connector instead and
widens its projection to the block mean (each weight repeated for every old token and divided by their number): the same
function with factor^2 times the projection's weights, a start for further training. Nothing is fitted. It saves work in
the language model and in the expert's attention, none in the vision tower. What one key that stands for several weighs
in attention (the log of their number on its logit) is not corrected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlac import calibrate
from vlac.errors import Inapplicable
from vlac.ops import NpArray
from vlac.policy import Policy
from vlac.registry import Pass, passes

WEIGHT = "connector.proj.weight"
METHODS = {"pool": "token_pool", "shuffle": "scale_factor"}
"""Method -> the field of the family's spec that it multiplies."""


def block_mean(weight: NpArray, width: int, shuffle: int, factor: int) -> NpArray:
    """[D, width*s*s] for a shuffle by s = `shuffle` -> [D, width*(s*f)^2] for s*f, giving the mean of f x f tokens.

    Channel (dy*s + dx)*width + c of a shuffled row is channel c of patch (dy, dx) of its block, as in vlac.ops.
    """
    w = weight.reshape(len(weight), 1, shuffle, 1, shuffle, width)
    wide = np.broadcast_to(w, (len(weight), factor, shuffle, factor, shuffle, width))
    return np.ascontiguousarray(wide.reshape(len(weight), -1) / np.float32(factor**2))


def _requires(policy: Policy, factor: int, method: str) -> None:
    if method not in METHODS:
        raise Inapplicable(f"method={method!r}; there are: {', '.join(METHODS)}")
    vision, field = getattr(policy.spec, "vision", None), METHODS[method]
    if vision is None or not hasattr(policy.spec, field):
        raise Inapplicable(
            f"{policy.family} draws no {field} of image tokens", remedy="leave it out, or another method"
        )
    if method == "shuffle" and getattr(policy.spec, "token_pool", 1) > 1:
        raise Inapplicable("the tokens are pooled already; the shuffle comes before", remedy="method=pool")
    side = math.isqrt(policy.spec.tokens_per_camera)
    legal = [f for f in range(2, side + 1) if side % f == 0]
    if factor not in legal:
        raise Inapplicable(
            f"factor={factor} for {side}x{side} tokens per camera; legal: {', '.join(map(str, legal)) or 'none'}"
        )


def _apply(policy: Policy, factor: int, method: str) -> tuple[Policy, Mapping[str, Any]]:
    spec, field, weights = policy.spec, METHODS[method], policy.weights
    if method == "shuffle":
        shuffle, width = spec.scale_factor, spec.vision.hidden_size
        shape = (weights[WEIGHT].shape[0], width * (shuffle * factor) ** 2)
        weights = weights.map(WEIGHT, lambda w: block_mean(w, width, shuffle, factor), shape)
    changed = dataclasses.replace(spec, **{field: getattr(spec, field) * factor})
    after = policy.replace(spec=changed, weights=weights)
    figures = {
        "tokens_per_camera_before": spec.tokens_per_camera,
        "tokens_per_camera_after": changed.tokens_per_camera,
        "parameters_before": calibrate.size(policy),
        "parameters_after": calibrate.size(after),
    }
    return after, figures


def _ensures(before: Policy, after: Policy, factor: int, method: str) -> None:
    calibrate.draw(after)


REDUCE_VISUAL_TOKENS = passes.add(
    Pass(
        name="reduce-visual-tokens",
        apply=_apply,
        params={
            "factor": (int, 2, "a new token is the mean of factor x factor old ones"),
            "method": (str, "pool", "pool: after the connector; shuffle: a larger pixel shuffle before it"),
        },
        requires=_requires,
        ensures=_ensures,
        doc="Fewer image tokens, each the mean of a block.",
    )
)
