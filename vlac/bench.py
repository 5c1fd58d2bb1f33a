"""How fast an artifact answers on this machine: cold load, first inference and steady state apart, in a fresh process.

The figures come from vlac.bench_worker; this module starts it, watches the board meanwhile, and says whether the run
may be quoted (VALID), may not (INVALID, with reasons) or could not be checked (UNVERIFIED).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlac import __version__, machine
from vlac.artifact import Artifact, open_artifact, sha256
from vlac.errors import EngineError, InputError, Unsupported
from vlac.registry import Progress, silent

RUNS, LEAST, BUDGET_S = 30, 10, 60.0
"""Without --runs: 30 chunks, or as many as fit into a minute, and never fewer than 10."""
PERCENTILES = (50, 90, 95, 99)
SAMPLE_EVERY_S = 0.5


def bench(
    path: str | Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    runs: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measures an artifact on this machine; times in milliseconds, sizes in bytes.

    Raises:
        Unsupported: the process runs under emulation, where a latency means nothing.
        ArtifactError, EngineError: nothing to measure, or the engine failed.
    """
    emulated = machine.emulation()
    if emulated:
        raise Unsupported(
            f"no latency is reported under emulation: {emulated}", remedy="run `vlac bench` on the board itself"
        )
    if runs is not None and runs < 1:
        raise InputError(f"--runs {runs}: at least 1")
    artifact = open_artifact(path)
    request = {
        "path": str(path),
        "engine": engine,
        "threads": threads,
        "runs": runs or RUNS,
        "least": runs or LEAST,
        "budget_s": BUDGET_S,
    }
    cache = drop_page_cache(artifact)
    progress("running in a fresh process", 0, 0)
    raw, seen = _run(request)
    return _report(artifact, raw, seen, cache)


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


def _run(request: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory(prefix="vlac-bench-") as folder:
        ask, answer = Path(folder) / "request.json", Path(folder) / "result.json"
        ask.write_text(json.dumps({**request, "started": time.time()}), encoding="utf-8")
        command = [sys.executable, "-m", "vlac.bench_worker", str(ask), str(answer)]
        code, noise, seen = watched(command, machine.sample)
        if not answer.is_file():
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise EngineError(
                f"the measured process ended with {how}: {noise.strip()[-2000:] or 'it said nothing'}",
                remedy="try another --engine; `vlac doctor` tests them",
            )
        result = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in result:
        raise EngineError(result["error"], remedy=result["remedy"])
    return result, seen


def watched(command: Sequence[str], look: Callable[[], dict[str, Any]]) -> tuple[int, str, list[dict[str, Any]]]:
    """Runs a command while `look` is sampled beside it: exit code, its stderr, the samples (first before the start)."""
    seen = [look()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_EVERY_S):
            seen.append(look())

    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            done.set()
            watcher.join()
        errors.seek(0)
        noise = errors.read().decode("utf-8", "replace")
    seen.append(look())
    return code, noise, seen


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
    artifact: Artifact, raw: Mapping[str, Any], seen: Sequence[Mapping[str, Any]], cache: str
) -> dict[str, Any]:
    runs = raw["runs"]
    phases = [k for k in runs[0] if k not in ("chunk_ms", "total_ms")]
    stages = {k.removesuffix("_ms"): summarise([r[k] for r in runs]) for k in (*phases, "chunk_ms")}
    steps = artifact.io.n_action_steps
    info = raw["info"]
    board = board_of(seen)
    verdict, remarks = judge(board, seen, len(runs))
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
        "reuse": {name: summarise(times) for name, times in raw["reuse"].items()},
        "rate": {
            "chunk_hz": 1000 / stages["chunk"]["p50"],
            "n_action_steps": steps,
            "control_hz": 1000 * steps / stages["chunk"]["p50"],
            "control_hz_p99": 1000 * steps / stages["chunk"]["p99"],
        },
        "memory": {k: raw[k] for k in ("peak_rss_bytes", "peak_rss_from", "before_load_bytes")},
        "board": board,
        "verdict": verdict,
        "remarks": remarks,
        "samples_ms": {k.removesuffix("_ms"): [r[k] for r in runs] for k in runs[0]},
    }


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


def board_of(seen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Start, end and extremes of what was sampled; None for what the board does not tell."""

    def column(key: str) -> list[Any]:
        return [s[key] for s in seen if s.get(key) is not None]

    heat, clock, bits, load, swap = (column(k) for k in ("temperature", "frequency", "throttled", "load", "swap"))
    return {
        "temperature_c": {"start": heat[0], "end": heat[-1], "max": max(heat)} if heat else None,
        "frequency_mhz": {"start": clock[0], "min": min(clock), "max": max(clock)} if clock else None,
        "throttled": {"start": hex(bits[0]), "end": hex(bits[-1])} if bits else None,
        "load_average": {"start": load[0] if load else None, "end": load[-1] if load else None},
        "swap_growth_bytes": swap[-1] - swap[0] if swap else None,
    }


def judge(board: Mapping[str, Any], seen: Sequence[Mapping[str, Any]], runs: int) -> tuple[str, list[str]]:
    """(VALID | INVALID | UNVERIFIED, remarks): whether these figures may be quoted as this machine's."""
    wrong: list[str] = []
    bits = [s["throttled"] for s in seen if s.get("throttled") is not None]
    if bits and any(b & ~bits[0] or b & 0xF for b in bits):
        wrong.append("the board throttled or lacked voltage during the run")
    heat, clock, swap = board["temperature_c"], board["frequency_mhz"], board["swap_growth_bytes"]
    if heat and heat["max"] > 80:
        wrong.append(f"temperature reached {heat['max']:.0f} C (limit 80)")
    if swap is not None and swap > 1 << 20:
        wrong.append(f"swap grew by {swap / 1e6:.0f} MB")
    load, cores = board["load_average"]["start"], machine.usable_cores()
    if load is not None and load > 0.25 * cores:
        wrong.append(f"load average {load:.2f} on {cores} cores before the start: other work was running")
    remarks = [f"invalid: {text}" for text in wrong]
    if clock and clock["min"] < 0.95 * clock["max"]:
        remarks.append(f"clock moved between {clock['min']:.0f} and {clock['max']:.0f} MHz")
    if runs < 100:
        remarks.append(
            f"p99 of {runs} runs lies between the two slowest; 100 or more runs (--runs) make it a percentile"
        )
    unknown = [k for k, v in (("temperature", heat), ("clock", clock), ("throttling", bits)) if not v]
    if unknown:
        remarks.append(f"not checked, the machine does not tell: {', '.join(unknown)}")
    return ("INVALID" if wrong else "UNVERIFIED" if unknown else "VALID"), remarks
