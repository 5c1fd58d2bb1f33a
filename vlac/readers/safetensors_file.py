"""safetensors files, read strictly and lazily: the header is validated before a byte of data is mapped.

Gives `LazyTensor`s that decode F64, F32, F16 and BF16 to float32 when loaded; float32 tensors are read-only views of
the memory map. One file, or shards listed in an index. Nothing in a file can run code or read out of bounds.
Format: https://huggingface.co/docs/safetensors (u64 little-endian header length, JSON header, contiguous data).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlac.errors import CheckpointError
from vlac.weights import Array, LazyTensor, Weights

MAX_HEADER = 100_000_000
MAX_RANK = 16
DAMAGED = "the file is damaged or incomplete; download or copy it again"

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
}  # fmt: skip
"""Bytes per element of every dtype that the format names."""

MAX_MAPPED = 2 << 30
"""Bytes of a file up to which float32 tensors are views of the map; of larger ones pages would pile up in memory."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes that load as float32."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's header entry: dtype as written ("BF16"), shape, and its bytes [start, stop) in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A validated header: tensors in file order, free-form metadata, and the file's size in bytes."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    file_size: int


def _no_duplicates(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                raise CheckpointError(f"{path}: key {key!r} appears twice", remedy=DAMAGED)
            result[key] = value
        return result

    return pairs


def read_json(path: Path, data: bytes | None = None) -> Any:
    """JSON from a file (or from `data` that came from it); duplicate keys and malformed text raise CheckpointError."""
    try:
        raw = path.read_bytes() if data is None else data
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}", remedy=DAMAGED) from None


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: header entry must hold dtype, shape and data_offsets", remedy=DAMAGED)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(ITEM_SIZE)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(d) for d in shape):
        raise CheckpointError(f"{where}: shape {str(shape)[:80]} is not a list of sizes", remedy=DAMAGED)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(o) for o in offsets):
        raise CheckpointError(f"{where}: data_offsets {str(offsets)[:80]} are not two sizes", remedy=DAMAGED)
    start, stop = offsets
    expected = math.prod(shape) * ITEM_SIZE[dtype]
    if stop - start != expected:
        raise CheckpointError(
            f"{where}: {dtype} {shape} needs {expected} bytes, data_offsets give {stop - start}", remedy=DAMAGED
        )
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + stop)


def read_header(path: Path) -> Header:
    """The validated header; raises CheckpointError that names the file and tensor. Reads no tensor data.

    Tensors must tile the data region exactly: no overlap, no gap, nothing behind the last one.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > MAX_HEADER or 8 + length > size:
                raise CheckpointError(
                    f"{path}: header of {length} bytes in a file of {size} bytes (limit {MAX_HEADER})", remedy=DAMAGED
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: not a safetensors file: the header is not JSON", remedy=DAMAGED)
    table = read_json(path, raw)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map names to text", remedy=DAMAGED)
    entries = {name: _entry(path, name, entry, 8 + length) for name, entry in table.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    end, previous = 8 + length, "the header"
    for name, info in ordered:
        if info.start != end:
            kind = "overlaps" if info.start < end else "leaves a gap behind"
            raise CheckpointError(f"{path}: tensor {name} {kind} {previous} at byte {info.start}", remedy=DAMAGED)
        end, previous = info.stop, name
    if end != size:
        raise CheckpointError(f"{path}: tensors end at byte {end}, the file has {size} bytes", remedy=DAMAGED)
    return Header(path, dict(ordered), metadata, size)


class _Map:
    """One file's memory map, made when the first tensor is loaded and shared by all of its tensors."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._map: mmap.mmap | None = None

    def buffer(self) -> mmap.mmap:
        if self._map is None:
            path = self._header.path
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path}: cannot be mapped: {error}") from None
            if len(mapped) != self._header.file_size:
                raise CheckpointError(f"{path}: changed from {self._header.file_size} to {len(mapped)} bytes")
            self._map = mapped
        return self._map

    def release(self, start: int, stop: int) -> None:
        """Bytes that have been copied leave this process's memory; they are read again when asked for again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, stop - first)


def _load_rows(mapped: _Map, name: str, info: TensorInfo, start: int, stop: int) -> Array:
    """Rows start..stop - 1 of the first axis."""
    row = (info.stop - info.start) // info.shape[0]
    part = TensorInfo(info.dtype, (stop - start, *info.shape[1:]), info.start + start * row, info.start + stop * row)
    return _load(mapped, name, part)


def _load(mapped: _Map, name: str, info: TensorInfo) -> Array:
    path = mapped._header.path
    if info.dtype not in FLOATS:
        raise CheckpointError(f"{path}: tensor {name} is {info.dtype}, expected one of {', '.join(FLOATS)}")
    count = math.prod(info.shape)
    if count == 0:
        return np.zeros(info.shape, np.float32)
    stored = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}[info.dtype]
    raw = np.frombuffer(mapped.buffer(), dtype=stored, count=count, offset=info.start).reshape(info.shape)
    if info.dtype == "BF16":
        wide = raw.astype(np.uint32)
        wide <<= np.uint32(16)
        mapped.release(info.start, info.stop)
        return wide.view(np.float32)
    if info.dtype == "F32" and raw.flags.aligned and mapped._header.file_size <= MAX_MAPPED:
        return raw.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes Inf, which LazyTensor.load refuses by name
        copied = raw.astype(np.float32, copy=True)
    mapped.release(info.start, info.stop)
    return copied


def open_file(path: Path) -> Weights:
    """Every tensor of one file, lazily. `LazyTensor.dtype` is the dtype on disk in lower case ("bf16")."""
    header = read_header(path)
    mapped = _Map(header)
    return Weights(
        {
            name: LazyTensor(
                info.shape,
                partial(_load, mapped, name, info),
                info.dtype.lower(),
                f"{path.name}: {name}",
                partial(_load_rows, mapped, name, info) if info.shape and info.shape[0] else None,
            )
            for name, info in header.tensors.items()
        }
    )


def inside(folder: Path, name: object, what: str) -> Path:
    """folder/name for a file name read from a checkpoint; CheckpointError when it could leave the folder."""
    if not isinstance(name, str) or not name or name in (".", "..") or any(c in name for c in "/\\:\0"):
        raise CheckpointError(
            f"{what}: {str(name)[:120]!r} is not a plain file name in {folder}",
            remedy="do not trust this checkpoint; names must stay in its folder",
        )
    return folder / name


def shard_names(index: Path) -> dict[str, str]:
    """tensor -> shard file name from a `*.safetensors.index.json`, names checked to stay in the folder."""
    table = read_json(index)
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map from tensor to shard", remedy=DAMAGED)
    for tensor, shard in weight_map.items():
        if inside(index.parent, shard, f"{index}, tensor {tensor}").suffix != ".safetensors":
            raise CheckpointError(f"{index}: tensor {tensor} lies in {shard}, which is not a safetensors file")
    return dict(weight_map)


def open_sharded(index: Path) -> Weights:
    """Every tensor of a sharded checkpoint; each must be listed once and lie in exactly the shard listed."""
    weight_map = shard_names(index)
    shards = sorted(set(weight_map.values()))
    missing = [s for s in shards if not (index.parent / s).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:8])}",
            remedy="download the missing files",
        )
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        for name, tensor in open_file(index.parent / shard).items():
            if weight_map.get(name) != shard:
                listed = f"listed in {weight_map[name]}" if name in weight_map else "not listed"
                raise CheckpointError(f"{index}: tensor {name} lies in {shard} but is {listed}", remedy=DAMAGED)
            tensors[name] = tensor
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise CheckpointError(f"{weight_map[lost[0]]}: tensor {lost[0]} is listed in {index.name} but not there")
    return Weights(tensors)


def weight_files(folder: Path, stem: str = "model") -> list[Path]:
    """The safetensors files (and index) that hold a folder's weights; empty when there are none."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [index, *(folder / s for s in sorted(set(shard_names(index).values())))]
    return []


def open_folder(folder: Path, stem: str = "model") -> Weights:
    """Weights of a folder: `{stem}.safetensors`, else the shards of `{stem}.safetensors.index.json`.

    Raises CheckpointError when neither is there; pickle files are refused by name, never opened.
    """
    files = weight_files(folder, stem)
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
        if pickles:
            raise CheckpointError(
                f"{folder}: weights only as pickle ({', '.join(pickles[:4])}); loading pickle can run code",
                remedy="convert them to safetensors in the environment that wrote them (save_pretrained)",
            )
        raise CheckpointError(f"{folder}: no {stem}.safetensors and no {stem}.safetensors.index.json")
    return open_file(files[0]) if files[0].suffix == ".safetensors" else open_sharded(files[0])
