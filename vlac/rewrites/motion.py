"""Code motion: what a loop computes anew every turn, though nothing it reads changes, moves to the stage before it."""

from __future__ import annotations

from collections.abc import Mapping

from vlac.graph import RUNTIME_INPUTS, Call, Node, Program, Repeat
from vlac.ops import Type
from vlac.rewrites.clean import prune
from vlac.rewrites.draft import Draft, StageDraft, closure, stem, symbols_of, unique


def hoist_invariants(program: Program) -> Program:
    """In a repeated stage, nodes that read only inputs the loop does not change move to the last stage called before.

    Values that cross become outputs there and inputs here, under one name that no other value of the program has.
    What reads no input at all (`arange`, `full`) stays, and is copied where a moved node needs it; a `tile` stays too,
    so that one row crosses instead of many. What has a size (of the chunk) that the stage before cannot know moves to a
    stage of its own, LOOP_once, that is called before the loop.
    """
    draft = Draft.of(program)
    for at, step in enumerate(draft.steps):
        before = [s for s in draft.steps[:at] if isinstance(s, Call) and not s.each]
        calls = [s.stage for s in draft.steps]
        if isinstance(step, Repeat) and before and calls.count(step.stage) == calls.count(before[-1].stage) == 1:
            loop, host = draft.stage(step.stage), draft.stage(before[-1].stage)
            own = symbols_of(dict(loop.inputs).values()) - symbols_of(dict(host.inputs).values())
            _hoist(draft, step, loop, host, own)
            if own:
                _hoist_into_own_stage(draft, step, loop, own)
    return prune(draft.build())


def _hoist_into_own_stage(draft: Draft, step: Repeat, loop: StageDraft, own: set[str]) -> None:
    """The start values that tell the sizes become inputs of the new stage, whether a node reads them or not."""
    inputs = dict(loop.inputs)
    tells = [(start, inputs[into]) for _, into, start in step.carry if symbols_of([inputs[into]]) & own]
    tells = list(dict.fromkeys(tells))  # two carries may start with the noise
    if own <= symbols_of([t for _, t in tells]):
        host = StageDraft(unique(f"{loop.name}_once", {s.name for s in draft.stages}), tells, [], [])
        if _hoist(draft, step, loop, host, set()):
            draft.stages.insert(draft.stages.index(loop), host)
            draft.steps.insert(draft.steps.index(step), Call(host.name))


def _invariant(stage: StageDraft, step: Repeat, types: Mapping[str, Type], own: set[str]) -> set[str]:
    """Names of nodes that read an input and do not change over the turns; outputs of the stage are made here, and what
    has a symbol of `own`."""
    changing = {step.index, *(into for _, into, _ in step.carry)}
    outside = {n for n, _ in stage.inputs} - changing
    moved: set[str] = set()
    constant: set[str] = set()
    for n in stage.nodes:
        values = {i for i in n.inputs if not i.startswith("@")}
        if n.op == "tile" or n.name in stage.outputs or not values <= outside | moved | constant:
            continue
        if symbols_of([types[n.name]]) & own:
            continue
        # a node on weights alone is fold's business; here it is a constant like any other
        (moved if values & (outside | moved) else constant).add(n.name)
    return moved


def _hoist(draft: Draft, step: Repeat, loop: StageDraft, host: StageDraft, own: set[str]) -> bool:
    """Moves what may move and has no symbol of `own`; whether anything did."""
    types = draft.types(loop)
    moved = _invariant(loop, step, types, own)
    read = {i for n in loop.nodes if n.name not in moved for i in n.inputs}
    crossing = [n.name for n in loop.nodes if n.name in moved and n.name in read]
    if not crossing:
        return False
    needed = {n.name: n for c in crossing for n in closure(loop.nodes, c)}
    names = _names(draft, loop, host, [n for n in loop.nodes if n.name in needed], set(crossing))
    _bring_inputs(loop, host, needed)
    for n in loop.nodes:
        if n.name in needed:
            host.nodes.append(Node(names[n.name], n.op, tuple(names.get(i, i) for i in n.inputs), n.attrs))
    host.outputs += [names[c] for c in crossing]
    _take_inputs(loop, crossing, names, types, moved)
    return True


def _names(draft: Draft, loop: StageDraft, host: StageDraft, nodes: list[Node], crossing: set[str]) -> dict[str, str]:
    """New names: unique in the host, and for those that cross in the whole program."""
    local = {n for n, _ in host.inputs} | {n.name for n in host.nodes}
    everywhere = {n for s in draft.stages for n, _ in s.inputs} | {n.name for s in draft.stages for n in s.nodes}
    result: dict[str, str] = {}
    for n in nodes:
        taken = local | set(result.values()) | set(RUNTIME_INPUTS) | {draft.result}
        others = taken | (everywhere - {n.name}) if n.name in crossing else taken
        result[n.name] = unique(_telling_name(n), others)
    return result


def _telling_name(n: Node) -> str:
    """A node named by its op alone ("linear.7") says more across stages under its weight's name."""
    weights = [i[1:] for i in n.inputs if i.startswith("@")]
    return stem(weights[0]) if weights and n.name.split(".")[0] == n.op else n.name


def _bring_inputs(loop: StageDraft, host: StageDraft, needed: dict[str, Node]) -> None:
    """Inputs of the moved nodes that the host neither makes nor has yet."""
    known = {n for n, _ in host.inputs} | {n.name for n in host.nodes}
    reads = {i for n in needed.values() for i in n.inputs}
    host.inputs += [(n, t) for n, t in loop.inputs if n in reads and n not in known]


def _take_inputs(
    loop: StageDraft, crossing: list[str], names: dict[str, str], types: dict[str, Type], moved: set[str]
) -> None:
    loop.nodes = [n for n in loop.nodes if n.name not in moved]
    loop.inputs += [(names[c], types[c]) for c in crossing]
    loop.rename_uses({c: names[c] for c in crossing})
