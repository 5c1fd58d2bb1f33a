"""Gated MLPs in parts of their hidden units, for engines whose products of a wide weight keep some cores waiting.

Where the weight of a gate outgrows a core's cache, OpenVINO shares a product out by blocks of 64 rows alone: 129 rows
take as long as 192 on two cores. 144 rows times 960 x 2560 in int8 take 1.11 ms, 0.84 ms as two products of half the
width; in bfloat16 2.17 and 1.67. Parts are exact: a hidden unit has rows of its own in the weight, and keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from vlac.dims import bind_dim
from vlac.graph import Node, Program
from vlac.ops import Attr
from vlac.rewrites.clean import prune
from vlac.rewrites.draft import Draft, StageDraft, is_weight, node
from vlac.rewrites.parts import columns

LARGEST = 2_000_000
"""Elements of a part's weight: two megabytes of codes are about what the caches of two cores hold."""
MOST_PARTS = 4
MANY_ROWS = 96
"""Below so many rows (the most there can be) a wide product is as fast: flow steps over 50 rows gain nothing."""
ALIGNED = 32
"""Parts begin at multiples of so many hidden units: the blocks of every format."""
ACTIVATIONS = ("silu", "gelu")


def part_gates(program: Program, formats: Collection[str]) -> Program:
    """act(x A) * (x B), A and B columns of one weight, as a concat of the same over parts of the columns.

    Wherever the weight is read, so that it can be held in parts (`part_projections`). Only weights held in `formats`.
    """
    draft, most = Draft.of(program), program.max_symbols()
    found: list[tuple[StageDraft, Node, Node, list[Node], str]] = []
    parts: dict[str, int] = {}
    for stage in draft.stages:
        types = draft.types(stage)
        for n in [n for n in stage.nodes if n.op == "mul"]:
            if (gate := _gate(stage, n)) is not None:
                linear, activation, slices = gate
                weight, rows = linear.inputs[1], bind_dim(types[n.name].shape[0], most)
                found.append((stage, n, activation, slices, weight))
                held = draft.params[weight[1:]]
                if isinstance(rows, int) and rows >= MANY_ROWS and held.format in formats:
                    parts[weight] = min(MOST_PARTS, -(-math.prod(held.shape) // 2 // LARGEST))
    for stage, n, activation, slices, weight in found:
        if parts.get(weight, 1) > 1:
            _part(stage, n, activation, slices, parts[weight])
    return prune(draft.build())


def _gate(stage: StageDraft, n: Node) -> tuple[Node, Node, list[Node]] | None:
    """(linear, activation, slices of the linear in the order of n's operands) if `n` multiplies the two halves."""
    made = stage.producers()
    operands = [made.get(i) for i in n.inputs]
    activations = [m for m in operands if m is not None and m.op in ACTIVATIONS]
    if None in operands or len(activations) != 1:
        return None
    slices = [made.get(m.inputs[0]) if m.op in ACTIVATIONS else m for m in operands if m is not None]
    cut = [s for s in slices if s is not None and s.op == "slice" and s.attr["axis"] == 1]
    between = (*n.inputs, *activations[0].inputs)
    if len(cut) != 2 or cut[0].inputs != cut[1].inputs or any(stage.single_user(v) is None for v in between):
        return None
    linear = made.get(cut[0].inputs[0])
    if linear is None or linear.op != "linear" or not is_weight(linear.inputs[1]):
        return None
    return (linear, activations[0], cut)


def _part(stage: StageDraft, n: Node, activation: Node, slices: list[Node], parts: int) -> None:
    ends = [columns(s) for s in slices]
    width = ends[0][1] - ends[0][0]
    step = -(-width // parts // ALIGNED) * ALIGNED
    new: list[Node] = []

    def add(base: str, op: str, *inputs: str, **attrs: Attr) -> str:
        new.append(node(stage.fresh(base, [m.name for m in new]), op, *inputs, **attrs))
        return new[-1].name

    products = []
    for at in range(0, width, step):
        operands = []
        for s, (start, stop) in zip(slices, ends, strict=True):
            here = {"axis": 1, "start": start + at, "stop": min(start + at + step, stop)}
            taken = add(f"{s.name}.part", "slice", s.inputs[0], **here)
            if s.name in activation.inputs:
                taken = add(f"{activation.name}.part", activation.op, taken, **activation.attr)
            operands.append(taken)
        products.append(add(f"{n.name}.part", "mul", *operands))
    stage.replace(n, [*new, node(n.name, "concat", *products, axis=1)])
    stage.remove(activation, *slices)
