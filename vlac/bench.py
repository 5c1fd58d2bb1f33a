"""How fast an artifact answers on this machine: cold load, first inference and steady state apart, in a fresh process.

The figures come from vlac.bench_worker; this module starts it beside a process that looks at the board
(vlac.board.sampler), and reports whether the run may be quoted (VALID), may not (INVALID, with reasons) or could not be
checked (UNVERIFIED).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlac import __version__, machine, steady
from vlac.artifact import Artifact, open_artifact, sha256
from vlac.board import readers
from vlac.board.reading import Tree
from vlac.board.sampler import look
from vlac.board.summary import Look, Run, known
from vlac.board.summary import summarise as board_of
from vlac.board.verdict import judge
from vlac.errors import EngineError, InputError
from vlac.registry import Progress, silent
from vlac.statistics import wilson

RUNS, LEAST, BUDGET_S = 30, 10, 60.0
"""Without --runs: 30 chunks, or as many as fit into a minute, and never fewer than 10."""
PERCENTILES = (50, 90, 95, 99)
SUSTAIN_S = 600.0
"""A sustained run that has not settled by then is reported as it is."""
ENDING_S = 30.0
"""How long the process that looks at the board may take to end."""


def bench(
    path: str | Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
    runs: int | None = None,
    rate: float | None = None,
    sustain: bool = False,
    root: str | Path = "/",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measures an artifact on this machine; times in milliseconds, sizes in bytes.

    options: for the engine, as in vlac.load. rate: control rate in Hz for which missed deadlines are counted. sustain:
    runs until latency has settled, and takes the figures of the settled part. root: where the board's /proc and /sys
    are read, for tests.

    Raises:
        Unsupported: the process runs under emulation, where a latency means nothing.
        ArtifactError, EngineError: nothing to measure, or the engine failed.
    """
    machine.refuse_emulated()
    if runs is not None and runs < 1:
        raise InputError(f"--runs {runs}: at least 1")
    if rate is not None and not 0 < rate <= 1e5:
        raise InputError(f"--rate {rate}: control steps in a second, such as 30")
    if sustain and runs is not None:
        raise InputError("--sustain together with --runs", remedy="a sustained run ends when latency has settled")
    artifact = open_artifact(path)
    request = {
        "path": str(path),
        "engine": engine,
        "threads": threads,
        "options": dict(options or {}),
        "runs": runs or RUNS,
        "least": runs or LEAST,
        "budget_s": BUDGET_S,
        "sustain": {"window_s": steady.WINDOW_S, "most_s": SUSTAIN_S} if sustain else {},
    }
    cache = drop_page_cache(artifact)
    progress("running until latency has settled" if sustain else "running in a fresh process", 0, 0)
    tree = Tree(Path(root))
    before = readers.describe(tree)
    raw, looks = _run(request, tree)
    window = raw["window"]
    threads = raw["info"].get("threads")
    run = Run(window["start"], window["end"], threads or machine.usable_cores(), len(raw["runs"]), window["cpu_s"])
    return _report(artifact, raw, looks, board_of(tree, looks, run, before), cache, rate)


def drop_page_cache(artifact: Artifact) -> str:
    """Asks the kernel to forget the artifact's pages, so that the load is cold; says what was done."""
    if not hasattr(os, "posix_fadvise"):
        return "page cache as it was"
    for file in _files(artifact):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return "page cache as it was"
        finally:
            os.close(fd)
    return "artifact dropped from the page cache"


def _files(artifact: Artifact) -> list[Path]:
    if artifact.path.is_file():
        return [artifact.path]
    names = ["manifest.json", *artifact.manifest["files"]]
    return [p for p in dict.fromkeys(artifact.path / n for n in names) if p.is_file()]


# --- the fresh process -----------------------------------------------------------------------------------------


def _run(request: Mapping[str, Any], tree: Tree) -> tuple[dict[str, Any], list[Look]]:
    with tempfile.TemporaryDirectory(prefix="vlac-bench-") as folder:
        ask, answer = Path(folder) / "request.json", Path(folder) / "result.json"
        ask.write_text(json.dumps({**request, "started": time.time()}), encoding="utf-8")
        command = [sys.executable, "-m", "vlac.bench_worker", str(ask), str(answer)]
        code, noise, looks = watched(command, tree)
        if not answer.is_file():
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise EngineError(
                f"the measured process ended with {how}: {noise.strip()[-2000:] or 'it said nothing'}",
                remedy="try another --engine; `vlac doctor` tests them",
            )
        result = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in result:
        raise EngineError(result["error"], remedy=result["remedy"])
    return result, looks


def watched(command: Sequence[str], tree: Tree) -> tuple[int, str, list[Look]]:
    """Runs a command while a process of its own looks at the board: exit code, its stderr, the looks, of which the
    first is from before the start and the last from after the end."""
    with tempfile.TemporaryDirectory(prefix="vlac-looks-") as folder, tempfile.TemporaryFile() as errors:
        file = Path(folder) / "looks.jsonl"
        looking = [sys.executable, "-m", "vlac.board.sampler", str(file), str(tree.root)]
        with subprocess.Popen(looking, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sampler:
            assert sampler.stdin is not None and sampler.stdout is not None
            try:
                sampler.stdout.readline()  # its first look is done
                code = _wait(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors))
                sampler.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    sampler.wait(ENDING_S)
            finally:
                sampler.kill()
        errors.seek(0)
        noise = errors.read().decode("utf-8", "replace")
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return code, noise, [json.loads(line) for line in lines if line.endswith("}")] or [look(tree)]


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


# --- figures ---------------------------------------------------------------------------------------------------


def summarise(samples: Sequence[float]) -> dict[str, float]:
    """p50, p90, p95, p99 (linear between samples), max, mean and standard deviation of a few milliseconds."""
    values = np.asarray(samples, dtype=np.float64)
    points = np.percentile(values, PERCENTILES)
    return {
        **{f"p{p}": float(v) for p, v in zip(PERCENTILES, points, strict=True)},
        "max": float(values.max()),
        "mean": float(values.mean()),
        "sd": float(values.std(ddof=1)) if values.size > 1 else 0.0,
    }


def _report(
    artifact: Artifact,
    raw: Mapping[str, Any],
    looks: Sequence[Look],
    board: Mapping[str, Any],
    cache: str,
    rate: float | None,
) -> dict[str, Any]:
    since = raw["settled_at"] or 0
    runs = raw["runs"][since:]
    phases = [k for k in runs[0] if k not in ("chunk_ms", "total_ms")]
    stages = {k.removesuffix("_ms"): summarise([r[k] for r in runs]) for k in (*phases, "chunk_ms")}
    info = raw["info"]
    verdict, remarks = judge(board, len(runs))
    steadiness = _steady(raw)
    return {
        "artifact": {
            "name": artifact.manifest.get("name") or artifact.path.name,
            "path": artifact.path.name,
            "target": artifact.manifest["target"],
            **fingerprint(artifact),
        },
        "engine": info.get("engine", ""),
        "engine_info": info,
        "threads": info.get("threads"),
        "machine": machine.describe(),
        "versions": _versions(info),
        "runs": len(runs),
        "load": {k: raw[k] for k in ("import_ms", "load_ms", "first_ms", "to_first_chunk_ms")} | {"page_cache": cache},
        "stages": stages,
        "steady": steadiness,
        "reuse": {name: summarise(times) for name, times in raw["reuse"].items()},
        "rate": control_rate(stages["chunk"], artifact.io.n_action_steps, artifact.io.chunk_size),
        "deadline": deadline([r["chunk_ms"] for r in runs], artifact.io.n_action_steps, rate),
        "memory": {k: raw[k] for k in ("peak_rss_bytes", "peak_rss_from", "before_load_bytes", "major_faults")}
        | {"system_delta_bytes": system_delta(looks)},
        "board": board,
        "verdict": verdict,
        "remarks": remarks + _course_remarks(steadiness),
        "samples_ms": {k.removesuffix("_ms"): [r[k] for r in runs] for k in runs[0]},
    }


def control_rate(chunk: Mapping[str, float], steps: int, rows: int) -> dict[str, Any]:
    """Control rates in Hz that a chunk latency sustains when the next chunk is computed while this one is executed.

    A robot executes the first n_action_steps rows of a chunk, then needs the next: the chunk's latency must fit into
    n_action_steps / rate. All rows executed would sustain chunk_rows / latency.
    """
    return {
        "chunk_hz": 1000 / chunk["p50"],
        "chunk_rows": rows,
        "n_action_steps": steps,
        "control_hz": 1000 * steps / chunk["p50"],
        "control_hz_p99": 1000 * steps / chunk["p99"],
        "control_hz_whole_chunk": 1000 * rows / chunk["p50"],
        "formula": "control_hz = 1000 * n_action_steps / chunk latency in ms: the next chunk is computed while "
        "n_action_steps rows of this one are executed",
    }


def deadline(chunks: Sequence[float], steps: int, rate: float | None) -> dict[str, Any] | str:
    """How many chunks (milliseconds) came later than n_action_steps / rate, with the share's 95 % interval (Wilson)."""
    if rate is None:
        return "not available: no control rate was given (--rate HZ)"
    budget = 1000 * steps / rate
    misses = sum(c > budget for c in chunks)
    return {
        "rate_hz": rate,
        "budget_ms": budget,
        "formula": "a chunk misses when it takes longer than 1000 * n_action_steps / rate ms",
        "misses": misses,
        "chunks": len(chunks),
        "share": misses / len(chunks),
        "interval95": list(wilson(misses, len(chunks))),
    }


def system_delta(looks: Sequence[Look]) -> int | str:
    """Bytes by which the memory in use (MemTotal - MemAvailable) rose at most: what CPU and GPU took together, where
    they share it. Mapped weights stay available to others and are in the resident set instead."""
    free = [x["memory"]["available"] for x in looks if known(x.get("memory"))]
    if not free:
        return next((str(x["memory"]) for x in looks if x.get("memory")), "not available: nobody looked")
    return int(free[0] - min(free))


def _steady(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Whether latency settled, from which chunk on, and what it did over the whole run."""
    times, ends = [r["chunk_ms"] for r in raw["runs"]], raw["ends_s"]
    windows = f"the medians of {steady.WINDOWS} windows of {steady.WINDOW_S:.0f} s within {steady.WITHIN:.0%}"
    since = steady.settled(ends, times) if raw["settled_at"] is None else raw["settled_at"]
    reached: bool | str = since is not None
    if since is None and ends[-1] < steady.WINDOWS * steady.WINDOW_S:
        reached = f"not available: the run took {ends[-1]:.1f} s (--sustain runs until latency has settled)"
    return {
        "reached": reached,
        "rule": windows,
        "from_chunk": raw["settled_at"] or 0,
        "seconds": ends[-1],
        "chunks": len(times),
        "course": steady.course(ends, times),
    }


def _course_remarks(steadiness: Mapping[str, Any]) -> list[str]:
    course, said = steadiness["course"], []
    if isinstance(course, dict) and course["kind"] != "even":
        when = f" after {course['at_s']:.1f} s" if "at_s" in course else ""
        said.append(
            f"latency {course['kind']}{when}: {course['before_ms']:.4g} -> {course['after_ms']:.4g} ms "
            f"(x {course['ratio']:.2f}){', as when a boost clock ends' if course['ratio'] > 1 else ''}"
        )
    if steadiness["reached"] is False:
        said.append(f"latency had not settled after {steadiness['seconds']:.0f} s")
    return said


def fingerprint(artifact: Artifact) -> dict[str, Any]:
    """Which artifact this is: bytes and sha256 of the whole, and of each of its files."""
    hashes = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in _files(artifact)}
    return {"bytes": sum(h["bytes"] for h in hashes.values()), "sha256": _one_hash(hashes), "files": hashes}


def _one_hash(hashes: Mapping[str, Mapping[str, Any]]) -> str:
    """A single file's own sha256; for a folder that of the lines "sha256  name", as sha256sum prints them, sorted."""
    if len(hashes) == 1:
        return str(next(iter(hashes.values()))["sha256"])
    lines = "".join(f"{h['sha256']}  {name}\n" for name, h in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _versions(info: Mapping[str, Any]) -> dict[str, str]:
    named = {"vlac": __version__, "python": platform.python_version(), "numpy": np.__version__}
    skip = ("engine", "threads", "artifact", "container", "target")
    return named | {k: str(v) for k, v in info.items() if isinstance(v, str) and k not in skip and len(str(v)) < 60}
