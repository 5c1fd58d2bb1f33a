"""A robot's machine: nothing of the compile side imports, nothing asks the network, and the chunk is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_toy import artifact, observation

from vlac.runtime.session import Session

ROBOT = """
import socket, sys, warnings

class Blocked:
    names = {"torch", "onnx", "transformers", "huggingface_hub", "safetensors", "gguf"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} is not installed on a robot")

sys.meta_path.insert(0, Blocked())

asked = []

def refuse(*args, **kwargs):
    asked.append(args)
    raise OSError("the network is blocked")

class Socket(socket.socket):
    connect = connect_ex = sendto = refuse

socket.socket, socket.create_connection, socket.getaddrinfo = Socket, refuse, refuse
warnings.simplefilter("ignore")
import numpy as np
import vlac
from vlac.runtime.session import Session, load
assert vlac.pad_state([1.0], 2).tolist() == [1.0, 0.0]
CODE
compile_side = ("families", "readers", "passes", "targets", "lower", "policy", "registry", "api", "checkpoint")
found = [m for m in sys.modules if m.startswith(tuple("vlac." + c for c in compile_side))]
assert not found, found
assert not asked, asked
"""


def on_a_robot(code: str, *arguments: str) -> np.ndarray:
    """Runs `code` where only the runtime is installed and the network is blocked; it prints a chunk as JSON."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", ROBOT.replace("CODE", code), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": f"{root}:{root / 'tests'}", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout.splitlines()[-1]), np.float32)


def test_it_acts_where_only_the_runtime_is_installed_and_the_network_is_blocked() -> None:
    code = """
from runtime_toy import artifact, observation
with Session(artifact()) as policy:
    print(policy.act(**observation()).tolist())
"""
    with Session(artifact()) as here:
        np.testing.assert_array_equal(on_a_robot(code), here.act(**observation()))


ENGINES = [("onnx-fp32", "onnxruntime"), ("onnx-fp32", "openvino"), ("gguf-f32", "ggml"), ("gguf-f32", "numpy")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, golden: Callable[[str], Any]) -> Callable[[str], Path]:
    """compiled("gguf-f32"): smolvla_letterbox as an artifact on disk, compiled once."""
    import vlac

    done: dict[str, Path] = {}

    def make(target: str) -> Path:
        if target not in done:
            out = tmp_path_factory.mktemp("artifact") / target
            vlac.compile(str(golden("smolvla_letterbox").checkpoint), target, out)
            done[target] = out
        return done[target]

    return make


@pytest.mark.parametrize("target, engine", ENGINES)
def test_an_artifact_acts_there_and_gives_lerobots_chunk(
    target: str, engine: str, compiled: Callable[[str], Path], golden: Callable[[str], Any]
) -> None:
    from vlac.engines.base import get_engine

    if why := get_engine(engine).missing():
        pytest.skip(why)
    code = """
from conftest import open_golden
from pathlib import Path
with load(sys.argv[1], engine=sys.argv[2], threads=1) as policy:
    print(policy.act(**open_golden(Path(sys.argv[3])).observation(0)).tolist())
"""
    folder = golden("smolvla_letterbox")
    chunk = on_a_robot(code, str(compiled(target)), engine, str(folder.path))
    want = folder.chunk(0)
    assert np.abs(chunk - want).max() <= 2e-5 * np.abs(want).max()
