"""merge-in-tower: fewer rows inside the vision tower, merged where they are alike, and put back before the connector.

Token merging (ToMe, Bolya et al. 2022, arXiv 2210.09461) with a schedule that is fixed when compiling: before each of
the layers `at`, a share of the rows (every second one is a candidate) is merged into the row whose keys are most like
its own on average over observations, by the mean of what both stand for; from there on a row weighs in attention what
it stands for. Behind the last layer every patch gets the row it was merged into, so that a pixel shuffle finds its
grid. No matching runs at run time: the merges are matrices, [rows after, rows before], kept in float32. It saves work
in the layers behind the first merge, with the square in attention. Costs: drift, measured; and the integer attention of
onnx-int8, which takes no weights. Apply it behind quantize-weights, which would round the matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlac import calibrate
from vlac.artifact import Golden
from vlac.errors import Inapplicable
from vlac.ops import NpArray
from vlac.policy import Policy
from vlac.registry import Pass, passes
from vlac.weights import LazyTensor

PICTURES = 64
"""Similarities are averaged over at most this many pictures."""


def layers_of(at: str, count: int) -> tuple[int, ...]:
    """ "4+8" -> (4, 8); nothing: a third and two thirds of the way."""
    if not at:
        return tuple(sorted({max(1, count // 3), max(1, 2 * count // 3)} - {count}))
    try:
        found = tuple(int(part) for part in at.split("+"))
    except ValueError:
        found = ()
    if not found or sorted(set(found)) != list(found) or not 1 <= found[0] <= found[-1] < count:
        raise Inapplicable(f"at={at!r}: rising layers of 1 to {count - 1}, as 4+8")
    return found


def matching(similar: NpArray, merged: int, checker: NpArray) -> NpArray:
    """For every row the row it goes to, itself where it stays: the `merged` rows among `checker` that have the most
    similar partner outside of it. similar [n, n]."""
    result = np.arange(len(similar))
    mine, others = np.flatnonzero(checker), np.flatnonzero(~checker)
    best = others[similar[np.ix_(mine, others)].argmax(axis=1)]
    order = np.argsort(-similar[mine, best], kind="stable")[:merged]
    result[mine[order]] = best[order]
    return result


def matrix(to: NpArray, sizes: NpArray) -> tuple[NpArray, NpArray, NpArray]:
    """(merge matrix [m, n], sizes [m] ascending, new row of each old one [n]) for rows that go to `to`."""
    kept = np.unique(to)
    total = np.array([sizes[to == k].sum() for k in kept])
    order = np.argsort(total, kind="stable")
    place = {int(k): i for i, k in enumerate(kept[order])}
    new = np.array([place[int(t)] for t in to])
    m = np.zeros((len(kept), len(to)))
    m[new, np.arange(len(to))] = sizes
    return m / m.sum(axis=1, keepdims=True), total[order], new


def runs_of(sizes: NpArray) -> tuple[tuple[int, int], ...]:
    """((rows, size), ...) of ascending sizes."""
    values, counts = np.unique(sizes, return_counts=True)
    return tuple((int(n), int(v)) for v, n in zip(values, counts, strict=True))


def alike(policy: Policy, layer: int, given: Sequence[Golden]) -> NpArray:
    """Mean cosine of the keys of every two rows that enter a layer of the tower, [n, n], over pictures."""
    program = calibrate.draw(policy)
    (at,) = calibrate.linears(program, f"vision.layers.{layer}.self_attn.k_proj.weight")
    total: list[NpArray] = []

    def see(_: int, __: str, values: Mapping[str, NpArray]) -> None:
        k = values[at[2]].astype(np.float64)
        k /= np.maximum(np.linalg.norm(k, axis=1, keepdims=True), 1e-30)
        if len(total) < PICTURES:
            total.append(k @ k.T)

    calibrate.watch(policy, given, {at[0]: [at[2]]}, see)
    return np.asarray(np.mean(total, axis=0))


def _drawn(policy: Policy) -> bool:
    """Whether the family's drawing reads the merges of the spec: tried with one that merges nothing."""
    vision = policy.spec.vision
    if not hasattr(vision, "merges") or vision.merges:
        return hasattr(vision, "merges")
    rows = vision.grid**2
    same = LazyTensor((rows, rows), lambda: np.eye(rows, dtype=np.float32), source="identity")
    spec = dataclasses.replace(policy.spec, vision=dataclasses.replace(vision, merges=((0, ((rows, 1),)),)))
    weights = policy.weights.with_(**{"vision.merge.0": same, "vision.unmerge": same})
    return "vision.unmerge" in calibrate.draw(policy.replace(spec=spec, weights=weights)).params


def _requires(policy: Policy, at: str, merge: float, samples: int, observations: str) -> None:
    vision = getattr(policy.spec, "vision", None)
    if vision is None or not _drawn(policy):
        raise Inapplicable(f"{policy.family} draws no merges in its tower", remedy="leave merge-in-tower out")
    if vision.merges:
        raise Inapplicable("rows are merged in the tower already", remedy="one merge-in-tower with more layers in at=")
    if not 0 < merge <= 0.5:
        raise Inapplicable(f"merge={merge}: above 0, and at most 0.5 (every second row is a candidate)")
    if vision.num_hidden_layers < 2:
        raise Inapplicable(f"a tower of {vision.num_hidden_layers} layer has none behind a merge")
    layers_of(at, vision.num_hidden_layers)
    if int(merge * vision.grid**2) < 1:
        raise Inapplicable(f"merge={merge} of {vision.grid**2} patches is none")


def _apply(policy: Policy, at: str, merge: float, samples: int, observations: str) -> tuple[Policy, Mapping[str, Any]]:
    vision, given = policy.spec.vision, calibrate.observations(policy, samples, observations)
    side = vision.grid
    rows = np.add.outer(np.arange(side), np.arange(side)).reshape(-1)
    checker, sizes, where = rows % 2 == 1, np.ones(side**2, dtype=int), np.arange(side**2)
    after, merges = policy, []
    tensors: dict[str, LazyTensor] = {}
    for layer in layers_of(at, vision.num_hidden_layers):
        to = matching(alike(after, layer, given), int(merge * len(sizes)), checker)
        m, sizes, new = matrix(to, sizes)
        merges.append((layer, runs_of(sizes)))
        where, checker = new[where], np.arange(len(sizes)) % 2 == 1
        unmerge = np.zeros((side**2, len(sizes)))
        unmerge[np.arange(side**2), where] = 1
        tensors[f"vision.merge.{layer}"] = LazyTensor.of(m, f"vision.merge.{layer}")
        tensors["vision.unmerge"] = LazyTensor.of(unmerge, "vision.unmerge")
        spec = dataclasses.replace(policy.spec, vision=dataclasses.replace(vision, merges=tuple(merges)))
        after = policy.replace(spec=spec, weights=policy.weights.with_(**tensors))
    kept = ("vision.merge.*", "f32"), ("vision.unmerge", "f32")
    figures = {
        "layers": "+".join(str(i) for i, _ in merges),
        "rows_before": side**2,
        "rows_after": "+".join(str(sum(n for n, _ in runs)) for _, runs in merges),
        "largest_merged": int(sizes.max()),
    }
    return after.replace(precision=(*policy.precision, *kept)), figures


def _ensures(before: Policy, after: Policy, **_: Any) -> None:
    """The family draws the merges, and does not pass over them."""
    if "vision.unmerge" not in calibrate.draw(after).params:
        raise Inapplicable(f"{after.family} draws no merges in its tower", remedy="leave merge-in-tower out")


MERGE_IN_TOWER = passes.add(
    Pass(
        name="merge-in-tower",
        apply=_apply,
        params={
            "at": (
                str,
                "",
                "layers before which rows are merged, as 4+8; a third and two thirds of the way without it",
            ),
            "merge": (float, 0.25, "share of the rows that is merged each time, at most 0.5"),
            "samples": (int, 8, "observations to find what is alike"),
            "observations": (
                str,
                "",
                "a file or folder of them; those beside the checkpoint, or seeded ones without it",
            ),
        },
        requires=_requires,
        ensures=_ensures,
        doc="Fewer rows inside the vision tower, merged where they are alike.",
    )
)
