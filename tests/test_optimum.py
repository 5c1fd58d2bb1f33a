"""The plug-in for Optimum's command line, run by Optimum itself (in .venv-lerobot, which has its dependencies)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, GoldenFolder

import vlac

PYTHON = ROOT / ".venv-lerobot" / "bin" / "python"
pytestmark = [
    pytest.mark.lerobot,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-lerobot; scripts/peers/lerobot.sh sets it up"),
]


def optimum(*arguments: object) -> str:
    command = [PYTHON, "-m", "optimum.commands.optimum_cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_export_vla_is_listed() -> None:
    assert "vlac, the VLA" in optimum("export", "--help")


def test_export_vla_compiles(golden: Callable[[str], GoldenFolder], tmp_path: Path) -> None:
    tiny = golden("smolvla_tiny")
    out = tmp_path / "out"
    optimum("export", "vla", tiny.checkpoint, out, "--target", "gguf-f32", "--pass", "flow-steps:steps=10")
    chunk = vlac.load(out, engine="torch").act(**tiny.observation(0))
    assert np.abs(chunk - tiny.chunk(0)).max() <= 2e-5 * np.abs(tiny.chunk(0)).max()
