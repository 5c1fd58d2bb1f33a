"""Lowering on the SmolVLA goldens: LeRobot's chunks after every rewrite, and how much less there is to compute."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vlac.checkpoint import read_policy
from vlac.graph import Program, Repeat, check, infer_stage
from vlac.lower import REWRITES, assign_formats, lower, pad_to_blocks, roles
from vlac.program_text import parse
from vlac.registry import families
from vlac.runtime.inputs import prepare
from vlac.runtime.schedule import execute

pytest.importorskip("torch")

from vlac.engines.torch_engine import TorchSession

NAMES = ("smolvla_tiny", "smolvla_letterbox")


@pytest.fixture(scope="module", params=NAMES)
def checked(request: pytest.FixtureRequest, golden: Callable[[str], Any]) -> tuple[Program, Callable[[Program], float]]:
    """The naive program, and a function that says how far a program is from LeRobot: max |difference| / max |chunk|."""
    folder = golden(request.param)
    policy = read_policy(str(folder.checkpoint))
    naive = families.get(policy.family).build(policy)

    def distance(program: Program) -> float:
        session = TorchSession(program, lambda name: program.weights[name].load())
        worst = 0.0
        for i in range(2):
            ready = prepare(policy.io, policy.tokenizer, program, **folder.observation(i))
            x = execute(program, session, ready.env, ready.symbols)[:, : policy.io.action_dim]
            want = folder.chunk(i, "normalised")
            worst = max(worst, float(np.abs(x - want).max() / np.abs(want).max()))
        return worst

    return naive, distance


Checked = tuple[Program, Callable[[Program], float]]


def test_every_rewrite_keeps_lerobots_chunk(checked: Checked) -> None:
    program, distance = checked
    assert distance(program) <= 1e-5
    for rewrite in REWRITES:
        program = check(rewrite.fn(program))
        assert parse(str(program)) == program
        assert distance(program) <= 1e-5, rewrite.name


def multiplications(program: Program) -> int:
    """Multiply-adds of all linears and attentions for one chunk, every symbol at its largest; `vision` once."""
    bound = program.bind(program.max_symbols())
    total = 0
    for step in bound.schedule.steps:
        stage = bound.stage(step.stage)
        types = infer_stage(stage, bound.params)
        times = step.times if isinstance(step, Repeat) else 1
        for n in stage.nodes:
            sizes = [d for d in types[n.name].shape if isinstance(d, int)]
            if n.op == "linear":
                total += times * sizes[0] * math.prod(bound.params[n.inputs[1][1:]].shape)
            elif n.op == "attention":
                keys = types[n.inputs[1]].shape[0]
                assert isinstance(keys, int)
                total += times * 2 * sizes[0] * sizes[1] * keys
    return total


def test_there_is_less_to_compute_and_less_to_store(checked: Checked) -> None:
    naive, _ = checked
    lowered = lower(naive)
    stored = [sum(math.prod(p.shape) for p in program.params.values()) for program in (naive, lowered)]
    assert multiplications(lowered) < 0.95 * multiplications(naive)
    assert stored[1] < stored[0]
    assert lower(lowered) == lowered


def test_what_a_loop_must_not_hold_has_left_it(checked: Checked) -> None:
    program = lower(checked[0])
    flow = program.stage("flow")
    assert not {"tile", "time_embedding", "attention_mask", "cumsum", "cast"} & {n.op for n in flow.nodes}
    changing, kept = {"x", "step"}, {n for n, _ in flow.inputs}
    for n in flow.nodes:
        if n.op == "linear":
            assert n.inputs[0] not in kept - changing, f"{n.name} projects what no step changes"
    assert not any(n.op == "pixel_shuffle" for s in program.stages for n in s.nodes)


def test_heads_stay_fp32_whatever_the_plan(checked: Checked) -> None:
    program = lower(checked[0])
    heads = {n for n, role in roles(program).items() if role == "head"}
    assert heads == {"state_proj.weight", "action_time_mlp_in.part0.weight", "action_out_proj.weight"}

    def plan(name: str, shape: tuple[int, ...], role: str) -> str:
        return "q8_0" if role in ("linear", "embed") else "f32"

    formats = pad_to_blocks(assign_formats(program, plan, (("*", "q8_0"),))).params
    assert {formats[n].format for n in heads} == {"f32"}


def test_padded_rows_change_nothing(checked: Checked) -> None:
    naive, distance = checked
    program = assign_formats(lower(naive), lambda n, s, role: "q6_k" if role in ("linear", "embed") else "f32")
    assert distance(check(pad_to_blocks(program))) <= 1e-5
