"""The torch engine's ways for a GPU, as far as a CPU shows them: refusals, narrow products, replayed stages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_torch_engine import inputs, loop_program

import vlac
from vlac.engines.torch_device import Resident
from vlac.errors import EngineError, VlacError
from vlac.graph import Program
from vlac.metrics import relative_l2

torch = pytest.importorskip("torch")

from vlac.engines import torch_engine  # noqa: E402
from vlac.engines.torch_engine import TorchSession  # noqa: E402
from vlac.engines.torch_graphs import Graphs  # noqa: E402
from vlac.engines.torch_precision import NarrowProducts, only_multiplied  # noqa: E402

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
CHECKPOINT = Path(__file__).parent / "golden" / "smolvla_tiny" / "checkpoint"
Array = np.ndarray[Any, Any]


def session(program: Program, **options: Any) -> TorchSession:
    return TorchSession(program, lambda n: program.weights[n].load(), threads=1, **options)


def answer(s: TorchSession, t: int = 8, valid: int = 5) -> Array:
    """x_next after the loop."""
    env = inputs(t, valid)
    env |= s.run("prefix", env, {"T": t})
    return s.repeat(s.program.schedule.steps[1], env, {"T": t})["x_next"]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlac.compile(CHECKPOINT, target="onnx-fp32", out=tmp_path_factory.mktemp("cuda") / "out").path


def chunks(artifact: Path, **options: Any) -> Array:
    with vlac.load(artifact, engine="torch", threads=1, options=options) as policy:
        seen = policy.artifact.goldens()
        return np.stack([policy.act(o.images, o.state, o.task, noise=o.noise) for o in seen])


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "device 'tpu', expected cpu, cuda or cuda:N"),
        ({"device": "cuda:x"}, "expected cpu, cuda or cuda:N"),
        ({"device": "cuda:"}, "expected cpu, cuda or cuda:N"),
        ({"dtype": "f8"}, "expected one of f32, f64, bf16, f16, int8"),
        ({"graphs": True}, "graphs=True on cpu"),
    ],
)
def test_what_is_not_there_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        session(loop_program(), **options)
    assert caught.value.remedy


@no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:3"])
def test_without_a_gpu_cuda_is_refused_with_the_remedy(device: str) -> None:
    with pytest.raises(EngineError, match=f"device '{device}' is not there; torch .* sees cpu only") as caught:
        session(loop_program(), device=device)
    assert "use device=cpu" in str(caught.value.remedy)


def test_options_of_bitsandbytes_stand_alone(artifact: Path) -> None:
    with pytest.raises(EngineError, match="option 'tf32' does not go with linear"):
        vlac.load(artifact, engine="torch", options={"linear": "int8", "tf32": True})


def test_an_unknown_way_of_attention_is_refused() -> None:
    from vlac.engines.torch_device import checked_sdpa

    assert checked_sdpa("math") == "math"
    with pytest.raises(EngineError, match="sdpa='flash', expected one of auto, math"):
        checked_sdpa("flash")


# --- narrow products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 2e-2), ("f16", 3e-3), ("int8", 6e-2)])
def test_narrow_products_answer_like_wide_ones(artifact: Path, dtype: str, limit: float) -> None:
    """Within parity's limits of the format, and not the same: they are narrow."""
    wide, narrow = chunks(artifact), chunks(artifact, dtype=dtype)
    assert 1e-6 < relative_l2(narrow, wide) < limit


def test_only_linears_of_the_network_are_narrow(artifact: Path) -> None:
    """Heads that touch state and actions, and tables that are looked up, stay float32."""
    with vlac.load(artifact, engine="torch", options={"dtype": "bf16"}) as policy:
        engine: Any = policy._engine
        chosen = engine._narrow.chosen
        roles = {n: r["role"] for n, r in policy.artifact.manifest["census"]["tensors"].items() if n in chosen}
        assert len(chosen) > 10
        assert set(roles.values()) == {"linear"}
        policy.act(*(lambda o: (o.images, o.state, o.task))(policy.artifact.goldens()[0]), seed=0)
        kinds = {n: w.dtype for n, w in engine._weights.items()}
    assert {kinds[n] for n in chosen & set(kinds)} == {torch.bfloat16}
    assert {d for n, d in kinds.items() if n not in chosen} == {torch.float32}


def test_a_table_that_is_also_looked_up_is_not_narrow() -> None:
    program = loop_program()
    assert only_multiplied(program, None) == {"w"}
    assert only_multiplied(program, frozenset()) == frozenset()


@pytest.mark.parametrize(("rows", "width", "out"), [(1, 8, 8), (16, 20, 12), (17, 33, 5), (50, 64, 96)])
def test_int8_products_are_those_of_the_codes(rows: int, width: int, out: int) -> None:
    """Any size, though the product wants multiples of 8 and more than 16 rows."""
    rng = np.random.default_rng(rows)
    x, w = rng.standard_normal((rows, width)).astype(np.float32), rng.standard_normal((out, width)).astype(np.float32)

    def codes(v: Array) -> tuple[Array, Array]:
        scale = np.abs(v).max(1, keepdims=True) / np.float32(127)
        return np.rint(v / scale), scale

    (cx, sx), (cw, sw) = codes(x), codes(w)
    narrow = NarrowProducts(torch, "int8", frozenset({"w"}))
    run = narrow.linear(lambda *_: pytest.fail("plain"))
    got = run([torch.from_numpy(x), narrow.stored(torch.from_numpy(w)), torch.ones(out)], {}).numpy()
    np.testing.assert_allclose(got, cx @ cw.T * sx * sw.T + 1, rtol=1e-5, atol=1e-5)


def test_a_masked_row_stays_finite_in_f16() -> None:
    q = torch.ones(3, 8)
    mask = torch.full((3, 4), torch_engine.MASKED)
    op = session(loop_program(), dtype="f16")._ops["attention"]
    y = op([q, torch.ones(4, 8), torch.ones(4, 8), mask], {"heads": 2, "kv_heads": 2, "scale": 1.0})
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()


# --- replaying ---------------------------------------------------------------------------------------------------


def again(run: Callable[[], dict[str, Any]]) -> tuple[Callable[[], None], dict[str, Any]]:
    """Stands in for a CUDA graph: runs the recorded function anew, into the same tensors."""
    with torch.inference_mode():
        out = {k: t.clone() for k, t in run().items()}

    def replay() -> None:
        for name, t in run().items():
            out[name].copy_(t)

    return replay, out


def test_a_recorded_policy_answers_like_a_plain_one(artifact: Path) -> None:
    want = chunks(artifact)
    with vlac.load(artifact, engine="torch", threads=1, options={}) as policy:
        engine: Any = policy._engine
        engine._graphs = Graphs(again)
        for _ in range(2):  # recorded, then replayed with other inputs
            got = [policy.act(o.images, o.state, o.task, noise=o.noise, reuse=False) for o in policy.artifact.goldens()]
            np.testing.assert_array_equal(np.stack(got), want)
        assert len(engine._graphs) >= 3


def test_every_bucket_is_recorded_by_itself() -> None:
    plain, recorded = session(loop_program()), session(loop_program())
    recorded._graphs = Graphs(again)
    for t, valid in ((4, 4), (8, 5), (4, 2), (8, 8)):
        np.testing.assert_array_equal(answer(recorded, t, valid), answer(plain, t, valid))
    assert len(recorded._graphs) == 4  # two stages, two buckets


def test_what_is_handed_out_is_not_overwritten_by_the_next_replay() -> None:
    s = session(loop_program())
    s._graphs = Graphs(again)
    first = answer(s, 8, 5)
    copy = first.copy()
    answer(s, 8, 7)
    np.testing.assert_array_equal(first, copy)


def test_what_a_graph_cannot_hold_is_run_plainly() -> None:
    s = session(loop_program())
    s._graphs = Graphs(lambda run: pytest.fail("recorded"))
    kept = torch_engine.UNRECORDED
    torch_engine.UNRECORDED = ("rope", "attention")
    try:
        assert np.isfinite(answer(s)).all()
    finally:
        torch_engine.UNRECORDED = kept


def test_compiled_stages_answer_like_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole, by a compiler that changes nothing: what inductor makes of it is a GPU's question."""
    monkeypatch.setattr(torch_engine, "COMPILER", "eager")
    np.testing.assert_array_equal(answer(session(loop_program(), compile=True)), answer(session(loop_program())))


# --- arrays that are on the device already -------------------------------------------------------------------------


def test_an_array_is_known_by_identity_and_while_it_lives() -> None:
    known = Resident()
    a = np.ones(3, np.float32)
    known.note(a, "tensor")
    assert known.find(a) == "tensor"
    assert known.find(a.copy()) is None
    del a
    assert len(known) == 0


def test_results_that_come_back_are_not_sent_again() -> None:
    s = session(loop_program())
    s._resident = Resident()
    env = inputs(8, 5)
    made = s.run("prefix", env, {"T": 8})
    assert s._tensor(made["keys"]) is s._resident.find(made["keys"])
    want = answer(session(loop_program()))
    env |= made
    np.testing.assert_array_equal(s.repeat(s.program.schedule.steps[1], env, {"T": 8})["x_next"], want)  # type: ignore[arg-type]


# --- on a GPU ------------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 5e-5),
        ({"sdpa": "math"}, 5e-5),
        ({"graphs": False}, 5e-5),
        ({"dtype": "bf16"}, 2e-2),
        ({"dtype": "f16"}, 3e-3),
        ({"dtype": "int8"}, 6e-2),
        ({"dtype": "bf16", "compile": True}, 2e-2),
    ],
)
def test_cuda_answers_like_the_cpu(artifact: Path, options: dict[str, Any], limit: float) -> None:
    assert relative_l2(chunks(artifact, device="cuda", **options), chunks(artifact)) < limit


# --- parity and the command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
def test_parity_judges_other_numbers_by_the_plain_engine(artifact: Path, dtype: str) -> None:
    from vlac.parity import parity

    report = parity(artifact, engine="torch", threads=1, options={"device": "cpu", "dtype": dtype})
    compiler = report["compiler"]
    assert report["ok"], compiler
    assert compiler["reference"] == "torch"
    assert report["grade"] == dtype
    assert (compiler["chunk"]["max_relative"] == 0) == (dtype == "f32")


@no_gpu
@pytest.mark.parametrize("command", ["run", "bench", "parity"])
def test_device_cuda_is_refused_in_words(artifact: Path, command: str) -> None:
    asked = ["--image", "top=x.png"] if command == "run" else []
    done = subprocess.run(
        [sys.executable, "-m", "vlac.cli", command, str(artifact), *asked, "--device", "cuda"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    if command != "run":
        assert "device 'cuda' is not there" in done.stderr
        assert "-> use device=cpu" in done.stderr


def test_device_is_torch_s_alone() -> None:
    from vlac.cli.options import on_torch

    assert on_torch(None, None, None) == (None, {})
    assert on_torch("ggml", None, None) == ("ggml", {})
    assert on_torch(None, "cuda", "bf16") == ("torch", {"device": "cuda", "dtype": "bf16"})
    with pytest.raises(VlacError, match="--device is for the torch engine, not ggml"):
        on_torch("ggml", "cuda", None)
