"""How a folder artifact is written: parameters streamed one at a time into data files, side files, the manifest last.

Knows formats and layouts (vlac.layouts), not ONNX: what a data file holds is indexed in manifest["tensors"], which
`vlac.artifact` reads back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlac.artifact import NpArray, Sidecars, manifest_checksum, sha256
from vlac.errors import Unsupported
from vlac.formats import FORMATS
from vlac.graph import Program
from vlac.layouts import (
    INT4,
    INT4_BLOCK,
    bf16_from_f32,
    pack_int4,
    quantize_fp8_rows,
    quantize_int4_blocks,
    quantize_int8_rows,
)
from vlac.registry import Progress, silent
from vlac.weights import LazyTensor

PAGE, LINE = 4096, 64
LARGE = 64 << 10
"""Arrays of at least this many bytes start on a page, so that an engine can map them; smaller ones on a cache line."""


@dataclass(frozen=True)
class Part:
    """Bytes in a data file: numpy dtype and shape of what lies there."""

    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    def row(self) -> dict[str, Any]:
        """As manifest["tensors"] lists it."""
        return {**vars(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class Stored:
    """A parameter in the data files: its format, layout and parts."""

    shape: tuple[int, ...]
    format: str
    layout: str
    parts: Mapping[str, Part]


class TensorStore:
    """Data files of one artifact.

    A parameter is loaded, encoded and written when it is first asked for, then forgotten: peak memory is a few copies
    of the largest one. A parameter that several graphs need is stored once.
    """

    def __init__(self, folder: Path, program: Program, progress: Progress = silent) -> None:
        self.folder = folder
        self._program = program
        self._progress = progress
        self._layouts = choose_layouts(program)
        self._stored: dict[str, Stored] = {}
        self._constants: dict[tuple[str, str], Part] = {}
        self._sizes: dict[str, int] = {}

    def param(self, name: str, file: str) -> Stored:
        """The parameter `name`, written to `file` unless some file already holds it."""
        if name not in self._stored:
            self._progress("writing weights", len(self._stored), len(self._program.params))
            param = self._program.params[name]
            layout = self._layouts.get(name, "rows")
            arrays = self.encoded(name, layout)
            parts = {k: self._append(file, a) for k, a in arrays.items()}
            self._stored[name] = Stored(param.shape, param.format, layout, parts)
        return self._stored[name]

    def encoded(self, name: str, layout: str) -> dict[str, NpArray]:
        """The parts of a parameter; stores of engines that want them otherwise differ here."""
        return encode(self._program.weights[name], self._program.params[name].format, layout, name)

    def constant(self, array: NpArray, file: str) -> Part:
        """An array that is no parameter (tables, masks), stored once per file."""
        key = (file, f"{array.dtype.str}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}")
        if key not in self._constants:
            self._constants[key] = self._append(file, array)
        return self._constants[key]

    def index(self) -> dict[str, Any]:
        """manifest["tensors"]."""
        return {
            name: {
                "shape": list(s.shape),
                "format": s.format,
                "layout": s.layout,
                "parts": {k: p.row() for k, p in s.parts.items()},
            }
            for name, s in self._stored.items()
        }

    def _append(self, file: str, array: NpArray) -> Part:
        data = np.ascontiguousarray(array)
        end = self._sizes.get(file, 0)
        align = PAGE if data.nbytes >= LARGE else LINE
        offset = -(-end // align) * align
        with (self.folder / file).open("ab") as f:
            f.write(b"\0" * (offset - end))
            f.write(data.data)
        self._sizes[file] = offset + data.nbytes
        return Part(file, offset, data.nbytes, data.dtype.str, data.shape)


def choose_layouts(program: Program) -> dict[str, str]:
    """ "columns" for parameters that only linears read as weights, "rows" for all others."""
    columns: dict[str, bool] = {}
    for stage in program.stages:
        for node in stage.nodes:
            for i, name in enumerate(node.inputs):
                if name.startswith("@"):
                    columns[name[1:]] = columns.get(name[1:], True) and node.op == "linear" and i == 1
    return {name: "columns" if c else "rows" for name, c in columns.items()}


def encode(tensor: LazyTensor, format: str, layout: str, name: str) -> dict[str, NpArray]:
    """Parts of a tensor (inverse of decode_parts), read in pieces where it is large; Unsupported names a tensor that
    the format cannot hold."""
    if format in ("f32", "f16", "bf16"):
        values = tensor.load() if format == "f32" else _gathered(_rounded(r, format, name) for r in tensor.rows())
        return {"values": np.ascontiguousarray(values.T if layout == "columns" else values)}
    if len(tensor.shape) == 2 and format == "int8":
        parts = [quantize_int8_rows(r) for r in tensor.rows()]
        q, scale = (_gathered(p[i] for p in parts) for i in range(2))
        return {"q": np.ascontiguousarray(q.T) if layout == "columns" else q, "scale": scale}
    if len(tensor.shape) == 2 and format == "fp8":
        pairs = [quantize_fp8_rows(r) for r in tensor.rows()]
        codes, scale = (_gathered(p[i] for p in pairs) for i in range(2))
        return {"q": np.ascontiguousarray(codes.T) if layout == "columns" else codes, "scale": scale}
    block = FORMATS[format].block
    if len(tensor.shape) == 2 and format in INT4 and layout == "columns" and tensor.shape[1] % block == 0:
        parts = [quantize_int4_blocks(r, block) for r in tensor.rows()]
        q, scale = (_gathered(p[i] for p in parts) for i in range(2))
        return {"q": pack_int4(q.T), "scale": np.ascontiguousarray(scale.T)}
    raise Unsupported(
        f"tensor {name} {list(tensor.shape)} cannot be stored as {format} in an ONNX artifact",
        remedy="f32, f16, bf16 hold any tensor, int8 weights of linears and embeddings, int4 weights of linears "
        f"whose input width is a multiple of {INT4_BLOCK} (int4g16, int4g64, int4g128: of 16, 64, 128)",
    )


def _gathered(parts: Iterable[NpArray]) -> NpArray:
    found = list(parts)
    return found[0] if len(found) == 1 else np.concatenate(found, axis=0)


def _rounded(rows: NpArray, format: str, name: str) -> NpArray:
    if format == "bf16":
        return bf16_from_f32(rows)
    largest = max(float(rows.max(initial=0.0)), -float(rows.min(initial=0.0)))
    if largest > float(np.finfo(np.float16).max):
        raise Unsupported(
            f"tensor {name} holds {largest:.3g}, float16 ends at 65504", remedy="store this tensor as f32 or bf16"
        )
    return rows.astype(np.float16)


def write_sidecars(folder: Path, sidecars: Sidecars, extra: Mapping[str, Any]) -> None:
    """The files beside the weights; manifest.json comes last, with `extra` and size and hash of every other file."""
    (folder / "program.txt").write_text(sidecars.program, encoding="utf-8", newline="\n")
    (folder / "io.json").write_text(sidecars.io, encoding="utf-8", newline="\n")
    for name, data in (("tokenizer.json", sidecars.tokenizer), ("golden.npz", sidecars.golden)):
        if data is not None:
            (folder / name).write_bytes(data)
    files = {
        str(p.relative_to(folder).as_posix()): {"size": p.stat().st_size, "sha256": sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
    manifest = {**sidecars.manifest, **extra, "files": files}
    manifest["checksum"] = manifest_checksum(manifest)
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8", newline="\n")
