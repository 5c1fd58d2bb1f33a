"""The plugin for LeRobot: found, configured, loaded and rolled out by LeRobot's own code, with vlac's answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dialect_files as files
import numpy as np
import pytest
from conftest import ROOT

import vlac
from vlac.artifact import open_artifact
from vlac.goldens import synthetic

PYTHON = ROOT / ".venv-lerobot" / "bin" / "python"
PLUGIN = ROOT / "plugins" / "lerobot_policy_vlac"
pytestmark = [
    pytest.mark.lerobot,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-lerobot; scripts/peers/lerobot.sh sets it up"),
]


def lerobot(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{PLUGIN}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(PYTHON), *map(str, arguments)], env=env, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.parametrize("target", ["gguf-f32", "onnx-fp32"])
def test_lerobot_runs_an_artifact_with_no_other_change(tmp_path: Path, target: str) -> None:
    checkpoint = files.write(tmp_path / "checkpoint")
    result = vlac.compile(checkpoint, target=target, out=tmp_path / "out", goldens=1)
    assert result.path is not None
    made = lerobot("-m", "lerobot_policy_vlac", result.path, tmp_path / "policy")
    assert made.returncode == 0, made.stderr
    again = lerobot("-m", "lerobot_policy_vlac", result.path, tmp_path / "policy")
    assert again.returncode == 2 and "not empty" in again.stderr

    artifact = open_artifact(result.path)
    given = synthetic(artifact.io, 1)[0]
    pictures = {f"image/{k}": v for k, v in given.images.items()}
    np.savez(tmp_path / "given.npz", state=given.state, noise=given.noise, **pictures)  # type: ignore[arg-type]
    done = lerobot(
        ROOT / "tests" / "lerobot_plugin_check.py", tmp_path / "policy", tmp_path / "given.npz", tmp_path / "said.npz"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = np.load(tmp_path / "said.npz")

    session = vlac.load(result.path, engine="torch")
    task = "pick up the cube"
    chunk = session.act(images=given.images, state=given.state, task=task, noise=given.noise)
    np.testing.assert_allclose(said["chunk"][0], chunk, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(said["rows"][:, 0], chunk[:2], rtol=1e-5, atol=1e-4)
    noise = np.random.default_rng(7).standard_normal(given.noise.shape).astype(np.float32)
    rolled = session.act(images=given.images, state=given.state, task=task, noise=noise)
    session.close()
    assert said["rolled"].shape[2] == artifact.io.action_dim and said["rolled"].shape[1] == 3
    np.testing.assert_allclose(said["rolled"][0], rolled[:3], rtol=1e-5, atol=1e-4)


def test_push_cubes_ends_as_in_vlac_eval(tmp_path: Path) -> None:
    """lerobot-eval's own rollout of the bundled policy, two seeds; benchmarks/push_cubes_plugin.py has fifty."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from push_cubes_plugin import compare

    result = vlac.compile("push-cubes", target="onnx-fp32", out=tmp_path / "out", goldens=1)
    assert result.path is not None
    found = compare(result.path, tmp_path / "policy", 0, 2, "torch")
    assert found["same_success"] == 2 and not found["different"]
    assert found["same_steps"] == 2
