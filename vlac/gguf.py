"""GGUF v3 files: a strict reader that maps and validates, a streaming writer, and vlac's own artifacts in them.

Every rule of the container is checked before a byte of tensor data is handed on, so that nothing native ever sees a
broken file: `read_gguf` gives what the file says or raises ArtifactError naming the file and the key or tensor.
Container: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Union

import numpy as np

from vlac.artifact import Artifact, StoredTensor, check_manifest, check_tensors
from vlac.errors import ArtifactError, VlacError
from vlac.formats import FORMATS, decode, get_format
from vlac.io import IO
from vlac.program_text import parse
from vlac.weights import Array

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Scalar = Union[int, float, bool, str]

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_NAME = 63
MAX_DIMS = 4

# value type id -> struct code; 8 is string, 9 is array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_NAMES = {
    **dict(zip(range(8), ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool"), strict=True)),
    8: "string",
    9: "array",
    10: "u64",
    11: "i64",
    12: "f64",
}
_IDS = {name: i for i, name in _NAMES.items()}

# ggml tensor types by id: (name, values per block, bytes per block); removed ids are absent
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 40),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18),
}
_TYPE_IDS = {name: i for i, (name, _, _) in GGML_TYPES.items()}


@dataclass(frozen=True)
class Value:
    """A metadata value: kind ("u32", "string", ..., "array") and, for arrays, the kind of the elements."""

    kind: str
    value: Scalar | tuple[Scalar, ...]
    element: str = ""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's row in the header: numpy's shape (ggml's `ne` reversed), type name, place in the data section."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A mapped, validated file. `data(name)` is a read-only view of a tensor's packed bytes; nothing is copied."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]
    alignment: int
    data_start: int
    _map: Bytes = field(repr=False, compare=False)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._map)

    def data(self, name: str) -> Bytes:
        info = self.tensors[name]
        start = self.data_start + info.offset
        return self._map[start : start + info.nbytes]

    def text(self, key: str) -> str | None:
        """A string value; None when absent, ArtifactError when of another kind."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if value.kind != "string":
            raise ArtifactError(f"{self.path}: key {key} is {value.kind}, expected string")
        return str(value.value)


# --- reading -----------------------------------------------------------------------------------------------------


class _Cursor:
    """Reads forward through the header; every read is checked against the end of the file first."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.data, self.at, self.what = path, data, 0, "header"

    def fail(self, message: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path}: {self.what}: {message} (byte {self.at})",
            remedy="the file is damaged or not GGUF; copy it again or compile again",
        )

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise self.fail(f"wants {count} bytes, the file ends after {len(self.data) - self.at}")
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, least: int, of: str) -> int:
        """A u64 count of things that take at least `least` bytes each, so that a lie cannot make us allocate."""
        n = int(self.number("Q"))
        if n * least > len(self.data) - self.at:
            raise self.fail(f"announces {n} {of}, more than the file can hold")
        return n

    def string(self) -> str:
        raw = bytes(self.take(self.count(1, "bytes of text")))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"text is not UTF-8 ({error.reason})") from None

    def scalar(self, kind: int) -> Scalar:
        if kind == 8:
            return self.string()
        if kind == 7:
            flag = self.number("B")
            if flag > 1:
                raise self.fail(f"a bool is {flag}")
            return bool(flag)
        value: Scalar = self.number(_SCALARS[kind])
        return value

    def value(self) -> Value:
        kind = self.number("I")
        if kind not in _NAMES:
            raise self.fail(f"unknown value type {kind}")
        if kind != 9:
            return Value(_NAMES[kind], self.scalar(kind))
        element = self.number("I")
        if element == 9 or element not in _NAMES:
            raise self.fail(f"array of type {element} (nested arrays are not allowed)")
        least = 8 if element == 8 else struct.calcsize("<" + _SCALARS[element])
        n = self.count(least, f"{_NAMES[element]} elements")
        if element in (7, 8):
            items = tuple(self.scalar(element) for _ in range(n))
        else:
            items = struct.unpack(f"<{n}{_SCALARS[element]}", self.take(n * least))
        return Value("array", items, _NAMES[element])


def read_gguf(path: Path) -> GgufFile:
    """Maps a file and reads its header, checking every rule of the container. Raises ArtifactError."""
    try:
        with path.open("rb") as f:
            size = f.seek(0, 2)
            if size < 24:
                raise ArtifactError(f"{path}: {size} bytes are no GGUF file", remedy="copy it again or compile again")
            mapped = np.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from None
    cursor = _Cursor(path, mapped.data)
    n_tensors, n_keys = _read_preamble(cursor)
    metadata = _read_metadata(cursor, n_keys)
    cursor.what = "key general.alignment"
    alignment = _alignment(cursor, metadata)
    tensors = _read_infos(cursor, n_tensors, alignment)
    data_start = _pad(cursor.at, alignment) if tensors else cursor.at
    for info in tensors.values():
        end = data_start + info.offset + info.nbytes
        if end > size:
            raise ArtifactError(
                f"{path}: tensor {info.name} ends at byte {end}, the file has {size}",
                remedy="the copy was cut short; copy it again or compile again",
            )
    return GgufFile(path, metadata, tensors, alignment, data_start, mapped)


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    if bytes(cursor.take(4)) != MAGIC:
        raise cursor.fail("does not begin with GGUF")
    version = cursor.number("I")
    if version != VERSION:
        raise cursor.fail(f"GGUF version {version}, this vlac reads {VERSION}")
    return cursor.count(24, "tensors"), cursor.count(13, "keys")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for i in range(count):
        cursor.what = f"key {i} of {count}"
        key = cursor.string()
        cursor.what = f"key {key!r}"
        if not key or len(key.encode()) > 65535:
            raise cursor.fail("empty or longer than 65535 bytes")
        if key in metadata:
            raise cursor.fail("occurs twice")
        metadata[key] = cursor.value()
    return metadata


def _alignment(cursor: _Cursor, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", Value("u32", DEFAULT_ALIGNMENT))
    n = value.value
    if value.kind != "u32" or not isinstance(n, int) or n < 1 or n & (n - 1):
        raise cursor.fail(f"is {value.kind} {n!r}, expected u32 and a power of two")
    return n


def _read_infos(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for i in range(count):
        cursor.what = f"tensor {i} of {count}"
        name = cursor.string()
        cursor.what = f"tensor {name!r}"
        if not name or len(name.encode()) > MAX_NAME:
            raise cursor.fail(f"name is empty or longer than {MAX_NAME} bytes")
        if name in tensors:
            raise cursor.fail("occurs twice")
        info = _read_info(cursor, name)
        if info.offset != expected:
            raise cursor.fail(f"offset {info.offset}, expected {expected} (tensors lie one after another)")
        expected = _pad(expected + info.nbytes, alignment)
        tensors[name] = info
    return tensors


def _read_info(cursor: _Cursor, name: str) -> TensorInfo:
    n_dims = cursor.number("I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.fail(f"{n_dims} dimensions, expected 1 to {MAX_DIMS}")
    ne = [int(cursor.number("Q")) for _ in range(n_dims)]
    type_id, offset = cursor.number("I"), int(cursor.number("Q"))
    if type_id not in GGML_TYPES:
        raise cursor.fail(f"unknown tensor type {type_id}")
    kind, block, block_bytes = GGML_TYPES[type_id]
    if min(ne) < 1 or math.prod(ne) >= 1 << 63:
        raise cursor.fail(f"dimensions {ne}: zero, or more than 2^63 values")
    if ne[0] % block:
        raise cursor.fail(f"rows of {ne[0]} values, {kind} wants multiples of {block}")
    return TensorInfo(name, tuple(reversed(ne)), kind, offset, math.prod(ne) // block * block_bytes)


def _pad(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


# --- writing -----------------------------------------------------------------------------------------------------


def _packed_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _packed_scalar(kind: str, value: Any) -> bytes:
    return _packed_string(value) if kind == "string" else struct.pack("<" + _SCALARS[_IDS[kind]], value)


def _packed_value(v: Value) -> bytes:
    if v.kind != "array":
        return struct.pack("<I", _IDS[v.kind]) + _packed_scalar(v.kind, v.value)
    assert isinstance(v.value, tuple)
    head = struct.pack("<IIQ", _IDS["array"], _IDS[v.element], len(v.value))
    return head + b"".join(_packed_scalar(v.element, x) for x in v.value)


class GgufWriter:
    """Writes a file in one pass: header first, then each tensor as it is made.

    Shapes and types of all tensors are given at the start, so the header's size is known; `rewrite` replaces metadata
    by values of the same packed length at the end (checksums). Equal calls give equal bytes.
    """

    def __init__(self, out: BinaryIO, metadata: Mapping[str, Value], tensors: Sequence[tuple[str, str, Sequence[int]]]):
        """`out` is empty and seekable; `tensors` are (name, type name, shape) in file order."""
        self._out = out
        value = metadata.get("general.alignment", Value("u32", DEFAULT_ALIGNMENT)).value
        assert isinstance(value, int)
        self._alignment = value
        self._infos = list(_layout(tensors, self._alignment))
        self._next = 0
        header = self._header(metadata)
        self._size = len(header)
        out.write(header)

    def _header(self, metadata: Mapping[str, Value]) -> bytes:
        parts = [MAGIC, struct.pack("<IQQ", VERSION, len(self._infos), len(metadata))]
        parts += [_packed_string(key) + _packed_value(value) for key, value in metadata.items()]
        for t in self._infos:
            ne = tuple(reversed(t.shape))
            parts.append(
                _packed_string(t.name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, _TYPE_IDS[t.type], t.offset)
            )
        raw = b"".join(parts)
        return raw + bytes(_pad(len(raw), self._alignment) - len(raw))

    def write(self, name: str, data: Bytes) -> str:
        """The next tensor's packed bytes -> their CRC-32; ValueError when it is not its turn or the size is wrong."""
        return self.stream(name, [data])

    def stream(self, name: str, pieces: Iterable[Bytes]) -> str:
        """As `write`, the bytes in pieces."""
        info, size, crc = self._infos[self._next], 0, 0
        if info.name != name:
            raise ValueError(f"{name}, expected {info.name} with {info.nbytes} bytes")
        for piece in pieces:
            data = np.ascontiguousarray(piece).data
            size += data.nbytes
            crc = zlib.crc32(data, crc)
            self._out.write(data)
        if size != info.nbytes:
            raise ValueError(f"{name} with {size} bytes, expected {info.name} with {info.nbytes}")
        self._out.write(bytes(_pad(size, self._alignment) - size))
        self._next += 1
        return f"{crc:08x}"

    def rewrite(self, metadata: Mapping[str, Value]) -> None:
        """Replaces all metadata after the last tensor; the packed length must be what it was."""
        header = self._header(metadata)
        if len(header) != self._size or self._next != len(self._infos):
            raise ValueError(
                f"header of {len(header)} bytes for {self._size}, {self._next} of {len(self._infos)} tensors"
            )
        self._out.seek(0)
        self._out.write(header)
        self._out.seek(0, 2)


def _layout(tensors: Iterable[tuple[str, str, Sequence[int]]], alignment: int) -> Iterable[TensorInfo]:
    offset, seen = 0, set()
    for name, kind, shape in tensors:
        _, block, block_bytes = GGML_TYPES[_TYPE_IDS[kind]]
        if not name or len(name.encode()) > MAX_NAME or name in seen:
            raise ValueError(f"tensor name {name!r} is empty, longer than {MAX_NAME} bytes, or taken")
        if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1 or shape[-1] % block:
            raise ValueError(f"tensor {name}: {kind}{list(shape)} cannot be stored in GGUF")
        seen.add(name)
        info = TensorInfo(name, tuple(shape), kind, offset, math.prod(shape) // block * block_bytes)
        yield info
        offset = _pad(offset + info.nbytes, alignment)


# --- vlac's artifacts --------------------------------------------------------------------------------------------

PROGRAM, IO_KEY, MANIFEST, TOKENIZER = "vlac.program", "vlac.io", "vlac.manifest", "tokenizer.huggingface.json"
MANIFEST_CRC = "vlac.manifest.crc32"
GOLDEN = "vlac.golden"


def crc32(data: Bytes | bytes) -> str:
    """CRC-32 (zlib) as eight hexadecimal digits."""
    return f"{zlib.crc32(data if isinstance(data, bytes) else np.ascontiguousarray(data).data):08x}"


def _check_end(file: GgufFile) -> None:
    """A file that vlac wrote ends with the padding of its last tensor: nothing is missing, nothing was appended."""
    end = max((t.offset + t.nbytes for t in file.tensors.values()), default=0)
    expected = _pad(file.data_start, file.alignment) + _pad(end, file.alignment)  # a file may hold no tensor
    if file.size != expected:
        raise ArtifactError(
            f"{file.path}: the file has {file.size} bytes, its tensors make {expected}",
            remedy="the copy was cut short or something was appended; copy it again or compile again",
        )


def open_gguf_artifact(path: Path) -> Artifact:
    """A GGUF file that vlac wrote, as an Artifact whose tensors are views of the mapped file.

    Checks the container, the checksums of all texts, the manifest, the program, and that every parameter is there.
    Tensor bytes are not read: `verify` does that.
    """
    file = read_gguf(path)
    texts = {key: file.text(key) for key in (PROGRAM, IO_KEY, MANIFEST, TOKENIZER)}
    program_text, io_text, manifest_text = texts[PROGRAM], texts[IO_KEY], texts[MANIFEST]
    if program_text is None or io_text is None or manifest_text is None:
        missing = next(key for key in (PROGRAM, IO_KEY, MANIFEST) if texts[key] is None)
        architecture = file.text("general.architecture") or "none"
        raise ArtifactError(
            f"{path}: no key {missing}; a GGUF file of another program (general.architecture: {architecture})",
            remedy="vlac runs files that `vlac compile --target gguf-...` wrote",
        )
    _check_end(file)
    manifest = _read_manifest(file, manifest_text)
    checksums = manifest["crc32"]
    for key, text in texts.items():
        if text is not None and key != MANIFEST and checksums.get(key) != crc32(text.encode()):
            raise ArtifactError(f"{path}: key {key} does not match its checksum", remedy="copy the file again")
    for name in (*checksums, *file.tensors):
        if (name not in file.tensors and texts.get(name) is None) or name not in checksums:
            raise ArtifactError(
                f"{path}: {name} is in the manifest or in the file, not in both", remedy="copy it again"
            )
    try:
        program = parse(program_text)
        io = IO.from_json(io_text)
    except VlacError as error:
        raise ArtifactError(f"{path}: {error.message}", remedy=error.remedy or "compile again") from None
    tensors = {name: _stored(file, info) for name, info in file.tensors.items() if info.type in FORMATS}
    check_tensors(program, tensors, str(path))
    tokenizer = texts[TOKENIZER]
    golden = file.tensors.get(GOLDEN)
    if golden is not None and (golden.type != "i8" or len(golden.shape) != 1):
        raise ArtifactError(
            f"{path}: tensor {GOLDEN} is {golden.type}{list(golden.shape)}, expected i8 of one dimension"
        )

    def golden_bytes() -> bytes | None:
        return file.data(GOLDEN).tobytes() if golden is not None else None

    raw = tokenizer.encode() if tokenizer is not None else None
    return Artifact(path, "gguf", program, io, manifest, raw, tensors, golden_bytes)


def _read_manifest(file: GgufFile, text: str) -> Mapping[str, Any]:
    where = f"{file.path}: {MANIFEST}"
    stored = file.metadata.get(MANIFEST_CRC)
    if stored is None or stored.kind != "u32" or stored.value != zlib.crc32(text.encode()):
        raise ArtifactError(f"{where} does not match its checksum {MANIFEST_CRC}", remedy="copy the file again")
    try:
        manifest = check_manifest(json.loads(text), where)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not JSON: {error}", remedy="compile again") from None
    if not isinstance(manifest.get("crc32"), dict):
        raise ArtifactError(f"{where}: key 'crc32' is missing or not a table", remedy="compile again")
    return manifest


def _stored(file: GgufFile, info: TensorInfo) -> StoredTensor:
    data = file.data(info.name)

    def load() -> Array:
        return decode(info.type, data, info.shape)

    return StoredTensor(info.shape, get_format(info.type).name, load, data)


def verify(path: Path) -> None:
    """Reads every tensor of an artifact and compares it with its checksum; raises ArtifactError naming the tensor."""
    from vlac import integrity

    integrity.verify(open_gguf_artifact(path))
