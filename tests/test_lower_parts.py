"""Rewrites that the ONNX targets add: projections of many rows taken apart, factors on scores taken into weights, keys
of a few actions as many as those of all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lower_toys import ops, program_of, rewrite, run, same

from vlac.dims import symbol
from vlac.graph import Param, Program, StageBuilder, Symbol, check, infer_stage
from vlac.rewrites.keys import level_suffix_keys
from vlac.rewrites.parts import MANY_ROWS, part_projections
from vlac.rewrites.scores import fold_score_scales

SHAPES = {"l.q.weight": (8, 6), "l.q.bias": (8,), "l.k.weight": (4, 6), "l.v.weight": (4, 6), "table": (9, 8)}


def attention(rows: int, scale: float = 0.25, spoil: str = "") -> Program:
    """One stage with q (with a bias), k and v of the same `rows`, fused, and their attention."""
    b = StageBuilder("one")
    x = b.input("state", "f32", rows, 6)
    q, k, v = b.linear(x, "@l.q.weight", "@l.q.bias"), b.linear(x, "@l.k.weight"), b.linear(x, "@l.v.weight")
    turned = b.op("rope", q, b.op("arange", start=0, stop=rows), head_dim=4, base=100.0) if spoil != "plain" else q
    y = b.attention(turned, k, v, heads=2, kv_heads=1, scale=scale)
    if spoil == "read":
        y = b.add(y, turned)
    b.output(b.op("silu", y, name="out"))
    return rewrite("fuse_projections")(program_of(b, shapes=SHAPES))


def seen(rows: int) -> dict[str, Any]:
    return {"state": np.random.default_rng(3).normal(size=(rows, 6)).astype(np.float32)}


def test_projections_of_many_rows_come_apart() -> None:
    program = attention(MANY_ROWS)
    done = check(part_projections(program, ("f32",)))
    assert ops(program).count("linear") == 1 and "slice" in ops(program)
    assert ops(done).count("linear") == 3 and "slice" not in ops(done)
    assert sorted(p.shape for p in done.params.values()) == [(4,), (4,), (4, 6), (4, 6), (8,), (8, 6)]
    assert same(run(program, seen(MANY_ROWS)), run(done, seen(MANY_ROWS)))


def test_few_rows_and_other_formats_stay_together() -> None:
    few, many = attention(MANY_ROWS - 1), attention(MANY_ROWS)
    assert part_projections(few, ("f32",)) == few
    assert part_projections(many, ("int8",)) == many


def test_parts_keep_their_format_and_what_columns_weigh() -> None:
    program = attention(MANY_ROWS)
    name = next(n for n, p in program.params.items() if len(p.shape) == 2)
    held = program.replace(params={**program.params, name: Param(program.params[name].shape, "int8")})
    done = part_projections(held, ("int8",))
    assert {p.format for p in done.params.values() if len(p.shape) == 2} == {"int8"}
    whole = program.weights[name].load()
    parts = [done.weights[n].load() for n in done.params if n.endswith(".weight")]
    assert np.array_equal(np.concatenate(parts), whole)


def twice_read(first: int, second: int, rows: int = MANY_ROWS) -> Program:
    """Two linears of one weight, each cut in two: after so many columns."""
    b = StageBuilder("one")
    x = b.input("state", "f32", rows, 6)
    cut = [(b.linear(y, "@w.weight"), at) for y, at in ((x, first), (b.op("silu", x), second))]
    parts = [b.op("slice", y, axis=1, start=s, stop=e) for y, at in cut for s, e in ((0, at), (at, 8))]
    b.output(b.op("concat", *parts, axis=1, name="out"))
    return program_of(b, shapes={"w.weight": (8, 6)})


def test_a_weight_that_two_linears_read_comes_apart_if_both_cut_it_alike() -> None:
    program = twice_read(3, 3)
    done = check(part_projections(program, ("f32",)))
    assert sorted(p.shape for p in done.params.values()) == [(3, 6), (5, 6)]
    assert same(run(program, seen(MANY_ROWS)), run(done, seen(MANY_ROWS)))
    assert part_projections(twice_read(3, 4), ("f32",)) == twice_read(3, 4)


def test_one_linear_for_which_it_is_better_decides_for_all_of_a_weight() -> None:
    few = twice_read(3, 3, rows=5)
    assert part_projections(few, ("f32",)) == few
    done = part_projections(few, ("f32",), lambda stage, n, made, form: n.inputs[0] == "state")
    assert ops(done).count("linear") == 4


@pytest.mark.parametrize("rows", [5, MANY_ROWS])
@pytest.mark.parametrize("spoil", ["", "plain"])
def test_a_power_of_two_goes_into_the_queries_and_changes_no_bit(rows: int, spoil: str) -> None:
    program = part_projections(attention(rows, spoil=spoil), ("f32",))
    done = check(fold_score_scales(program))
    assert [n.attr["scale"] for s in done.stages for n in s.nodes if n.op == "attention"] == [1.0]
    assert np.array_equal(run(program, seen(rows)), run(done, seen(rows)))


@pytest.mark.parametrize(("scale", "spoil"), [(0.3, ""), (1.0, ""), (0.25, "read")])
def test_other_factors_and_queries_that_are_read_twice_stay(scale: float, spoil: str) -> None:
    program = attention(5, scale, spoil)
    assert fold_score_scales(program) == program


def flow() -> Program:
    """A loop's stage: N rows attend to four older ones and causally to themselves."""
    b, n = StageBuilder("one"), symbol("N")
    x, old = b.input("noise", "f32", n, 8), b.input("state", "f32", 4, 4)
    where = b.op("arange", start=4, stop=n + 4)
    there = b.op("concat", b.op("arange", start=0, stop=4), where, axis=0)
    seen = b.op("attention_mask", where, there, b.op("full", shape=(n + 4,), value=1.0, dtype="bool"))
    k, v = (b.op("concat", old, b.linear(x, f"@l.{w}.weight"), axis=0) for w in "kv")
    y = b.attention(x, k, v, seen, heads=2, kv_heads=1, scale=0.5)
    b.output(b.op("silu", y, name="out"))
    shapes = {"l.k.weight": (4, 8), "l.v.weight": (4, 8)}
    drawn = program_of(b, shapes=shapes, symbols=(Symbol("N", (2, 5)),))
    return check(drawn)


def test_float16_weights_keep_their_bits() -> None:
    program = attention(5)
    name = next(n for n, p in program.params.items() if len(p.shape) == 2)
    held = program.replace(params={**program.params, name: Param(program.params[name].shape, "f16")})
    assert fold_score_scales(held) == held


def test_a_few_rows_attend_to_as_many_keys_as_all_of_them() -> None:
    program = flow()
    done = check(level_suffix_keys(program))
    keys = {
        rows: [types[n.inputs[1]].shape[0] for n in done.stages[0].nodes if n.op == "attention"]
        for rows in (2, 5)
        for types in [infer_stage(done.bind({"N": rows}).stages[0], done.params)]
    }
    assert keys[2] == keys[5] == [4 + 5 + 1]
    rng = np.random.default_rng(2)
    x, old = rng.normal(size=(5, 8)).astype(np.float32), rng.normal(size=(4, 4)).astype(np.float32)
    for rows in (2, 5):
        given = {"noise": x[:rows], "state": old}
        before, after = (run(p.bind({"N": rows}), given) for p in (program, done))
        assert same(before, after, 3e-7)
    whole = run(done.bind({"N": 5}), {"noise": x, "state": old})
    assert same(run(done.bind({"N": 2}), {"noise": x[:2], "state": old}), whole[:2], 3e-7)


def test_keys_of_other_sequences_stay_as_they_are() -> None:
    program = attention(5)
    assert level_suffix_keys(program) == program
