"""llama-cpp-python as a provider of ggml: the engine passes its self-test on it and answers as LeRobot does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, GoldenFolder

import vlac

FOLDER = ROOT / ".venv-llama-cpp"
pytestmark = [
    pytest.mark.llama_cpp,
    pytest.mark.skipif(
        not (FOLDER / "llama_cpp").is_dir(), reason="no .venv-llama-cpp; scripts/peers/llama_cpp.sh builds it"
    ),
]

# One provider per process: the libraries of two would find each other by soname.
ACT = """
import json, sys, numpy as np, vlac
sys.path[:0] = [sys.argv[1]]
from conftest import open_golden
from pathlib import Path
golden = open_golden(Path(sys.argv[2]))
policy = vlac.load(sys.argv[3], engine="ggml", threads=2)
chunks = [policy.act(**golden.observation(i)).tolist() for i in range(len(golden.tasks))]
print(json.dumps({"info": policy.info["provider"], "chunks": chunks}))
"""


@pytest.mark.filterwarnings("ignore:the task is longer")
@pytest.mark.parametrize("name", ["smolvla_tiny", "smolvla_letterbox"])
@pytest.mark.parametrize(("target", "limit"), [("gguf-f32", 2e-5), ("gguf-q8", 0.06)])
def test_chunks_on_llama_cpp(
    golden: Callable[[str], GoldenFolder], tmp_path: Path, name: str, target: str, limit: float
) -> None:
    folder = golden(name)
    vlac.compile(folder.checkpoint, target=target, out=tmp_path / "out")
    environment = {
        **os.environ,
        "PYTHONPATH": str(FOLDER),
        "VLAC_GGML_PROVIDER": "llama-cpp-python",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", ACT, ROOT / "tests", folder.path, tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["info"] == "llama-cpp-python"
    for i, chunk in enumerate(answer["chunks"]):
        expected = folder.chunk(i)
        assert np.abs(np.array(chunk) - expected).max() <= limit * np.abs(expected).max()
