"""`vlac prepare`: what it leaves is used, gives the same bits, is bound to machine and artifact, and is checked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlac
from vlac.engines.prepared import Prepared
from vlac.errors import ArtifactError, EngineError, Unsupported
from vlac.prepare import prepare, text

pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore:the task is longer")
ENGINES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def compiled(golden: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepare") / "out"
    vlac.compile(golden("smolvla_tiny").checkpoint, "onnx-int8", out, goldens=1)
    return out


@pytest.fixture
def artifact(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "out"))


def chunk(path: Path, engine: str, observation: Any, **options: Any) -> tuple[np.ndarray, bool]:
    with vlac.load(path, engine=engine, threads=1, options=options) as policy:
        return policy.act(**observation), policy.info["prepared"]


@pytest.mark.parametrize("engine", ENGINES)
def test_prepared_artifacts_answer_the_same_bits(
    engine: str, artifact: Path, golden: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(engine)
    given = golden("smolvla_tiny").observation(0)
    plain, used = chunk(artifact, engine, given)
    assert not used
    report = prepare(artifact, engine, threads=1)
    assert report["bytes"] > 100_000 and report["after"]["private_mb"] > 0
    assert "MB private after an act" in text(report)
    again, used = chunk(artifact, engine, given)
    assert used and np.array_equal(plain, again)
    assert not chunk(artifact, engine, given, prepared=False)[1]

    stamp = artifact / "prepared" / engine / "stamp.json"
    mine = json.loads(stamp.read_text())
    stamp.write_text(json.dumps({**mine, "stamp": {**mine["stamp"], "cpu": "another"}}))
    with monkeypatch.context() as patch:  # a disk that cannot be written: what is there is left aside
        patch.setattr(Prepared, "make", lambda *_: (_ for _ in ()).throw(EngineError("read-only")))
        assert not chunk(artifact, engine, given)[1]
    again, used = chunk(artifact, engine, given)
    assert used and np.array_equal(plain, again)
    assert json.loads(stamp.read_text())["stamp"] == mine["stamp"]


def test_damage_to_what_was_prepared_is_found(artifact: Path, golden: Callable[[str], Any]) -> None:
    pytest.importorskip("onnxruntime")
    prepare(artifact, "onnxruntime", threads=1)
    data = max((artifact / "prepared" / "onnxruntime").glob("*.data"), key=lambda p: p.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 64
    data.write_bytes(raw)
    with pytest.raises(ArtifactError, match="damaged") as error:
        chunk(artifact, "onnxruntime", golden("smolvla_tiny").observation(0))
    assert "prepare again" in error.value.remedy
    data.unlink()  # what is not whole is not used, and made again
    assert chunk(artifact, "onnxruntime", golden("smolvla_tiny").observation(0))[1]


def test_a_prepared_artifact_can_be_compiled_over(artifact: Path, golden: Callable[[str], Any]) -> None:
    pytest.importorskip("onnxruntime")
    (artifact / "prepared" / "onnxruntime").mkdir(parents=True)
    (artifact / "prepared" / "onnxruntime" / "stamp.json").write_text("{}")
    vlac.compile(golden("smolvla_tiny").checkpoint, "onnx-int8", artifact, goldens=1)
    assert not (artifact / "prepared").exists()


def test_what_gains_nothing_is_refused(golden: Callable[[str], Any], tmp_path: Path) -> None:
    vlac.compile(golden("smolvla_tiny").checkpoint, "gguf-q8", tmp_path / "out", goldens=1)
    with pytest.raises(Unsupported, match="needs no preparing"):
        prepare(tmp_path / "out")


def test_telemetry_is_not_even_imported(compiled: Path) -> None:
    pytest.importorskip("openvino")
    code = (
        "import sys, vlac; vlac.load(sys.argv[1], engine='openvino'); "
        "print([m for m in sys.modules if 'openvino_telemetry' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(compiled)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
