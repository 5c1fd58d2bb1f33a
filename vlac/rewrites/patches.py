"""A pixel shuffle becomes free when patches are cut in its order from the start."""

from __future__ import annotations

import math

import numpy as np

from vlac.dims import Dim
from vlac.graph import Node, Program
from vlac.ops import NpArray, Type
from vlac.rewrites.draft import Draft, StageDraft, is_weight, node

ROW_WISE = ("layer_norm", "rms_norm", "linear", "silu", "sigmoid", "tanh", "relu", "gelu", "softmax", "scale")
ELEMENTWISE = ("add", "sub", "mul")


def shuffle_as_patch_order(program: Program) -> Program:
    """patchify(block=1) ... pixel_shuffle(f) -> patchify(block=f) ... reshape.

    Holds where everything between treats rows alike (row-wise ops, unmasked attention over all of them), for then a
    permutation of the rows passes through. Tables with one row per patch (positions) are permuted along.
    """
    draft = Draft.of(program)
    for stage in draft.stages:
        types = draft.types(stage)
        for patches in [n for n in stage.nodes if n.op == "patchify" and n.attr["block"] == 1]:
            region = _region(stage, types, patches)
            if region is not None:
                _reorder(draft, stage, types, patches, *region)
    return draft.build()


def _region(
    stage: StageDraft, types: dict[str, Type], patches: Node
) -> tuple[int, list[tuple[Node, int]], list[Node]] | None:
    """The factor, the (node, operand) places that add a table of rows, and the shuffles; None if it cannot be done."""
    rows = types[patches.name].shape[0]
    inside = {patches.name}
    tables: list[tuple[Node, int]] = []
    shuffles: list[Node] = []
    for n in stage.nodes:
        if not any(i in inside for i in n.inputs):
            continue
        if n.op == "pixel_shuffle":
            shuffles.append(n)
        elif _keeps_rows_apart(n, inside, types, rows):
            if n.op in ELEMENTWISE:
                tables += [(n, k) for k, i in enumerate(n.inputs) if is_weight(i)]
            inside.add(n.name)
        else:
            return None
    factors = {n.attr["factor"] for n in shuffles}
    if len(factors) != 1 or inside & set(stage.outputs):
        return None
    return factors.pop(), tables, shuffles


def _keeps_rows_apart(n: Node, inside: set[str], types: dict[str, Type], rows: Dim) -> bool:
    """Whether permuting the rows of the operands inside the region permutes the rows of the result, and no more."""
    if n.op in ROW_WISE:
        return n.inputs[0] in inside and all(is_weight(i) for i in n.inputs[1:])
    if n.op in ELEMENTWISE:
        # a value from elsewhere must be the same for every row
        return n.inputs[0] in inside and all(i in inside or is_weight(i) or _one_row(types[i]) for i in n.inputs[1:])
    if n.op == "attention":
        return len(n.inputs) == 3 and all(i in inside for i in n.inputs)
    if n.op in ("slice", "concat"):
        return n.attr["axis"] == 1 and all(i in inside for i in n.inputs)
    return n.op == "pad"


def _one_row(t: Type) -> bool:
    return len(t.shape) < 2 or t.shape[0] == 1


def _reorder(
    draft: Draft,
    stage: StageDraft,
    types: dict[str, Type],
    patches: Node,
    factor: int,
    tables: list[tuple[Node, int]],
    shuffles: list[Node],
) -> None:
    rows = types[patches.name].shape[0]
    assert isinstance(rows, int)
    order = block_order(math.isqrt(rows), factor)
    patch = patches.attr["patch"]
    stage.replace(patches, [node(patches.name, "patchify", *patches.inputs, patch=patch, block=factor)])
    for n, k in tables:
        shape = draft.params[n.inputs[k][1:]].shape
        if len(shape) == 2 and shape[0] == rows:
            operands = list(n.inputs)
            operands[k] = draft.redefine(n.inputs[k], lambda t: t[order])
            stage.replace(n, [Node(n.name, n.op, tuple(operands), n.attrs)])
    for n in shuffles:
        stage.replace(n, [node(n.name, "reshape", *n.inputs, shape=types[n.name].shape)])


def block_order(grid: int, block: int) -> NpArray:
    """Row-major patch index of each row in block order, i32 [grid*grid]: blocks row-major, patches row-major inside."""
    index = np.arange(grid * grid, dtype=np.int32).reshape(grid // block, block, grid // block, block)
    return index.transpose(0, 2, 1, 3).reshape(-1)
