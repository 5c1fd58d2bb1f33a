"""The published size of SmolVLA, 450M parameters: what compiling and running it may take in memory and on disk."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from compile_full_size import child, size_mb

pytestmark = [
    pytest.mark.full_size,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.disk_usage("/tmp").free < 8e9, reason="needs 8 GB of disk"),
]

ACTIVATIONS_MB = 200
"""What a run may hold beside the weights: Python with its packages, and the values of the largest stage."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("full") / "smolvla_450m"
    subprocess.run([sys.executable, ROOT / "scripts" / "make_full_size.py", out], check=True, timeout=600)
    return out


@pytest.mark.parametrize(("target", "artifact_mb", "relative_l2"), [("gguf-q8", 520, 0.05), ("onnx-int4", 300, 0.6)])
def test_memory_and_size(checkpoint: Path, tmp_path: Path, target: str, artifact_mb: float, relative_l2: float) -> None:
    out = tmp_path / target
    made = child("--compile", str(checkpoint), target, str(out))
    assert made["compile_peak_mb"] < 3000
    size = size_mb(out)
    assert size <= artifact_mb
    ran = child("--act", str(out))
    assert ran["relative_l2"] <= relative_l2
    if target == "gguf-q8":
        assert ran["run_peak_mb"] <= 1.25 * size + ACTIVATIONS_MB
    shutil.rmtree(out)
