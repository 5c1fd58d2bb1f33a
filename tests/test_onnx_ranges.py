"""Bounds of integer values hold every value that the reference computes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_artifacts import flow_inputs, flow_program

from vlac.engines.numpy_engine import run_stage
from vlac.graph import Call, Program, Schedule, StageBuilder
from vlac.ops import OPS
from vlac.targets._onnx_ranges import ranges

UNARY = {
    "cumsum": {},
    "reduce_sum": {},
    "repeat_each": {"times": 2},
    "pad": {"size": 9},
    "reshape": {"shape": (4,)},
    "slice": {"axis": 0, "start": 1, "stop": 3},
    "tile": {"rows": 4},
}


@st.composite
def index_stages(draw: st.DrawFn) -> Program:
    """A chain of index ops on a vector made from masks and constants."""
    s = StageBuilder("one")
    value, size = s.cast(s.input("token_valid", "bool", 4), dtype="i32"), 4
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from([*UNARY, "add", "sub", "mul", "concat"]))
        if kind in ("add", "sub", "mul"):
            constant = s.full(shape=(1,), value=float(draw(st.integers(-5, 5))), dtype="i32")
            value = s.op(kind, value, constant)
        elif kind == "concat":
            start = draw(st.integers(-3, 3))
            value, size = s.concat(value, s.arange(start=start, stop=start + 2), axis=0), size + 2
        elif (
            (kind in ("reshape", "slice") and size != 4)
            or (kind == "pad" and size > 9)
            or (kind == "tile" and size != 1)
        ):
            continue
        else:
            value = s.op(kind, value, **UNARY[kind])
            size = {"cumsum": size, "reduce_sum": 1, "repeat_each": 2 * size, "slice": 2}.get(
                kind, 9 if kind == "pad" else 4
            )
        if size > 40:
            break
    s.output(s.op("reshape", value, name="out", shape=(size,)))
    return Program("one", (), (s.build(),), {}, Schedule((Call("one"),), "out"))


@given(index_stages(), st.lists(st.booleans(), min_size=4, max_size=4))
@settings(deadline=None)
def test_values_lie_within_their_bounds(program: Program, valid: list[bool]) -> None:
    bounds = ranges(program)["one"]
    stage = program.stages[0]
    env = {"token_valid": np.array(valid)}
    for node in stage.nodes:
        env[node.name] = OPS[node.op].reference([env[i] for i in node.inputs], node.attr)
        found = bounds[node.name]
        assert found is not None, node
        if np.abs(env[node.name].astype(np.int64)).max() < 2**30:  # the reference wraps at 32 bits, bounds do not
            assert found[0] <= env[node.name].min() and env[node.name].max() <= found[1], node


def test_bounds_follow_values_from_stage_to_stage() -> None:
    program = flow_program()
    bounds = ranges(program)
    assert bounds["prefix"]["count"] == bounds["flow"]["count"] == (0, 12)
    assert bounds["flow"]["step"] == (0, 4)
    assert bounds["prefix"]["tokens"] is None
    inputs = {**flow_inputs(), "image_tokens": np.zeros((8, 64), np.float32)}
    count = run_stage(program, "prefix", inputs, lambda n: program.weights[n].load())["count"]
    assert 0 <= count[0] <= 12
