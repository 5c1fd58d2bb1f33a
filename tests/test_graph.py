"""Programs as text: what is printed parses back to the same value; whatever else the parser is given, it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlac.dims import Dim, symbol
from vlac.errors import ProgramError
from vlac.graph import (
    Call,
    Node,
    Param,
    Program,
    Repeat,
    Schedule,
    Stage,
    StageBuilder,
    Symbol,
    check,
    infer_stage,
)
from vlac.ops import OPS, Type
from vlac.program_text import parse

C, T = symbol("C"), symbol("T")

Draw = Callable[[st.SearchStrategy[int]], int]


def small() -> Program:
    """Two stages, a symbol, every kind of attribute, a repeat."""
    p = StageBuilder("prefix")
    ids = p.input("tokens", "i32", T)
    x = p.embed(ids, "@table", name="rows")
    p.output(
        p.rope(x, ids, head_dim=4, base=10000.0, name="keys"), p.full(shape=(T,), value=0.0, dtype="bool", name="no")
    )
    f = StageBuilder("flow")
    state = f.input("x", "f32", 3, 8)
    step = f.input("step", "i32", 1)
    keys = f.input("keys", "f32", T, 8)
    y = f.attention(state, keys, keys, heads=2, kv_heads=2, scale=0.5)
    y = f.gelu(f.reshape(y, shape=(6, 4)), approximate="tanh")
    y = f.add(f.reshape(y, shape=(3, 8)), f.embed(step, "@steps"))
    f.output(f.slice(f.concat(y, state, axis=1), axis=1, start=4, stop=12, name="x_next"))
    return check(
        Program(
            "small",
            (Symbol("T", (4, 8)),),
            (p.build(), f.build()),
            {"table": Param((11, 8), "q8_0"), "steps": Param((4, 8))},
            Schedule((Call("prefix"), Repeat("flow", 4, "step", (("x_next", "x", "noise"),))), "x_next"),
        )
    )


SMALL_TEXT = """\
program small
symbol T in 4, 8

stage prefix (tokens: i32[T])
  rows = embed(tokens, @table) : f32[T,8]
  keys = rope(rows, tokens) {base=10000.0, head_dim=4} : f32[T,8]
  no = full() {dtype="bool", shape=[T], value=0.0} : bool[T]
  return keys, no

stage flow (x: f32[3,8], step: i32[1], keys: f32[T,8])
  attention.1 = attention(x, keys, keys) {heads=2, kv_heads=2, scale=0.5} : f32[3,8]
  reshape.1 = reshape(attention.1) {shape=[6, 4]} : f32[6,4]
  gelu.1 = gelu(reshape.1) {approximate="tanh"} : f32[6,4]
  reshape.2 = reshape(gelu.1) {shape=[3, 8]} : f32[3,8]
  embed.1 = embed(step, @steps) : f32[1,8]
  add.1 = add(reshape.2, embed.1) : f32[3,8]
  concat.1 = concat(add.1, x) {axis=1} : f32[3,16]
  x_next = slice(concat.1) {axis=1, start=4, stop=12} : f32[3,8]
  return x_next

params
  table : q8_0[11,8]
  steps : f32[4,8]

schedule
  call prefix
  repeat 4 flow index step carry x=x_next from noise
  result x_next
"""


def test_the_text_of_a_program_is_this() -> None:
    assert str(small()) == SMALL_TEXT


def test_text_parses_back_to_the_program() -> None:
    assert parse(SMALL_TEXT) == small()


# --- drawn programs --------------------------------------------------------------------------------------------


def _linear(b: StageBuilder, x: str, w: int, params: dict[str, Param], draw: Draw) -> tuple[str, int]:
    n = draw(st.integers(1, 9))
    name = f"w{len(params)}.weight"
    params[name] = Param((n, w), ("f32", "f16", "q8_0")[draw(st.integers(0, 2))])
    return b.linear(x, f"@{name}"), n


def _join(b: StageBuilder, x: str, w: int, params: dict[str, Param], draw: Draw) -> tuple[str, int]:
    return b.concat(x, b.scale(x, factor=draw(st.integers(-9, 9)) / 7), axis=1), 2 * w


def _cut(b: StageBuilder, x: str, w: int, params: dict[str, Param], draw: Draw) -> tuple[str, int]:
    start = draw(st.integers(0, w - 1))
    return b.slice(x, axis=1, start=start, stop=w), w - start


def _pad(b: StageBuilder, x: str, w: int, params: dict[str, Param], draw: Draw) -> tuple[str, int]:
    size = w + draw(st.integers(0, 5))
    return b.pad(x, size=size), size


def _attend(b: StageBuilder, x: str, w: int, params: dict[str, Param], draw: Draw) -> tuple[str, int]:
    return b.attention(x, x, x, heads=1, kv_heads=1, scale=1 / (1 + w)), w


def _norm(b: StageBuilder, x: str, w: int, params: dict[str, Param], draw: Draw) -> tuple[str, int]:
    return b.layer_norm(x, eps=10.0 ** -draw(st.integers(3, 9))), w


STEPS = (_linear, _join, _cut, _pad, _attend, _norm)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """One or two stages, each a chain of random ops on rows of a symbolic number."""
    rows: Dim = C * draw(st.integers(1, 5)) + T * draw(st.integers(0, 2)) + draw(st.integers(0, 3))
    params: dict[str, Param] = {}
    stages: list[Stage] = []
    source, width = "state", draw(st.integers(1, 8))
    for k in range(draw(st.integers(1, 2))):
        b = StageBuilder(f"stage{k}")
        x = b.input(source, "f32", rows, width)
        for _ in range(draw(st.integers(1, 8))):
            x, width = draw(st.sampled_from(STEPS))(b, x, width, params, draw)
        source = b.op("silu", x, name=f"out{k}")
        b.output(source)
        stages.append(b.build())
    symbols = (Symbol("C", (1, 2, 3)), Symbol("T", (8, draw(st.integers(9, 99)))))
    calls = tuple(Call(s.name) for s in stages)
    return check(Program("drawn", symbols, tuple(stages), params, Schedule(calls, source)))


@given(programs())
@settings(max_examples=60, deadline=None)
def test_any_program_prints_and_parses_back(program: Program) -> None:
    assert parse(str(program)) == program


@given(programs(), st.integers(1, 3), st.integers(8, 99))
@settings(max_examples=40, deadline=None)
def test_binding_symbols_keeps_the_rules_and_leaves_none(program: Program, c: int, t: int) -> None:
    bound = check(program.bind({"C": c, "T": t}))
    assert bound.symbols == ()
    for stage in bound.stages:
        assert all(isinstance(d, int) for t in infer_stage(stage, bound.params).values() for d in t.shape)


# --- broken text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("keys = rope(rows, tokens)", "keys = rope(rows, token)", "token is not defined before"),
        ("x_next = slice(concat.1)", "x_next = splice(concat.1)", "cannot read this"),
        (" : f32[3,16]", " : f32[3,17]", "written as f32[3,17], but concat gives f32[3,16]"),
        ("embed(tokens, @table) : f32[T,8]", "embed(tokens, @table) : f32[8]", "line 5: rows is written as f32[8]"),
        ("@table)", "@tables)", "no parameter tables"),
        ("start=4, stop=12", "start=4", "slice has attributes"),
        ("axis=1, start", "axis=1.0, start", "int attribute"),
        ("scale=0.5", "scale=NaN", "float attribute"),
        ("scale=0.5", 'scale="0.5"', "float attribute"),
        ('dtype="bool"', 'dtype="f8"', "f8"),
        ('approximate="tanh"', 'approximate="fast"', "fast"),
        ("heads=2, kv", "heads=0, kv", "0 heads"),
        ("head_dim=4", "head_dim=0", "head_dim 0"),
        ("shape=[6, 4]", "shape=[0, 4]", "reshape"),
        ("tokens: i32[T]", "tokens: i64[T]", "i64"),
        ("tokens: i32[T]", "tokens: i32[0]", "empty"),
        ("tokens: i32[T]", "tokens: i32[99999999999]", "more than"),
        ("table : q8_0", "table : q8_9", "q8_9"),
        ("steps : f32", "table : f32", "cannot read this"),
        ("symbol T in 4, 8", "symbol T in 8, 4", "ascend"),
        ("  return keys, no\n", "", "cannot read this"),
        ("x=x_next from", "x=x_prev from", "carry x=x_prev"),
        ("from noise", "from nothing", "nothing"),
        ("repeat 4", "repeat 0", "repeat 0"),
        ("index step", "index keys", "index keys"),
        ("call prefix\n", "call prefix each robot\n", "each robot"),
        ("call prefix\n", "call suffix\n", "no stage suffix"),
        ("result x_next", "result action", "action"),
        ("  result x_next\n", "", "incomplete"),
        ("stage flow", "stage prefix", "repeat"),
        ("rows = embed", "@rows = embed", "cannot read this"),
        ("program small\n", "", "incomplete"),
    ],
)
def test_a_broken_line_is_refused_with_its_reason(old: str, new: str, said: str) -> None:
    assert old in SMALL_TEXT
    with pytest.raises(ProgramError) as error:
        parse(SMALL_TEXT.replace(old, new, 1))
    assert said in str(error.value)


def refuses_or_reads(text: str) -> None:
    """parse gives a program that prints back, or ProgramError, and nothing else."""
    try:
        program = parse(text)
    except ProgramError:
        return
    assert parse(str(program)) == program


@given(
    st.integers(0, len(SMALL_TEXT)),
    st.integers(0, 12),
    st.one_of(
        st.text(max_size=6),
        st.text(alphabet='0123456789[]{}(),.:=@*+-"TCxe \n', max_size=8),
        st.sampled_from(["-1", "0", "99999999999999999999", "C*T", '"', "[" * 30, "f32[1,1,1]", "bool[]", "1e999"]),
    ),
)
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_text_with_a_hole_is_refused_or_read(at: int, length: int, text: str) -> None:
    refuses_or_reads(SMALL_TEXT[:at] + text + SMALL_TEXT[at + length :])


TYPES = st.builds(
    Type,
    st.sampled_from(["f32", "i32", "bool"]),
    st.lists(st.one_of(st.integers(1, 9), st.sampled_from([T, C * 4])), max_size=3).map(tuple),
)
VALUES = {
    "int": st.integers(-2, 9),
    "float": st.floats(-2, 9),
    "str": st.sampled_from(["tanh", "none", "f32", "i32", "bool", "?"]),
    "dim": st.one_of(st.integers(-2, 9), st.just(T)),
    "dims": st.lists(st.one_of(st.integers(-2, 9), st.just(T)), max_size=3).map(tuple),
}


@pytest.mark.parametrize("op", sorted(OPS))
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_every_shape_rule_answers_or_refuses(op: str, data: st.DataObject) -> None:
    """No operands and attributes of the right kind make a shape rule raise anything but ProgramError."""
    row = OPS[op]
    inputs = [(f"x{i}", data.draw(TYPES)) for i in range(data.draw(st.integers(0, len(row.inputs) + 1)))]
    attrs = tuple((k, data.draw(VALUES[kind])) for k, kind in sorted(row.attrs.items()))
    stage = Stage("s", tuple(inputs), (Node("y", op, tuple(n for n, _ in inputs), attrs),), ("y",))
    try:
        infer_stage(stage, {})
    except ProgramError as error:
        assert "y = " in str(error)


def test_a_value_assigned_twice_is_refused() -> None:
    node = Node("y", "silu", ("state",))
    stage = Stage("s", (("state", Type("f32", (1, 2))),), (node, node), ("y",))
    with pytest.raises(ProgramError, match="assigned twice"):
        infer_stage(stage, {})
