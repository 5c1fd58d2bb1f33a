"""GGUF layouts of other engines as data, and the strict check of a file against them.

A `Layout` says what one engine wants in a file of one architecture: keys with their value types, what the engine has
in its code, tensors with shapes over named dimensions, formats. The tables are in vlac/targets/_dialect_*.py; the
emitter reads them one way, vlac.readers.gguf the other way. `examine` finds whatever would make the engine abort,
or take a default in silence, and needs numpy only.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Union

import numpy as np

from vlac.errors import ArtifactError, Unsupported
from vlac.gguf import GOLDEN, MANIFEST, MANIFEST_CRC, PROGRAM, GgufFile, TensorInfo, Value, crc32, read_gguf

Dim = Union[int, float, bool, str]
Dims = Mapping[str, Dim]
"""Dimension -> value, under the names of vlac's specs: "vision.hidden_size", "flow.num_steps", "io.action_dim"."""

TABLES = ("vlac.targets._dialect_qvac", "vlac.targets._dialect_vla_cpp")


@dataclass(frozen=True)
class Key:
    """A metadata key. `kind` is the only value type that the engine reads right.

    Attributes:
        field: the dimension it holds, "" for none.
        default: what the engine takes when the key is absent; None = it must be there.
        low, high: the engine's legal range.
        read: whether the engine reads it; else it is only checked for its kind.
        one_of: legal values of a text, any if empty.
    """

    name: str
    kind: str
    field: str = ""
    default: Dim | None = None
    low: float = -math.inf
    high: float = math.inf
    read: bool = True
    one_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A tensor, or one per layer where the names hold {i}.

    Attributes:
        file, ours: its name in the file, and vlac's.
        shape: PyTorch's order; numbers, dimensions or derived dimensions. A dimension that no key tells is bound by
            the first tensor that has it.
        kind: which formats suit it (`Layout.formats`).
        layers: the dimension that counts {i}.
        when: which layers have it; all when None.
        fill: the value written when vlac does not keep this tensor, because inference never reads it.
        add: added to vlac's values in the file (Gemma's norms: -1).
        optional: the engine does without it.
    """

    file: str
    ours: str
    shape: tuple[int | str, ...]
    kind: str = "linear"
    layers: str = ""
    when: Callable[[Dims, int], bool] | None = None
    fill: float | None = None
    add: float = 0.0
    optional: bool = False


@dataclass(frozen=True)
class Check:
    """A relation between dimensions that the engine takes for granted; `text` names them in braces, "_" for "."."""

    text: str
    holds: Callable[[Dims], bool]


@dataclass(frozen=True)
class Layout:
    """One engine's file of one architecture.

    Attributes:
        dialect, engine: "qvac"; how people call the engine.
        architecture: general.architecture. family: vlac's family that it is.
        marker: a tensor that only this dialect's files hold (architecture strings are shared between dialects).
        keys, rows, checks: see there. fixed: what the engine has in its code. at_most: likewise, as upper bounds.
        same: dimension -> another that the engine uses for it.
        derived: dimensions computed from others.
        formats: row kind -> formats that the engine takes; the last one is what anything can fall back to.
        newer: (formats, version): formats that only that version of the engine and later ones take.
        forbidden: (pattern, why): tensor names that break the engine.
        case_insensitive: whether the engine lower-cases the architecture.
        nameless: whether it takes a file without an architecture for this one.
        statistics: the normalisation modes that the engine can apply, none for engines that leave it to the caller.
        notes: what a user of such a file should know.
        small: (values, pattern, format): in 8-bit files of fewer values, names that match have this format instead.
        hazards: (problems, warnings) that follow from all dimensions together, tensors' included.
    """

    dialect: str
    engine: str
    architecture: str
    family: str
    marker: str
    keys: tuple[Key, ...]
    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    fixed: Mapping[str, Dim]
    derived: Mapping[str, Callable[[Dims], int]]
    formats: Mapping[str, tuple[str, ...]]
    at_most: Mapping[str, int] = field(default_factory=dict)
    same: Mapping[str, str] = field(default_factory=dict)
    statistics: tuple[str, ...] = ()
    newer: tuple[tuple[str, ...], str] = ((), "")
    forbidden: tuple[tuple[str, str], ...] = ()
    case_insensitive: bool = False
    nameless: bool = False
    notes: tuple[str, ...] = ()
    small: tuple[int, str, str] = (0, "", "")
    hazards: Callable[[Dims], tuple[list[str], list[str]]] = lambda dims: ([], [])

    @property
    def title(self) -> str:
        return f"{self.dialect} {self.architecture}"

    def tensors(self, dims: Dims) -> Iterator[tuple[str, str, Row]]:
        """(name in the file, vlac's name, row) of every tensor that these dimensions call for, in file order."""
        for row in self.rows:
            count = int(dims[row.layers]) if row.layers else 1
            for i in range(count):
                if row.when is None or row.when(dims, i):
                    yield row.file.replace("{i}", str(i)), row.ours.replace("{i}", str(i)), row


# --- the tables ------------------------------------------------------------------------------------------------


def layouts() -> tuple[Layout, ...]:
    """All layouts that vlac knows."""
    return tuple(layout for module in TABLES for layout in importlib.import_module(module).LAYOUTS)


def dialects() -> tuple[str, ...]:
    """Names for --dialect."""
    return tuple(dict.fromkeys(layout.dialect for layout in layouts()))


def layout_of(dialect: str, family: str) -> Layout:
    """The layout of a family in a dialect; Unsupported names what there is."""
    if dialect not in dialects():
        raise Unsupported(f"no dialect {dialect!r}; there are: {', '.join(dialects())}")
    found = {layout.family: layout for layout in layouts() if layout.dialect == dialect}
    if family not in found:
        why = _declined(dialect).get(family, "nothing says that its engine runs it")
        raise Unsupported(
            f"dialect {dialect} has no layout for family {family}: {why}; it has: {', '.join(found)}",
            remedy="compile without --dialect: vlac's own engines run every family",
        )
    return found[family]


def _declined(dialect: str) -> dict[str, str]:
    """Family -> why vlac writes none of its files in this dialect, where there is more to say than that."""
    modules = [importlib.import_module(module) for module in TABLES]
    return {k: why for m in modules if dialect in {x.dialect for x in m.LAYOUTS} for k, why in m.DECLINED.items()}


def detect(file: GgufFile, dialect: str = "auto") -> Layout | None:
    """The layout that a file is written in, by architecture and marker tensor; None when it is none of them.

    Raises ArtifactError when the file fits several and no dialect is given, or is not in the one that is.
    """
    if dialect not in ("auto", *dialects()):
        raise Unsupported(f"no dialect {dialect!r}; there are: auto, {', '.join(dialects())}")
    found = [layout for layout in layouts() if layout.marker in file.tensors and _architecture_fits(file, layout)]
    chosen = [layout for layout in found if dialect in ("auto", layout.dialect)]
    if len(chosen) > 1:
        raise ArtifactError(
            f"{file.path}: holds tensors of {' and of '.join(layout.title for layout in chosen)}",
            remedy=f"say which with --dialect {chosen[0].dialect}",
        )
    if not chosen and dialect != "auto":
        markers = ", ".join(f"{x.marker} ({x.architecture})" for x in layouts() if x.dialect == dialect)
        raise ArtifactError(
            f"{file.path}: not a file in the {dialect} dialect: general.architecture is "
            f"{_architecture(file)!r} and none of these tensors is there for it: {markers}"
        )
    return chosen[0] if chosen else None


def _architecture(file: GgufFile) -> str:
    """What the file calls its architecture; QVAC reads `model_type` where that is absent or empty."""
    for key in ("general.architecture", "model_type"):
        value = file.metadata.get(key)
        if value is not None and value.kind == "string" and value.value:
            return str(value.value)
    return ""


def _architecture_fits(file: GgufFile, layout: Layout) -> bool:
    name = _architecture(file)
    if not name:
        return layout.nameless
    return (name.lower() if layout.case_insensitive else name) == layout.architecture


# --- the check -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """What a file says and what is wrong with it. `problems` would make the engine refuse, abort or misread."""

    layout: Layout
    dims: Dims
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """JSON values for reports."""
        return {
            "dialect": self.layout.dialect,
            "engine": self.layout.engine,
            "architecture": self.layout.architecture,
            "dims": dict(self.dims),
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "notes": list(self.layout.notes),
        }


def examine(file: GgufFile, layout: Layout) -> Findings:
    """Holds a file's header against a layout: keys and their types, relations, every tensor's shape and format."""
    dims, problems, warnings = _read_keys(file, layout)
    if not problems:
        problems += relations(layout, dims)
    if not problems:
        problems += _check_tensors(file, layout, dims)
    if not problems:
        more = layout.hazards(dims)
        problems, warnings = problems + more[0], warnings + more[1]
        warnings += _strange_tensors(file, layout, dims) + _unread_keys(file, layout, dims)
    problems += _forbidden(file, layout)
    newer, version = layout.newer
    packed = sorted({t.type for t in file.tensors.values() if t.type in newer and not t.name.startswith("vlac.")})
    if packed:
        warnings.append(f"{', '.join(packed)} tensors need {layout.engine} {version} or later")
    return Findings(layout, dims, tuple(problems), tuple(warnings))


def _read_keys(file: GgufFile, layout: Layout) -> tuple[dict[str, Dim], list[str], list[str]]:
    dims: dict[str, Dim] = {**layout.fixed, **layout.at_most}
    strangers = [k for k in file.metadata if k not in {key.name for key in layout.keys}]
    problems: list[str] = []
    warnings: list[str] = []
    for key in layout.keys:
        found = file.metadata.get(key.name)
        if found is None:
            if key.default is None and key.read:
                problems.append(f"key {key.name} is missing ({key.kind})")
            elif key.default is not None and key.field and key.read:
                dims[key.field] = key.default
                near = get_close_matches(key.name, strangers, n=1, cutoff=0.85)
                if near:
                    problems.append(
                        f"key {near[0]} is not {key.name}: {layout.engine} would silently take {key.default}"
                    )
                else:
                    warnings.append(f"no key {key.name}: {layout.engine} takes {key.default}")
            continue
        wrong = _wrong_value(key, found, layout)
        if wrong:
            problems.append(wrong)
        elif key.field and key.read and not isinstance(found.value, tuple):
            dims[key.field] = found.value
    dims.update({name: dims[other] for name, other in layout.same.items() if other in dims})
    known = {key.name for key in layout.keys}
    prefix = f"{layout.architecture}."
    for name in file.metadata:
        if name.startswith(prefix) and name not in known:
            problems.append(f"key {name} is none that {layout.engine} reads: misspelt, or of another version")
    architecture = file.metadata.get("general.architecture")
    if architecture is not None and architecture.kind != "string":
        problems.append(f"key general.architecture is {architecture.kind}, expected string")
    elif architecture is None or not architecture.value:
        warnings.append(f"no general.architecture: {layout.engine} takes the file for {layout.architecture}")
    return dims, problems, warnings


def _wrong_value(key: Key, found: Value, layout: Layout) -> str:
    if found.kind != key.kind:
        fate = "" if key.default is None else f"; {layout.engine} would silently take {key.default}"
        return f"key {key.name} is {found.kind}, expected {key.kind}{fate}"
    value = found.value
    if key.one_of and value not in key.one_of:
        return f"key {key.name} is {value!r}, expected {' or '.join(key.one_of)}"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not key.low <= value <= key.high:
        return f"key {key.name} is {value}, expected {key.low:g} to {key.high:g}"
    return ""


def relations(layout: Layout, dims: Dims) -> list[str]:
    """The checks of a layout that do not hold, with the numbers filled in; texts write "_" for "."."""
    numbers = {name.replace(".", "_"): value for name, value in dims.items()}
    return [check.text.format(**numbers) for check in layout.checks if not check.holds(dims)]


def sizes(layout: Layout, dims: Dims) -> dict[str, Dim]:
    """Dimensions with the derived ones."""
    return {**dims, **{name: fn(dims) for name, fn in layout.derived.items()}}


def _check_tensors(file: GgufFile, layout: Layout, dims: dict[str, Dim]) -> list[str]:
    """Problems of tensors; dimensions that only tensors tell are added to `dims`."""
    problems: list[str] = []
    known = sizes(layout, dims)
    for name, _, row in layout.tensors(dims):
        info = file.tensors.get(name)
        if info is None:
            if not row.optional:
                problems.append(f"tensor {name} is missing")
            continue
        problems += _misshapen(info, row, known, dims)
        allowed = layout.formats[row.kind]
        if info.type not in allowed:
            problems.append(f"tensor {name} is {info.type}, {layout.engine} takes {', '.join(allowed)} here")
    return problems


def _misshapen(info: TensorInfo, row: Row, known: dict[str, Dim], dims: dict[str, Dim]) -> list[str]:
    """Compares shapes with trailing ones of `ne` dropped on both sides, as ggml does; binds free dimensions."""
    found = (1,) * (len(row.shape) - len(info.shape)) + info.shape
    if len(found) != len(row.shape):
        found = info.shape
    expected: list[int | str] = []
    for k, part in enumerate(row.shape):
        if isinstance(part, str) and part not in known and len(found) == len(row.shape):
            known[part] = dims[part] = found[k]
        value = part if isinstance(part, int) else known.get(part, part)
        expected.append(value if isinstance(value, str) else int(value))
    if _no_leading_ones(found) == _no_leading_ones(expected):
        return []
    return [f"tensor {info.name} has shape {list(info.shape)}, expected {expected}"]


def _no_leading_ones(shape: Iterable[int | str]) -> list[int | str]:
    parts = list(shape)
    while len(parts) > 1 and parts[0] == 1:
        parts.pop(0)
    return parts


def _forbidden(file: GgufFile, layout: Layout) -> list[str]:
    return [
        f"tensor {name}: {why}"
        for name in file.tensors
        for pattern, why in layout.forbidden
        if fnmatchcase(name, pattern)
    ]


def _strange_tensors(file: GgufFile, layout: Layout, dims: Dims) -> list[str]:
    known = {name for name, _, _ in layout.tensors(dims)}
    strange = [n for n in file.tensors if n not in known and not n.startswith("vlac.")]
    shown = ", ".join(strange[:5]) + (f", {len(strange) - 5} more" if len(strange) > 5 else "")
    return [f"{len(strange)} tensors that {layout.engine} does not read: {shown}"] if strange else []


def _unread_keys(file: GgufFile, layout: Layout, dims: Dims) -> list[str]:
    return [
        f"key {key.name} is {file.metadata[key.name].value}, the tensors say {dims[key.field]}"
        for key in layout.keys
        if not key.read
        and key.name in file.metadata
        and key.field in dims
        and file.metadata[key.name].value != dims[key.field]
    ]


# --- whole files -----------------------------------------------------------------------------------------------


def check_file(path: Path, dialect: str = "auto", *, data: bool = True) -> Findings:
    """Reads and checks a file of another engine; raises ArtifactError that lists the problems.

    `data`: tensor bytes as well, against the checksums that vlac writes, or for NaN and Inf where there are none.
    """
    file = read_gguf(path)
    layout = detect(file, dialect)
    if layout is None:
        raise ArtifactError(
            f"{path}: not a file of an engine that vlac knows (general.architecture: {_architecture(file) or 'none'})",
            remedy=f"known: {', '.join(x.title for x in layouts())}",
        )
    findings = examine(file, layout)
    problems = findings.problems or (tuple(damaged(file)) if data else ())
    if problems:
        raise refusal(path, layout, problems)
    return findings


def refusal(path: Path, layout: Layout, problems: Iterable[str]) -> ArtifactError:
    """One error that lists what is wrong."""
    lines = list(problems)
    shown = "\n  ".join(lines[:12]) + (f"\n  ... {len(lines) - 12} more" if len(lines) > 12 else "")
    return ArtifactError(
        f"{path}: {layout.engine} would refuse this {layout.architecture} file, abort on it or misread it:\n  {shown}",
        remedy="write the file again; nothing that fails here should reach a robot",
    )


def foreign_file(path: Path) -> Path | None:
    """The GGUF file of another engine that `path` is, or that lies alone in the folder `path`; None for anything else.

    Files that vlac's own engines open (they hold a program) are not foreign. Raises ArtifactError for a broken file.
    """
    if path.is_dir() and not any((path / name).is_file() for name in ("manifest.json", "config.json")):
        found = sorted(path.glob("*.gguf"))
        path = found[0] if len(found) == 1 else path
    if path.suffix != ".gguf" or not path.is_file():
        return None
    return None if PROGRAM in read_gguf(path).metadata else path


def read_manifest(file: GgufFile) -> dict[str, Any] | None:
    """The manifest that vlac put into a file of another engine, None where there is none. ArtifactError if damaged."""
    text = file.text(MANIFEST)
    if text is None:
        return None
    stored = file.metadata.get(MANIFEST_CRC)
    if stored is None or f"{stored.value:08x}" != crc32(text.encode()):
        raise ArtifactError(f"{file.path}: {MANIFEST} does not match its checksum", remedy="copy the file again")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file.path}: {MANIFEST} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("crc32"), dict):
        raise ArtifactError(f"{file.path}: {MANIFEST} has no table crc32")
    return manifest


def key_checksum(metadata: Mapping[str, Value]) -> str:
    """Checksum of all keys but the manifest's own two."""
    rows = [[k, v.kind, v.element, v.value] for k, v in metadata.items() if k not in (MANIFEST, MANIFEST_CRC)]
    return crc32(json.dumps(sorted(rows, key=lambda r: str(r[0])), ensure_ascii=True).encode())


def tensor_checksum(fmt: str, shape: Iterable[int], data: Any) -> str:
    """Checksum of a tensor's format, shape and bytes: equal bytes under another type would be other values."""
    return crc32(f"{fmt} {list(shape)} {crc32(data)}".encode())


def damaged(file: GgufFile) -> Iterator[str]:
    """Tensors (and keys) that are not what vlac wrote; for files of others: float tensors with NaN or Inf."""
    manifest = read_manifest(file)
    if manifest is None:
        yield from _not_finite(file)
        return
    sums = manifest["crc32"]
    if sums.get("keys") != key_checksum(file.metadata):
        yield "the keys do not match their checksum"
    for name in dict.fromkeys((*file.tensors, *(n for n in sums if n != "keys"))):
        info = file.tensors.get(name)
        if info is None or sums.get(name) != tensor_checksum(info.type, info.shape, file.data(name)):
            yield f"tensor {name} does not match its checksum"


_NUMPY: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "f64": np.dtype("<f8"),
}


def _not_finite(file: GgufFile) -> Iterator[str]:
    for name, info in file.tensors.items():
        if info.type not in _NUMPY or name == GOLDEN:
            continue
        values = file.data(name).view(_NUMPY[info.type])
        bad = 0
        for i in range(0, values.size, 1 << 22):
            part = values[i : i + (1 << 22)]
            ok = (part & 0x7F80) != 0x7F80 if info.type == "bf16" else np.isfinite(part)
            bad += int(part.size - np.count_nonzero(ok))
        if bad:
            yield f"tensor {name}: {bad} values are NaN or Inf"
