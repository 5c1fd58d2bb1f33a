"""Lowering as a whole: same results after every rewrite, nothing left to do, and the text of what comes out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lower_toys import DIMS, Dims, NpArray, observation, ops, run, same, toy

from vlac.errors import CheckpointError, Unsupported
from vlac.graph import check
from vlac.lower import REWRITES, lower, lower_until
from vlac.program_text import parse
from vlac.weights import LazyTensor, Weights


@given(DIMS, st.sampled_from([4, 7]), st.integers(0, 4))
@settings(max_examples=25, deadline=None)
def test_every_rewrite_keeps_the_result(d: Dims, t: int, valid: int) -> None:
    naive, given_ = toy(d), observation(d, t, valid)
    want = run(naive, given_, t)
    program = naive
    for rewrite in REWRITES:
        program = check(rewrite.fn(program))
        assert parse(str(program)) == program
        assert same(want, run(program, given_, t)), rewrite.name


@given(DIMS)
@settings(max_examples=10, deadline=None)
def test_lowering_twice_changes_nothing_more(d: Dims) -> None:
    once = lower(toy(d))
    assert lower(once) == once
    assert set(once.weights) == set(once.params)


def test_lowering_reads_no_weight() -> None:
    naive = toy(Dims())

    def refuse() -> NpArray:
        raise AssertionError("a weight was read")

    lazy = Weights({n: LazyTensor(t.shape, refuse) for n, t in naive.weights.items()})
    assert lower(naive.replace(weights=lazy)) == lower(naive)


def test_text_alone_can_be_lowered() -> None:
    """Without weights the program comes out the same; only its values are missing."""
    text = str(toy(Dims()))
    done = lower(parse(text))
    assert done == lower(toy(Dims()))
    with pytest.raises(CheckpointError, match=r"vit\.q_proj\.weight"):
        done.weights["vit.qkv_proj.weight"].load()


def test_a_lowered_loop_keeps_only_what_changes() -> None:
    program = lower(toy(Dims()))
    assert "time_embedding" not in ops(program)
    assert "attention_mask" not in ops(program, "flow")
    assert not {"tile", "concat"} & set(ops(program, "flow"))
    assert "pixel_shuffle" not in ops(program)
    # the last layer of the prefix gives keys and values and nothing else
    assert not any(
        name.startswith("text.1.") and "kv_proj" not in name and "norm" not in name for name in program.params
    )
    linears = [n for n in program.stage("flow").nodes if n.op == "linear"]
    assert len(linears) == 2 + 2 * 2 + 1  # in, mix_out, two layers of q and o, out


LOWERED_FLOW = """\
stage flow_once (noise: f32[N,5], valid: bool[T+6])
  full.1 = full() {dtype="i32", shape=[N], value=1.0} : i32[N]
  full.2 = full() {dtype="i32", shape=[T+6], value=0.0} : i32[T+6]
  attention_mask.1 = attention_mask(full.1, full.2, valid) : bool[N,T+6]
  return attention_mask.1

stage flow (step: i32[1], x: f32[N,5], k.0: f32[T+6,4], v.0: f32[T+6,4], expert.1.k_proj: f32[T+6,4], expert.1.v_proj: f32[T+6,4], attention_mask.1: bool[N,T+6])
  mix_in.part0 = linear(x, @mix_in.part0.weight) : f32[N,8]
  mix_in.part1 = embed(step, @flow.mix_in.part1.table) : f32[1,8]
  linear.2 = add(mix_in.part0, mix_in.part1) : f32[N,8]
  silu.1 = silu(linear.2) : f32[N,8]
  linear.3 = linear(silu.1, @mix_out.weight, @mix_out.bias) : f32[N,8]
  slice.1 = embed(step, @flow.slice.1.table) : f32[1,8]
  mul.1 = mul(linear.3, slice.1) : f32[N,8]
  slice.2 = embed(step, @flow.slice.2.table) : f32[1,8]
  add.1 = add(mul.1, slice.2) : f32[N,8]
  rms_norm.1 = rms_norm(add.1) {eps=1e-05} : f32[N,8]
  linear.5 = linear(rms_norm.1, @expert.0.q_proj.weight) : f32[N,8]
  attention.1 = attention(linear.5, k.0, v.0, attention_mask.1) {heads=2, kv_heads=1, scale=0.5} : f32[N,8]
  linear.6 = linear(attention.1, @expert.0.o_proj.weight) : f32[N,8]
  add.2 = add(add.1, linear.6) : f32[N,8]
  rms_norm.2 = rms_norm(add.2) {eps=1e-05} : f32[N,8]
  linear.7 = linear(rms_norm.2, @expert.1.q_proj.weight) : f32[N,8]
  attention.2 = attention(linear.7, expert.1.k_proj, expert.1.v_proj, attention_mask.1) {heads=2, kv_heads=1, scale=0.5} : f32[N,8]
  linear.10 = linear(attention.2, @expert.1.o_proj.weight) : f32[N,8]
  add.3 = add(add.2, linear.10) : f32[N,8]
  velocity = linear(add.3, @action_out.weight, @action_out.bias) : f32[N,5]
  embed.2 = embed(step, @dts) : f32[1,1]
  mul.2 = mul(velocity, embed.2) : f32[N,5]
  x_next = add(x, mul.2) : f32[N,5]
  return x_next
"""  # noqa: E501


def test_the_text_of_a_lowered_loop_is_this() -> None:
    text = str(lower(toy(Dims())))
    assert text[text.index("stage flow") : text.index("params")].rstrip() + "\n" == LOWERED_FLOW


def test_lower_until_stops_where_it_is_told() -> None:
    naive = toy(Dims())
    assert "time_embedding" in ops(lower_until(naive, "split_concat_linears"))
    assert "time_embedding" not in ops(lower_until(naive, "tabulate_steps"))
    with pytest.raises(Unsupported, match="no rewrite 'inline'; in order there are: share, prune, fold"):
        lower_until(naive, "inline")
    names = [r.name for r in REWRITES]
    assert len(set(names)) == len(names)
