"""GGUF files: read and written as the `gguf` package does, every rule enforced, no crash on any bytes."""

from __future__ import annotations

import contextlib
import io as _io
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlac.errors import ArtifactError
from vlac.formats import encode
from vlac.gguf import GgufFile, GgufWriter, Value, read_gguf

NpArray = np.ndarray[Any, Any]

EVERY_KIND: dict[str, Value] = {
    "general.architecture": Value("string", "toy"),
    "general.alignment": Value("u32", 32),
    "a.u8": Value("u8", 255),
    "a.i8": Value("i8", -128),
    "a.u16": Value("u16", 65535),
    "a.i16": Value("i16", -5),
    "a.i32": Value("i32", -(2**31)),
    "a.u64": Value("u64", 2**64 - 1),
    "a.i64": Value("i64", -(2**63)),
    "a.f32": Value("f32", 0.5),
    "a.f64": Value("f64", 0.1),
    "a.bool": Value("bool", True),
    "a.text": Value("string", "grüße, 世界\n"),
    "a.floats": Value("array", (0.25, -1.5), "f32"),
    "a.texts": Value("array", ("x", "", "yz"), "string"),
    "a.flags": Value("array", (True, False), "bool"),
    "a.none": Value("array", (), "i32"),
}

Tensors = Mapping[str, tuple[str, NpArray]]


def toy_tensors() -> dict[str, tuple[str, NpArray]]:
    r = np.random.default_rng(2)
    return {
        "one.weight": ("f32", r.standard_normal((3, 5)).astype(np.float32)),
        "two.weight": ("q8_0", r.standard_normal((2, 2, 64)).astype(np.float32)),
        "three.bias": ("f16", r.standard_normal(7).astype(np.float32)),
        "four": ("bf16", r.standard_normal((1, 2)).astype(np.float32)),
    }


def written(metadata: Mapping[str, Value] = EVERY_KIND, tensors: Tensors | None = None) -> bytes:
    tensors = toy_tensors() if tensors is None else tensors
    out = _io.BytesIO()
    writer = GgufWriter(out, metadata, [(n, f, v.shape) for n, (f, v) in tensors.items()])
    for name, (fmt, values) in tensors.items():
        writer.write(name, encode(fmt, values))
    writer.rewrite(metadata)
    return out.getvalue()


def opened(data: bytes, folder: Path) -> GgufFile:
    path = folder / "toy.gguf"
    path.write_bytes(data)
    return read_gguf(path)


def content(file: GgufFile) -> Any:
    return dict(file.metadata), {n: (t, file.data(n).tobytes()) for n, t in file.tensors.items()}


# --- the container, piece by piece -------------------------------------------------------------------------------


def text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(raw)) + raw


def kv(key: str | bytes, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def info(name: str, ne: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def raw_file(
    kvs: Sequence[bytes] = (), infos: Sequence[bytes] = (), data: bytes = b"", magic: bytes = b"GGUF", version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:  # fmt: skip
    n_tensors, n_kv = counts or (len(infos), len(kvs))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_kv) + b"".join(kvs) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes are no GGUF"),
    "magic": (raw_file(magic=b"GGML"), "does not begin with GGUF"),
    "big endian": (raw_file(version=3 << 24), "GGUF version 50331648"),
    "version 2": (raw_file(version=2), "GGUF version 2, this vlac reads 3"),
    "version 4": (raw_file(version=4), "GGUF version 4"),
    "many tensors": (raw_file(counts=(2**62, 0)), "more than the file can hold"),
    "many keys": (raw_file(counts=(0, 2**63)), "more than the file can hold"),
    "one key announced, none there": (raw_file(counts=(0, 1)) + bytes(64), "key ''.*empty or longer"),
    "duplicate key": (raw_file([kv("a.b", 0, b"\1"), kv("a.b", 0, b"\2")]), "key 'a.b': occurs twice"),
    "empty key": (raw_file([kv("", 0, b"\1")]), "empty or longer"),
    "long key": (raw_file([kv("k" * 65536, 0, b"\1")]), "empty or longer"),
    "key not UTF-8": (raw_file([kv(b"\xff\xfe", 0, b"\1")]), "not UTF-8"),
    "value type": (raw_file([kv("a.b", 13, b"\1")]), "key 'a.b': unknown value type 13"),
    "bool of 2": (raw_file([kv("a.b", 7, b"\2")]), "a bool is 2"),
    "long string": (raw_file([kv("a.b", 8, struct.pack("<Q", 2**40))]), "key 'a.b': announces 1099511627776 bytes"),
    "long array": (raw_file([kv("a.b", 9, struct.pack("<IQ", 10, 2**61))]), "u64 elements, more than"),
    "array of arrays": (raw_file([kv("a.b", 9, struct.pack("<IQ", 9, 0))]), "nested arrays"),
    "alignment type": (raw_file([kv("general.alignment", 10, struct.pack("<Q", 32))]), "general.alignment: is u64 32"),
    "alignment 0": (raw_file([kv("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment: is u32 0"),
    "alignment 24": (raw_file([kv("general.alignment", 4, struct.pack("<I", 24))]), "power of two"),
    "no name": (raw_file(infos=[info("", [1], 0, 0)], data=bytes(32)), "name is empty"),
    "long name": (raw_file(infos=[info("n" * 64, [1], 0, 0)], data=bytes(32)), "longer than 63"),
    "duplicate name": (
        raw_file(infos=[info("t", [1], 0, 0), info("t", [1], 0, 32)], data=bytes(64)), "tensor 't': occurs twice"),
    "no dimensions": (raw_file(infos=[info("t", [], 0, 0)], data=bytes(32)), "0 dimensions"),
    "five dimensions": (raw_file(infos=[info("t", [1] * 5, 0, 0)], data=bytes(32)), "5 dimensions"),
    "zero dimension": (raw_file(infos=[info("t", [4, 0], 0, 0)], data=bytes(32)), "zero, or more"),
    "overflow": (raw_file(infos=[info("t", [2**33, 2**33], 0, 0)], data=bytes(32)), "more than 2\\^63"),
    "negative": (raw_file(infos=[info("t", [2**64 - 1], 0, 0)], data=bytes(32)), "more than 2\\^63"),
    "removed type": (raw_file(infos=[info("t", [32], 4, 0)], data=bytes(64)), "unknown tensor type 4"),
    "unknown type": (raw_file(infos=[info("t", [32], 99, 0)], data=bytes(64)), "unknown tensor type 99"),
    "row": (raw_file(infos=[info("t", [48], 8, 0)], data=bytes(64)), "tensor 't': rows of 48 values, q8_0 wants"),
    "first offset": (raw_file(infos=[info("t", [1], 0, 32)], data=bytes(64)), "offset 32, expected 0"),
    "gap": (
        raw_file(infos=[info("t", [1], 0, 0), info("u", [1], 0, 64)], data=bytes(96)), "'u': offset 64, expected 32"),
    "shared": (raw_file(infos=[info("t", [1], 0, 0), info("u", [1], 0, 0)], data=bytes(64)), "offset 0, expected 32"),
    "truncated": (raw_file(infos=[info("t", [16], 0, 0)], data=bytes(63)), "t ends at byte 128, the file has 127"),
    "huge": (raw_file(infos=[info("t", [2**40], 0, 0)], data=bytes(64)), "tensor t ends at byte"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_broken_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    data, said = BAD[case]
    with pytest.raises(ArtifactError, match=said) as caught:
        opened(data, tmp_path)
    assert "toy.gguf" in caught.value.message


def test_a_file_without_tensors_is_legal(tmp_path: Path) -> None:
    file = opened(raw_file([kv("a.b", 5, struct.pack("<i", -3))]), tmp_path)
    assert file.metadata == {"a.b": Value("i32", -3)}
    assert file.tensors == {}


def test_a_missing_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.gguf cannot be read: No such file"):
        read_gguf(tmp_path / "none.gguf")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = opened(written(), tmp_path)
    assert dict(file.metadata) == EVERY_KIND
    for name, (fmt, values) in toy_tensors().items():
        assert (file.tensors[name].type, file.tensors[name].shape) == (fmt, values.shape)
        assert np.array_equal(file.data(name), encode(fmt, values))
        assert not file.data(name).flags.writeable
        assert file.data(name).ctypes.data % 32 == 0


def test_the_same_content_gives_the_same_bytes() -> None:
    assert written() == written()


def test_the_writer_refuses_what_the_reader_would() -> None:
    rows: list[list[tuple[str, str, tuple[int, ...]]]] = [
        [("n" * 64, "f32", (1,))], [("t", "f32", (1,)), ("t", "f32", (1,))], [("t", "q8_0", (33,))], [("t", "f32", ())],
        [("", "f32", (1,))], [("t", "f32", (2, 0))], [("t", "f32", (1, 1, 1, 1, 1))],
    ]  # fmt: skip
    for row in rows:
        with pytest.raises(ValueError, match="t"):
            GgufWriter(_io.BytesIO(), {}, row)


def test_tensors_are_written_in_order_and_whole() -> None:
    writer = GgufWriter(_io.BytesIO(), {}, [("t", "f32", (2,)), ("u", "f32", (1,))])
    with pytest.raises(ValueError, match="expected t with 8"):
        writer.write("u", np.zeros(4, dtype=np.uint8))
    with pytest.raises(ValueError, match="expected t with 8"):
        writer.write("t", np.zeros(4, dtype=np.uint8))
    with pytest.raises(ValueError, match="0 of 2 tensors"):
        writer.rewrite({})


# --- against the gguf package ------------------------------------------------------------------------------------


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    opened(written(), tmp_path)
    reader = gguf.GGUFReader(tmp_path / "toy.gguf")
    for key, value in EVERY_KIND.items():
        if value.value == ():
            continue  # the package cannot give an empty array
        got = reader.get_field(key).contents()
        want = list(value.value) if isinstance(value.value, tuple) else value.value
        assert got == (pytest.approx(want) if value.kind in ("f32", "f64") else want), key
    tensors = {t.name: t for t in reader.tensors}
    for name, (fmt, values) in toy_tensors().items():
        assert tensors[name].tensor_type.name.lower() == fmt
        assert [int(n) for n in tensors[name].shape] == list(reversed(values.shape))
        assert np.array_equal(tensors[name].data.reshape(-1).view(np.uint8), encode(fmt, values))


def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "toy")
    writer.add_custom_alignment(64)
    writer.add_string("a.text", "grüße")
    writer.add_uint64("a.u64", 7)
    writer.add_bool("a.bool", False)
    writer.add_array("a.texts", ["x", "yz"])
    writer.add_array("a.ints", [1, -2])
    for name, (fmt, values) in toy_tensors().items():
        kind = gguf.GGMLQuantizationType[fmt.upper()]
        packed = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path)
    assert file.alignment == 64
    assert file.metadata["a.text"] == Value("string", "grüße")
    assert file.metadata["a.u64"] == Value("u64", 7)
    assert file.metadata["a.bool"] == Value("bool", False)
    assert file.metadata["a.texts"] == Value("array", ("x", "yz"), "string")
    assert file.metadata["a.ints"] == Value("array", (1, -2), "i32")
    for name, (fmt, values) in toy_tensors().items():
        assert (file.tensors[name].type, file.tensors[name].shape) == (fmt, values.shape)
        assert np.array_equal(file.data(name), encode(fmt, values))


# --- any bytes ---------------------------------------------------------------------------------------------------

GOOD = written()
SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW
@given(data=st.binary(max_size=400))
def test_random_bytes_are_an_artifact_error(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        opened(data, tmp_path)


@SLOW
@given(cut=st.integers(0, len(GOOD) - 1))
def test_a_file_cut_short_is_an_artifact_error_or_lost_only_padding(cut: int, tmp_path: Path) -> None:
    whole = content(opened(GOOD, tmp_path))
    (tmp_path / "toy.gguf").unlink()
    with contextlib.suppress(ArtifactError):
        assert content(opened(GOOD[:cut], tmp_path)) == whole


@SLOW
@given(edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_never_read_outside_the_file(edits: list[tuple[int, int]], tmp_path: Path) -> None:
    data = bytearray(GOOD)
    for at, value in edits:
        data[at] = value
    path = tmp_path / "toy.gguf"
    path.unlink(missing_ok=True)
    try:
        file = opened(bytes(data), tmp_path)
    except ArtifactError:
        return
    for name, t in file.tensors.items():
        assert file.data(name).nbytes == t.nbytes  # a view that left the map would be shorter
