"""Common subexpressions, nodes that do nothing, and dead code, across stages."""

from __future__ import annotations

from vlac.graph import Call, Node, Program, Repeat, symbols_in
from vlac.rewrites.draft import Draft, StageDraft, symbols_of


def share(program: Program) -> Program:
    """Nodes of a stage with equal op, operands and attributes become one; a stage's outputs keep their own node."""
    draft = Draft.of(program)
    for stage in draft.stages:
        first: dict[tuple[object, ...], str] = {}
        same: dict[str, str] = {}
        kept: list[Node] = []
        for n in stage.nodes:
            n = Node(n.name, n.op, tuple(same.get(i, i) for i in n.inputs), n.attrs)
            known = first.setdefault((n.op, n.inputs, n.attrs), n.name)
            if known != n.name:
                same[n.name] = known
            if known == n.name or n.name in stage.outputs:
                kept.append(n)
        stage.nodes = kept
    return draft.build()


def drop_identities(program: Program) -> Program:
    """Nodes that give what they read (a reshape to the same shape, a slice of everything, a scale by 1) go.

    A stage's outputs keep their own node: their names are how stages find them.
    """
    draft = Draft.of(program)
    for stage in draft.stages:
        types = draft.types(stage)
        same: dict[str, str] = {}
        for n in stage.nodes:
            if n.op in MAY_BE_IDENTITY and len(n.inputs) == 1 and n.name not in stage.outputs:
                source = same.get(n.inputs[0], n.inputs[0])
                if types.get(source) == types[n.name] and _changes_nothing(n):
                    same[n.name] = source
        stage.nodes = [n for n in stage.nodes if n.name not in same]
        stage.rename_uses(same)
    return draft.build()


MAY_BE_IDENTITY = ("reshape", "slice", "pad", "tile", "cast", "concat", "transpose", "pixel_shuffle", "scale")
"""With one operand and a result of the same type these give their operand back, save for what is checked below."""


def _changes_nothing(n: Node) -> bool:
    if n.op == "scale":
        return bool(n.attr["factor"] == 1.0)
    return n.op != "transpose" or n.attr["perm"] == tuple(range(len(n.attr["perm"])))


def prune(program: Program) -> Program:
    """Drops dead nodes (of a prefix's last layer all but norm, keys and values), stage inputs and outputs that nobody
    reads, stages without outputs, and unread parameters.

    A repeated stage that somebody reads keeps its index and its carries. Parameters end up in the order in which stages
    first read them, which is the order targets write them in.
    """
    draft = Draft.of(program)
    wanted = {draft.result}
    before = -1
    while len(wanted) != before:
        before = len(wanted)
        for step in reversed(draft.steps):
            wanted |= _reads_for(draft.stage(step.stage), step, wanted)
    for step in draft.steps:
        _drop(draft.stage(step.stage), step, wanted)
    alive = {s.name for s in draft.stages if s.outputs}
    draft.steps = [s for s in draft.steps if s.stage in alive]
    draft.stages = [s for s in draft.stages if s.name in alive]
    read = dict.fromkeys(i[1:] for s in draft.stages for n in s.nodes for i in n.inputs if i.startswith("@"))
    draft.params = {k: draft.params[k] for k in read}
    draft.weights = {k: draft.weights[k] for k in read if k in draft.weights}
    return draft.build()


def _bound(step: Call | Repeat) -> set[str]:
    """Inputs that the step itself provides."""
    return step.own_inputs if isinstance(step, Repeat) else set()


def _live(stage: StageDraft, step: Call | Repeat, wanted: set[str]) -> tuple[list[str], list[Node]]:
    """Outputs and nodes that must stay; a loop that is read keeps its carried outputs, one that is not loses all."""
    carried: set[str] = set()
    made = set(stage.outputs)
    if isinstance(step, Repeat):
        # what is collected is kept whether the schedule reads it or not: it was asked for by name
        carried = {out for out, _, _ in step.carry} | {out for out, _ in step.collect} | {step.until}
        made |= {name for _, name in step.collect}
    read = any(o in wanted for o in made)
    outputs = [o for o in stage.outputs if read and (o in wanted or o in carried)]
    need, kept = set(outputs), []
    for n in reversed(stage.nodes):
        if n.name in need:
            need.update(n.inputs)
            kept.append(n)
    return outputs, kept[::-1]


def _reads_for(stage: StageDraft, step: Call | Repeat, wanted: set[str]) -> set[str]:
    """Values from outside that the stage needs in order to give what is wanted of it."""
    outputs, nodes = _live(stage, step, wanted)
    need = {i for n in nodes for i in n.inputs} | set(outputs)
    result = {n for n, _ in stage.inputs if n in need} - _bound(step)
    if outputs and isinstance(step, Repeat):
        result |= {initial for _, _, initial in step.carry}
    return result


def _drop(stage: StageDraft, step: Call | Repeat, wanted: set[str]) -> None:
    stage.outputs, stage.nodes = _live(stage, step, wanted)
    need = {i for n in stage.nodes for i in n.inputs} | set(stage.outputs) | _bound(step)
    stage.inputs = [(n, t) for n, t in stage.inputs if n in need | _tellers(stage, need)]


def _tellers(stage: StageDraft, need: set[str]) -> set[str]:
    """Inputs that nobody reads, of which one alone tells a size that nodes are made with."""
    told = symbols_of(t for n, t in stage.inputs if n in need)
    used = {s for n in stage.nodes for _, v in n.attrs for s in symbols_in(v)} - told
    result: set[str] = set()
    for name, t in stage.inputs:
        if name not in need and symbols_of([t]) & used:
            used -= symbols_of([t])
            result.add(name)
    return result
