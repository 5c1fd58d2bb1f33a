"""Weights in bfloat16 of linears that read pictures: each the sum of two such numbers."""

from __future__ import annotations

import numpy as np

from vlac.graph import Node, Param, Program
from vlac.layouts import bf16_from_f32, f32_from_bf16
from vlac.ops import NpArray, Type
from vlac.rewrites.clean import prune
from vlac.rewrites.draft import Draft, is_weight, node, static_shape, stem

FORMAT = "bf16"


def pair_weights(program: Program) -> Program:
    """x W^T of a patch of pixels, or of tokens side by side in one row, as [x x] [W_high W_low]^T.

    W_high is W as bfloat16, W_low what that leaves, as bfloat16: together 16 bits of mantissa. What these linears read
    is smooth, so the rounding errors of a row's weights add up instead of cancelling, and make half of the drift of a
    program that is bfloat16 otherwise; they do 0.4 % of SmolVLA's multiplications each. One product adds both halves.
    """
    draft = Draft.of(program)
    pairs: dict[str, str] = {}
    for stage in draft.stages:
        types, made = draft.types(stage), stage.producers()
        for n in [n for n in stage.nodes if n.op == "linear" and is_weight(n.inputs[1])]:
            name, source = n.inputs[1][1:], made.get(n.inputs[0])
            if draft.params[name].format != FORMAT or source is None or not reads_pictures(source, types):
                continue
            if name not in pairs:
                rows, width = draft.params[name].shape
                lazy = draft.lazy(name).map_rows(halves, (2 * width,))
                pairs[name] = draft.add_param(f"{stem(name)}.pair.weight", lazy)
                draft.params[pairs[name][1:]] = Param((rows, 2 * width), FORMAT)
            twice = node(stage.fresh(f"{n.inputs[0]}.twice"), "concat", n.inputs[0], n.inputs[0], axis=1)
            stage.replace(n, [twice, Node(n.name, n.op, (twice.name, pairs[name], *n.inputs[2:]), n.attrs)])
    return prune(draft.build())


def reads_pictures(n: Node, types: dict[str, Type]) -> bool:
    """Whether a value is made of patches, or of rows that hold several tokens each."""
    if n.op == "patchify":
        return True
    before, after = static_shape(types[n.inputs[0]]), static_shape(types[n.name])
    if n.op not in ("reshape", "pixel_shuffle") or before is None or after is None or len(before) != 2:
        return False
    return len(after) == 2 and after[1] > before[1] and after[1] % before[1] == 0


def halves(w: NpArray) -> NpArray:
    """w [n, k] f32 -> [n, 2 k]: w as bfloat16, and what that leaves."""
    high = f32_from_bf16(bf16_from_f32(w))
    return np.concatenate([high, w - high], axis=1)
