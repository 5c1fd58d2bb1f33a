"""What a policy asks of linears beside their weights: a bias where the family draws none, inputs rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from vlac.errors import Unsupported
from vlac.graph import Node, Param, Program
from vlac.ops import NpArray
from vlac.rewrites.draft import Draft, StageDraft, node
from vlac.rewrites.precision import roles
from vlac.weights import LazyTensor

ROUNDINGS = ("int8-token", "int8-block32", "int8-tensor")
"""Of activations: a scale per row, per 32 values of a row, or one fixed for all."""

OPERANDS = ("queries", "keys")


def add_biases(program: Program, biases: Mapping[str, LazyTensor]) -> Program:
    """Linears with these weights (name -> bias [n]) get a bias that the family did not draw. On the drawn program."""
    if not biases:
        return program
    draft = Draft.of(program)
    for weight, bias in biases.items():
        name = bias_name(weight)
        draft.params[name], draft.weights[name] = Param(bias.shape), bias
    for stage in draft.stages:
        stage.nodes = [
            Node(n.name, n.op, (*n.inputs, f"@{bias_name(n.inputs[1][1:])}"), n.attrs)
            if n.op == "linear" and n.inputs[1][1:] in biases and len(n.inputs) == 2
            else n
            for n in stage.nodes
        ]
    return draft.build()


def bias_name(weight: str) -> str:
    """ "x.weight" -> "x.bias"."""
    return weight.removesuffix(".weight") + ".bias"


def round_inputs(program: Program, plan: Sequence[tuple[str, str, float]]) -> Program:
    """Linears of role "linear" whose weight a pattern of `plan` matches read a rounded input.

    plan: (pattern, one of ROUNDINGS or "none", largest magnitude for int8-tensor), last match wins. A pattern may be
    the name of an operand of attention (`attention_operands`), to the letter. Runs after rotations: what is rounded is
    what is read.
    """
    if not plan:
        return program
    kinds = roles(program)
    operands = {name for s in program.stages for n in s.nodes for name in attention_operands(s.name, n)}
    chosen: dict[str, tuple[str, float]] = {}
    for pattern, how, largest in plan:
        hits = [n for n, kind in kinds.items() if kind == "linear" and fnmatchcase(n, pattern)]
        hits = [pattern] if pattern in operands else hits
        if not hits:
            raise Unsupported(f"activation pattern {pattern!r} matches no linear of the lowered program")
        chosen.update(dict.fromkeys(hits, (how, largest)))
    chosen = {n: how for n, how in chosen.items() if how[0] != "none" and not n.startswith("rotation.")}
    draft = Draft.of(program)
    for stage in draft.stages:
        _round_stage(stage, chosen)
    return draft.build()


def attention_operands(stage: str, n: Node) -> dict[str, str]:
    """Name -> value of the queries and keys that may be rounded on fixed scales; empty for other nodes.

    Of attention in which every query sees every key with a key head of its own: there products of integers are fused.
    """
    if n.op != "attention" or len(n.inputs) != 3 or n.attr["heads"] != n.attr["kv_heads"]:
        return {}
    return {f"{stage}/{n.name}/{part}": n.inputs[i] for i, part in enumerate(OPERANDS)}


def is_operand(name: str) -> bool:
    """Whether a name of `round_inputs` is an operand of attention, and not a weight."""
    return name.count("/") >= 2 and name.endswith(tuple(f"/{part}" for part in OPERANDS))


def without_rounding(program: Program, formats: Sequence[str]) -> Program:
    """No `round_int8` of form block32 before linears whose weights are in `formats`: their kernels do the same."""
    draft = Draft.of(program)
    for stage in draft.stages:
        names: dict[str, str] = {}
        for n in stage.nodes:
            if n.op == "round_int8" and n.attr["form"] == "block32":
                readers = [r for r in stage.nodes if n.name in r.inputs]
                linear = readers and all(r.op == "linear" for r in readers) and n.name not in stage.outputs
                if linear and all(program.params[r.inputs[1][1:]].format in formats for r in readers):
                    names[n.name] = n.inputs[0]
        stage.rename_uses(names)
        stage.remove(*(n for n in stage.nodes if n.name in names))
    return draft.build()


def with_importance(program: Program, importance: Mapping[str, NpArray]) -> Program:
    """Weights that know the mean squares [k] of what multiplies them, by name; Unsupported names one that is gone."""
    gone = [n for n in importance if n not in program.params]
    if gone:
        raise Unsupported(
            f"{gone[0]} was measured and is no weight of the lowered program",
            remedy="apply passes that change the network before the pass that measures",
        )
    marked = {n: replace(program.weights[n], importance=h) for n, h in importance.items()}
    return program.replace(weights=program.weights.with_(**marked)) if marked else program


def _round_stage(stage: StageDraft, chosen: Mapping[str, tuple[str, float]]) -> None:
    made: dict[tuple[str, str, float], str] = {}
    result: list[Node] = []

    def rounded(value: str, how: str, largest: float) -> str:
        key = (value, how, largest)
        if key not in made:
            made[key] = stage.fresh(f"{value.lstrip('@')}.int8", [x.name for x in result])
            form = how.removeprefix("int8-")
            result.append(node(made[key], "round_int8", value, form=form, largest=float(largest)))
        return made[key]

    for n in stage.nodes:
        weight = n.inputs[1][1:] if n.op == "linear" else ""
        if weight in chosen:
            n = Node(n.name, n.op, (rounded(n.inputs[0], *chosen[weight]), *n.inputs[1:]), n.attrs)
        for name, value in attention_operands(stage.name, n).items():
            if name in chosen:
                inputs = [rounded(value, *chosen[name]) if i == value else i for i in n.inputs]
                n = Node(n.name, n.op, tuple(inputs), n.attrs)
        result.append(n)
    stage.nodes = result
