"""A thousand calls in a row: does memory grow, does an answer drift, how long do the slowest calls take?

python benchmarks/soak.py --out FILE.json [--checkpoint CKPT] [--runs TARGET:ENGINE ...] [--calls 1000] [--threads N]
python benchmarks/soak.py --out FILE.json --artifact out/ --engine ggml

Every run is a process of its own. Calls are a robot's: new frames, one new frame of two, only a new state, another
instruction (of another length), a few actions instead of all; seeded, so that two runs do the same. The first call's
observation is asked again every 100 calls and at the end, with and without reuse: its chunk must be the same bits.
RSS is taken after every 20th call; growth is from the median of the second tenth of the calls to that of the last, and
from the sixth to the last: allocators take a few hundred calls until they have seen every size.
Times are of a shared machine unless you made it quiet: the load average stands beside them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "golden" / "smolvla_tiny" / "checkpoint"
RUNS = (
    "onnx-fp32:onnxruntime",
    "onnx-int8:onnxruntime",
    "onnx-fp32:openvino",
    "onnx-int8:openvino",
    "gguf-q8:ggml",
    "gguf-f32:torch",
)
TASKS = ("stop", "pick up the cube", "pick up the red cube and put it into the box", "open the drawer on the left side")
SAME_EVERY, RSS_EVERY = 100, 20


def memory_now() -> tuple[int, int]:
    """(resident, of them anonymous) bytes of this process; pages of mapped weights are resident, not anonymous."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, anonymous = (int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon"))
    return resident, anonymous


def soak(path: str, engine: str, calls: int, threads: int | None) -> dict[str, Any]:
    """One run, in this process."""
    from vlac.goldens import synthetic
    from vlac.runtime.inputs import samples
    from vlac.runtime.session import load

    warnings.simplefilter("ignore")
    rng = np.random.Generator(np.random.PCG64(0))
    with load(path, engine=engine, threads=threads) as policy:
        io, text = policy.io, bool(policy.io.text_steps)
        golden = synthetic(io, 1)[0]
        first: dict[str, Any] = {"images": dict(golden.images), "state": golden.state}
        first |= {"task": TASKS[1]} if text else {}
        first |= {"noise": golden.noise} if samples(policy.artifact.program) else {}
        want = policy.act(**first)
        times: dict[str, list[float]] = {}
        memory: list[tuple[int, int, int]] = []
        worst, asked, now = 0.0, 1, dict(first)
        for i in range(1, calls + 1):
            if i % SAME_EVERY == 0 or i == calls:
                for reuse in (True, False):
                    worst = max(worst, float(np.abs(policy.act(**first, reuse=reuse) - want).max()))
                    asked += 1
                now = dict(first)
            kind = _next(now, rng, text)
            few = {"n_actions": max(1, io.chunk_size // 5)} if rng.random() < 0.2 else {}
            begun = time.perf_counter()
            policy.act(**now, **few)
            times.setdefault(kind, []).append(1e3 * (time.perf_counter() - begun))
            if i % RSS_EVERY == 0:
                gc.collect()
                memory.append((i, *memory_now()))
        plain = (str, int, float, bool)
        info = {k: v for k, v in policy.info.items() if isinstance(v, plain) and k != "artifact"}
    return {
        "info": info,
        "calls": calls,
        "same_input": {"asked": asked, "max_abs_change": worst},
        "rss": _growth([m[1] for m in memory]),
        "anonymous": _growth([m[2] for m in memory]),
        "memory": memory,
        "ms": {kind: _summary(found) for kind, found in times.items()},
        "all_ms": _summary([t for found in times.values() for t in found]),
        "load_average": os.getloadavg()[0],
    }


def _growth(sizes: list[int]) -> dict[str, float]:
    tenth = max(1, len(sizes) // 10)
    middle, parts = len(sizes) // 2, (sizes[tenth : 2 * tenth] or sizes, sizes[-tenth:])
    early, late = (statistics.median(part) for part in parts)
    half = statistics.median(sizes[middle : middle + tenth])
    return {"early_bytes": early, "late_bytes": late, "growth_bytes": late - early, "second_half_bytes": late - half}


def _next(now: dict[str, Any], rng: np.random.Generator, text: bool) -> str:
    """Changes the observation as a robot's changes; says how."""
    kind = str(rng.choice(["frames", "frames", "one_frame", "state", "state", "task"]))
    names = list(now["images"])
    if kind == "task" and text:
        now["task"] = TASKS[int(rng.integers(len(TASKS)))]
    for name in names if kind == "frames" else names[-1:] if kind == "one_frame" else ():
        picture = now["images"][name].copy()
        picture[int(rng.integers(len(picture)))] = rng.integers(0, 256, picture.shape[1:], dtype=picture.dtype)
        now["images"] = {**now["images"], name: picture}
    if now["state"] is not None and np.size(now["state"]):
        now["state"] = now["state"] + rng.standard_normal(now["state"].shape).astype(np.float32) / 100
    return kind


def _summary(times: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(times, (50, 99))
    return {"count": len(times), "p50": float(p50), "p99": float(p99), "max": max(times)}


def run_apart(path: str, engine: str, calls: int, threads: int | None) -> dict[str, Any]:
    """One run in a fresh process; a run that fails says why."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, "--one", str(answer), "--artifact", path, "--engine", engine]
        command += ["--calls", str(calls), *(["--threads", str(threads)] if threads else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]}
        found: dict[str, Any] = json.loads(answer.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--checkpoint", type=Path, default=TINY)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), metavar="TARGET:ENGINE")
    parser.add_argument("--artifact", help="an artifact there is, instead of compiling --checkpoint")
    parser.add_argument("--engine")
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.one.write_text(json.dumps(soak(args.artifact, args.engine, args.calls, args.threads)))
        return
    from vlac import machine

    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for run in [f"artifact:{args.engine}"] if args.artifact else args.runs:
            target, _, engine = run.partition(":")
            path = args.artifact or _compiled(args.checkpoint, target, Path(folder))
            rows[run] = run_apart(path, engine, args.calls, args.threads)
            print(_line(run, rows[run]), flush=True)
    result = {"calls": args.calls, "threads": args.threads, "machine": machine.describe(), "runs": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _compiled(checkpoint: Path, target: str, folder: Path) -> str:
    import vlac

    out = folder / target
    if not out.exists():
        vlac.compile(checkpoint, target, out, goldens=1)
    return str(out)


def _line(run: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{run}: {row['error'][0]}"
    grown, late, of = (row["rss"][k] / 1e6 for k in ("growth_bytes", "second_half_bytes", "late_bytes"))
    times = f"p50 {row['all_ms']['p50']:.1f} ms, p99 {row['all_ms']['p99']:.1f} ms"
    changed = row["same_input"]["max_abs_change"]
    memory = f"RSS {grown:+.2f} MB ({late:+.2f} in the second half) of {of:.0f}"
    return f"{run}: {memory}, same input changed by {changed:g}, {times}"


if __name__ == "__main__":
    main()
