"""Compiles a SmolVLA of the published size (450.0M parameters) to every target and measures what the README states.

python benchmarks/compile_full_size.py [--checkpoint DIR] [--work DIR] [TARGET ...]

Per target, each in a fresh process: wall time and peak memory of compiling, size of what was written, time of loading,
memory and time of acting. Writes benchmarks/results/compile_full_size.json; targets that are not asked for keep their
earlier rows. Needs about 8 GB of disk in --work (default: a temporary folder).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compile_full_size.json"
TARGETS = ("gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8", "gguf-q6", "gguf-q5", "gguf-q4")
TARGETS += ("onnx-fp32", "onnx-fp16", "onnx-int8", "onnx-int4", "openvino-int8", "openvino-bf16")
PACKAGES = ("vlac-compiler", "numpy", "torch", "onnx", "onnxruntime", "openvino", "transcribe-cpp-native")


def peak_mb() -> float:
    """Peak resident memory of this process, in 10^6 bytes; ru_maxrss would be its parent's as well, through exec."""
    return resident_mb("VmHWM")


def resident_mb(field: str = "VmRSS") -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def compile_once(checkpoint: str, target: str, out: str, *passes: str) -> dict[str, Any]:
    """In its own process: one compile, goldens included."""
    import vlac

    started = time.perf_counter()
    made = vlac.compile(checkpoint, target=target, out=out, passes=passes)
    seconds = time.perf_counter() - started
    formats = {k: v["values"] for k, v in made.manifest["census"]["formats"].items()}
    return {"compile_s": round(seconds, 1), "compile_peak_mb": round(peak_mb()), "formats": formats}


def act_once(artifact: str, engine: str | None) -> dict[str, Any]:
    """In its own process: load, then act on the artifact's golden observations, pictures of their own size."""
    import numpy as np

    import vlac

    before = resident_mb()
    started = time.perf_counter()
    policy = vlac.load(artifact, engine=engine)
    loaded = time.perf_counter() - started
    goldens = policy.artifact.goldens()
    times, errors, stages = [], [], {}
    for golden in (goldens[0], *goldens):
        began = time.perf_counter()
        chunk = policy.act(images=golden.images, state=golden.state, task=golden.task, noise=golden.noise, reuse=False)
        times.append(time.perf_counter() - began)
        stages = {k: round(v) for k, v in policy.stats.items() if k.endswith("_ms")}
        errors.append(float(np.linalg.norm(chunk - golden.chunk) / np.linalg.norm(golden.chunk)))
    return {
        "engine": policy.hparams.engine,
        "load_s": round(loaded, 3),
        "first_act_s": round(times[0], 2),
        "act_s": round(min(times[1:]), 2),
        "stages_ms": stages,
        "process_before_load_mb": round(before),
        "run_peak_mb": round(peak_mb()),
        "relative_l2": max(errors),
    }


def child(*arguments: str) -> dict[str, Any]:
    """Runs this script again in a fresh process and reads its last line."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def size_mb(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file()) / 1e6


def measure(checkpoint: Path, target: str, work: Path) -> dict[str, Any]:
    out = work / target
    row: dict[str, Any] = {"target": target, **child("--compile", str(checkpoint), target, str(out))}
    row["artifact_mb"] = round(size_mb(out), 1)
    engines = (None, "openvino") if target.startswith("onnx") else (None,)
    row["runs"] = [child("--act", str(out), *([e] if e else [])) for e in engines]
    return row


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    return {"cpu": model or platform.processor(), "cores": os.cpu_count(), "system": platform.platform(terse=True)}


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def save(rows: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    RESULT.parent.mkdir(exist_ok=True)
    report = {
        "what": "SmolVLA 450.0M (scripts/make_full_size.py), 2 cameras, 480x640 pictures, 512 px, chunk 50, 10 steps",
        "command": "python benchmarks/compile_full_size.py",
        "python": platform.python_version(),
        "machine": machine(),
        "versions": versions(),
        "checkpoint": checkpoint,
        "targets": [rows[t] for t in TARGETS if t in rows],
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    if sys.argv[1:2] == ["--compile"]:
        print(json.dumps(compile_once(*sys.argv[2:])))
        return
    if sys.argv[1:2] == ["--act"]:
        print(json.dumps(act_once(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET")
    parser.add_argument("--checkpoint", type=Path, help="made by scripts/make_full_size.py; default: made anew")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    if RESULT.exists():
        rows = {row["target"]: row for row in json.loads(RESULT.read_text(encoding="utf-8"))["targets"]}
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        checkpoint = args.checkpoint or work / "smolvla_450m"
        if not checkpoint.exists():
            subprocess.run([sys.executable, ROOT / "scripts" / "make_full_size.py", checkpoint], check=True)
        for target in args.targets:
            row = measure(checkpoint.resolve(), target, work)
            rows[target] = {**row, "load_average": os.getloadavg()[0], "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
            save(rows, {"parameters": 450046176, "mb": round(size_mb(checkpoint))})
            print(json.dumps(rows[target]), flush=True)


if __name__ == "__main__":
    main()
