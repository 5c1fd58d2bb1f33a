"""A changed byte anywhere in an artifact is found before a chunk leaves, whatever file or tensor it lies in."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import vlac
from vlac.errors import VlacError
from vlac.facts import inspect
from vlac.parity import parity

GOLDEN = Path(__file__).parent / "golden" / "smolvla_tiny" / "checkpoint"


@pytest.fixture(scope="module", params=["gguf-q8", "onnx-int8"])
def artifact(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    vlac.compile(GOLDEN, request.param, out)
    return out


def files(folder: Path) -> list[Path]:
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def act(folder: Path) -> np.ndarray:
    picture = np.zeros((48, 48, 3), np.uint8)
    with vlac.load(folder, engine="numpy") as policy:
        return policy.act({"top": picture, "wrist": picture}, np.zeros(6, np.float32), "push", seed=0)


@pytest.mark.parametrize("where", [0.1, 0.5, 0.97])
def test_one_changed_bit_is_found(artifact, tmp_path, where):
    act(artifact)
    for name in files(artifact):
        copy = tmp_path / "copy"
        shutil.copytree(artifact, copy)
        data = bytearray((copy / name).read_bytes())
        at = int(len(data) * where)
        while data[at] == 0 and at + 1 < len(data):  # padding between tensors carries nothing
            at += 1
        data[at] ^= 0x01
        (copy / name).write_bytes(data)
        with pytest.raises(VlacError, match=r"copy|checksum|damaged|compile again|broken|JSON"):
            parity(copy)
        with pytest.raises(VlacError):
            inspect(copy)
        if name.suffix not in (".onnx", ".npz"):  # the numpy engine reads no graph, and act needs no golden answer
            with pytest.raises(VlacError):
                act(copy)
        shutil.rmtree(copy)
