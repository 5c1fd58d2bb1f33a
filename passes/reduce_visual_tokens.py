"""reduce-visual-tokens: fewer tokens per camera for the language model, each for a block of factor x factor old ones.

method=pool takes the mean after the connector, with the weights as they are: also where there is no shuffle (pi0,
OpenVLA). method=shuffle enlarges the pixel shuffle before the connector instead and widens its projection to the block
mean (each weight repeated for every old token and divided by their number): the same function with factor^2 times the
projection's weights, a start for training. mass=1 adds log(factor^2) to the logits of a merged key wherever it is
attended to, so that it weighs what its block weighed (Bolya et al. 2022, arXiv 2210.09461); positions=centre gives it
the position of its block's middle, and everything behind the pictures the position it always had. heal=ridge refits
the projection: the mean of tokens of unlike direction is short, so it aims at the block's mean direction at its mean
length; observations held out judge it. Work is saved in the language model and in an expert's attention, none in the
tower.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlac import calibrate
from vlac.artifact import Golden
from vlac.errors import Inapplicable
from vlac.ops import NpArray
from vlac.passes.truncate_layers import ridge
from vlac.policy import Policy
from vlac.registry import Pass, passes
from vlac.weights import LazyTensor

WEIGHT = "connector.proj.weight"
METHODS = {"pool": "token_pool", "shuffle": "scale_factor"}
"""Method -> the field of the family's spec that it multiplies."""
POSITIONS = ("centre", "packed")
HEAL = ("none", "ridge")


def block_mean(weight: NpArray, width: int, shuffle: int, factor: int) -> NpArray:
    """[D, width*s*s] for a shuffle by s = `shuffle` -> [D, width*(s*f)^2] for s*f, giving the mean of f x f tokens.

    Channel (dy*s + dx)*width + c of a shuffled row is channel c of patch (dy, dx) of its block, as in vlac.ops.
    """
    w = weight.reshape(len(weight), 1, shuffle, 1, shuffle, width)
    wide = np.broadcast_to(w, (len(weight), factor, shuffle, factor, shuffle, width))
    return np.ascontiguousarray(wide.reshape(len(weight), -1) / np.float32(factor**2))


def blocks_of(tokens: NpArray, factor: int) -> NpArray:
    """[g*g, D] on a square grid -> [(g/factor)^2, factor^2, D]."""
    side, width = math.isqrt(len(tokens)), tokens.shape[1]
    parts = tokens.reshape(side // factor, factor, side // factor, factor, width).transpose(0, 2, 1, 3, 4)
    return np.asarray(parts.reshape(-1, factor**2, width))


def target(tokens: NpArray, factor: int) -> NpArray:
    """What a merged token should be: the mean direction of its block, at the block's mean length. [n, D], float64."""
    parts = blocks_of(tokens.astype(np.float64), factor)
    mean = parts.mean(axis=1)
    length = np.linalg.norm(parts, axis=2).mean(axis=1)
    return np.asarray(mean * (length / np.maximum(np.linalg.norm(mean, axis=1), 1e-30))[:, None])


def _requires(
    policy: Policy, factor: int, method: str, mass: bool, positions: str, heal: str, samples: int, observations: str
) -> None:
    for key, value, known in (("method", method, METHODS), ("positions", positions, POSITIONS), ("heal", heal, HEAL)):
        if value not in known:
            raise Inapplicable(f"{key}={value!r}; there are: {', '.join(known)}")
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
    if positions == "centre" and getattr(policy.spec, "add_image_special_tokens", False):
        raise Inapplicable(
            "with special tokens around pictures, blocks have no positions of their own", remedy="packed"
        )
    if heal != "none" and samples < 2:
        raise Inapplicable(f"samples={samples}: healing holds observations out to be judged, at least 2 are needed")


def _apply(
    policy: Policy, factor: int, method: str, mass: bool, positions: str, heal: str, samples: int, observations: str
) -> tuple[Policy, Mapping[str, Any]]:
    spec, field, weights = policy.spec, METHODS[method], policy.weights
    if method == "shuffle":
        shuffle, width = spec.scale_factor, spec.vision.hidden_size
        shape = (weights[WEIGHT].shape[0], width * (shuffle * factor) ** 2)
        weights = weights.map(WEIGHT, lambda w: block_mean(w, width, shuffle, factor), shape)
    changes = {field: getattr(spec, field) * factor}
    changes["token_weight"] = spec.token_weight * (factor**2 if mass else 1)
    changes["token_centres"] = spec.token_centres * factor if positions == "centre" else spec.token_centres
    changed = dataclasses.replace(spec, **changes)
    after = policy.replace(spec=changed, weights=weights)
    figures = {
        "tokens_per_camera_before": spec.tokens_per_camera,
        "tokens_per_camera_after": changed.tokens_per_camera,
        "parameters_before": calibrate.size(policy),
        "parameters_after": calibrate.size(after),
    }
    if heal == "none":
        return after, figures
    after, healed = heal_connector(policy, after, factor, calibrate.observations(policy, samples, observations))
    return after, {**figures, **healed}


def heal_connector(
    policy: Policy, after: Policy, factor: int, given: Sequence[Golden]
) -> tuple[Policy, Mapping[str, Any]]:
    """`after` with its last projection before the language model refitted; a quarter of the observations judges it."""
    made = {n.name: n for n in calibrate.draw(policy).stage("vision").nodes}
    weight = made["image_tokens"].inputs[1][1:] if made["image_tokens"].op == "linear" else ""
    if not weight:
        raise Inapplicable("the tokens are pooled already: heal the first reduction", remedy="one larger factor")
    bias = after.weights[f"{weight.removesuffix('weight')}bias"].load() if len(made["image_tokens"].inputs) > 2 else 0.0
    reads = calibrate.linears(calibrate.draw(after), weight)[0][1]
    wants, features = _seen(policy, given, "image_tokens"), _seen(after, given, reads)
    y = [np.concatenate([target(v, factor) - bias for v in group]) for group in wants]
    pooled = [
        [v if len(v) * factor**2 == len(t) else blocks_of(v, factor).mean(axis=1) for v, t in zip(vs, ts, strict=True)]
        for vs, ts in zip(features, wants, strict=True)
    ]
    x = [np.concatenate(group).astype(np.float64) for group in pooled]
    judges, start = max(1, len(given) // 4), after.weights[weight].load().astype(np.float64)
    healed = ridge(np.concatenate(x[:-judges]), np.concatenate(y[:-judges]), start)
    held_x, held_y = np.concatenate(x[-judges:]), np.concatenate(y[-judges:])
    before, fitted = (float(((held_x @ w.T - held_y) ** 2).sum() / (held_y**2).sum()) for w in (start, healed))
    tensor = LazyTensor.of(healed.astype(np.float32), f"{weight} healed")
    figures = {
        "held_out_observations": judges,
        "held_out_token_error_before": round(before, 6),
        "held_out_token_error_after": round(fitted, 6),
    }
    return after.replace(weights=after.weights.with_(**{weight: tensor})), figures


def _seen(policy: Policy, given: Sequence[Golden], value: str) -> list[list[NpArray]]:
    """A value of the vision stage for every camera of each observation."""
    found: list[list[NpArray]] = [[] for _ in given]
    calibrate.watch(policy, given, {"vision": [value]}, lambda i, _, v: found[i].append(np.array(v[value])))
    return found


def _ensures(before: Policy, after: Policy, **_: Any) -> None:
    calibrate.draw(after)


REDUCE_VISUAL_TOKENS = passes.add(
    Pass(
        name="reduce-visual-tokens",
        apply=_apply,
        params={
            "factor": (int, 2, "a new token is the mean of factor x factor old ones"),
            "method": (str, "pool", "pool: after the connector; shuffle: a larger pixel shuffle before it"),
            "mass": (bool, True, "a merged key weighs as much in attention as its block did"),
            "positions": (str, "centre", "centre: of the block's middle; packed: one after another"),
            "heal": (str, "none", "none, or ridge: refit the projection on observations"),
            "samples": (int, 16, "with heal: observations"),
            "observations": (
                str,
                "",
                "a file or folder of them; those beside the checkpoint, or seeded ones without it",
            ),
        },
        requires=_requires,
        ensures=_ensures,
        doc="Fewer image tokens, each the mean of a block.",
    )
)
