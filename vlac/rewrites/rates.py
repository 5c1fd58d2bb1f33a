"""Stages cut by how often their inputs change, so that a new state recomputes only what depends on it.

On a robot pictures come at the cameras' rate, instructions seldom, the state at every control step. A stage that reads
all of them would run whole for each new state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlac.dims import Dim
from vlac.graph import Call, Node, Program
from vlac.ops import Type
from vlac.rewrites.clean import prune
from vlac.rewrites.draft import Draft, StageDraft, is_weight, node, unique
from vlac.rewrites.rows import BY_ROW, ELEMENTWISE, Cutter, hides_later, spans_rows
from vlac.work import macs

FAST = ("state",)
"""Runtime inputs that change while frames and instruction stay."""
MOST = 0.5
"""A stage is cut only where the part that reads them is at most this share of its work."""


def split_by_rate(program: Program) -> Program:
    """A stage that is called once and reads the state becomes two: what does not depend on it keeps the stage's name,
    what does is stage NAME_state.

    Where the state is one of the last rows of a sequence whose earlier rows never see it (the attention masks are
    proved from their block numbers), the cut goes through the sequence: the earlier rows' keys and values cross, and
    the state's rows attend to them. Exact, for a masked key has weight 0; every row is computed once, as before.
    """
    draft = Draft.of(program)
    for step in list(draft.steps):
        calls = [s.stage for s in draft.steps]
        if isinstance(step, Call) and not step.each and calls.count(step.stage) == 1:
            _split(draft, step)
    return prune(draft.build())


def _split(draft: Draft, step: Call) -> None:
    stage = draft.stage(step.stage)
    fast = [n for n, _ in stage.inputs if n in FAST]
    if not fast:
        return
    weights = {f"@{name}": Type("f32", p.shape) for name, p in draft.params.items()}
    types = {**weights, **draft.types(stage)}
    depends = still_rows(stage.nodes, fast, types)
    cut = _Cut(draft, stage, types, depends)
    cut.all()
    sizes = {s.name: s.max for s in draft.symbols}
    total = macs(stage.nodes, types, sizes)
    again = macs(cut.new.nodes, cut.types, sizes)
    if total and again <= MOST * total:
        cut.put_in_place(step)


def still_rows(nodes: Sequence[Node], fast: Sequence[str], types: Mapping[str, Type]) -> dict[str, Dim]:
    """For every value that depends on `fast`, how many of its first rows do not (0: all may); `types` knows weights."""
    found: dict[str, Dim] = dict.fromkeys(fast, 0)
    made = {n.name: n for n in nodes}
    for n in nodes:
        if any(i in found for i in n.inputs):
            found[n.name] = _still(n, found, types, made)
    return found


def _still(n: Node, found: Mapping[str, Dim], types: Mapping[str, Type], made: Mapping[str, Node]) -> Dim:
    if n.op == "concat" and n.attr["axis"] == 0:
        before: Dim = 0
        for i in n.inputs:
            if i in found:
                return found[i] + before
            before = before + types[i].shape[0]
    cuts = {found[i] for i in n.inputs if i in found}
    if len(cuts) > 1 or 0 in cuts or n.inputs[0] not in found:
        return 0
    at, rows = cuts.pop(), types[n.name].shape[0]
    rest = [i for i in n.inputs[1:] if not is_weight(i)]
    if n.op in BY_ROW:
        return 0 if rest else at
    if n.op in ELEMENTWISE:
        return 0 if any(is_weight(i) and spans_rows(types[i], rows) for i in n.inputs) else at
    if n.op == "rope" or (n.op in ("slice", "concat") and n.attr["axis"] == 1):
        return at if all(spans_rows(types[i], rows) for i in rest) else 0
    if n.op == "attention" and not any(i in found for i in n.inputs[3:]):
        read = [i in found for i in n.inputs[1:3]]
        if not any(read) or (all(read) and len(n.inputs) > 3 and hides_later(n.inputs[3], at, made)):
            return at
    return 0


@dataclass
class _Cut:
    """One stage while it is cut into `old` (keeps its name) and `new` (reads the fast inputs)."""

    draft: Draft
    stage: StageDraft
    types: dict[str, Type]
    depends: dict[str, Dim]
    old: StageDraft = field(init=False)
    new: StageDraft = field(init=False)

    def __post_init__(self) -> None:
        names = {s.name for s in self.draft.stages}
        fast = [n for n, _ in self.stage.inputs if n in FAST]
        self.old = StageDraft(self.stage.name, list(self.stage.inputs), [], [])
        self.new = StageDraft(unique("_".join((self.stage.name, *fast)), names), [], [], [])
        self.types = dict(self.types)
        self._taken = {n for s in self.draft.stages for n, _ in s.inputs}
        self._taken |= {n.name for s in self.draft.stages for n in s.nodes}
        self._made = {n.name: n for n in self.stage.nodes}
        self._cutter = Cutter(self.old.nodes, self.types, self._taken)
        self._parts: dict[str, tuple[str, str]] = {}
        self._known: set[str] = set()
        self._whole: dict[str, str] = {}

    def all(self) -> None:
        """Every node into its stage, or half of it into each; then the outputs."""
        for n in self.stage.nodes:
            at = self.depends.get(n.name)
            if at is None:
                self.old.nodes.append(n)
            elif at == 0:
                self.new.nodes.append(Node(n.name, n.op, tuple(self._in_new(i) for i in n.inputs), n.attrs))
                self._known.add(n.name)
            else:
                self._cut_node(n, at)
        for name in self.stage.outputs:
            if name in self.depends:
                self._in_new(name)
                self.new.outputs.append(name)
            elif name not in self.old.outputs:
                self.old.outputs.append(name)

    def put_in_place(self, step: Call) -> None:
        self._rename_clashes()
        stages, steps = self.draft.stages, self.draft.steps
        at = stages.index(self.stage)
        stages[at : at + 1] = [self.old, self.new]
        steps.insert(steps.index(step) + 1, Call(self.new.name))

    def _rename_clashes(self) -> None:
        """A value that crosses must not have the name of one that other stages exchange."""
        others = [s for s in self.draft.stages if s is not self.stage]
        exchanged = {n for s in others for n in (*s.outputs, *(i for i, _ in s.inputs))}
        own = {*self.stage.outputs, *(n for n, _ in self.stage.inputs)}
        names = {n: unique(n, self._taken) for n in self.old.outputs if n in exchanged and n not in own}
        for s in (self.old, self.new):
            s.rename_uses(names)
            s.inputs = [(names.get(n, n), t) for n, t in s.inputs]
            s.outputs = [names.get(n, n) for n in s.outputs]
            s.nodes = [Node(names.get(n.name, n.name), n.op, n.inputs, n.attrs) for n in s.nodes]

    def _cut_node(self, n: Node, at: Dim) -> None:
        rows, rest = self.types[n.name].shape[0], self.types[n.name].shape[1:]
        first = tuple(self._first_rows(n, i, at) for i in n.inputs)
        last = tuple(self._last_rows(n, i, at, rows) for i in n.inputs)
        if n.op == "concat" and n.attr["axis"] == 0:
            first, last = self._cut_concat(n)
        head, tail = (unique(f"{n.name}.{part}", self._taken) for part in ("kept", "new"))
        self._taken |= {head, tail}
        dtype = self.types[n.name].dtype
        self.types[head], self.types[tail] = Type(dtype, (at, *rest)), Type(dtype, (rows - at, *rest))
        self._parts[n.name] = head, tail
        self.old.nodes.append(Node(head, n.op, first, n.attrs))
        self.new.nodes.append(Node(tail, n.op, last, n.attrs))
        self._known.add(tail)

    def _cut_concat(self, n: Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
        k = next(k for k, i in enumerate(n.inputs) if i in self.depends)
        middle = n.inputs[k]
        head, tail = self._parts.get(middle, ("", self._in_new(middle) if self.depends[middle] == 0 else ""))
        later = tuple(self._in_new(i) for i in n.inputs[k + 1 :])
        return (*n.inputs[:k], *((head,) if head else ())), (tail, *later)

    def _first_rows(self, n: Node, operand: str, at: Dim) -> str:
        """An operand as the rows before the cut read it; keys and values are then cut where queries are."""
        if operand in self._parts:
            return self._parts[operand][0]
        if operand in self.depends or is_weight(operand) or (n.op == "concat" and n.attr["axis"] == 0):
            return operand
        if n.op == "attention" and operand != n.inputs[3]:
            return operand  # keys that do not change at all
        if n.op == "attention" and n.inputs[1] in self._parts:
            return self._mask_of_first(operand, at)
        spans = spans_rows(self.types[operand], self.types[n.name].shape[0])
        return self._cutter.cut(operand, 0, at) if spans else operand

    def _mask_of_first(self, mask: str, at: Dim) -> str:
        key = f"{mask}/first"
        if key not in self._whole:
            m = self._made[mask]
            name = unique(f"{mask}.kept", self._taken)
            self._taken.add(name)
            self.types[name] = Type("bool", (at, at))
            self.old.nodes.append(node(name, "attention_mask", *(self._cutter.cut(i, 0, at) for i in m.inputs)))
            self._whole[key] = name
        return self._whole[key]

    def _last_rows(self, n: Node, operand: str, at: Dim, rows: Dim) -> str:
        """An operand as the rows from the cut on read it, there."""
        if is_weight(operand) or (n.op == "concat" and n.attr["axis"] == 0):
            return operand
        if n.op == "attention" and operand in n.inputs[1:3]:
            return self._in_new(operand)
        if operand in self._parts:
            return self._parts[operand][1]
        if operand in self.depends or not spans_rows(self.types[operand], rows):
            return self._in_new(operand)
        return self._cross(self._cutter.cut(operand, at, rows))

    def _in_new(self, value: str) -> str:
        """A whole value in the new stage, joined from its parts there if it was cut."""
        if is_weight(value) or value in self._known:
            return value
        if value in self._parts:
            head, tail = self._parts[value]
            self.new.nodes.append(node(value, "concat", self._cross(head), tail, axis=0))
            self._known.add(value)
            return value
        return self._cross(value)

    def _cross(self, value: str) -> str:
        """A value that the old stage makes or reads, in the new one; constants are made again."""
        if value in self._known:
            return value
        self._known.add(value)
        maker = next((n for n in self.old.nodes if n.name == value), None)
        if maker is not None and not maker.inputs:
            self.new.nodes.append(maker)
            return value
        self.new.inputs.append((value, self.types[value]))
        if maker is not None and value not in self.old.outputs:
            self.old.outputs.append(value)
        return value
