"""What a checkpoint or an artifact is, as a dict: features, cameras, statistics, tokenizer, formats, warnings.

Headers are enough for a checkpoint: no tensor data is read. `vlac.facts_text` prints it for people.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlac import integrity
from vlac.artifact import Artifact, open_artifact
from vlac.errors import InputError
from vlac.gguf_dialects import check_file, foreign_file
from vlac.io import IO, Step
from vlac.registry import Progress, ReadOptions, silent

if TYPE_CHECKING:
    from vlac.policy import Policy

_LOW_HIGH = (("min", "max"), ("q01", "q99"), ("q10", "q90"))


def inspect(
    path: str | Path,
    *,
    options: ReadOptions | None = None,
    dialect: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Facts of a checkpoint (folder or hub id), a .gguf file or an artifact folder, as JSON values.

    Args:
        options: how to read a checkpoint (revision, statistics, spec); artifacts need none.
        dialect: the engine whose layout a GGUF file must have ("qvac", "vla.cpp"); None and "auto" find it out.

    Raises: VlacError when it can be read as neither.
    """
    file = foreign_file(Path(path))
    if file is None and dialect is not None:
        raise InputError(
            f"{path} is not a GGUF file of another engine", remedy="leave --dialect out, or give one such file"
        )
    if file is not None:
        progress("checking every byte", 0, 0)
        findings = check_file(file, dialect or "auto")
        return {**checkpoint_facts(_read(file, options)), "dialect": findings.facts()}
    if is_artifact(path):
        artifact = open_artifact(path)
        progress("checking every byte", 0, 0)
        integrity.verify(artifact)
        return artifact_facts(artifact)
    progress("reading headers", 0, 0)
    return checkpoint_facts(_read(path, options))


def is_artifact(path: str | Path) -> bool:
    """Whether `path` is a .gguf file or a folder that a target wrote, rather than a checkpoint or a hub id."""
    p = Path(path)
    if foreign_file(p) is not None:
        return False
    if p.is_dir():
        return (p / "manifest.json").is_file() or (not (p / "config.json").is_file() and any(p.glob("*.gguf")))
    return p.suffix == ".gguf"


def _read(path: str | Path, options: ReadOptions | None) -> Policy:
    from vlac.checkpoint import read_policy

    return read_policy(str(path), dataclasses.replace(options or ReadOptions(), headers_only=True))


def program_text(
    path: str | Path, *, after: str | None = None, options: ReadOptions | None = None, progress: Progress = silent
) -> str:
    """The program as text: of an artifact as it is stored; of a checkpoint as its family draws it, or lowered up to and
    including the rewrite `after`. Below the whole, as comments, what each rewrite takes away."""
    from vlac import removals

    if is_artifact(path):
        if after is not None:
            raise InputError(
                "--after shows a checkpoint's way through the rewrites; an artifact's program is past them",
                remedy="give the checkpoint, or leave --after out",
            )
        artifact = open_artifact(path)
        log = artifact.manifest.get("lowering")
        return str(artifact.program) + (removals.text(log) if isinstance(log, dict) else "")
    from vlac.api import draw
    from vlac.lower import lower_until

    progress("drawing the program", 0, 0)
    program = draw(_read(path, options))
    if after is not None:
        return str(lower_until(program, after))
    return str(program) + removals.text(removals.removals(program))


# --- checkpoint ------------------------------------------------------------------------------------------------


def checkpoint_facts(policy: Policy) -> dict[str, Any]:
    """Facts of a policy that was read."""
    return {
        "kind": "checkpoint",
        "path": policy.source.checkpoint,
        "revision": policy.source.revision,
        "family": policy.family,
        "name": policy.name,
        "parameters": policy.parameters or sum(math.prod(t.shape) for t in policy.weights.values()),
        "parts": parts((name, t.shape, t.dtype) for name, t in policy.weights.items()),
        **io_facts(policy.io),
        "tokenizer": tokenizer_facts(policy.tokenizer, policy.io.text_steps),
        "dimensions": dataclasses.asdict(policy.spec),
        "flow": _flow(dataclasses.asdict(policy.flow) if policy.flow else None),
        "files": {name: dict(entry) for name, entry in policy.source.files.items()},
        "warnings": list(policy.warnings),
        "ignored_config_keys": list(policy.ignored),
    }


def parts(tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> dict[str, Any]:
    """Parameters per part (the name's first component) and storage type: {part: {parameters, dtypes: {dtype: n}}}."""
    counts: dict[str, Counter[str]] = {}
    for name, shape, dtype in tensors:
        counts.setdefault(name.split(".", 1)[0], Counter())[dtype] += math.prod(shape)
    return {part: {"parameters": sum(c.values()), "dtypes": dict(sorted(c.items()))} for part, c in counts.items()}


def io_facts(io: IO) -> dict[str, Any]:
    """Features, cameras, chunk and statistics of an io description."""
    return {
        "units": io.units,
        "cameras": [{"key": c.key, "name": c.name, "shape": list(c.shape), "optional": c.optional} for c in io.cameras],
        "max_missing_cameras": io.max_missing_cameras,
        "image": {"size": io.image_size, "steps": [_step(s) for s in io.image_steps]},
        "state": {"key": io.state_key, "dim": io.state_dim},
        "action": {"key": io.action_key, "dim": io.action_dim, "names": list(io.action_names)},
        "chunk_size": io.chunk_size,
        "n_action_steps": io.n_action_steps,
        "max_action_dim": io.max_action_dim,
        "rename": dict(io.rename),
        "statistics": {
            io.state_key or "state": statistics(io.state_steps, io.state_dim),
            io.action_key or "action": statistics(io.action_steps, io.action_dim),
        },
    }


def statistics(steps: Iterable[Step], dim: int) -> dict[str, Any] | None:
    """Mode and ranges of the statistics that a list of steps applies; None where values pass unchanged.

    low and high: min/max or quantiles, or mean -+ 2 std; constant: dimensions that never moved in the data.
    """
    for step in steps:
        p = step.params
        if step.step not in ("normalise", "unnormalise") or p.get("mode") == "IDENTITY":
            continue
        if "mean" in p:
            mean, std = _numbers(p["mean"]), _numbers(p["std"])
            low = [m - 2 * s for m, s in zip(mean, std, strict=False)]
            high = [m + 2 * s for m, s in zip(mean, std, strict=False)]
            source = "mean -+ 2 std"
        else:
            names = next(((a, b) for a, b in _LOW_HIGH if a in p and b in p), None)
            if names is None:
                continue
            low, high, source = _numbers(p[names[0]]), _numbers(p[names[1]]), f"{names[0]}..{names[1]}"
        constant = [i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a == b]
        return {
            "mode": p.get("mode", ""),
            "covers": len(low),
            "dim": dim,
            "range": source,
            "low": low,
            "high": high,
            "constant": constant,
        }
    return None


def _numbers(values: Any) -> list[float]:
    flat: list[float] = []
    for v in values if isinstance(values, (list, tuple)) else [values]:
        flat += _numbers(v) if isinstance(v, (list, tuple)) else [float(v)]
    return flat


def tokenizer_facts(data: bytes | None, steps: Iterable[Step]) -> dict[str, Any] | None:
    """Kind, vocabulary and steps of the prompt; None for a policy that reads no text."""
    listed = [_step(s) for s in steps]
    if data is None:
        return {"kind": "missing", "vocabulary": 0, "bytes": 0, "steps": listed} if listed else None
    try:
        parsed = json.loads(data)
        model = parsed["model"]
        vocabulary = len(model["vocab"]) + sum(
            1 for t in parsed.get("added_tokens", ()) if t["content"] not in model["vocab"]
        )
        kind = str(model.get("type", "unknown"))
    except (ValueError, KeyError, TypeError, RecursionError):
        kind, vocabulary = "unreadable", 0
    return {"kind": kind, "vocabulary": vocabulary, "bytes": len(data), "steps": listed}


def _step(step: Step) -> str:
    """A step with its short parameters: "tokenise(max_length=48)"."""
    shown = [f"{k}={v!r}" for k, v in step.params.items() if not isinstance(v, (list, tuple, dict))]
    return f"{step.step}({', '.join(shown)})"


def _flow(flow: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not flow:
        return None
    return {"solver": flow["solver"], "steps": len(flow["times"]), "times": list(flow["times"])}


# --- artifact --------------------------------------------------------------------------------------------------


def artifact_facts(artifact: Artifact) -> dict[str, Any]:
    """Facts of an opened artifact."""
    m = artifact.manifest
    census = m.get("census", {})
    tensors = census.get("tensors", {})
    path = artifact.path
    files = {name: dict(entry) for name, entry in m["files"].items()} or {path.name: {"size": path.stat().st_size}}
    return {
        "kind": "artifact",
        "path": str(path),
        "container": artifact.container,
        "family": m["family"],
        "name": m.get("name", ""),
        "target": m["target"],
        "engines": list(artifact.engines),
        "written_by": f"vlac {m.get('vlac', 'unknown')}",
        "source": m.get("source", {}),
        "parameters": m.get("parameters", 0),
        "parts": parts((name, p.shape, p.format) for name, p in artifact.program.params.items()),
        **io_facts(artifact.io),
        "tokenizer": tokenizer_facts(artifact.tokenizer, artifact.io.text_steps),
        "dimensions": m.get("spec", {}),
        "flow": _flow(m.get("flow")),
        "census": {
            "formats": census.get("formats", {}),
            "bytes": census.get("bytes", 0),
            "promoted": {
                name: {"requested": row["requested"], "realised": row["realised"]}
                for name, row in tensors.items()
                if row["requested"] != row["realised"]
            },
        },
        "history": list(m.get("history", ())),
        "goldens": {"count": len(artifact.goldens()), "kind": m.get("golden", "")},
        "noise_floor": m.get("noise_floor"),
        "stages": {s.name: len(s.nodes) for s in artifact.program.stages},
        "files": files,
        "warnings": list(m.get("warnings", ())),
        "ignored_config_keys": list(m.get("ignored_config_keys", ())),
    }
