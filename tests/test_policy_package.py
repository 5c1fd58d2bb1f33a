"""Policy packages: what is in them, what is refused, and the same actions in Intel's own runtime."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import dialect_files as files
import numpy as np
import pytest
from conftest import ROOT

import vlac
from vlac.artifact import open_artifact
from vlac.errors import ArtifactError, Unsupported, VlacError
from vlac.policy_package import open_package, write_package

PYTHON = ROOT / ".venv-physicalai" / "bin" / "python"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write(tmp_path_factory.mktemp("package") / "checkpoint")


def compiled(checkpoint: Path, out: Path, target: str = "onnx-fp32", single_file: bool = True) -> Path:
    result = vlac.compile(checkpoint, target=target, out=out, goldens=2, single_file=single_file)
    assert result.path is not None
    return result.path


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(checkpoint, tmp_path_factory.mktemp("package") / "out")


def test_the_manifest_tells_what_is_there(artifact: Path, tmp_path: Path) -> None:
    package = write_package(artifact, tmp_path / "package")
    found = json.loads((package / "manifest.json").read_text())
    assert (found["format"], found["version"]) == ("policy_package", "1.0")
    (backend, model), *more = found["model"]["artifacts"].items()
    assert backend == "onnx" and not more and (package / model).stem == found["policy"]["name"]
    assert [c["name"] for c in found["hardware"]["cameras"]] == ["top", "wrist"]
    assert found["hardware"]["robots"][0]["action"]["shape"] == [4]
    assert open_package(package / "vlac").io == open_artifact(artifact).io
    assert str(artifact) not in (package / "manifest.json").read_text()


@pytest.mark.parametrize("name", ["vlac/io.json", "model.onnx.data"])
def test_a_changed_file_is_found_before_anything_runs(artifact: Path, tmp_path: Path, name: str) -> None:
    package = write_package(artifact, tmp_path / "package")
    path = package / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="not the file that was exported"):
        open_package(package / "vlac")
    path.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        open_package(package / "vlac")


def test_what_a_package_cannot_hold_is_refused(artifact: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="several graphs"):
        write_package(compiled(checkpoint, tmp_path / "staged", single_file=False), tmp_path / "package")
    with pytest.raises(Unsupported, match="no ONNX graph"):
        write_package(compiled(checkpoint, tmp_path / "x.gguf", "gguf-f32", single_file=False), tmp_path / "package")
    with pytest.raises(VlacError, match="no backend"):
        write_package(artifact, tmp_path / "package", "torch")
    assert not (tmp_path / "package").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("mine")
    with pytest.raises(VlacError, match="not an empty folder"):
        write_package(artifact, tmp_path / "full")


# --- in Intel's runtime ------------------------------------------------------------------------------------------


def answers(package: Path, given: Any, folder: Path) -> Any:
    """What physicalai says in a process of its own."""
    pictures = {f"image/{k}": v for k, v in given.images.items()}
    arrays = {"state": given.state, "noise": given.noise, "task": np.array(given.task), **pictures}
    np.savez(folder / "given.npz", **arrays)  # type: ignore[arg-type]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script = ROOT / "tests" / "physicalai_check.py"
    command = [str(PYTHON), str(script), str(package), str(folder / "given.npz"), str(folder / "said.npz")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(folder / "said.npz")


@pytest.mark.physicalai
@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-physicalai; scripts/peers/physicalai.sh sets it up")
@pytest.mark.parametrize(
    ("target", "backend", "within"),
    [("onnx-fp32", "onnx", 1e-5), ("onnx-fp32", "openvino", 1e-5), ("openvino-int8", "openvino", 0.05)],
)
def test_physicalai_acts_as_vlac(checkpoint: Path, tmp_path: Path, target: str, backend: str, within: float) -> None:
    path = compiled(checkpoint, tmp_path / "out", target)
    package = write_package(path, tmp_path / "package", backend)
    opened = open_artifact(path)
    given = opened.goldens()[0]
    said = answers(package, given, tmp_path)
    session = vlac.load(path)
    chunk = session.act(images=given.images, state=given.state, task=given.task, noise=given.noise)
    session.close()
    largest = float(np.abs(chunk).max())
    print(f"{target} in {backend}: max|d|/max {np.abs(said['chunk'] - chunk).max() / largest:.2e}")
    assert said["chunk"].shape == chunk.shape and int(said["rows"]) == len(chunk)
    assert str(said["backend"]) == {"onnx": "onnx", "openvino": "vlac-openvino"}[backend]
    np.testing.assert_allclose(said["chunk"], chunk, rtol=0, atol=within * largest)
    np.testing.assert_allclose(said["again"], said["chunk"], rtol=0, atol=1e-5 * largest)
    np.testing.assert_array_equal(said["first"], said["chunk"][0])
    assert list(said["names"]) == ["images.top", "images.wrist", "state", "task"]
