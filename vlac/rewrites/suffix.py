"""Chunks of fewer actions: where no action looks at a later one, the number of rows that a loop works on is a symbol.

Then the first n actions cost what n actions cost, and are what they would be in the whole chunk.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlac.dims import ROWS, Dim, symbol
from vlac.errors import ProgramError
from vlac.graph import Node, Program, Repeat, Stage, Symbol, check, symbols_in
from vlac.ops import Attr, Type
from vlac.rewrites.draft import Draft, StageDraft, is_weight
from vlac.rewrites.rows import BY_ROW, ELEMENTWISE, is_causal

FIFTHS = 5
MASK = -1
"""Marks a mask that keeps every row from later ones."""


def free_suffix(program: Program) -> Program:
    """In a loop that starts from noise f32[n, A], n becomes the symbol N (up to n) if every value's first N rows depend
    on the first N rows of its operands alone: row-wise ops, attention to other sequences, and causal attention.

    The masks are proved from their block numbers; a loop that lets actions see later ones stays as it is.
    """
    loops = [s for s in program.schedule.steps if isinstance(s, Repeat)]
    if len(loops) != 1 or loops[0].collect or loops[0].until or any(s.name == ROWS for s in program.symbols):
        return program
    step, stage = loops[0], program.stage(loops[0].stage)
    types = dict(stage.inputs)
    extents = {types[into].shape[0] for _, into, initial in step.carry if initial == "noise" and types[into].shape}
    count = extents.pop() if len(extents) == 1 else 0
    carried = [into for _, into, _ in step.carry]
    if not isinstance(count, int) or count < 2 or any(types[into].shape[:1] != (count,) for into in carried):
        return program
    freed = _freed(stage, count, carried)
    draft = Draft.of(program)
    draft.stages[draft.stages.index(draft.stage(stage.name))] = freed
    draft.symbols = (*program.symbols, Symbol(ROWS, buckets(count)))
    try:
        result = check(draft.build())
    except ProgramError:
        return program
    kept = first_rows(freed, draft.types(freed))
    bound = result.bind({ROWS: count}).stage(stage.name)
    causal = kept is not None and all(kept.get(out) == 0 for out, _, _ in step.carry)
    return result if causal and bound == stage else program


def buckets(count: int) -> tuple[int, ...]:
    """Numbers of rows that a loop may be built for: fifths of a chunk."""
    return tuple(sorted({-(-count * k // FIFTHS) for k in range(1, FIFTHS + 1)}))


def _freed(stage: Stage, count: int, carried: list[str]) -> StageDraft:
    """The stage with N wherever a value is made with `count` rows."""
    n = symbol(ROWS)

    def freed(node: Node) -> Node:
        a: dict[str, Attr] = dict(node.attrs)
        if node.op == "arange" and isinstance(a["start"], int) and a["stop"] == a["start"] + count:
            a["stop"] = n + a["start"]
        elif node.op == "full" and isinstance(a["shape"], tuple) and a["shape"][0] == count:
            a["shape"] = (n, *a["shape"][1:])
        elif node.op == "tile" and a["rows"] == count:
            a["rows"] = n
        return Node(node.name, node.op, node.inputs, tuple((k, a[k]) for k, _ in node.attrs))

    inputs = [(i, Type(t.dtype, (n, *t.shape[1:])) if i in carried else t) for i, t in stage.inputs]
    return StageDraft(stage.name, inputs, [freed(node) for node in stage.nodes], list(stage.outputs))


def first_rows(stage: StageDraft, types: Mapping[str, Type]) -> dict[str, Dim] | None:
    """For every value with N rows, how many rows of something else stand before them (MASK for causal masks); None if
    some value's first rows need later ones."""
    made = stage.producers()
    found: dict[str, Dim] = {i: 0 for i, t in stage.inputs if _holds(t)}
    for n in stage.nodes:
        if not _holds(types[n.name]) and not any(i in found for i in n.inputs):
            continue
        before = _before(n, found, types, made)
        if before is None:
            return None
        found[n.name] = before
    return found


def _holds(t: Type) -> bool:
    return ROWS in symbols_in(t.shape)


def _before(n: Node, found: Mapping[str, Dim], types: Mapping[str, Type], made: Mapping[str, Node]) -> Dim | None:
    rows = types[n.name].shape[:1]
    if n.op in ("arange", "full", "tile"):
        return 0 if rows == (symbol(ROWS),) else None
    if n.op == "concat" and n.attr["axis"] == 0:
        *others, last = n.inputs
        if any(i in found for i in others) or found.get(last) != 0:
            return None
        total: Dim = 0
        for i in others:
            total = types[i].shape[0] + total
        return total
    if n.op == "attention_mask":
        query, keys = found.get(n.inputs[0]), [found.get(i) for i in n.inputs[1:]]
        if query != 0:
            return None
        if keys == [None, None]:
            return 0  # each row says what it sees of another sequence
        return MASK if None not in keys and is_causal(n.name, symbol(ROWS), made) else None
    if n.op == "attention":
        query, keys = found.get(n.inputs[0]), [found.get(i) for i in n.inputs[1:3]]
        mask = found.get(n.inputs[3]) if len(n.inputs) > 3 else None
        if query != 0:
            return None
        if keys == [None, None]:
            return 0 if mask in (None, 0) else None
        return 0 if keys[0] == keys[1] is not None and mask == MASK else None
    by_row = n.op in (*BY_ROW, *ELEMENTWISE, "rope", "cast", "cumsum")
    if not by_row and not (n.op in ("slice", "concat") and n.attr["axis"] == 1):
        return None
    read = {found[i] for i in n.inputs if i in found}
    same = all(i in found or is_weight(i) or types[i].shape[:1] != rows for i in n.inputs)
    return 0 if read == {0} and rows == (symbol(ROWS),) and same else None
