"""Each rewrite alone: what it does to a small program, what it leaves alone, and that the result stays."""

from __future__ import annotations

import numpy as np
import pytest
from lower_toys import LOOP_GIVEN, T, loop, one, ops, program_of, rewrite, rows, run, same

from vlac.graph import Param, Repeat, StageBuilder, check
from vlac.rewrites.linears import fused_name
from vlac.rewrites.patches import block_order


def test_fold_makes_a_weight_of_nodes_that_read_only_weights() -> None:
    program = one(
        lambda b: b.add(
            b.input("state", "f32", 3, 4), b.scale(b.embed(b.arange(start=2, stop=5), "@table"), factor=3.0)
        ),
        table=(9, 4),
    )
    folded = check(rewrite("fold")(program))
    assert ops(folded) == ["add"]
    assert folded.params == {"s.scale.1": Param((3, 4))}
    assert (run(program, {"state": rows(3, 4)}) == run(folded, {"state": rows(3, 4)})).all()


def test_fold_leaves_outputs_index_constants_and_repeated_rows_as_they_are() -> None:
    index = one(
        lambda b: b.add(b.input("tokens", "i32", 2), b.add(b.arange(start=0, stop=2), b.arange(start=3, stop=5)))
    )
    result = one(lambda b: b.scale("@w", factor=2.0), w=(1, 4))
    row = one(lambda b: b.add(b.input("state", "f32", 5, 4), b.tile("@w", rows=5)), w=(1, 4))
    for program in (index, result, row):
        assert rewrite("fold")(program) == program


def test_fold_scales_moves_a_factor_into_weight_and_bias_or_table() -> None:
    def draw(b: StageBuilder) -> str:
        x = b.scale(b.linear(b.input("state", "f32", 2, 4), "@a", "@b"), factor=0.1)
        return b.concat(
            x, b.scale(b.scale(b.embed(b.input("tokens", "i32", 3), "@table"), factor=7.0), factor=0.3), axis=0
        )

    program = one(draw, a=(5, 4), b=(5,), table=(9, 5))
    folded = check(rewrite("fold_scales")(program))
    assert ops(folded) == ["linear", "embed", "concat"]
    given_ = {"state": rows(2, 4), "tokens": np.array([8, 0, 3], np.int32)}
    assert same(run(program, given_), run(folded, given_), 3e-7)


def test_fold_scales_leaves_what_others_read() -> None:
    def draw(b: StageBuilder) -> str:
        x = b.linear(b.input("state", "f32", 2, 4), "@a")
        words = b.embed(b.input("tokens", "i32", 2), "@table")
        plain = b.embed(b.full(shape=(2,), value=1.0, dtype="i32"), "@table")
        return b.add(b.add(b.add(x, b.scale(x, factor=2.0)), b.scale(words, factor=3.0)), plain)

    program = one(draw, a=(4, 4), table=(9, 4))
    assert ops(rewrite("fold_scales")(program)) == ops(program)


def test_a_weight_with_two_readers_is_copied_before_it_changes() -> None:
    def draw(b: StageBuilder) -> str:
        x = b.input("state", "f32", 2, 4)
        return b.add(b.scale(b.linear(x, "@a"), factor=3.0), b.linear(b.silu(x), "@a"))

    program = one(draw, a=(4, 4))
    folded = check(rewrite("fold_scales")(program))
    assert set(folded.params) == {"a", "a.1"}
    assert same(run(program, {"state": rows(2, 4)}), run(folded, {"state": rows(2, 4)}), 3e-7)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("out_bias", [True, False])
def test_fold_biases_drops_those_of_keys_and_moves_those_of_values(heads: int, groups: int, out_bias: bool) -> None:
    def draw(b: StageBuilder) -> str:
        x = b.input("state", "f32", 5, 6)
        q, k, v = (b.linear(x, f"@{p}.weight", f"@{p}.bias") for p in "qkv")
        y = b.attention(q, k, v, b.input("image_valid", "bool", 5, 5), heads=heads, kv_heads=groups, scale=0.5)
        return b.linear(y, "@o.weight", *["@o.bias"] * out_bias)

    wide, narrow = heads * 2, groups * 2
    shapes = {"q__weight": (wide, 6), "q__bias": (wide,), "o__weight": (6, wide), "o__bias": (6,)}
    shapes |= {"k__weight": (narrow, 6), "k__bias": (narrow,), "v__weight": (narrow, 6), "v__bias": (narrow,)}
    program = one(draw, **shapes)
    folded = check(rewrite("fold_biases")(program))
    assert {"q.bias", "o.bias"} <= set(folded.params)
    assert not {"k.bias", "v.bias"} & set(folded.params)
    given_ = {"state": rows(5, 6), "image_valid": np.tril(np.ones((5, 5), bool))}
    assert same(run(program, given_), run(folded, given_))


def test_fold_biases_leaves_a_rotated_key_and_a_value_read_twice() -> None:
    def draw(b: StageBuilder) -> str:
        x = b.input("state", "f32", 3, 4)
        k = b.rope(b.linear(x, "@k.weight", "@k.bias"), b.arange(start=0, stop=3), head_dim=4, base=9.0)
        v = b.linear(x, "@v.weight", "@v.bias")
        return b.add(b.linear(b.attention(x, k, v, heads=1, kv_heads=1, scale=1.0), "@o.weight"), v)

    program = one(draw, k__weight=(4, 4), k__bias=(4,), v__weight=(4, 4), v__bias=(4,), o__weight=(4, 4))
    assert rewrite("fold_biases")(program) == rewrite("prune")(program)


def test_row_wise_ops_go_before_a_tile_and_sums_broadcast() -> None:
    def draw(b: StageBuilder) -> str:
        row = b.tile(b.input("state", "f32", 1, 4), rows=6)
        row = b.silu(b.linear(row, "@a"))
        x = b.input("noise", "f32", 6, 4)
        return b.mul(b.add(row, x), b.sigmoid(row))

    program = one(draw, a=(4, 4))
    done = check(rewrite("broadcast_tiles")(program))
    assert "tile" not in ops(done)
    given_ = {"state": rows(1, 4), "noise": rows(6, 4)}
    assert same(run(program, given_), run(done, given_), 3e-7)


def test_split_concat_linears_takes_the_repeated_part_out() -> None:
    def draw(b: StageBuilder) -> str:
        row = b.tile(b.input("state", "f32", 1, 3), rows=6)
        x = b.concat(b.input("noise", "f32", 6, 4), row, b.silu("noise"), axis=1)
        return b.linear(x, "@a.weight", "@a.bias")

    program = one(draw, a__weight=(5, 11), a__bias=(5,))
    done = check(rewrite("split_concat_linears")(program))
    assert ops(done).count("linear") == 3
    assert {n: p.shape for n, p in done.params.items() if "part" in n} == {
        "a.part0.weight": (5, 4),
        "a.part1.weight": (5, 3),
        "a.part2.weight": (5, 4),
    }
    given_ = {"state": rows(1, 3), "noise": rows(6, 4)}
    assert same(run(program, given_), run(done, given_))


def test_split_concat_linears_leaves_parts_of_many_rows_together() -> None:
    program = one(
        lambda b: b.linear(b.concat(b.input("noise", "f32", 6, 4), b.input("state", "f32", 6, 4), axis=1), "@a"),
        a=(5, 8),
    )
    assert rewrite("split_concat_linears")(program) == program


def test_tabulate_steps_evaluates_every_step_ahead() -> None:
    program = loop(lambda b, x, step: b.tanh(b.linear(b.embed(step, "@times"), "@w")), times=(3, 1), w=(4, 1))
    done = check(rewrite("tabulate_steps")(program))
    assert ops(done, "loop") == ["embed", "add"]
    assert done.params["loop.tanh.1.table"] == Param((3, 4))
    assert same(run(program, LOOP_GIVEN), run(done, LOOP_GIVEN), 3e-7)


def test_tabulate_steps_reshapes_values_of_several_rows() -> None:
    program = loop(
        lambda b, x, step: b.reshape(b.linear(b.embed(step, "@times"), "@w"), shape=(3, 4)), times=(3, 1), w=(12, 1)
    )
    done = check(rewrite("tabulate_steps")(program))
    assert ops(done, "loop") == ["embed", "reshape", "add"]
    assert same(run(program, LOOP_GIVEN), run(done, LOOP_GIVEN), 3e-7)


def test_hoist_invariants_moves_what_the_loop_does_not_change() -> None:
    def draw(b: StageBuilder, x: str, step: str) -> str:
        valid = b.input("token_valid", "bool", T)
        mask = b.attention_mask(b.arange(start=0, stop=3), b.full(shape=(T,), value=0.0, dtype="i32"), valid)
        return b.attention(x, b.linear("memory", "@k"), b.linear("memory", "@v"), mask, heads=1, kv_heads=1, scale=0.5)

    program = loop(draw, k=(4, 4), v=(4, 4))
    done = check(rewrite("hoist_invariants")(program))
    assert ops(done, "loop") == ["attention", "add"]
    assert dict(done.stage("loop").inputs).keys() == {"x", "step", "k", "v", "attention_mask.1"}
    assert done.stage("first").outputs == ("attention_mask.1", "k", "v")
    assert (run(program, LOOP_GIVEN) == run(done, LOOP_GIVEN)).all()


def test_hoisted_values_never_take_a_name_that_is_in_use() -> None:
    def draw(b: StageBuilder, x: str, step: str) -> str:
        b.silu("memory", name="embed.1")  # dead, and named as a node of the first stage
        clash = b.tanh("memory", name="noise.1")
        return b.attention(x, b.sigmoid(clash, name="embed.1"), "memory", heads=1, kv_heads=1, scale=0.5)

    program = loop(draw)
    done = check(rewrite("hoist_invariants")(program))
    assert ops(done, "loop") == ["attention", "add"]
    assert (run(program, LOOP_GIVEN) == run(done, LOOP_GIVEN)).all()


def test_hoist_invariants_leaves_a_loop_with_nothing_before_it() -> None:
    b = StageBuilder("loop")
    x, step = b.input("x", "f32", 3, 4), b.input("step", "i32", 1)
    y = b.add(b.tanh(b.input("state", "f32", 3, 4)), b.embed(step, "@t"))
    b.output(b.add(x, y, name="x_next"))
    steps = (Repeat("loop", 2, "step", (("x_next", "x", "noise"),)),)
    program = program_of(b, shapes={"t": (2, 4)}, steps=steps, result="x_next")
    assert rewrite("hoist_invariants")(program) == program


@pytest.mark.parametrize("biases", [(), ("in",), ("out",), ("in", "out")])
def test_compose_linears_where_the_inner_width_is_small(biases: tuple[str, ...]) -> None:
    def draw(b: StageBuilder) -> str:
        x = b.linear(b.input("state", "f32", 2, 3), "@in.weight", *["@in.bias"] * ("in" in biases))
        return b.linear(x, "@out.weight", *["@out.bias"] * ("out" in biases))

    program = one(draw, in__weight=(8, 3), in__bias=(8,), out__weight=(7, 8), out__bias=(7,))
    done = check(rewrite("compose_linears")(program))
    assert ops(done) == ["linear"]
    assert done.params == {"out.weight": Param((7, 3)), **({"out.bias": Param((7,))} if biases else {})}
    assert same(run(program, {"state": rows(2, 3)}), run(done, {"state": rows(2, 3)}))


def test_compose_linears_leaves_a_bottleneck() -> None:
    program = one(lambda b: b.linear(b.linear(b.input("state", "f32", 2, 9), "@a"), "@b"), a=(2, 9), b=(9, 2))
    assert rewrite("compose_linears")(program) == program


def test_fuse_projections_joins_linears_of_one_value_and_fills_missing_biases() -> None:
    def draw(b: StageBuilder) -> str:
        x = b.silu(b.input("state", "f32", 5, 6))
        q, k = b.linear(x, "@l.q_proj.weight", "@l.q_proj.bias"), b.linear(x, "@l.k_proj.weight")
        v = b.linear(x, "@l.v_proj.weight")
        gate, up = (b.linear(q, f"@l.{p}_proj.weight") for p in ("gate", "up"))
        return b.add(b.attention(gate, k, v, heads=2, kv_heads=1, scale=0.5), up)

    shapes = {
        "l__q_proj__weight": (4, 6),
        "l__q_proj__bias": (4,),
        "l__k_proj__weight": (2, 6),
        "l__v_proj__weight": (2, 6),
    }
    program = one(draw, **shapes, l__gate_proj__weight=(4, 4), l__up_proj__weight=(4, 4))
    done = check(rewrite("fuse_projections")(program))
    assert {n: p.shape for n, p in done.params.items()} == {
        "l.qkv_proj.weight": (8, 6),
        "l.qkv_proj.bias": (8,),
        "l.gate_up_proj.weight": (8, 4),
    }
    assert ops(done).count("linear") == 2
    assert same(run(program, {"state": rows(5, 6)}), run(done, {"state": rows(5, 6)}), 3e-7)


def test_fuse_projections_never_stores_a_weight_twice() -> None:
    """A weight that another linear reads too stays alone; the same group in two stages becomes the same weight."""

    def stage(name: str, source: str, alone: bool) -> StageBuilder:
        b = StageBuilder(name)
        x = b.input(source, "f32", 2, 4)
        y = b.add(b.linear(x, "@a_proj"), b.linear(x, "@b_proj"))
        b.output(b.op("linear", y, "@a_proj", name=f"{name}.out") if alone else b.op("silu", y, name=f"{name}.out"))
        return b

    shapes = {"a_proj": (4, 4), "b_proj": (4, 4)}
    shared = program_of(stage("one", "state", False), stage("two", "one.out", False), shapes=shapes)
    assert list(check(rewrite("fuse_projections")(shared)).params) == ["ab_proj.weight"]
    apart = program_of(stage("one", "state", False), stage("two", "one.out", True), shapes=shapes)
    assert rewrite("fuse_projections")(apart) == apart


@pytest.mark.parametrize(
    ("names", "fused"),
    [
        (["t.0.q_proj", "t.0.k_proj", "t.0.v_proj"], "t.0.qkv_proj"),
        (["t.0.mlp.gate_proj", "t.0.mlp.up_proj"], "t.0.mlp.gate_up_proj"),
        (["a.0.k_proj", "b.0.v_proj"], "a.0.kv_proj"),
        (["a.fc", "a.gate"], "a.fc_gate"),
        (["q_proj", "kv_proj"], "q_kv_proj"),
    ],
)
def test_fused_names_read_well(names: list[str], fused: str) -> None:
    assert fused_name(names) == fused


def test_block_order_lists_patches_block_by_block() -> None:
    assert block_order(4, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert sorted(block_order(9, 3)) == list(range(81))


@pytest.mark.parametrize("spoiler", ["mask", "rope", "output", "two factors", "concat"])
def test_a_shuffle_stays_where_rows_are_told_apart(spoiler: str) -> None:
    b = StageBuilder("s")
    x = b.patchify(b.input("pixels", "f32", 3, 8, 8), patch=2, block=1)
    if spoiler == "mask":
        x = b.attention(x, x, x, b.input("image_valid", "bool", 16, 16), heads=1, kv_heads=1, scale=1.0)
    elif spoiler == "rope":
        x = b.rope(x, b.arange(start=0, stop=16), head_dim=4, base=9.0)
    elif spoiler == "concat":
        x = b.slice(b.concat(x, b.full(shape=(1, 12), value=0.0, dtype="f32"), axis=0), axis=0, start=1, stop=17)
    y = b.pixel_shuffle(x, factor=2)
    if spoiler == "two factors":
        y = b.concat(b.reshape(y, shape=(1, 192)), b.reshape(b.pixel_shuffle(x, factor=4), shape=(1, 192)), axis=0)
    b.output(y, *[x] * (spoiler == "output"))
    program = program_of(b, shapes={})
    assert rewrite("shuffle_as_patch_order")(program) == program


def test_share_and_prune_leave_one_of_equals_and_nothing_dead() -> None:
    b = StageBuilder("s")
    x = b.input("state", "f32", 2, 4)
    b.input("noise", "f32", 2, 4)
    y = b.add(b.silu(x), b.silu(x))
    b.linear(y, "@dead")
    b.output(b.add(y, y, name="kept"), b.tanh(y, name="unread"))
    other = StageBuilder("other")
    other.output(other.tanh(other.input("state", "f32", 2, 4), name="nobody"))
    program = program_of(b, other, shapes={"dead": (4, 4)}, result="kept")
    done = check(rewrite("prune")(rewrite("share")(program)))
    assert ops(done) == ["silu", "add", "add"]
    assert [s.name for s in done.stages] == ["s"]
    assert [n for n, _ in done.stage("s").inputs] == ["state"]
    assert (done.params, dict(done.weights), len(done.schedule.steps)) == ({}, {}, 1)


def test_drop_identities_removes_what_gives_back_what_it_reads() -> None:
    def draw(b: StageBuilder) -> str:
        x = b.input("state", "f32", 4, 6)
        x = b.reshape(b.slice(b.pad(b.concat(x, axis=0), size=6), axis=1, start=0, stop=6), shape=(4, 6))
        x = b.scale(b.transpose(b.pixel_shuffle(x, factor=1), perm=(0, 1)), factor=1.0)
        return b.silu(x)

    program = one(draw)
    done = check(rewrite("drop_identities")(program))
    assert ops(done) == ["silu"]
    assert (run(program, {"state": rows(4, 6)}) == run(done, {"state": rows(4, 6)})).all()


def test_drop_identities_keeps_outputs_and_square_transposes() -> None:
    output = one(lambda b: b.reshape(b.input("state", "f32", 4, 4), shape=(4, 4)))
    turned = one(lambda b: b.silu(b.transpose(b.input("state", "f32", 4, 4), perm=(1, 0))))
    scaled = one(lambda b: b.silu(b.scale(b.input("state", "f32", 4, 4), factor=2.0)))
    for program in (output, turned, scaled):
        assert rewrite("drop_identities")(program) == program
