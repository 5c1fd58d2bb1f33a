"""Attention's factor on scores, taken into the weights of the queries."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from vlac.graph import Node, Param, Program
from vlac.ops import NpArray
from vlac.rewrites.clean import prune
from vlac.rewrites.draft import Draft, StageDraft, is_weight, node


def fold_score_scales(program: Program) -> Program:
    """Softmax(q k^T s) v with q = x W^T + b, or some columns of that, rotated or not: s goes into those rows of W and b
    where it is a power of two.

    A power of two changes no bit of any product or sum (numbers below 1e-37 aside), nor codes whose scales are float32;
    other factors, and float16 weights, whose small numbers would lose bits, are left to attention. For engines that
    have no factor in their attention and multiply the queries: 0.6 % of SmolVLA's vision tower in OpenVINO's profile.
    """
    draft = Draft.of(program)
    for stage in draft.stages:
        for n in [n for n in stage.nodes if n.op == "attention"]:
            scale = float(n.attr["scale"])
            found = _projection(draft, stage, n)
            if found is None or scale == 1 or scale <= 0 or math.frexp(scale)[0] != 0.5:
                continue
            made, start, stop = found
            for operand in made.inputs[1:]:
                _scale_rows(draft, operand[1:], start, stop, scale)
            stage.replace(n, [node(n.name, n.op, *n.inputs, **{**n.attr, "scale": 1.0})])
    return prune(draft.build())


def _projection(draft: Draft, stage: StageDraft, attention: Node) -> tuple[Node, int, int] | None:
    """The linear that makes the queries, and which of its columns they are, if nothing else reads those columns nor
    its parameters."""
    made, value, reader = stage.producers(), attention.inputs[0], attention
    while (n := made.get(value)) is not None and stage.single_user(value) is reader and n.op in ("rope", "slice"):
        value, reader = n.inputs[0], n
        if n.op == "slice":
            break
    linear = made.get(value)
    if linear is None or linear.op != "linear" or value in stage.outputs:
        return None
    if not all(is_weight(i) and draft.reads(i[1:]) == 1 for i in linear.inputs[1:]):
        return None
    if any(draft.params[i[1:]].format == "f16" for i in linear.inputs[1:]):
        return None
    if reader.op != "slice":
        return (linear, 0, draft.params[linear.inputs[1][1:]].shape[0]) if stage.single_user(value) is reader else None
    start, stop = reader.attr["start"], reader.attr["stop"]
    others = [r for r in stage.nodes if value in r.inputs and r is not reader]
    apart = reader.attr["axis"] == 1 and all(_apart(r, start, stop) for r in others)
    return (linear, start, stop) if apart else None


def _apart(other: Node, start: int, stop: int) -> bool:
    """Whether this node takes columns of which none lies in start..stop - 1."""
    if other.op != "slice" or other.attr["axis"] != 1:
        return False
    return bool(other.attr["stop"] <= start or other.attr["start"] >= stop)


def _scale_rows(draft: Draft, name: str, start: int, stop: int, scale: float) -> None:
    """The parameter with rows start..stop - 1 multiplied, in the format it has."""
    lazy, held = draft.lazy(name), draft.params[name]
    factors = np.ones((held.shape[0],) + (1,) * (len(held.shape) - 1), np.float32)
    factors[start:stop] = scale

    def scaled(w: NpArray) -> NpArray:
        return np.asarray(w * factors, np.float32)

    draft.weights[name] = replace(lazy.map(scaled), importance=lazy.importance)
    draft.params[name] = Param(held.shape, held.format)
