"""Programs: what a network computes, as stages of nodes in SSA form, with a printer and a checker; the parser is
`vlac.program_text`.

A family draws a Program, `lower` rewrites it, a target writes it down, an engine runs it. It is a value: frozen,
comparable, printable; `parse(str(program)) == program`. Weights are named (`@name`) and bound separately.

Standard names of values that the runtime provides to stages (a stage lists those it reads among its inputs):
  pixels f32[3,S,S] (one camera, preprocessed) | image_valid bool[C] (camera was given)
  camera_valid bool[C] (slot takes part in the prefix even if its image is absent)
  tokens i32[T] | token_valid bool[T] | state f32[1,S] | noise f32[N,A]
Everything else a stage reads must be the output of an earlier stage or a carry.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

from vlac.dims import Affine, Dim, bind_dim, parse_dim
from vlac.errors import ProgramError
from vlac.formats import FORMATS
from vlac.ops import OPS, Attr, Op, Type
from vlac.weights import Weights

RUNTIME_INPUTS = ("pixels", "image_valid", "camera_valid", "tokens", "token_valid", "state", "noise")


@dataclass(frozen=True)
class Node:
    """name = op(inputs) {attrs}. Inputs name values of the stage; "@w" names a weight."""

    name: str
    op: str
    inputs: tuple[str, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()

    @property
    def attr(self) -> dict[str, Any]:
        """Attributes as a dict."""
        return dict(self.attrs)


@dataclass(frozen=True)
class Stage:
    """Nodes in order; `inputs` with their types; `outputs` are names of values, in order."""

    name: str
    inputs: tuple[tuple[str, Type], ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Param:
    """A weight as the program sees it: logical shape and storage format (vlac.formats)."""

    shape: tuple[int, ...]
    format: str = "f32"


@dataclass(frozen=True)
class Symbol:
    """A dimension chosen per call: largest value, and the sizes a stage may be built for (ascending, last = max)."""

    name: str
    buckets: tuple[int, ...]

    @property
    def max(self) -> int:
        return self.buckets[-1]


@dataclass(frozen=True)
class Call:
    """Run a stage once; its inputs are found by name, its outputs become values.

    each="camera": once for every camera that was given, outputs stacked along axis 0 in slot order; slots without a
    camera hold zeros.
    """

    stage: str
    each: str = ""


@dataclass(frozen=True)
class Repeat:
    """Run a stage `times` times. `index` names its i32[1] input that counts 0, 1, ...; `carry` is (output, input,
    initial value's name): the output of one turn is the input of the next.

    collect: (output, name): the output of every turn, joined along axis 0, becomes the value `name`.
    until, stop: the loop ends after the turn in which the output `until`, i32[1], is one of `stop`; what is collected
    holds zeros for the turns that were not run.
    """

    stage: str
    times: int
    index: str
    carry: tuple[tuple[str, str, str], ...]
    collect: tuple[tuple[str, str], ...] = ()
    until: str = ""
    stop: tuple[int, ...] = ()

    @property
    def own_inputs(self) -> set[str]:
        """Inputs of the stage that the loop itself provides: they differ from turn to turn."""
        return {self.index, *(into for _, into, _ in self.carry)}


@dataclass(frozen=True)
class Schedule:
    """How stages make a chunk; `result` names the value that is the normalised chunk f32[N, A], or action tokens
    i32[N], which reach the action steps as one row of numbers."""

    steps: tuple[Union[Call, Repeat], ...]
    result: str


@dataclass(frozen=True)
class Program:
    """Stages, parameters, symbols and schedule. `weights` holds values and takes no part in equality or text."""

    name: str
    symbols: tuple[Symbol, ...]
    stages: tuple[Stage, ...]
    params: Mapping[str, Param]
    schedule: Schedule
    weights: Weights = field(default_factory=Weights, compare=False, repr=False)

    def stage(self, name: str) -> Stage:
        for s in self.stages:
            if s.name == name:
                return s
        raise ProgramError(f"program {self.name} has no stage {name}")

    def replace(self, **changes: Any) -> Program:
        return dataclasses.replace(self, **changes)

    def bind(self, symbols: Mapping[str, int]) -> Program:
        """The program for one bucket: symbols become numbers in shapes and attributes."""

        def bind_attr(value: Attr) -> Attr:
            if isinstance(value, tuple):
                return tuple(bind_attr(v) for v in value)
            return bind_dim(value, symbols) if isinstance(value, Affine) else value

        stages = tuple(
            Stage(
                s.name,
                tuple((n, Type(t.dtype, tuple(bind_dim(d, symbols) for d in t.shape))) for n, t in s.inputs),
                tuple(dataclasses.replace(n, attrs=tuple((k, bind_attr(v)) for k, v in n.attrs)) for n in s.nodes),
                s.outputs,
            )
            for s in self.stages
        )
        left = tuple(s for s in self.symbols if s.name not in symbols)
        return self.replace(symbols=left, stages=stages)

    def max_symbols(self) -> dict[str, int]:
        """Every symbol at its largest value."""
        return {s.name: s.max for s in self.symbols}

    def __str__(self) -> str:
        return print_program(self)


# --- checking --------------------------------------------------------------------------------------------------


def check_operands(op: Op, count: int) -> None:
    """Raises ProgramError when `op` does not take `count` operands."""
    least = sum(1 for i in op.inputs if not i.endswith(("?", "*")))
    most = 10_000 if any(i.endswith("*") for i in op.inputs) else len(op.inputs)
    if any(i.endswith("*") for i in op.inputs):
        least = max(least, 1)
    if not least <= count <= most:
        raise ProgramError(f"{op.name} takes {' '.join(op.inputs)}, got {count} operands")


MAX_ELEMENTS = 2**31
"""No value may hold more: what an engine could index with 32 bits, and a guard against a mistyped shape."""


def check_size(t: Type) -> Type:
    """The type itself; ProgramError when a dimension is empty or the value is absurdly large."""
    known = [d for d in t.shape if isinstance(d, int)]
    if any(d < 1 for d in known) or math.prod(known) > MAX_ELEMENTS:
        raise ProgramError(f"{t} is empty or holds more than {MAX_ELEMENTS} values")
    return t


def infer_stage(stage: Stage, params: Mapping[str, Param]) -> dict[str, Type]:
    """Types of every value in a stage; raises ProgramError that names stage and node."""
    types: dict[str, Type] = dict(stage.inputs)
    for node in stage.nodes:
        where = f"stage {stage.name}, {node.name} = {node.op}({', '.join(node.inputs)})"
        op = OPS.get(node.op)
        if op is None:
            raise ProgramError(f"{where}: unknown op")
        if set(node.attr) != set(op.attrs):
            raise ProgramError(f"{where}: attributes {sorted(node.attr)}, expected {sorted(op.attrs)}")
        if node.name in types:
            raise ProgramError(f"{where}: {node.name} is assigned twice")
        operands = []
        for i in node.inputs:
            if i.startswith("@"):
                if i[1:] not in params:
                    raise ProgramError(f"{where}: no parameter {i[1:]}")
                operands.append(Type("f32", params[i[1:]].shape))
            elif i in types:
                operands.append(types[i])
            else:
                raise ProgramError(f"{where}: {i} is not defined before")
        try:
            check_operands(op, len(operands))
            types[node.name] = check_size(op.infer(operands, node.attr))
        except ProgramError as error:
            raise ProgramError(f"{where}: {error.message}") from None
    for out in stage.outputs:
        if out not in types:
            raise ProgramError(f"stage {stage.name}: output {out} is not defined")
    return types


def check(program: Program) -> Program:
    """Every rule that a program must keep; returns it unchanged or raises ProgramError."""
    names = [s.name for s in program.stages]
    if len(set(names)) != len(names):
        raise ProgramError(f"stage names repeat: {names}")
    for name, p in program.params.items():
        if p.format not in FORMATS:
            raise ProgramError(f"parameter {name} has unknown format {p.format}")
        check_size(Type("f32", p.shape))
    known: dict[str, Type | None] = dict.fromkeys(RUNTIME_INPUTS)
    for s in program.stages:
        for _, t in s.inputs:
            check_size(t)
    outputs = {s.name: infer_stage(s, program.params) for s in program.stages}
    for step in program.schedule.steps:
        stage = program.stage(step.stage)
        bound = _check_repeat(step, stage, outputs[stage.name], known) if isinstance(step, Repeat) else set()
        for name, want in stage.inputs:
            if name in bound:
                continue
            if name not in known:
                raise ProgramError(f"stage {stage.name}: input {name} is given by no earlier stage")
            have = known[name]
            if have is not None and have != want:
                raise ProgramError(f"stage {stage.name}: input {name} is {have}, stage wants {want}")
        for out in stage.outputs:
            known[out] = _given(program, step, outputs[stage.name][out])
        if isinstance(step, Repeat):
            known.update(_collected(step, stage, outputs[stage.name], known))
    if program.schedule.result not in known:
        raise ProgramError(f"schedule returns {program.schedule.result}, which nothing defines")
    return program


def _check_repeat(step: Repeat, stage: Stage, types: Mapping[str, Type], known: Mapping[str, Type | None]) -> set[str]:
    """Names of the inputs that the repetition itself provides."""
    inputs = dict(stage.inputs)
    if step.times < 1 or inputs.get(step.index, Type("i32", (1,))) != Type("i32", (1,)):
        raise ProgramError(f"repeat {step.times} {stage.name}: index {step.index} must be an input i32[1]")
    for out, into, initial in step.carry:
        if out not in stage.outputs or into not in inputs or types[out] != inputs[into]:
            raise ProgramError(f"stage {stage.name}: carry {into}={out}: not an output and an input of one type")
        if initial not in known:
            raise ProgramError(f"stage {stage.name}: initial value {initial} of {into} is not defined")
    return {step.index, *(into for _, into, _ in step.carry)}


def _collected(
    step: Repeat, stage: Stage, types: Mapping[str, Type], known: Mapping[str, Type | None]
) -> dict[str, Type]:
    """Types of what a repetition gathers, by name; ProgramError where it gathers or stops by what is not made."""
    result: dict[str, Type] = {}
    for out, name in step.collect:
        if out not in stage.outputs or not types[out].shape:
            raise ProgramError(f"stage {stage.name}: collects {out}, which is no output with rows")
        if name in known or name in result:
            raise ProgramError(f"stage {stage.name}: {name} is collected, and defined elsewhere")
        rows, *rest = types[out].shape
        result[name] = Type(types[out].dtype, (rows * step.times, *rest))
    if bool(step.until) != bool(step.stop):
        raise ProgramError(f"stage {stage.name}: an output to stop by and the ids to stop at go together")
    if step.until and (step.until not in stage.outputs or types[step.until] != Type("i32", (1,))):
        raise ProgramError(f"stage {stage.name}: stops by {step.until}, which is no output i32[1]")
    return result


def _given(program: Program, step: Call | Repeat, t: Type) -> Type | None:
    """Type of a stage's output as later stages see it; None where the number of cameras is no symbol."""
    if isinstance(step, Repeat) or not step.each:
        return t
    if step.each != "camera" or not t.shape:
        raise ProgramError(f"call {step.stage} each {step.each}: only rows for each camera can be stacked")
    if not any(s.name == "C" for s in program.symbols):
        return None
    return Type(t.dtype, (t.shape[0] * parse_dim("C"), *t.shape[1:]))


def symbols_in(value: Attr) -> set[str]:
    """Symbols that an attribute, or a shape, depends on."""
    if isinstance(value, tuple):
        return {s for v in value for s in symbols_in(v)}
    return {s for s, _ in value.terms} if isinstance(value, Affine) else set()


def stage_symbols(stage: Stage) -> frozenset[str]:
    """Symbols that a stage depends on: two buckets that agree in these are one for it."""
    shapes = [t.shape for _, t in stage.inputs]
    return frozenset(s for v in (*shapes, *(v for n in stage.nodes for _, v in n.attrs)) for s in symbols_in(v))


def uses(stage: Stage) -> dict[str, list[Node]]:
    """For every value or weight ("@w") of a stage, the nodes that read it."""
    result: dict[str, list[Node]] = {}
    for node in stage.nodes:
        for i in node.inputs:
            result.setdefault(i, []).append(node)
    return result


# --- building --------------------------------------------------------------------------------------------------


class StageBuilder:
    """Draws one stage. `b.linear(x, "@w")` adds a node and returns its name; `b.at("layer 0")` names a region.

    Any op of the table is a method; keyword arguments are its attributes.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._inputs: list[tuple[str, Type]] = []
        self._nodes: list[Node] = []
        self._outputs: list[str] = []
        self._taken: set[str] = set()

    def input(self, name: str, dtype: str, *shape: Dim) -> str:
        self._inputs.append((name, Type(dtype, shape)))
        self._taken.add(name)
        return name

    def op(self, op: str, *inputs: str, name: str = "", **attrs: Attr) -> str:
        """Adds a node; `name` is a wish (made unique), default is the op's name with a number."""
        base = name or op
        unique, i = base, 1
        while unique in self._taken or (not name and unique == op):
            unique = f"{base}.{i}"
            i += 1
        self._taken.add(unique)
        self._nodes.append(Node(unique, op, inputs, tuple(sorted(attrs.items()))))
        return unique

    def __getattr__(self, op: str) -> Any:
        if op not in OPS:
            raise AttributeError(op)
        return lambda *inputs, **kw: self.op(op, *inputs, **kw)

    def output(self, *names: str) -> None:
        self._outputs.extend(names)

    def build(self) -> Stage:
        return Stage(self.name, tuple(self._inputs), tuple(self._nodes), tuple(self._outputs))


# --- text ------------------------------------------------------------------------------------------------------


def _print_attr(value: Attr) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_print_attr(v) for v in value) + "]"
    return str(value) if isinstance(value, Affine) else json.dumps(value)


def print_program(program: Program, stages: Sequence[str] | None = None) -> str:
    """The program as text; `stages` limits which are shown (then it does not parse back)."""
    lines = [f"program {program.name}"]
    for sym in program.symbols:
        lines.append(f"symbol {sym.name} in {', '.join(map(str, sym.buckets))}")
    for stage in program.stages:
        if stages is not None and stage.name not in stages:
            continue
        types = infer_stage(stage, program.params)
        args = ", ".join(f"{n}: {t}" for n, t in stage.inputs)
        lines += ["", f"stage {stage.name} ({args})"]
        for n in stage.nodes:
            attrs = " {" + ", ".join(f"{k}={_print_attr(v)}" for k, v in n.attrs) + "}" if n.attrs else ""
            lines.append(f"  {n.name} = {n.op}({', '.join(n.inputs)}){attrs} : {types[n.name]}")
        lines.append(f"  return {', '.join(stage.outputs)}")
    lines += ["", "params"]
    for name, p in program.params.items():
        lines.append(f"  {name} : {p.format}[{','.join(map(str, p.shape))}]")
    lines += ["", "schedule"]
    for step in program.schedule.steps:
        if isinstance(step, Call):
            lines.append(f"  call {step.stage}" + (f" each {step.each}" if step.each else ""))
        else:
            carry = ", ".join(f"{i}={o} from {start}" for o, i, start in step.carry)
            collect = ", ".join(f"{name}={out}" for out, name in step.collect)
            lines.append(
                f"  repeat {step.times} {step.stage} index {step.index} carry {carry}"
                + (f" collect {collect}" if step.collect else "")
                + (f" until {step.until} in {', '.join(map(str, step.stop))}" if step.until else "")
            )
    lines.append(f"  result {program.schedule.result}")
    return "\n".join(lines) + "\n"
