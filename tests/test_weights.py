"""Tensors read in pieces: the same values, the same bytes in every artifact, and errors that name the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import GOLDEN, write_tensors

import vlac
from vlac.errors import CheckpointError
from vlac.readers import safetensors_file
from vlac.readers.safetensors_file import open_file
from vlac.weights import LazyTensor

NpArray = np.ndarray[Any, Any]


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, LazyTensor]:
    """a: float32 [7, 6], b: bfloat16 [5, 6], both on disk."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((7, 6)).astype(np.float32)
    b = (rng.standard_normal((5, 6)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    write_tensors(tmp_path / "t.safetensors", {"a": a, "b": b})
    return dict(open_file(tmp_path / "t.safetensors"))


def joined(tensor: LazyTensor) -> NpArray:
    return np.concatenate(list(tensor.rows()))


@pytest.mark.parametrize("piece", [1, 6, 17, 24, 1000])
def test_pieces_are_the_whole(stored: dict[str, LazyTensor], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlac.weights.PIECE", piece)
    a, b = stored["a"], stored["b"]
    both = LazyTensor.concat([a, b, a])
    padded = both.map_rows(lambda w: np.pad(w, [(0, 0), (0, 2)]), (8,))
    scaled = padded.map_rows(lambda w: w * np.float32(0.5))
    for tensor in (a, b, both, padded, scaled):
        assert np.array_equal(joined(tensor), tensor.load())
        assert len(list(tensor.rows())) == -(-tensor.shape[0] // max(1, piece // tensor.shape[1])) or piece >= 1000
    assert scaled.shape == (19, 8)
    turned = b.map(lambda w: w[::-1])  # not the same for any run of rows: only whole
    assert len(list(turned.rows())) == 1


def test_a_piece_with_a_wrong_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlac.weights.PIECE", 8)
    values = np.zeros((9, 4), np.float32)
    values[7, 1] = np.nan
    write_tensors(tmp_path / "t.safetensors", {"bad": values})
    with pytest.raises(CheckpointError, match="bad: 1 of 8 values are NaN"):
        list(open_file(tmp_path / "t.safetensors")["bad"].rows())


def test_large_files_are_copied_out_of_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path / "t.safetensors", {"w": np.ones((3, 4), np.float32)})
    monkeypatch.setattr(safetensors_file, "MAX_MAPPED", 0)
    first, second = (open_file(tmp_path / "t.safetensors")["w"].load() for _ in range(2))
    assert np.array_equal(first, second)
    assert first.flags.owndata


@pytest.mark.parametrize("target", ["gguf-q4", "onnx-int4", "onnx-fp16"])
def test_artifacts_have_the_same_bytes(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = GOLDEN / "smolvla_tiny" / "checkpoint"
    whole = vlac.compile(folder, target, tmp_path / "whole", goldens=1).path
    monkeypatch.setattr("vlac.weights.PIECE", 1000)
    pieces = vlac.compile(folder, target, tmp_path / "pieces", goldens=1).path
    assert whole is not None and pieces is not None
    files = [p for p in whole.rglob("*") if p.is_file()] if whole.is_dir() else [whole]
    assert files
    for file in files:
        other = pieces / file.relative_to(whole) if whole.is_dir() else pieces
        assert file.read_bytes() == other.read_bytes(), file.name
