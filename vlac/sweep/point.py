"""A point: one recipe, target and engine, compiled and measured; the row of figures that comes of it, and its key.

Keys are made of contents (files of the checkpoint, of observations, of whatever a pass reads), so that a row is found
again wherever it was measured and however the files are called.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlac import __version__
from vlac.errors import VlacError
from vlac.registry import Progress, ReadOptions, silent

Row = dict[str, Any]

FORM = 1
"""Of a row: counted up when older rows mean something else."""


@dataclass(frozen=True)
class Measure:
    """What is measured of every artifact.

    runs: chunks timed by `vlac bench`; 0 = no latency. observations: an .npz for golden answers and drift; "" = seeded
    ones. goldens: how many of them. episodes: closed-loop episodes in `environment` (vlac.environments); 0 = none.
    """

    runs: int = 10
    observations: str = ""
    goldens: int = 2
    episodes: int = 0
    environment: str = "push-cubes"


@dataclass(frozen=True)
class Build:
    """What is compiled: a checkpoint with how it is read, a target and passes in the form of --pass."""

    checkpoint: str
    target: str
    passes: tuple[str, ...] = ()
    read: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """A build on an engine. `axes`: where it stands in its grid (axis -> choice), for tables."""

    build: Build
    engine: str | None = None
    threads: int | None = None
    axes: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        recipe = " ".join(self.build.passes) or "no passes"
        where = "".join(f", {x}" for x in (self.engine, self.threads and f"{self.threads} threads") if x)
        return f"{self.build.target}: {recipe}{where}"


# --- keys --------------------------------------------------------------------------------------------------------


def checkpoint_files(build: Build) -> dict[str, Any]:
    """sha256 and size of the checkpoint's files; VlacError when it cannot be read."""
    from vlac.checkpoint import read_policy

    policy = read_policy(build.checkpoint, ReadOptions(**build.read))
    recorded = {} if policy.recorded is None else {"observations": _content(str(policy.recorded.path))}
    return {k: dict(v) for k, v in policy.source.files.items()} | recorded


def build_key(build: Build, files: Mapping[str, Any], measure: Measure) -> str:
    """Of the artifact: everything that its bytes depend on."""
    from vlac.api import typed_passes

    passes = [
        [entry.name, {k: _content(v) for k, v in sorted(values.items())}]
        for entry, values in typed_passes(build.passes)
    ]
    golden = [_content(measure.observations), measure.goldens]
    return _digest([__version__, files, build.target, passes, dict(build.read), dict(build.options), golden])


def point_key(point: Point, build: str, measure: Measure) -> str:
    """Of the row: the artifact's key and how it was measured."""
    loop = [measure.episodes, measure.environment] if measure.episodes else []
    return _digest([FORM, build, point.engine, point.threads, measure.runs, loop])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _content(value: Any) -> Any:
    """A parameter that names a file or a folder counts by what is in it."""
    if not isinstance(value, str) or not value or len(value) > 1024:
        return value
    try:
        path = Path(value)
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files} or value
    except OSError:
        return value


# --- measuring ---------------------------------------------------------------------------------------------------


def run_group(
    points: Sequence[Point], keys: Sequence[str], measure: Measure, emit: Callable[[Row], None], artifact: Path
) -> None:
    """Compiles what the points share (to `artifact`, unless it is there) and measures each; a row goes out as soon as
    it is known. Refusals become rows; anything else is the caller's to catch."""
    try:
        _compile(points[0].build, artifact, measure, silent)
    except VlacError as error:
        for point, key in zip(points, keys, strict=True):
            emit(refused(point, key, error))
        return
    for point, key in zip(points, keys, strict=True):
        began = time.monotonic()
        try:
            row = measured(point, artifact, measure, silent)
        except VlacError as error:
            row = refused(point, key, error)
        emit({**row, "key": key, "seconds": round(time.monotonic() - began, 2)})


def _compile(build: Build, artifact: Path, measure: Measure, progress: Progress) -> None:
    from vlac.api import compile

    if artifact.is_dir() and any(artifact.iterdir()):
        return
    compile(
        build.checkpoint,
        target=build.target,
        out=artifact,
        passes=build.passes,
        observations=measure.observations or None,
        goldens=measure.goldens,
        progress=progress,
        **{k: v for k, v in build.options.items() if k == "single_file"},
        **build.read,
    )


def measured(point: Point, artifact: Path, measure: Measure, progress: Progress) -> Row:
    """The row of a compiled point: the reports of `vlac parity`, `vlac bench` and `vlac eval` whole, and `figures`."""
    from vlac.bench import bench
    from vlac.parity import parity

    file = path_of(artifact)
    report = parity(file, engine=point.engine, threads=point.threads, progress=progress)
    report["artifact"] = file.name
    speed = None
    if measure.runs:
        speed = bench(file, engine=point.engine, threads=point.threads, runs=measure.runs, progress=progress)
    loop = None
    if measure.episodes:
        from vlac.environments import named
        from vlac.evaluate import evaluate

        adapter = named(measure.environment, None)
        loop = evaluate(file, adapter, episodes=measure.episodes, engine=point.engine, threads=point.threads)
        loop["artifact"] = file.name
    row: Row = {**_about(point), "status": "done", "parity": report, "bench": speed, "eval": loop}
    row["bytes"] = sum(p.stat().st_size for p in (artifact.rglob("*") if artifact.is_dir() else [file]) if p.is_file())
    return {**row, "figures": figures(row)}


def path_of(artifact: Path) -> Path:
    """The artifact's folder, or the one .gguf file in it."""
    files = list(artifact.glob("*.gguf")) if artifact.is_dir() else []
    return files[0] if len(files) == 1 else artifact


def figures(row: Mapping[str, Any]) -> dict[str, Any]:
    """What points are compared by: mb, ms (median chunk), drift (relative L2), cosine, success (share of episodes)."""
    cost, speed, episodes = row["parity"]["cost"], row["bench"], row["eval"]
    compiler = row["parity"]["compiler"]
    return {
        "mb": row["bytes"] / 1e6,
        "ms": speed["stages"]["chunk"]["p50"] if speed else None,
        "drift": cost["relative_l2"],
        "cosine": cost["cosine"],
        "success": episodes["success"]["rate"] if episodes else None,
        "success_interval": [episodes["success"][k] for k in ("low", "high")] if episodes else None,
        "compiler_ok": compiler["ok"] if compiler else None,
    }


def refused(point: Point, key: str, error: VlacError) -> Row:
    """The row of a point that vlac refuses: legal to ask, nothing to measure."""
    said = {"message": error.message, "remedy": error.remedy}
    return {**_about(point), "key": key, "status": "refused", "error": said, "figures": {}}


def failed(point: Point, key: str, why: str) -> Row:
    """The row of a point whose process broke; it is tried again by the next run."""
    return {**_about(point), "key": key, "status": "failed", "error": {"message": why, "remedy": ""}, "figures": {}}


def _about(point: Point) -> Row:
    b = point.build
    return {
        "vlac": __version__,
        "label": point.label,
        "checkpoint": Path(b.checkpoint).name or b.checkpoint,
        "target": b.target,
        "engine": point.engine,
        "threads": point.threads,
        "passes": list(b.passes),
        "axes": dict(point.axes),
    }


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    """A folder that is removed afterwards, inside `folder` if one is given."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vlac-sweep-", dir=folder) as name:
        yield Path(name)


# --- through JSON ------------------------------------------------------------------------------------------------


def request_of(points: Sequence[Point], keys: Sequence[str], measure: Measure, artifact: Path | None) -> dict[str, Any]:
    """The group as JSON values, for a worker; `group_of` reads it back. Without `artifact` the worker makes a place."""
    return {
        "points": [asdict(p) for p in points],
        "keys": list(keys),
        "measure": asdict(measure),
        "artifact": None if artifact is None else str(artifact),
    }


def group_of(request: Mapping[str, Any]) -> tuple[list[Point], list[str], Measure, Path | None]:
    """Points, keys, measure and artifact of a request."""
    points = []
    for p in request["points"]:
        build = Build(**{**p["build"], "passes": tuple(p["build"]["passes"])})
        points.append(Point(build, p["engine"], p["threads"], p["axes"]))
    where = request["artifact"]
    return points, list(request["keys"]), Measure(**request["measure"]), None if where is None else Path(where)
