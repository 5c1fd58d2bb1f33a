"""safetensors files: what is read right, and everything that is refused."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import GOLDEN, read_tensors, safetensors_bytes, write_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlac.errors import CheckpointError
from vlac.readers.safetensors_file import open_file, open_folder, open_sharded, read_header

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2.0], np.float32),
    "scalar": np.array(7.0, np.float32),
    "none": np.zeros((0, 4), np.float32),
}


def test_golden_file_reads_as_it_was_written() -> None:
    path = GOLDEN / "smolvla_tiny" / "checkpoint" / "model.safetensors"
    weights, expected = open_file(path), read_tensors(path)
    assert set(weights) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(weights[name].load(), values)


def test_float32_is_a_read_only_view_of_the_map(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    weights = open_file(tmp_path / "x.safetensors")
    first, second = weights["a.weight"].load(), weights["a.weight"].load()
    assert np.shares_memory(first, second) and not first.flags.writeable


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_floats_load_as_float32(tmp_path: Path, dtype: type) -> None:
    values = np.array([[0.5, -3.0], [1024.0, 2**-10]], dtype)
    write_tensors(tmp_path / "x.safetensors", {"t": values})
    tensor = open_file(tmp_path / "x.safetensors")["t"]
    assert tensor.load().dtype == np.float32 and tensor.dtype == f"f{values.itemsize * 8}"
    np.testing.assert_array_equal(tensor.load(), values.astype(np.float32))


@given(hnp.arrays(np.uint16, hnp.array_shapes(max_dims=2, max_side=5)))
def test_bf16_is_the_upper_half_of_float32(bits: np.ndarray[Any, Any]) -> None:
    bits = bits & np.uint16(0xBFFF)  # no NaN, no Inf
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_tensors(path, {"t": bits})
        loaded = open_file(path)["t"].load()
    np.testing.assert_array_equal(loaded.view(np.uint32), bits.astype(np.uint32) << 16)


def test_unaligned_data_is_copied(tmp_path: Path) -> None:
    text = json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    text += b" " * (3 - len(text) % 4 if len(text) % 4 != 3 else 4)
    raw = len(text).to_bytes(8, "little") + text + np.array([3.0, 4.0], np.float32).tobytes()
    (tmp_path / "x.safetensors").write_bytes(raw)
    loaded = open_file(tmp_path / "x.safetensors")["t"].load()
    assert loaded.flags.aligned
    np.testing.assert_array_equal(loaded, [3.0, 4.0])


def set_entry(name: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(changes)


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "overlap": (set_entry("b", data_offsets=[16, 24]), "tensor b overlaps"),
    "shape too large": (set_entry("b", shape=[3]), "tensor b: F32 .* needs 12 bytes"),
    "negative size": (set_entry("b", shape=[-2]), "tensor b: shape"),
    "boolean size": (set_entry("b", shape=[True, 2]), "tensor b: shape"),
    "shape is text": (set_entry("b", shape="2"), "tensor b: shape"),
    "rank too high": (set_entry("b", shape=[1] * 17), "tensor b: shape"),
    "offsets reversed": (set_entry("b", data_offsets=[32, 24]), "tensor b: .* data_offsets"),
    "offsets beyond the end": (set_entry("scalar", data_offsets=[4000, 4004]), "tensor none leaves a gap behind b"),
    "three offsets": (set_entry("b", data_offsets=[24, 32, 32]), "tensor b: data_offsets"),
    "unknown dtype": (set_entry("b", dtype="F7"), "tensor b: unknown dtype 'F7'"),
    "dtype of another size": (set_entry("b", dtype="F64"), "tensor b: F64"),
    "key missing": (lambda h: h["b"].pop("dtype"), "tensor b: header entry"),
    "key too many": (set_entry("b", extra=1), "tensor b: header entry"),
    "entry is a number": (lambda h: h.update(b=3), "tensor b: header entry"),
    "tensor not listed": (lambda h: h.pop("scalar"), "tensor none leaves a gap behind b"),
    "metadata is a list": (lambda h: h.update(__metadata__=[1]), "__metadata__"),
    "metadata holds numbers": (lambda h: h.update(__metadata__={"a": 1}), "__metadata__"),
}


@pytest.mark.parametrize("case", SPOILED, ids=str)
def test_spoiled_header_is_refused(tmp_path: Path, case: str) -> None:
    edit, message = SPOILED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(TENSORS, edit))
    with pytest.raises(CheckpointError, match=message) as refused:
        read_header(path)
    assert str(path) in refused.value.message


RAW = {
    "empty file": b"",
    "four bytes": b"\x01\x00\x00\x00",
    "header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "header length beyond the limit": (2**62).to_bytes(8, "little") + b"{}",
    "not JSON": (4).to_bytes(8, "little") + b"abcd",
    "JSON that stops": (8).to_bytes(8, "little") + b'{"a": {"',
    "not UTF-8": (6).to_bytes(8, "little") + b'{"\xff":1',
    "deeply nested": (200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995,
    "a huge number": (5010).to_bytes(8, "little") + b'{"a":' + b"9" * 5004 + b"}",
    "duplicate key": (14).to_bytes(8, "little") + b'{"a":1,"a":2} ',
    "data without tensors": (2).to_bytes(8, "little") + b"{}xxxx",
}


@pytest.mark.parametrize("case", RAW, ids=str)
def test_broken_file_is_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(RAW[case])
    with pytest.raises(CheckpointError) as refused:
        open_file(path)
    assert str(path) in refused.value.message


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_file(tmp_path / "gone.safetensors")


def test_integer_tensor_is_refused_when_loaded(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"ids": np.arange(3)})
    with pytest.raises(CheckpointError, match="tensor ids is I64, expected one of F64"):
        open_file(tmp_path / "x.safetensors")["ids"].load()


def test_file_that_shrinks_after_reading_the_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    weights = open_file(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="changed from"):
        weights["b"].load()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    write_tensors(tmp_path / "x.safetensors", {"t": np.array([1.0, bad], np.float32)})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: t: 1 of 2 values are NaN or Inf"):
        open_file(tmp_path / "x.safetensors")["t"].load()


GOOD = safetensors_bytes(TENSORS)
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")


def assert_refused_or_identical(data: bytes) -> None:
    """Reading `data` refuses, or gives every known name its own values."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(data)
        try:
            read = {name: tensor.load() for name, tensor in open_file(path).items()}
        except CheckpointError:
            return
        for name in set(read) & set(TENSORS):
            np.testing.assert_array_equal(read[name], TENSORS[name])


@settings(max_examples=400, deadline=None)
@given(st.integers(0, HEADER_END * 8 - 1))
def test_a_flipped_header_bit_never_gives_other_values(bit: int) -> None:
    data = bytearray(GOOD)
    data[bit // 8] ^= 1 << bit % 8
    assert_refused_or_identical(bytes(data))


@settings(deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=0) | st.binary(min_size=1, max_size=9))
def test_a_truncated_or_extended_file_is_refused(length: int, tail: bytes) -> None:
    data = GOOD[:length] if not tail else GOOD + tail
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            open_file(path)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    assert_refused_or_identical(data)


# --- shards ---


def write_shards(folder: Path, shards: dict[str, list[str]], weight_map: dict[str, Any] | None = None) -> Path:
    """`shards`: file -> names of TENSORS in it; the index lists them unless `weight_map` says otherwise."""
    for file, names in shards.items():
        write_tensors(folder / file, {n: TENSORS[n] for n in names})
    table = weight_map or {name: file for file, names in shards.items() for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return index


S1, S2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_shards_read_as_one(tmp_path: Path) -> None:
    write_shards(tmp_path, {S1: ["a.weight", "none"], S2: ["b", "scalar"]})
    weights = open_folder(tmp_path)
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(weights[name].load(), values)


BAD_INDEX: dict[str, tuple[dict[str, list[str]], dict[str, Any] | None, str]] = {
    "shard missing": ({S1: ["b"]}, {"b": S1, "scalar": S2}, f"1 of 2 shards are missing: {S2}"),
    "tensor listed but not there": ({S1: ["b"]}, {"b": S1, "scalar": S1}, "tensor scalar is listed"),
    "tensor there but not listed": ({S1: ["b", "scalar"]}, {"b": S1}, "tensor scalar lies in .* not listed"),
    "tensor in two shards": ({S1: ["b"], S2: ["b", "scalar"]}, {"b": S1, "scalar": S2}, "tensor b lies in"),
    "path upwards": ({S1: ["b"]}, {"b": "../x.safetensors"}, "'../x.safetensors' is not a plain file name"),
    "absolute path": ({S1: ["b"]}, {"b": "/etc/passwd"}, "'/etc/passwd' is not a plain file name"),
    "backslash": ({S1: ["b"]}, {"b": "..\\x.safetensors"}, "is not a plain file name"),
    "drive": ({S1: ["b"]}, {"b": "C:x.safetensors"}, "is not a plain file name"),
    "pickle": ({S1: ["b"]}, {"b": "pytorch_model.bin"}, "pytorch_model.bin, which is not a safetensors"),
    "not text": ({S1: ["b"]}, {"b": 3}, "is not a plain file name"),
}


@pytest.mark.parametrize("case", BAD_INDEX, ids=str)
def test_bad_index_is_refused(tmp_path: Path, case: str) -> None:
    shards, weight_map, message = BAD_INDEX[case]
    index = write_shards(tmp_path, shards, weight_map)
    with pytest.raises(CheckpointError, match=message):
        open_sharded(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a":"x","a":"y"}}'])
def test_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_sharded(index)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_never_opened(tmp_path: Path, pickle: str) -> None:
    (tmp_path / pickle).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match=f"only as pickle \\({pickle}"):
        open_folder(tmp_path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        open_folder(tmp_path)
