"""As many keys for a few actions as for the whole chunk, for engines whose softmax sums in an order of its own."""

from __future__ import annotations

from vlac.dims import ROWS, Affine, symbol
from vlac.graph import Node, Program
from vlac.ops import Type
from vlac.rewrites.clean import prune, share
from vlac.rewrites.draft import Draft, StageDraft, node


def level_suffix_keys(program: Program) -> Program:
    """Attention of N rows to others and to themselves gets masked rows of zeros behind, up to the whole chunk's N.

    Exact: a masked key has the probability 0. An engine that splits sums by how many keys there are then adds the same
    numbers in the same order for the first actions as for all of them; where activations are rounded coarsely, a last
    bit there moves a chunk by a hundredth.
    """
    most = program.max_symbols().get(ROWS)
    if most is None:
        return program
    draft = Draft.of(program)
    for stage in draft.stages:
        types = draft.types(stage)
        for n in [n for n in stage.nodes if n.op == "attention" and len(n.inputs) == 4]:
            keys, mask = types[n.inputs[1]].shape[0], types[n.inputs[3]]
            if mask.dtype == "bool" and isinstance(keys, Affine) and dict(keys.terms).get(ROWS) == 1:
                _level(stage, n, types, most)
    return prune(share(draft.build()))


def _level(stage: StageDraft, n: Node, types: dict[str, Type], most: int) -> None:
    query, *operands = n.inputs
    rest = most - symbol(ROWS) + 1  # an extent is never 0
    longer = []
    for operand, axis in zip(operands, (0, 0, 1), strict=True):
        held = types[operand]
        shape = (rest, held.shape[1]) if axis == 0 else (held.shape[0], rest)
        longer.append(_joined(stage, n, operand, node("", "full", shape=shape, value=0.0, dtype=held.dtype), axis))
    stage.replace(n, [Node(n.name, n.op, (query, *longer), n.attrs)])


def _joined(stage: StageDraft, before: Node, operand: str, zeros: Node, axis: int) -> str:
    """The operand with zeros behind it; `share` makes one of equal ones."""
    made = stage.producers().get(operand)
    parts = made.inputs if made is not None and made.op == "concat" and made.attr["axis"] == axis else (operand,)
    filler = Node(stage.fresh("zeros"), zeros.op, (), zeros.attrs)
    name = stage.fresh(f"{operand}.level", [filler.name])
    stage.replace(before, [filler, node(name, "concat", *parts, filler.name, axis=axis), before])
    return name
