"""vlac.parity_table: several engines and devices of one artifact in one run, each held against one reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import GOLDEN
from family_cases import CASES

import vlac
from vlac.engines.base import get_engine
from vlac.errors import EngineError, InputError
from vlac.parity_table import Place, compare, compare_text

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")
CUDA = torch.cuda.is_available()
CHECKPOINT = GOLDEN / "smolvla_tiny" / "checkpoint"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = vlac.compile(CHECKPOINT, "onnx-fp32", tmp_path_factory.mktemp("table") / "out").path
    assert path is not None
    return path


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {r["on"]: r for r in report["rows"]}


def test_one_table_for_cpu_and_cuda(artifact: Path) -> None:
    report = compare(artifact, ["torch:cpu", "torch:cuda", "onnxruntime", "torch:cpu:bf16", "numpy"], threads=1)
    found = rows(report)
    assert list(found) == ["torch:cpu", "torch:cuda", "onnxruntime", "torch:cpu:bf16", "numpy"]
    assert report["reference"].startswith("torch, float32 on the CPU")
    assert found["torch:cpu"]["compiler"]["chunk"]["max_relative"] == 0
    for name in ("onnxruntime", "numpy"):
        assert 0 < found[name]["compiler"]["chunk"]["max_relative"] < 5e-6
    assert found["torch:cpu:bf16"]["grade"] == "bf16"
    assert 1e-4 < found["torch:cpu:bf16"]["compiler"]["chunk"]["max_relative"] < 5e-2
    assert all(0 <= found[n]["cost"]["relative_l2"] < 5e-2 for n in found if found[n]["ok"] is not None)
    assert report["ok"] and not any(r.get("tf32") for r in report["rows"])
    text = compare_text(report)
    assert "TF32" in text and text.endswith("\n\nok")
    if not CUDA:
        assert found["torch:cuda"]["ok"] is None and "'cuda' is not there" in found["torch:cuda"]["not_available"]
        assert "torch:cuda: not available: torch engine: device 'cuda' is not there" in text


def test_a_limit_that_does_not_hold_fails_its_row(artifact: Path) -> None:
    report = compare(artifact, ["torch:cpu", "onnxruntime"], threads=1, limits=["compiler.max<=1e-12"])
    assert [r["ok"] for r in report["rows"]] == [True, False]
    assert not report["ok"] and compare_text(report).endswith("NOT OK")
    strict = compare(artifact, ["torch:cpu"], threads=1, limits=["cos>=1.1"])
    assert not strict["ok"]


def test_each_engine_s_own_tokens_are_followed(tmp_path: Path) -> None:
    case = CASES["openvla_tiny"]
    path = vlac.compile(case.checkpoint, "onnx-int8", tmp_path / "out", goldens=1, **case.options).path
    report = compare(path or "", ["torch", "onnxruntime"], threads=1)
    assert all(r["compiler"]["tokens"]["of"] == 7 for r in report["rows"])


def test_the_checkpoint_runs_once_for_all_rows(artifact: Path) -> None:
    report = compare(artifact, ["torch", "onnxruntime"], reference=str(CHECKPOINT), threads=1)
    assert all(r["cost"]["relative_l2"] < 1e-5 for r in report["rows"])


def test_places() -> None:
    assert Place.parse("torch:cuda:1:bf16").options == {"device": "cuda:1", "dtype": "bf16"}
    assert Place.parse("torch:int8").options == {"dtype": "int8"}
    assert Place.parse("onnxruntime") == Place("onnxruntime", "onnxruntime")
    for wrong in ("torch:gpu", "torch:cpu:cpu", "torch:cpu:1", "torch:"):
        with pytest.raises(InputError, match="is no device and no type"):
            Place.parse(wrong)
    with pytest.raises(InputError, match="for the torch engine"):
        Place.parse("ggml:cuda")


def test_what_cannot_be_asked_is_refused(artifact: Path) -> None:
    with pytest.raises(InputError, match="the same place twice"):
        compare(artifact, ["torch", "torch"])
    with pytest.raises(EngineError, match="does not run on engine 'ggml'"):
        compare(artifact, ["torch", "ggml"])
    if not CUDA:
        with pytest.raises(EngineError, match="none of these can run"):
            compare(artifact, ["torch:cuda"])


def test_an_engine_that_is_not_installed_is_a_row(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = get_engine("openvino")
    monkeypatch.setattr(type(engine), "missing", lambda self: "no such module")
    report = compare(artifact, ["openvino", "torch"], threads=1)
    assert rows(report)["openvino"]["not_available"] == "no such module" and report["ok"]


def test_the_command(artifact: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from vlac.cli import app

    def run(*more: str) -> Any:
        return CliRunner().invoke(app, ["parity", str(artifact), "--threads", "1", *more])

    saved = tmp_path / "r.json"
    done = run("--on", "torch:cpu", "--on", "torch:cuda", "--json", "--save", str(saved))
    assert done.exit_code == 0
    assert json.loads(done.stdout)["rows"][0]["on"] == "torch:cpu" and saved.is_file()
    assert run("--on", "onnxruntime", "--limit", "compiler.max<=1e-12").exit_code == 1
    assert run("--on", "torch", "--engine", "ggml").exit_code == 2
