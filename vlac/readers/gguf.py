"""GGUF files that other VLA engines load (QVAC, vla.cpp) -> Policy: the dialects' tables read the other way.

Dimensions come from the file's keys and tensors. What such a file lacks (cameras, statistics, the tokenizer, the
prompt) comes from `--stats-from CKPT`, the checkpoint that it was made from; vlac's own files carry it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlac.errors import CheckpointError, Unsupported
from vlac.formats import FORMATS, Bytes, decode
from vlac.gguf import IO_KEY, TOKENIZER, GgufFile, read_gguf
from vlac.gguf_dialects import Dims, Findings, Row, detect, examine, foreign_file, layouts, refusal
from vlac.io import IO, Camera, Step
from vlac.policy import Policy, Source
from vlac.readers.hub import policy_folder, resolve
from vlac.registry import Reader, ReadOptions, families, readers
from vlac.spec import FlowSpec, from_dims
from vlac.weights import Array, LazyTensor, Weights


def read(path: Path, options: ReadOptions) -> Policy:
    """The Policy of another engine's file. ArtifactError lists what that engine would stumble over."""
    file = read_gguf(path)
    layout = detect(file)
    if layout is None:
        raise Unsupported(
            f"{path}: a GGUF file of no engine that vlac knows (general.architecture: "
            f"{file.text('general.architecture') or 'none'})",
            remedy=f"known: {', '.join(x.title for x in layouts())}, and files that vlac wrote",
        )
    findings = examine(file, layout)
    if findings.problems:
        raise refusal(path, layout, findings.problems)
    dims = {name: _tidy(value) for name, value in findings.dims.items()}
    tensors = {ours: _tensor(file, name, row) for name, ours, row in layout.tensors(dims) if name in file.tensors}
    weights = Weights({k: t for k, t in tensors.items() if not k.startswith("io.") and not _dead(findings, k)})
    warnings = [*findings.warnings]
    io, tokenizer = _io(file, dims, options, warnings)
    if IO_KEY not in file.metadata:
        io = _own_statistics(io, tensors, dims)
    family = families.get(layout.family)
    assert family.spec is not None
    return Policy(
        family=family.name,
        name=file.text("general.name") or path.stem,
        spec=from_dims(family.spec, {**dims, **_prompt_length(io)}),
        weights=weights,
        io=io,
        source=Source(str(path)),
        tokenizer=tokenizer,
        flow=FlowSpec.euler(
            int(dims["flow.num_steps"]), float(dims["flow.min_period"]), float(dims["flow.max_period"])
        ),
        warnings=tuple(f"{layout.dialect} file: {w}" for w in warnings),
        parameters=sum(math.prod(t.shape) for t in weights.values()),
    )


def _tidy(value: Any) -> Any:
    """A float32 key as the decimal number it was written from: 9.99999997e-07 -> 1e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _dead(findings: Findings, ours: str) -> bool:
    """Whether the file holds this tensor only because the engine asks for it."""
    return any(row.ours == ours and row.fill is not None for row in findings.layout.rows)


def _tensor(file: GgufFile, name: str, row: Row) -> LazyTensor:
    info = file.tensors[name]
    if info.type not in (*FORMATS, *_WITH_MINIMUM):
        known = ", ".join((*(f.name for f in FORMATS.values() if f.ggml_type is not None), *_WITH_MINIMUM))
        raise Unsupported(f"{file.path}: tensor {name} is {info.type}; vlac reads {known}")
    shape = (info.shape[0], math.prod(info.shape[1:])) if row.kind == "conv" else info.shape

    def load() -> Array:
        unpack = _with_minimum if info.type in _WITH_MINIMUM else decode
        values = unpack(info.type, file.data(name), info.shape).reshape(shape)
        return values - np.float32(row.add) if row.add else values

    return LazyTensor(shape, load, info.type, f"{file.path.name}: {name}")


_WITH_MINIMUM = {"q4_1": 20, "q5_1": 24}
"""Block formats that these engines' quantizers write and vlac does not: bytes per block of 32."""


def _with_minimum(kind: str, data: Bytes, shape: Sequence[int]) -> Array:
    """float32 of q4_1 and q5_1: float16 d and m, then (q5_1) 32 fifth bits, then 32 nibbles; d * q + m."""
    blocks = np.ascontiguousarray(data).reshape(-1, _WITH_MINIMUM[kind])
    scale, least = (np.ascontiguousarray(blocks[:, i : i + 2]).view(np.float16).astype(np.float32) for i in (0, 2))
    nibbles = blocks[:, -16:]
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=1)
    if kind == "q5_1":
        q = q | (np.unpackbits(blocks[:, 4:8], axis=1, bitorder="little") << 4)
    return np.asarray(q * scale + least, dtype=np.float32).reshape(shape)


# --- what comes from elsewhere -------------------------------------------------------------------------------------


def _io(file: GgufFile, dims: Dims, options: ReadOptions, warnings: list[str]) -> tuple[IO, bytes | None]:
    """(io, tokenizer): vlac's own keys, else --stats-from, else (to look only) a bare one."""
    own, tokenizer = file.text(IO_KEY), file.text(TOKENIZER)
    if own is not None and not options.stats_from:
        return IO.from_json(own), tokenizer.encode() if tokenizer is not None else None
    if options.stats_from:
        return _from_checkpoint(file, dims, options)
    error = CheckpointError(
        f"{file.path}: holds no cameras, no statistics of the robot and no tokenizer",
        remedy="give the checkpoint it was made from: --stats-from CKPT",
    )
    if not options.headers_only:
        raise error
    warnings.append(str(error))
    return _bare(dims), None


def _from_checkpoint(file: GgufFile, dims: Dims, options: ReadOptions) -> tuple[IO, bytes | None]:
    assert options.stats_from is not None
    folder = policy_folder(resolve(options.stats_from, options.revision))
    reader = next((r for r in readers.all() if r.detect(folder)), None)
    if reader is None:
        raise CheckpointError(
            f"--stats-from {options.stats_from}: not a checkpoint, and cameras and tokenizer are missing as well",
            remedy="give the checkpoint that the file was made from",
        )
    other = reader.read(folder, dataclasses.replace(options, stats_from=None))
    wrong = [
        f"{name}: the file has {dims[key]}, the checkpoint {value}"
        for name, key, value in (
            ("chunk_size", "chunk_size", other.io.chunk_size),
            ("max_action_dim", "max_action_dim", other.io.max_action_dim),
            ("action_dim", "io.action_dim", other.io.action_dim),
            ("state_dim", "io.state_dim", other.io.state_dim),
            ("image size", "vision.image_size", other.io.image_size),
            ("vocabulary", "text.vocab_size", other.io.vocab_size),
        )
        if key in dims and dims[key] != value
    ]
    if wrong:
        raise CheckpointError(
            f"--stats-from {options.stats_from} is not what {file.path.name} was made from: {'; '.join(wrong)}"
        )
    return other.io, other.tokenizer


def _bare(dims: Dims) -> IO:
    """An io that says what the file itself says: normalised units, one nameless camera."""
    side = int(dims["vision.image_size"])
    return IO(
        cameras=(Camera("observation.images.unknown", (3, side, side)),),
        image_steps=(),
        state_key="observation.state",
        state_dim=int(dims.get("io.state_dim", dims.get("max_state_dim", 0))),
        state_steps=(),
        text_steps=(),
        action_key="action",
        action_dim=int(dims["io.action_dim"]),
        max_action_dim=int(dims["max_action_dim"]),
        chunk_size=int(dims["chunk_size"]),
        n_action_steps=int(dims["chunk_size"]),
        action_steps=(),
        normalised_action_steps=(),
        image_size=side,
        vocab_size=int(dims["text.vocab_size"]),
        units="normalized",
    )


def _prompt_length(io: IO) -> dict[str, int]:
    """The longest prompt, where the io tells it."""
    lengths = [int(s.params["max_length"]) for s in io.text_steps if "max_length" in s.params]
    return {"tokenizer_max_length": lengths[-1]} if lengths else {}


_MODES = {"MEAN_STD": ("mean", "std"), "QUANTILES": ("q01", "q99")}


def _own_statistics(io: IO, tensors: dict[str, LazyTensor], dims: Dims) -> IO:
    """The file's own statistics in place of the checkpoint's: they are what its engine applies."""

    def replaced(steps: tuple[Step, ...], part: str) -> tuple[Step, ...]:
        return tuple(_replaced(step, part, tensors, dims) for step in steps)

    return dataclasses.replace(
        io, state_steps=replaced(io.state_steps, "state"), action_steps=replaced(io.action_steps, "action")
    )


def _replaced(step: Step, part: str, tensors: dict[str, LazyTensor], dims: Dims) -> Step:
    names = _MODES.get(str(step.params.get("mode")), ())
    if not step.step.endswith("normalise") or not names or any(f"io.{part}.{n}" not in tensors for n in names):
        return step
    values = {n: tensors[f"io.{part}.{n}"].load().tolist() for n in names}
    return Step(step.step, {**step.params, **values, "eps": dims.get("io.norm_eps", step.params.get("eps", 1e-8))})


def detect_file(path: Path) -> bool:
    """A .gguf file that is no artifact of vlac."""
    return path.is_file() and foreign_file(path) is not None


READER = readers.add(Reader("gguf", detect_file, read, doc="GGUF files of QVAC and vla.cpp"))
