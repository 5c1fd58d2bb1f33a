"""Projections that were made one, taken apart again for engines whose copies of the parts cost more than they save."""

from __future__ import annotations

from collections.abc import Callable, Collection

from vlac.graph import Node, Param, Program
from vlac.ops import Type
from vlac.rewrites.clean import prune
from vlac.rewrites.draft import Draft, StageDraft, is_weight, node, stem

Where = Callable[[StageDraft, Node, Type, str], bool]
"""(stage, linear, its type, format of its weight) -> whether it is better in parts."""

MANY_ROWS = 256
"""From which it pays everywhere: a product of so many rows is as fast for each part, and its result is megabytes."""


def many_rows(stage: StageDraft, n: Node, made: Type, form: str) -> bool:
    """Whether a product has so many rows whatever is asked for."""
    rows = made.shape[0]
    return isinstance(rows, int) and rows >= MANY_ROWS


def part_projections(program: Program, formats: Collection[str], where: Where = many_rows) -> Program:
    """The reverse of fuse_projections: linear and slices become one linear for every slice.

    ONNX Runtime and OpenVINO copy every slice of columns: 1 to 2 % of SmolVLA's vision tower in their profiles, and
    more of its flow in OpenVINO, where products take the gate's activation in once nothing stands between.
    Each row of the weight goes to the slices that take it, so that results are the same bits as long as the engine's
    kernels are. Only weights held in `formats`, and only those that all their linears take apart in the same way,
    `where` at least one of them is better so.
    """
    draft = Draft.of(program)
    for operands in dict.fromkeys(n.inputs[1:] for s in draft.stages for n in s.nodes if n.op == "linear"):
        if not all(is_weight(i) for i in operands) or (form := draft.params[operands[0][1:]].format) not in formats:
            continue
        users = [(s, n) for s in draft.stages for n in s.nodes if n.op == "linear" and n.inputs[1:] == operands]
        if any(draft.reads(i[1:]) != len(users) for i in operands):
            continue
        slices = [_slices(s, n) for s, n in users]
        cuts = sorted({columns(r) for readers in slices for r in readers})
        if not cuts or any(sorted(map(columns, readers)) != cuts for readers in slices):
            continue
        if any(where(s, n, draft.types(s)[n.name], form) for s, n in users):
            made = {cut: [_rows(draft, i, k, cut) for i in operands] for k, cut in enumerate(cuts)}
            for (stage, n), readers in zip(users, slices, strict=True):
                for r in readers:
                    stage.replace(r, [node(r.name, "linear", n.inputs[0], *made[columns(r)])])
                stage.remove(n)
    return prune(draft.build())


def _slices(stage: StageDraft, n: Node) -> list[Node]:
    """The slices of columns that are all that reads this linear; [] if it must stay whole."""
    readers = [r for r in stage.nodes if n.name in r.inputs]
    known = all(
        r.op == "slice" and r.attr["axis"] == 1 and all(isinstance(r.attr[k], int) for k in ("start", "stop"))
        for r in readers
    )
    return readers if known and n.name not in stage.outputs else []


def columns(n: Node) -> tuple[int, int]:
    """First and last + 1 of the columns that a slice takes."""
    start, stop = n.attr["start"], n.attr["stop"]
    assert isinstance(start, int) and isinstance(stop, int)
    return start, stop


def _rows(draft: Draft, operand: str, part: int, cut: tuple[int, int]) -> str:
    """Rows of a weight (or entries of a bias) as a parameter of their own."""
    name = operand[1:]
    base, _, kind = name.rpartition(".")
    new = draft.add_param(f"{base or stem(name)}.part{part}.{kind}", draft.lazy(name).cut(*cut))
    draft.params[new[1:]] = Param(draft.params[new[1:]].shape, draft.params[name].format)
    return new
