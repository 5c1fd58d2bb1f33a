"""Projections that were made one, taken apart again for engines whose copies of the parts cost more than they save."""

from __future__ import annotations

from collections.abc import Collection

from vlac.graph import Node, Param, Program
from vlac.ops import Type
from vlac.rewrites.clean import prune
from vlac.rewrites.draft import Draft, StageDraft, is_weight, node, stem

MANY_ROWS = 256
"""From which it pays: a product of so many rows is as fast for each part, and its result is megabytes."""


def part_projections(program: Program, formats: Collection[str]) -> Program:
    """The reverse of fuse_projections over many rows: linear and slices become one linear for every slice.

    ONNX Runtime and OpenVINO copy every slice of columns: 1 to 2 % of SmolVLA's vision tower in their profiles. Over
    few rows one product is the faster way. Each row of the weight goes to the slices that take it, so that results are
    the same bits as long as the engine's kernels are. Only weights held in `formats`.
    """
    draft = Draft.of(program)
    for stage in draft.stages:
        types = draft.types(stage)
        for n in [n for n in stage.nodes if n.op == "linear"]:
            slices = _slices(draft, stage, n, types)
            if slices and draft.params[n.inputs[1][1:]].format in formats:
                for k, cut in enumerate(slices):
                    operands = [_rows(draft, i, k, cut) for i in n.inputs[1:]]
                    stage.replace(cut, [node(cut.name, "linear", n.inputs[0], *operands)])
                stage.remove(n)
    return prune(draft.build())


def _slices(draft: Draft, stage: StageDraft, n: Node, types: dict[str, Type]) -> list[Node]:
    """The slices of columns that are all that reads this linear of many rows; [] if it must stay whole."""
    rows = types[n.name].shape[0]
    if n.name in stage.outputs or not isinstance(rows, int) or rows < MANY_ROWS:
        return []
    if not all(is_weight(i) and draft.reads(i[1:]) == 1 for i in n.inputs[1:]):
        return []
    readers = [r for r in stage.nodes if n.name in r.inputs]
    known = all(
        r.op == "slice" and r.attr["axis"] == 1 and all(isinstance(r.attr[k], int) for k in ("start", "stop"))
        for r in readers
    )
    return readers if known else []


def _rows(draft: Draft, operand: str, part: int, cut: Node) -> str:
    """Rows of a weight (or entries of a bias) as a parameter of their own."""
    name = operand[1:]
    base, _, kind = name.rpartition(".")
    new = draft.add_param(
        f"{base or stem(name)}.part{part}.{kind}", draft.lazy(name).cut(cut.attr["start"], cut.attr["stop"])
    )
    draft.params[new[1:]] = Param(draft.params[new[1:]].shape, draft.params[name].format)
    return new
