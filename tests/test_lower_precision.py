"""Roles, formats and padding to blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lower_toys import DIMS, Dims, observation, one, ops, run, same, toy

from vlac.errors import Unsupported
from vlac.formats import get_format
from vlac.graph import Param, StageBuilder, check
from vlac.lower import assign_formats, lower, pad_to_blocks, roles


def plan(name: str, shape: tuple[int, ...], role: str) -> str:
    return {"linear": "q8_0", "embed": "f16"}.get(role, "f32")


def test_roles_tell_heads_embeddings_and_linears() -> None:
    kinds = roles(lower(toy(Dims())))
    assert {n for n, k in kinds.items() if k == "head"} == {"state.weight", "mix_in.part0.weight", "action_out.weight"}
    assert {n for n, k in kinds.items() if k == "embed"} == {"words.weight"}
    assert {kinds[n] for n in kinds if n.endswith(("norm.weight", ".bias", ".table", "positions", "dts"))} == {"other"}
    assert kinds["vit.qkv_proj.weight"] == kinds["mix_out.weight"] == kinds["expert.1.k_proj.weight"] == "linear"


def test_formats_follow_the_plan_then_the_last_override_that_matches() -> None:
    program = lower(toy(Dims()))
    got = assign_formats(program, plan, (("*", "q4_0"), ("vit.*", "bf16"), ("state.weight", "f16"))).params
    assert got["vit.qkv_proj.weight"].format == "bf16"
    assert got["mix_out.weight"].format == got["words.weight"].format == "q4_0"
    assert got["state.weight"].format == "f16"  # a head, spelled out
    assert got["action_out.weight"].format == "f32"  # a head, under a pattern only
    assert {p.format for n, p in got.items() if n.endswith((".bias", "norm.weight", ".table"))} == {"f32"}


def test_an_override_that_acts_on_nothing_is_named() -> None:
    program = lower(toy(Dims()))
    with pytest.raises(Unsupported, match=r"acts on no linear.*text\.0\.qkv_proj\.weight"):
        assign_formats(program, plan, (("text.0.q_proj.weight", "f16"),))
    with pytest.raises(Unsupported, match=r"'\*\.bias' acts on no linear"):
        assign_formats(program, plan, (("*.bias", "f16"),))


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(Unsupported, match="q9"):
        assign_formats(lower(toy(Dims())), plan, (("*", "q9"),))


@given(DIMS, st.sampled_from(["q8_0", "q6_k", "int4"]))
@settings(max_examples=15, deadline=None)
def test_padding_to_blocks_is_exact_and_leaves_no_odd_row(d: Dims, fmt: str) -> None:
    program = lower(toy(d))
    formats = assign_formats(program, lambda n, s, role: fmt if role in ("linear", "embed") else "f32")
    padded = check(pad_to_blocks(formats))
    for name, p in padded.params.items():
        assert p.shape[-1] % get_format(p.format).block == 0, name
        assert p.format == formats.params[name].format
        assert padded.weights[name].load().shape == p.shape
    given_ = observation(d, 4, 3)
    assert same(run(program, given_), run(padded, given_), 3e-7)


def test_one_pad_serves_all_linears_of_a_value() -> None:
    def draw(b: StageBuilder) -> str:
        x = b.input("noise", "f32", 3, 36)
        return b.add(b.linear(b.silu(x), "@a"), b.add(b.linear(x, "@b"), b.linear(x, "@c")))

    program = one(draw, a=(8, 36), b=(8, 36), c=(8, 36))
    done = pad_to_blocks(program.replace(params={n: Param((8, 36), "q8_0") for n in "abc"}))
    assert ops(done).count("pad") == 2


def test_a_table_that_is_added_cannot_be_padded() -> None:
    program = one(lambda b: b.add(b.input("noise", "f32", 3, 36), "@t"), t=(3, 36))
    with pytest.raises(Unsupported, match=r"t \[3, 36\] is read by add"):
        pad_to_blocks(program.replace(params={"t": Param((3, 36), "q8_0")}))
