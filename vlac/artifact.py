"""What a target wrote, opened again: program, io, tokenizer, manifest, tensors, golden observations.

Two containers: one GGUF file (vlac/gguf.py), or a folder with manifest.json, program.txt, io.json, tokenizer.json,
golden.npz and the stage files. Opening validates before anything is mapped or handed to native code.
"""

from __future__ import annotations

import hashlib
import io as _io
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vlac.errors import ArtifactError
from vlac.graph import Program
from vlac.io import IO
from vlac.program_text import parse
from vlac.weights import Array

NpArray = np.ndarray[Any, Any]

FORMAT_VERSION = 1
FOLDER_FILES = ("manifest.json", "program.txt", "io.json")
PREPARED, STAMP = "prepared", "stamp.json"
"""In an artifact's folder: what `vlac prepare` made for this machine, PREPARED/ENGINE, and which files those are."""


@dataclass(frozen=True)
class StoredTensor:
    """A parameter as it lies in an artifact.

    Attributes:
        shape, format: as the program's Param says.
        decode: the float32 values that an engine effectively uses.
        data: the packed bytes in the format's own layout (read-only uint8 view of the file), None where a layout has
            its own way (ONNX int8 is stored transposed with separate scales).
    """

    shape: tuple[int, ...]
    format: str
    decode: Callable[[], Array] = field(repr=False, compare=False)
    data: NpArray | None = field(default=None, repr=False, compare=False)


TOKENS = "tokens"
"""The tap of a golden that holds the generated ids, i32 [n], of a policy that picks tokens."""


@dataclass(frozen=True)
class Golden:
    """An observation with what the fp32 reference of the untouched checkpoint answered.

    images: feature key -> uint8 HWC; state raw f32 [d]; noise f32 [N, A]; chunk f32 [N, action_dim] in the artifact's
    units (robot, or normalised when compiled without statistics); chunk_normalised likewise before un-normalisation.
    taps: stage output name -> array (see parity).
    """

    images: Mapping[str, NpArray]
    state: NpArray
    task: str
    noise: NpArray
    chunk: NpArray
    chunk_normalised: NpArray
    taps: Mapping[str, NpArray] = field(default_factory=dict)


@dataclass(frozen=True)
class Sidecars:
    """What every container carries beside the weights, as bytes, so that a target can store it."""

    program: str
    io: str
    manifest: Mapping[str, Any]
    tokenizer: bytes | None
    golden: bytes | None


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. `tensors` maps program parameter names to StoredTensor; `root` holds a folder's files."""

    path: Path
    container: str
    program: Program
    io: IO
    manifest: Mapping[str, Any]
    tokenizer: bytes | None
    tensors: Mapping[str, StoredTensor]
    golden_bytes: Callable[[], bytes | None] = field(repr=False, compare=False)

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines that can run it, best first; numpy always can."""
        return tuple(self.manifest.get("engines", ()))

    @property
    def host_engines(self) -> tuple[str, ...]:
        """Engines beside those that run its graphs, too, to check them on another machine: only when asked for."""
        return tuple(str(e) for e in self.manifest.get("host_engines", ()))

    def goldens(self) -> tuple[Golden, ...]:
        data = self.golden_bytes()
        return read_goldens(data, str(self.path)) if data else ()

    def file(self, name: str) -> Path:
        """A file of a folder artifact; ArtifactError when it leaves the folder, is missing or has the wrong size."""
        return checked_file(self.path, name, self.manifest)


def checked_file(root: Path, name: str, manifest: Mapping[str, Any]) -> Path:
    """root/name after checks: a plain relative path inside root, listed in the manifest, of the listed size."""
    if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise ArtifactError(f"{root}: file name {name!r} leaves the artifact")
    listed = manifest.get("files", {}).get(name)
    path = root / name
    if listed is None:
        raise ArtifactError(f"{root}: {name} is not listed in manifest.json", remedy="compile again")
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", remedy="copy the whole folder, or compile again")
    if path.stat().st_size != listed["size"]:
        raise ArtifactError(
            f"{path} has {path.stat().st_size} bytes, manifest.json says {listed['size']}",
            remedy="the copy was cut short or the file changed; copy it again or compile again",
        )
    return path


def open_artifact(path: str | Path) -> Artifact:
    """Opens a .gguf file, a folder artifact, or a folder that holds exactly one .gguf.

    Raises ArtifactError naming the file and what is wrong with it.
    """
    p = Path(path)
    if p.is_dir():
        if (p / "manifest.json").is_file():
            return _open_folder(p)
        found = sorted(p.glob("*.gguf"))
        if len(found) != 1:
            raise ArtifactError(
                f"{p}: no manifest.json and {len(found)} .gguf files; not an artifact of vlac",
                remedy="give the folder that `vlac compile -o` wrote, or one .gguf file",
            )
        p = found[0]
    if not p.is_file():
        raise ArtifactError(f"{p} does not exist", remedy="give the folder or file that `vlac compile -o` wrote")
    if p.suffix != ".gguf":
        raise ArtifactError(f"{p} is neither a folder nor a .gguf file")
    from vlac.gguf import open_gguf_artifact

    return open_gguf_artifact(p)


def check_manifest(manifest: Any, where: str) -> Mapping[str, Any]:
    """The manifest's own consistency; raises ArtifactError."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format_version"), int):
        raise ArtifactError(f"{where}: not a manifest of vlac (no format_version)")
    if manifest["format_version"] > FORMAT_VERSION:
        raise ArtifactError(
            f"{where}: format version {manifest['format_version']}, this vlac reads up to {FORMAT_VERSION}",
            remedy="update vlac on this machine",
        )
    for key, kind in (("engines", list), ("target", str), ("family", str), ("files", dict)):
        if not isinstance(manifest.get(key), kind):
            raise ArtifactError(f"{where}: key {key!r} is missing or not a {kind.__name__}")
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
            raise ArtifactError(f"{where}: files[{name!r}] has no size")
    return manifest


def check_tensors(program: Program, tensors: Mapping[str, StoredTensor], where: str) -> None:
    """Every parameter of the program is stored with its shape and format; raises ArtifactError naming the tensor."""
    for name, param in program.params.items():
        stored = tensors.get(name)
        if stored is None:
            raise ArtifactError(f"{where}: tensor {name} is missing", remedy="compile again")
        if stored.shape != param.shape or stored.format != param.format:
            raise ArtifactError(
                f"{where}: tensor {name} is {stored.format}{list(stored.shape)}, "
                f"the program wants {param.format}{list(param.shape)}",
                remedy="compile again",
            )


def _read_checked(root: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """A small file whose hash is checked now; weights are checked by vlac.integrity."""
    path = checked_file(root, name, manifest)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from None
    digest = manifest["files"][name].get("sha256")
    if digest is not None and digest != hashlib.sha256(data).hexdigest():
        raise ArtifactError(
            f"{path} is not the file that was compiled: its sha256 is not the one in manifest.json",
            remedy="copy the whole folder again, or compile again",
        )
    return data


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest's JSON without its key "checksum"."""
    rest = {k: v for k, v in manifest.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_text(path: Path, root: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", remedy="copy the whole folder, or compile again") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None


def _open_folder(root: Path) -> Artifact:
    where = str(root / "manifest.json")
    try:
        manifest = check_manifest(json.loads(_read_text(root / "manifest.json", root)), where)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{where} is not JSON: {error}", remedy="compile again") from None
    if "checksum" in manifest and manifest["checksum"] != manifest_checksum(manifest):
        raise ArtifactError(f"{where} does not match its own checksum", remedy="copy it again, or compile again")
    program = parse(_read_checked(root, "program.txt", manifest).decode())
    io = IO.from_json(_read_checked(root, "io.json", manifest).decode())
    tokenizer = _read_checked(root, "tokenizer.json", manifest) if "tokenizer.json" in manifest["files"] else None
    tensors = _folder_tensors(root, manifest)
    check_tensors(program, tensors, where)
    for name in manifest["files"]:
        checked_file(root, name, manifest)

    def golden() -> bytes | None:
        return _read_checked(root, "golden.npz", manifest) if "golden.npz" in manifest["files"] else None

    return Artifact(root, "folder", program, io, manifest, tokenizer, tensors, golden)


def _folder_tensors(root: Path, manifest: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Tensors of a folder from manifest["tensors"]: name -> {shape, format, parts: {part: {file, offset, nbytes, dtype,
    shape}}, layout}. How a layout's parts become float32 is in vlac.layouts.decode_parts."""
    from vlac.layouts import decode_parts

    result: dict[str, StoredTensor] = {}
    table = manifest.get("tensors")
    if not isinstance(table, dict):
        raise ArtifactError(f"{root}/manifest.json: key 'tensors' is missing")
    for name, row in table.items():
        try:
            shape, fmt, layout = tuple(int(d) for d in row["shape"]), str(row["format"]), str(row["layout"])
            parts = {k: _checked_part(root, manifest, name, p) for k, p in row["parts"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{root}/manifest.json: tensor {name}: broken entry ({error})") from None

        def load(parts: Mapping[str, Mapping[str, Any]] = parts, a: Any = (fmt, layout, shape, name)) -> Array:
            arrays = {k: _read_part(root, p) for k, p in parts.items()}
            return decode_parts(a[0], a[1], a[2], arrays, f"{root}: tensor {a[3]}")

        result[name] = StoredTensor(shape, fmt, load)
    return result


def _checked_part(root: Path, manifest: Mapping[str, Any], name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    path = checked_file(root, part["file"], manifest)
    offset, nbytes = int(part["offset"]), int(part["nbytes"])
    if offset < 0 or nbytes < 0 or offset + nbytes > path.stat().st_size:
        raise ArtifactError(f"{path}: tensor {name} lies at {offset}..{offset + nbytes}, outside the file")
    dtype = np.dtype(str(part["dtype"]))
    if dtype.hasobject or math.prod(part["shape"]) * dtype.itemsize != nbytes:
        raise ArtifactError(f"{path}: tensor {name}: {nbytes} bytes do not make {part['shape']} of {dtype}")
    return {"file": part["file"], "offset": offset, "dtype": dtype, "shape": tuple(int(d) for d in part["shape"])}


def _read_part(root: Path, part: Mapping[str, Any]) -> NpArray:
    return np.memmap(root / part["file"], dtype=part["dtype"], mode="r", offset=part["offset"], shape=part["shape"])


# --- golden observations ---------------------------------------------------------------------------------------


def write_goldens(goldens: tuple[Golden, ...]) -> bytes:
    """An .npz (no pickle, fixed timestamps: the same goldens give the same bytes)."""
    arrays: dict[str, NpArray] = {}
    for i, g in enumerate(goldens):
        arrays.update({f"obs{i}/image/{k}": v for k, v in g.images.items()})
        arrays.update({f"obs{i}/tap/{k}": v for k, v in g.taps.items()})
        arrays[f"obs{i}/task"] = np.frombuffer(g.task.encode(), dtype=np.uint8)
        for key in ("state", "noise", "chunk", "chunk_normalised"):
            arrays[f"obs{i}/{key}"] = getattr(g, key)
    out = _io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as z:
        for key in sorted(arrays):
            data = _io.BytesIO()
            np.lib.format.write_array(data, np.ascontiguousarray(arrays[key]), allow_pickle=False)  # type: ignore[no-untyped-call]
            z.writestr(zipfile.ZipInfo(key + ".npy", (1980, 1, 1, 0, 0, 0)), data.getvalue(), zipfile.ZIP_DEFLATED)
    return out.getvalue()


def read_goldens(data: bytes, where: str) -> tuple[Golden, ...]:
    """Inverse of write_goldens; ArtifactError when the archive is broken."""
    try:
        with np.load(_io.BytesIO(data), allow_pickle=False) as z:
            arrays = {k: z[k] for k in z.files}
        result = []
        i = 0
        while f"obs{i}/state" in arrays:
            images = {k.split("/image/", 1)[1]: v for k, v in arrays.items() if k.startswith(f"obs{i}/image/")}
            taps = {k.split("/tap/", 1)[1]: v for k, v in arrays.items() if k.startswith(f"obs{i}/tap/")}
            a = {k: arrays[f"obs{i}/{k}"] for k in ("state", "noise", "chunk", "chunk_normalised")}
            result.append(Golden(images=images, task=bytes(arrays[f"obs{i}/task"]).decode(), taps=taps, **a))
            i += 1
        return tuple(result)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ArtifactError(f"{where}: golden observations are broken: {error}") from None


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    h = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()
