"""Programs from their text: the inverse of `vlac.graph.print_program`, which says what a file or an artifact holds."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator

from vlac.dims import parse_dim
from vlac.errors import ProgramError
from vlac.graph import Call, Node, Param, Program, Repeat, Schedule, Stage, Symbol, check, infer_stage
from vlac.ops import DTYPES, OPS, Attr, Type

_NAME = r"[A-Za-z_][\w.]*"
_OPERAND = r"@?[A-Za-z_][\w.]*"
_TYPE = re.compile(r"(\w+)\[([^\]]*)\]")
_NODE = re.compile(rf"({_NAME}) = (\w+)\(([^)]*)\)(?: \{{(.*)\}})? : (\w+\[[^\]]*\])")
_STAGE = re.compile(r"stage (\w+) \((.*)\)")
_PARAM = re.compile(rf"({_NAME}) : (\w+)\[([\d,]*)\]")
_CALL = re.compile(r"call (\w+)(?: each (\w+))?")
_REPEAT = re.compile(
    rf"repeat (\d+) (\w+) index ({_NAME}) carry (.*?)(?: collect (.*?))?(?: until ({_NAME}) in ([\d, ]+))?"
)
_COLLECT = re.compile(rf"({_NAME})=({_NAME})")
_CARRY = re.compile(rf"({_NAME})=({_NAME}) from ({_NAME})")


def _parse_type(text: str) -> Type:
    m = _TYPE.fullmatch(text)
    if not m or m[1] not in DTYPES:
        raise ProgramError(f"cannot read type {text!r}")
    return Type(m[1], tuple(parse_dim(d) for d in m[2].split(",")) if m[2] else ())


def _split_top(text: str) -> Iterator[str]:
    depth, start, quoted = 0, 0, False
    for i, c in enumerate(text):
        if c == '"':
            quoted = not quoted
        elif not quoted and c == "[":
            depth += 1
        elif not quoted and c == "]":
            depth -= 1
        elif not quoted and c == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    if text[start:].strip():
        yield text[start:].strip()


def _split_names(text: str) -> tuple[str, ...]:
    names = tuple(_split_top(text))
    for name in names:
        if not re.fullmatch(_OPERAND, name):
            raise ProgramError(f"{name!r} is not a name")
    return names


def _parse_attr(kind: str, text: str) -> Attr:
    if kind == "dims" and text.startswith("[") and text.endswith("]"):
        return tuple(parse_dim(d) for d in _split_top(text[1:-1]))
    if kind == "dim":
        return parse_dim(text)
    value: object = None if text[:1] in ("[", "{") else json.loads(text)
    if kind == "float" and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "str" and isinstance(value, str):
        return value
    raise ProgramError(f"cannot read {kind} attribute {text!r}")


class _Parser:
    """What has been read so far; `line` takes the next line. Sections: head, stage, params, schedule, done."""

    def __init__(self) -> None:
        self.name = ""
        self.symbols: list[Symbol] = []
        self.stages: list[Stage] = []
        self.params: dict[str, Param] = {}
        self.steps: list[Call | Repeat] = []
        self.result = ""
        self.types: dict[tuple[str, str], tuple[int, Type]] = {}
        self._section = "head"
        self._stage: Stage | None = None

    def line(self, number: int, line: str) -> None:
        if self._section == "stage" and self._stage is not None:
            self._in_stage(number, line, self._stage)
        elif self._section in ("head", "stage") and (m := _STAGE.fullmatch(line)):
            args = [re.fullmatch(rf"({_NAME}): (.*)", a) for a in _split_top(m[2])]
            if any(a is None for a in args):
                raise ProgramError("cannot read the stage's inputs")
            self._stage = Stage(m[1], tuple((a[1], _parse_type(a[2])) for a in args if a), (), ())
            self._section = "stage"
        elif self._section == "stage" and line == "params":
            self._section = "params"
        elif self._section == "params" and line == "schedule":
            self._section = "schedule"
        elif self._section == "head":
            self._in_head(line)
        elif self._section == "params" and (m := _PARAM.fullmatch(line)) and m[1] not in self.params:
            self.params[m[1]] = Param(tuple(int(d) for d in m[3].split(",")) if m[3] else (), m[2])
        elif self._section == "schedule":
            self._in_schedule(line)
        else:
            raise ProgramError("cannot read this")

    def _in_head(self, line: str) -> None:
        if line.startswith("program ") and not self.name:
            self.name = line[8:]
        elif m := re.fullmatch(r"symbol (\w+) in ([\d, ]+)", line):
            buckets = tuple(int(v) for v in m[2].split(","))
            if list(buckets) != sorted(set(buckets)) or any(s.name == m[1] for s in self.symbols):
                raise ProgramError("a symbol is named once and its sizes ascend")
            self.symbols.append(Symbol(m[1], buckets))
        else:
            raise ProgramError("cannot read this")

    def _in_stage(self, number: int, line: str, stage: Stage) -> None:
        if line == "return" or line.startswith("return "):
            self.stages.append(dataclasses.replace(stage, outputs=_split_names(line[6:])))
            self._stage = None
        elif (m := _NODE.fullmatch(line)) and m[2] in OPS:
            kinds = OPS[m[2]].attrs
            pairs = [p.partition("=") for p in _split_top(m[4] or "")]
            if sorted(k for k, _, _ in pairs) != sorted(kinds):
                raise ProgramError(f"{m[2]} has attributes {sorted(kinds)}")
            attrs = tuple((k, _parse_attr(kinds[k], v)) for k, _, v in pairs)
            node = Node(m[1], m[2], _split_names(m[3]), attrs)
            self.types[stage.name, node.name] = number, _parse_type(m[5])
            self._stage = dataclasses.replace(stage, nodes=(*stage.nodes, node))
        else:
            raise ProgramError("cannot read this")

    def _in_schedule(self, line: str) -> None:
        if self.result:
            raise ProgramError("nothing may follow the result")
        if m := _CALL.fullmatch(line):
            self.steps.append(Call(m[1], m[2] or ""))
        elif m := _REPEAT.fullmatch(line):
            carry = [_CARRY.fullmatch(part) for part in _split_top(m[4])]
            collect = [_COLLECT.fullmatch(part) for part in _split_top(m[5] or "")]
            if any(c is None for c in (*carry, *collect)):
                raise ProgramError("cannot read the carries")
            self.steps.append(
                Repeat(
                    m[2],
                    int(m[1]),
                    m[3],
                    tuple((c[2], c[1], c[3]) for c in carry if c),
                    tuple((c[2], c[1]) for c in collect if c),
                    m[6] or "",
                    tuple(int(i) for i in (m[7] or "").split(",") if i.strip()),
                )
            )
        elif m := re.fullmatch(rf"result ({_NAME})", line):
            self.result = m[1]
        else:
            raise ProgramError("cannot read this")

    def program(self) -> Program:
        if not self.name or not self.stages or not self.result:
            raise ProgramError("program text is incomplete: needs a name, stages and a schedule")
        schedule = Schedule(tuple(self.steps), self.result)
        program = check(Program(self.name, tuple(self.symbols), tuple(self.stages), self.params, schedule))
        for stage in program.stages:
            types = infer_stage(stage, program.params)
            for node in stage.nodes:
                number, printed = self.types[stage.name, node.name]
                if printed != types[node.name]:
                    raise ProgramError(
                        f"program text, line {number}: {node.name} is written as {printed}, "
                        f"but {node.op} gives {types[node.name]}"
                    )
        return program


def parse(text: str) -> Program:
    """Inverse of str(program), without weights; lines that begin with "#" are passed over. Raises ProgramError naming
    the line; the result is checked, and the types written beside nodes must be the inferred ones."""
    parser = _Parser()
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        try:
            if line and not line.startswith("#"):
                parser.line(number, line)
        except (ProgramError, ValueError) as error:
            message = error.message if isinstance(error, ProgramError) else str(error)
            raise ProgramError(f"program text, line {number}: {message}: {line[:120]}") from None
    return parser.program()
