"""`vlac bench --profile`: every stage and what it computes, kinds of ops of every engine, and the yardstick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import vlac
from vlac.artifact import open_artifact
from vlac.bench_worker import inputs_of
from vlac.engines.base import get_engine
from vlac.errors import InputError
from vlac.profile import main_format, peak, profile, text
from vlac.runtime.inputs import prepare
from vlac.work import work

pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore:the task is longer")
KINDS = {"onnxruntime": "MatMulIntegerToFloat", "openvino": "FullyConnected", "ggml": "MUL_MAT", "torch": "linear"}


@pytest.fixture(scope="module")
def compiled(golden: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(target: str) -> Path:
        if target not in made:
            made[target] = tmp_path_factory.mktemp("profile") / target
            vlac.compile(golden("smolvla_tiny").checkpoint, target, made[target], goldens=1)
        return made[target]

    return make


@pytest.mark.parametrize(
    ("target", "engine", "form"),
    [
        ("onnx-int8", "onnxruntime", "int8"),
        ("openvino-bf16", "openvino", "bf16"),
        ("gguf-f16", "ggml", "f16"),
        ("gguf-f16", "torch", "f16"),
        ("gguf-f16", "numpy", "f16"),
    ],
)
def test_profile(
    target: str, engine: str, form: str, compiled: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(why)
    path = compiled(target)
    given = {**inputs_of(str(path))[0], "task": "stop"}
    monkeypatch.setattr("vlac.profile.inputs_of", lambda path: [given])
    report = profile(path, engine=engine, threads=1, runs=2)
    program = open_artifact(path).program
    assert {s["stage"] for s in report["stages"]} == {s.stage for s in program.schedule.steps}
    artifact = open_artifact(path)
    sizes = prepare(artifact.io, artifact.tokenizer, program, **given).symbols
    assert sizes["T"] < program.max_symbols()["T"]
    done = work(program, sizes)
    for s in report["stages"]:
        assert s["gmac"] == pytest.approx(done[s["stage"]].macs / 1e9) and s["ms"] > 0
        if s["gmac"]:
            assert s["peak_gmac_s"] > 0 and s["of_peak"] == pytest.approx(s["gmac_s"] / s["peak_gmac_s"])
    vision = next(s for s in report["stages"] if s["stage"] == "vision")
    assert vision["format"] == form
    if engine == "numpy":
        assert vision["ops"] == []
    else:
        assert sum(o["share"] for o in vision["ops"]) == pytest.approx(1)
        assert any(o["kind"].startswith(KINDS[engine]) for o in vision["ops"])
    assert "| vision |" in text(report)


def test_what_cannot_be_measured(compiled: Callable[[str], Path]) -> None:
    artifact = open_artifact(compiled("gguf-f16"))
    assert main_format(artifact.program, "vision") == "f16"
    assert peak(artifact, "torch", "int8", 1) is None
    with pytest.raises(InputError, match="runs"):
        profile(compiled("gguf-f16"), runs=0)
