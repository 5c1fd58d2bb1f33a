"""A program taken apart for editing: what every rewrite works on, and hands back with `build()`.

A rewrite keeps three promises: outputs keep their names, weights stay lazy, and a weight that someone else also reads
is never changed under them (`redefine` makes a new one instead).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlac.graph import Call, Node, Param, Program, Repeat, Schedule, Stage, Symbol, infer_stage, symbols_in
from vlac.ops import OPS, Attr, NpArray, Type
from vlac.weights import LazyTensor, Weights


def node(name: str, op: str, *inputs: str, **attrs: Attr) -> Node:
    """A node, attributes in the order of `StageBuilder`."""
    return Node(name, op, tuple(inputs), tuple(sorted(attrs.items())))


@dataclass
class StageDraft:
    """One stage as lists."""

    name: str
    inputs: list[tuple[str, Type]]
    nodes: list[Node]
    outputs: list[str]

    def fresh(self, base: str, more: Iterable[str] = ()) -> str:
        """`base`, or `base.1`, ...: a name that no value here (nor in `more`) has."""
        return unique(base, {n for n, _ in self.inputs} | {n.name for n in self.nodes} | set(more))

    def producers(self) -> dict[str, Node]:
        return {n.name: n for n in self.nodes}

    def users(self) -> dict[str, list[Node]]:
        """For every value or "@weight", the nodes that read it."""
        result: dict[str, list[Node]] = {}
        for n in self.nodes:
            for i in dict.fromkeys(n.inputs):
                result.setdefault(i, []).append(n)
        return result

    def single_user(self, value: str) -> Node | None:
        """The only node that reads `value`, and reads it once; None if there are more or the stage returns it."""
        readers = [n for n in self.nodes if value in n.inputs]
        if value in self.outputs or len(readers) != 1 or readers[0].inputs.count(value) != 1:
            return None
        return readers[0]

    def replace(self, old: Node, new: Sequence[Node]) -> None:
        """Puts `new` where `old` was; the last of them carries old's name."""
        at = self.nodes.index(old)
        self.nodes[at : at + 1] = new

    def remove(self, *old: Node) -> None:
        gone = {n.name for n in old}
        self.nodes = [n for n in self.nodes if n.name not in gone]

    def rename_uses(self, names: Mapping[str, str]) -> None:
        """Nodes read names[x] where they read x; outputs stay."""
        if names:
            self.nodes = [
                Node(n.name, n.op, tuple(names.get(i, i) for i in n.inputs), n.attrs)
                if any(i in names for i in n.inputs)
                else n
                for n in self.nodes
            ]


def unique(base: str, taken: Iterable[str]) -> str:
    """`base`, or the first of base.1, base.2, ... that is not taken."""
    names, result, i = set(taken), base, 1
    while result in names:
        result, i = f"{base}.{i}", i + 1
    return result


@dataclass
class Draft:
    """A program as lists and dicts. `params` and `weights` go together, except for programs without weights."""

    name: str
    symbols: tuple[Symbol, ...]
    stages: list[StageDraft]
    params: dict[str, Param]
    weights: dict[str, LazyTensor]
    steps: list[Call | Repeat]
    result: str

    @staticmethod
    def of(program: Program) -> Draft:
        stages = [StageDraft(s.name, list(s.inputs), list(s.nodes), list(s.outputs)) for s in program.stages]
        return Draft(
            program.name,
            program.symbols,
            stages,
            dict(program.params),
            dict(program.weights),
            list(program.schedule.steps),
            program.schedule.result,
        )

    def build(self) -> Program:
        return Program(
            self.name,
            self.symbols,
            tuple(Stage(s.name, tuple(s.inputs), tuple(s.nodes), tuple(s.outputs)) for s in self.stages),
            dict(self.params),
            Schedule(tuple(self.steps), self.result),
            Weights(self.weights),
        )

    def stage(self, name: str) -> StageDraft:
        return next(s for s in self.stages if s.name == name)

    def types(self, stage: StageDraft) -> dict[str, Type]:
        """Types of all values of a stage."""
        s = Stage(stage.name, tuple(stage.inputs), tuple(stage.nodes), tuple(stage.outputs))
        return infer_stage(s, self.params)

    def repeats(self) -> list[Repeat]:
        return [s for s in self.steps if isinstance(s, Repeat)]

    def reads(self, param: str) -> int:
        """How many operands of the whole program are this parameter."""
        return sum(n.inputs.count("@" + param) for s in self.stages for n in s.nodes)

    def lazy(self, param: str) -> LazyTensor:
        """The parameter's values; of a program without weights (parsed text), a tensor that cannot be loaded."""
        if param in self.weights:
            return self.weights[param]
        absent = Weights()
        return LazyTensor(self.params[param].shape, lambda: absent[param].load(), source=param)

    def add_param(self, base: str, tensor: LazyTensor) -> str:
        """A new parameter under `base`, made unique; returns "@name"."""
        name = unique(base, self.params)
        self.params[name] = Param(tensor.shape)
        self.weights[name] = tensor
        return "@" + name

    def redefine(self, operand: str, fn: Callable[[NpArray], NpArray], shape: Sequence[int] | None = None) -> str:
        """The operand "@w" with `fn` applied to its values, lazily: in place, or as a new weight if others read w."""
        name = operand[1:]
        tensor = self.lazy(name).map(lambda a: np.asarray(fn(a), dtype=np.float32), shape)
        return self.redefine_as(operand, tensor)

    def redefine_rows(self, operand: str, fn: Callable[[NpArray], NpArray]) -> str:
        """As `redefine`, for an `fn` that does the same to any run of rows."""
        return self.redefine_as(operand, self.lazy(operand[1:]).map_rows(fn))

    def redefine_as(self, operand: str, tensor: LazyTensor) -> str:
        """As `redefine`, with the new values given."""
        name = operand[1:]
        if self.reads(name) > 1:
            return self.add_param(name, tensor)
        self.params[name] = Param(tensor.shape)
        self.weights[name] = tensor
        return operand


def is_weight(operand: str) -> bool:
    """Whether an operand is a parameter."""
    return operand.startswith("@")


def static_shape(t: Type) -> tuple[int, ...] | None:
    """The shape as numbers, None if it holds a symbol."""
    numbers = tuple(d for d in t.shape if isinstance(d, int))
    return numbers if len(numbers) == len(t.shape) else None


def has_symbols(attr: Attr) -> bool:
    """Whether an attribute depends on a symbol."""
    return bool(symbols_in(attr))


def closure(nodes: Sequence[Node], wanted: str) -> list[Node]:
    """Those of `nodes` that `wanted` depends on, in order, itself included."""
    need, result = {wanted}, []
    for n in reversed(nodes):
        if n.name in need:
            need.update(n.inputs)
            result.append(n)
    return result[::-1]


def evaluate(
    nodes: Sequence[Node], wanted: str, weights: Mapping[str, LazyTensor], given: Mapping[str, NpArray]
) -> NpArray:
    """The value `wanted` by the numpy references; `given` holds values that no node makes."""
    env = dict(given)
    for n in nodes:
        for i in n.inputs:
            if is_weight(i) and i not in env:
                env[i] = weights[i[1:]].load()
        env[n.name] = OPS[n.op].reference([env[i] for i in n.inputs], n.attr)
    return env[wanted]


def stem(param: str) -> str:
    """The name without its ".weight"."""
    return param[: -len(".weight")] if param.endswith(".weight") else param


def symbols_of(types: Iterable[Type]) -> set[str]:
    """Symbols in the shapes of these types."""
    return {s for t in types for s in symbols_in(t.shape)}
