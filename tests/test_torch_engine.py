"""The torch engine as a session: sharing, threads, buckets, repeats. Ops are walked in test_ops.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlac.artifact import Artifact, StoredTensor
from vlac.dims import symbol
from vlac.engines.base import get_engine
from vlac.engines.numpy_engine import NumpySession
from vlac.errors import EngineError
from vlac.graph import Call, Param, Program, Repeat, Schedule, StageBuilder, Symbol, check
from vlac.io import IO
from vlac.weights import LazyTensor, Weights

torch = pytest.importorskip("torch")

from vlac.engines.torch_engine import ENGINE, TorchSession  # noqa: E402

T = symbol("T")


def loop_program() -> Program:
    """prefix: rows of tokens; flow: x <- x + attention over them, four times, plus the step's row of a table."""
    p = StageBuilder("prefix")
    tokens = p.input("tokens", "i32", T)
    p.input("token_valid", "bool", T)
    k = p.embed(tokens, "@table", name="k")
    positions = p.cumsum(p.cast("token_valid", dtype="i32"))
    p.output(p.rope(k, positions, head_dim=4, base=100.0, name="keys"), k)
    f = StageBuilder("flow")
    x = f.input("x", "f32", 3, 8)
    step = f.input("step", "i32", 1)
    keys = f.input("keys", "f32", T, 8)
    f.input("k", "f32", T, 8)
    valid = f.input("token_valid", "bool", T)
    block = f.full(shape=(3,), value=1.0, dtype="i32")
    mask = f.attention_mask(block, f.full(shape=(T,), value=0.0, dtype="i32"), valid)
    y = f.attention(x, keys, "k", mask, heads=2, kv_heads=2, scale=0.5)
    y = f.add(y, f.embed(step, "@steps"))
    f.output(f.add(x, f.linear(y, "@w", "@b"), name="x_next"))
    rng = np.random.default_rng(0)
    shapes = {"table": (11, 8), "steps": (4, 8), "w": (8, 8), "b": (8,)}
    weights = Weights({n: LazyTensor.of(rng.normal(size=s)) for n, s in shapes.items()})
    return check(
        Program(
            "loop",
            (Symbol("T", (4, 8)),),
            (p.build(), f.build()),
            {n: Param(s) for n, s in shapes.items()},
            Schedule((Call("prefix"), Repeat("flow", 4, "step", (("x_next", "x", "noise"),))), "x_next"),
            weights,
        )
    )


def inputs(t: int, valid: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(t)
    return {
        "tokens": rng.integers(0, 11, t).astype(np.int32),
        "token_valid": np.arange(t) < valid,
        "noise": rng.normal(size=(3, 8)).astype(np.float32),
    }


@pytest.mark.parametrize(("t", "valid"), [(4, 4), (8, 5), (4, 0)])
def test_repeat_agrees_with_the_reference_in_every_bucket(t: int, valid: int) -> None:
    program = loop_program()
    weight = lambda n: program.weights[n].load()  # noqa: E731
    results = []
    for session in (NumpySession(program, weight), TorchSession(program, weight)):
        env = inputs(t, valid)
        env |= session.run("prefix", env, {"T": t})
        results.append(session.repeat(program.schedule.steps[1], env, {"T": t})["x_next"])  # type: ignore[arg-type]
    assert np.isfinite(results[1]).all()
    assert np.abs(results[0] - results[1]).max() <= 2e-6 * np.abs(results[0]).max()


def test_read_only_weights_are_shared_without_a_warning_and_never_written() -> None:
    program = loop_program()
    arrays = {n: t.load().copy() for n, t in program.weights.items()}
    for a in arrays.values():
        a.flags.writeable = False
    session = TorchSession(program, lambda n: arrays[n])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.run("prefix", inputs(4, 4), {"T": 4})
    assert session._weights["table"].data_ptr() == arrays["table"].ctypes.data


def test_results_belong_to_the_caller() -> None:
    program = loop_program()
    session = TorchSession(program, lambda n: program.weights[n].load())
    given = inputs(4, 4)
    first = session.run("prefix", given, {"T": 4})
    kept = {k: v.copy() for k, v in first.items()}
    for v in first.values():
        v[:] = 0
    again = session.run("prefix", given, {"T": 4})
    assert all((again[k] == kept[k]).all() for k in kept)


def test_threads_and_precision_are_restored() -> None:
    program = loop_program()
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    session = TorchSession(program, lambda n: program.weights[n].load(), threads=1)
    session.run("prefix", inputs(4, 4), {"T": 4})
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
    assert session.info["threads"] == 1


def test_float64_is_closer_to_the_reference() -> None:
    program = loop_program()
    weight = lambda n: program.weights[n].load()  # noqa: E731
    env = inputs(8, 6)
    want = NumpySession(program, weight).run("prefix", env, {"T": 8})["keys"]
    got = TorchSession(program, weight, dtype="f64").run("prefix", env, {"T": 8})["keys"]
    assert np.abs(want - got).max() <= 1e-7 * np.abs(want).max()


@pytest.mark.parametrize(("kw", "word"), [({"device": "tpu"}, "tpu"), ({"dtype": "int3"}, "int3")])
def test_a_wrong_option_is_refused_by_name(kw: dict[str, str], word: str) -> None:
    with pytest.raises(EngineError, match=word):
        TorchSession(loop_program(), lambda n: np.zeros(1, np.float32), **kw)


def test_the_engine_is_registered() -> None:
    assert get_engine("torch") is ENGINE
    assert ENGINE.missing() == ""


def artifact_of(program: Program) -> Artifact:
    tensors = {n: StoredTensor(t.shape, "f32", t.load) for n, t in program.weights.items()}
    return Artifact(Path("toy"), "folder", program, IO(**NO_IO), {}, None, tensors, lambda: None)


NO_IO: dict[str, Any] = {
    **dict.fromkeys(
        ("cameras", "image_steps", "state_steps", "text_steps", "action_steps", "normalised_action_steps"), ()
    ),
    "state_key": "",
    "state_dim": 0,
    "action_key": "",
    "action_dim": 8,
    "max_action_dim": 8,
    "chunk_size": 3,
    "n_action_steps": 3,
}


def test_an_artifact_opens_with_its_decoded_weights() -> None:
    program = loop_program()
    session = ENGINE.open(artifact_of(program), threads=1, options={"dtype": "f64", "device": "cpu"})
    env = inputs(8, 6)
    want = NumpySession(program, lambda n: program.weights[n].load()).run("prefix", env, {"T": 8})["keys"]
    assert np.abs(want - session.run("prefix", env, {"T": 8})["keys"]).max() <= 1e-7 * np.abs(want).max()
    session.close()


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match="turbo"):
        ENGINE.open(artifact_of(loop_program()), options={"turbo": True})
