"""What a report of several artifacts is made of: facts of each, parity, bench and closed loop, measured or handed in.

Results that `vlac parity|bench|eval --save` wrote are matched to their artifact by its sha256; what is missing is
measured now. `vlac.report_page` makes a page of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlac.artifact import open_artifact
from vlac.bench import bench, fingerprint
from vlac.environments import Adapter
from vlac.errors import InputError, Unsupported
from vlac.evaluate import evaluate
from vlac.parity import parity
from vlac.registry import Progress, silent

Result = Mapping[str, Any]
KINDS: Mapping[str, tuple[str, ...]] = {
    "parity": ("compiler", "cost", "not_asked"),
    "bench": ("stages", "rate", "verdict"),
    "eval": ("environment", "success", "rows"),
}
"""Keys by which a saved result is recognised."""


@dataclass
class Entry:
    """One artifact: its manifest, which file it is, and what was found out about it (None: not asked).

    A control of the closed loop (wrong instructions, black pictures) goes to `controls`.
    """

    label: str
    path: Path
    manifest: Result
    bytes: int
    sha256: str
    parity: Result | None = None
    bench: Result | None = None
    eval: Result | None = None
    controls: list[Result] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ClosedLoop:
    """How success is measured for artifacts that no result was handed in for."""

    adapter: Adapter
    episodes: int = 50
    seed: int = 0
    against: str | None = None
    workers: int = 1


def collect(
    paths: Sequence[str | Path],
    results: Sequence[Path] = (),
    *,
    loop: ClosedLoop | None = None,
    timed: bool = True,
    runs: int | None = None,
    progress: Progress = silent,
) -> list[Entry]:
    """An Entry per artifact, in the order given.

    Args:
        results: JSON files of `vlac parity|bench|eval --save`.
        loop: measure success where no eval result was handed in; None leaves it out.
        timed: measure latency where no bench result was handed in.

    Raises InputError for a result that belongs to none of the artifacts, or is none.
    """
    entries = _entries(paths)
    for file in results:
        _match(file, entries)
    for entry in entries:
        if entry.parity is None:
            entry.parity = parity(entry.path, progress=progress)
        if entry.bench is None and timed:
            try:
                entry.bench = bench(entry.path, runs=runs, progress=progress)
            except Unsupported as error:
                entry.remarks.append(f"latency not measured: {error.message}")
        if entry.eval is None and loop is not None:
            entry.eval = evaluate(
                entry.path,
                loop.adapter,
                against=loop.against,
                episodes=loop.episodes,
                seed=loop.seed,
                workers=loop.workers,
                progress=progress,
            )
    return entries


def _entries(paths: Sequence[str | Path]) -> list[Entry]:
    opened = [open_artifact(p) for p in paths]
    entries = []
    for path, artifact in zip(paths, opened, strict=True):
        known = fingerprint(artifact)
        entries.append(Entry("", Path(path), artifact.manifest, known["bytes"], known["sha256"]))
    for entry, label in zip(entries, labels([e.path for e in entries]), strict=True):
        entry.label = label
    twice = {e.sha256: e for e in entries}
    if len(twice) < len(entries):
        raise InputError("an artifact is given twice")
    return entries


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [p.resolve().with_suffix("" if p.suffix == ".gguf" else p.suffix).parts for p in paths]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(p[-length:]) for p in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [str(p) for p in paths]


def kind_of(result: Any) -> str | None:
    """ "parity", "bench" or "eval"; None for anything else."""
    if not isinstance(result, dict):
        return None
    return next((kind for kind, keys in KINDS.items() if all(k in result for k in keys)), None)


def _match(file: Path, entries: Sequence[Entry]) -> None:
    result = _read(file)
    kind = kind_of(result)
    if kind is None:
        raise InputError(f"{file} is no result of `vlac parity|bench|eval --save`")
    digest = result["artifact"]["sha256"] if kind == "bench" else result.get("sha256")
    found = [e for e in entries if e.sha256 == digest]
    if not found:
        raise InputError(
            f"{file} is about another artifact than those given ({result['artifact'] if kind != 'bench' else digest})",
            remedy="name its artifact too, or measure again: the artifact may have been compiled anew",
        )
    if kind == "eval" and result["control"] != "none":
        found[0].controls.append(result)
    else:
        setattr(found[0], kind, result)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--with: {file} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from None
