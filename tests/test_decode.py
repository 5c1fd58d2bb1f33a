"""Greedy decoding as data: a prompt that is read once, a loop that carries caches and a token, collects, and may stop.

The toy has one attention layer over a prompt of T tokens and the tokens decoded so far; everything a real decoder needs
of the schedule is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_ops import SIDECAR_IO, TARGET

from vlac.artifact import Sidecars, open_artifact
from vlac.dims import parse_dim
from vlac.engines.base import EngineSession, get_engine
from vlac.engines.numpy_engine import NumpySession
from vlac.errors import ProgramError
from vlac.graph import Call, Param, Program, Repeat, Schedule, StageBuilder, Symbol, check
from vlac.lower import REWRITES, lower, lower_until, roles
from vlac.program_text import parse
from vlac.registry import silent, targets
from vlac.runtime.schedule import execute
from vlac.weights import LazyTensor, Weights

NpArray = np.ndarray[Any, Any]

VOCABULARY, WIDTH, HEADS, TURNS = 37, 8, 2, 6
T = parse_dim("T")


def prefill() -> Any:
    b = StageBuilder("prefill")
    tokens, valid = b.input("tokens", "i32", T), b.input("token_valid", "bool", T)
    x = b.embed(tokens, "@table")
    positions = b.arange(start=0, stop=T)
    b.rope(b.linear(x, "@k"), positions, head_dim=4, base=100.0, name="prompt_k")
    b.linear(x, "@v", name="prompt_v")
    one = b.full(shape=(1,), value=1.0, dtype="i32")
    last = b.sub(b.reduce_sum(b.cast(valid, dtype="i32")), one, name="start")
    b.pick(tokens, last, name="first_token")
    # the last token of the prompt is read again in the first turn: only those before it count as the prompt
    b.concat(b.slice(valid, axis=0, start=1, stop=T), b.full(shape=(1,), value=0.0, dtype="bool"), axis=0, name="seen")
    b.full(shape=(TURNS, WIDTH), value=0.0, dtype="f32", name="no_rows")
    b.output("prompt_k", "prompt_v", "start", "first_token", "seen", "no_rows")
    return b.build()


def decode() -> Any:
    b = StageBuilder("decode")
    turn, token = b.input("turn", "i32", 1), b.input("token", "i32", 1)
    start, seen = b.input("start", "i32", 1), b.input("seen", "bool", T)
    prompt_k, prompt_v = b.input("prompt_k", "f32", T, WIDTH), b.input("prompt_v", "f32", T, WIDTH)
    new_k, new_v = b.input("new_k", "f32", TURNS, WIDTH), b.input("new_v", "f32", TURNS, WIDTH)
    x = b.embed(token, "@table")
    at = b.add(start, turn)
    q = b.rope(b.linear(x, "@q"), at, head_dim=4, base=100.0)
    k = b.rope(b.linear(x, "@k"), at, head_dim=4, base=100.0)
    b.write_rows(new_k, k, turn, name="next_k")
    b.write_rows(new_v, b.linear(x, "@v"), turn, name="next_v")
    blocks = b.concat(
        b.sub(b.full(shape=(T,), value=0.0, dtype="i32"), b.full(shape=(1,), value=1.0, dtype="i32")),
        b.arange(start=0, stop=TURNS),
        axis=0,
    )
    valid = b.concat(seen, b.full(shape=(TURNS,), value=1.0, dtype="bool"), axis=0)
    mask = b.attention_mask(turn, blocks, valid)
    keys, values = b.concat(prompt_k, "next_k", axis=0), b.concat(prompt_v, "next_v", axis=0)
    y = b.attention(q, keys, values, mask, heads=HEADS, kv_heads=HEADS, scale=0.5)
    logits = b.linear(b.add(x, y), "@out", name="logits")
    b.argmax(logits, name="next_token")
    b.output("next_token", "next_k", "next_v", "logits")
    return b.build()


def toy(stop: tuple[int, ...] = ()) -> Program:
    rng = np.random.default_rng(5)
    shapes = {"table": (VOCABULARY, WIDTH), "out": (VOCABULARY, WIDTH)} | dict.fromkeys("kvq", (WIDTH, WIDTH))
    values = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    carry = (("next_token", "token", "first_token"), ("next_k", "new_k", "no_rows"), ("next_v", "new_v", "no_rows"))
    collect = (("next_token", "action_tokens"), ("logits", "step_logits"))
    loop = Repeat("decode", TURNS, "turn", carry, collect, "next_token" if stop else "", stop)
    return check(
        Program(
            "toy",
            (Symbol("T", (4, 9)),),
            (prefill(), decode()),
            {n: Param(s) for n, s in shapes.items()},
            Schedule((Call("prefill"), loop), "action_tokens"),
            Weights({n: LazyTensor.of(v) for n, v in values.items()}),
        )
    )


PROMPT = np.array([3, 1, 30, 17, 5], dtype=np.int32)


def env(size: int) -> dict[str, NpArray]:
    tokens, valid = np.zeros(size, np.int32), np.zeros(size, bool)
    tokens[: len(PROMPT)], valid[: len(PROMPT)] = PROMPT, True
    return {"tokens": tokens, "token_valid": valid}


def weight(program: Program) -> Any:
    return lambda name: program.weights[name].load()


def whole(program: Program) -> tuple[list[int], NpArray]:
    """Tokens and logits by the textbook: the whole sequence anew for every token, no cache."""
    w = {n: t.load().astype(np.float64) for n, t in program.weights.items()}
    ids, logits = list(PROMPT), []
    for _ in range(TURNS):
        x = w["table"][ids]
        angle = np.arange(len(ids))[:, None] / 100.0 ** (np.arange(0, 4, 2) / 4)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

        def turned(v: NpArray, cos: NpArray = cos, sin: NpArray = sin) -> NpArray:
            a, b = np.moveaxis(v.reshape(len(v), HEADS, 2, 2), 2, 0)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        q, k = turned(x @ w["q"].T)[-1], turned(x @ w["k"].T)
        v = (x @ w["v"].T).reshape(len(ids), HEADS, 4)
        s = np.einsum("hd,nhd->hn", q, k) * 0.5
        p = np.exp(s - s.max(1, keepdims=True))
        y = np.einsum("hn,nhd->hd", p / p.sum(1, keepdims=True), v).reshape(-1)
        logits.append((x[-1] + y) @ w["out"].T)
        ids.append(int(np.argmax(logits[-1])))
    return ids[len(PROMPT) :], np.array(logits)


def artifact(program: Program, target_name: str, folder: Path, **options: Any) -> EngineSession:
    target = targets.get(target_name)
    lowered = target.lower(lower(program), options)
    manifest = {"format_version": 1, "target": target_name, "family": "toy", "engines": list(target.engines)}
    sidecars = Sidecars(str(lowered), SIDECAR_IO.to_json(), {**manifest, "files": {}, "name": "toy"}, None, None)
    target.emit(lowered, sidecars, folder, options, silent)
    return open_artifact(folder)


def test_decoding_with_caches_is_decoding_anew() -> None:
    program = toy()
    tokens, logits = whole(program)
    session = NumpySession(program, weight(program))
    for size in (9, 6):
        collected: dict[str, NpArray] = {}
        ids = execute(program, session, env(size), {"T": size}, collected=collected)
        assert ids.tolist() == [tokens]
        assert collected["action_tokens"].tolist() == tokens
        assert np.abs(collected["step_logits"] - logits).max() < 1e-5


def test_the_program_parses_back() -> None:
    for program in (toy(), toy(stop=(4, 9))):
        assert parse(str(program)) == program
        assert parse(str(lower(program))) == lower(program)


@pytest.mark.parametrize("name", [r.name for r in REWRITES])
def test_every_rewrite_keeps_the_tokens(name: str) -> None:
    program = toy()
    tokens, logits = whole(program)
    lowered = lower_until(program, name)
    collected: dict[str, NpArray] = {}
    execute(lowered, NumpySession(lowered, weight(lowered)), env(9), {"T": 9}, collected=collected)
    assert collected["action_tokens"].tolist() == tokens
    assert np.abs(collected["step_logits"] - logits).max() < 1e-5


def test_the_table_of_tokens_is_an_embedding_in_the_loop_too() -> None:
    found = roles(toy())
    assert found["table"] == "embed"
    assert found["out"] == found["k"] == "linear"


@pytest.mark.parametrize("engine", ["torch", *TARGET])
@pytest.mark.parametrize("stops", [False, True])
def test_every_engine_decodes_the_same_tokens(engine: str, stops: bool, tmp_path: Path) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(f"{engine}: {why}")
    tokens, logits = whole(toy())
    stop = tokens[2] if stops else None
    ran = tokens.index(stop) + 1 if stop is not None else TURNS
    opened = artifact(toy((stop,) if stop is not None else ()), TARGET.get(engine, "gguf-f32"), tmp_path)
    session = get_engine(engine).open(opened, threads=1)
    try:
        for taps in (None, {}):
            collected: dict[str, NpArray] = {}
            execute(opened.program, session, env(9), {"T": 9}, taps=taps, collected=collected)
            assert collected["action_tokens"].tolist() == tokens[:ran] + [0] * (TURNS - ran)
            assert np.abs(collected["step_logits"][:ran] - logits[:ran]).max() <= 1e-5 * np.abs(logits).max()
            assert not collected["step_logits"][ran:].any()
    finally:
        session.close()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("stops", [False, True])
def test_one_file_holds_the_whole_loop(engine: str, stops: bool, tmp_path: Path) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(f"{engine}: {why}")
    tokens, _ = whole(toy())
    stop = (tokens[2],) if stops else ()
    ran = tokens.index(tokens[2]) + 1 if stops else TURNS
    opened = artifact(toy(stop), "onnx-fp32", tmp_path, single_file=True)
    session = get_engine(engine).open(opened, threads=1)
    try:
        ids = execute(opened.program, session, env(9), {"T": 9})
        assert ids.tolist() == [tokens[:ran] + [0] * (TURNS - ran)]
    finally:
        session.close()


BROKEN: Mapping[str, Repeat] = {
    "no output with rows": Repeat("decode", 2, "turn", (), (("nothing", "all"),)),
    "defined elsewhere": Repeat("decode", 2, "turn", (), (("logits", "seen"),)),
    "no output i32": Repeat("decode", 2, "turn", (), (), "logits", (1,)),
    "go together": Repeat("decode", 2, "turn", (), (), "next_token"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_cannot_be_collected_or_stopped_by_is_refused(message: str) -> None:
    program = toy()
    loop = program.schedule.steps[1]
    assert isinstance(loop, Repeat)
    broken = BROKEN[message]
    steps = (Call("prefill"), Repeat("decode", 2, "turn", loop.carry, broken.collect, broken.until, broken.stop))
    with pytest.raises(ProgramError, match=message):
        check(program.replace(schedule=Schedule(steps, "next_token")))
