"""Compiles a 7.5B-shaped OpenVLA and a 3.2B-shaped pi0 (scripts/make_large.py) and measures memory and disk.

python benchmarks/compile_big.py [--work DIR] [--family openvla|pi0] [--layers N] [TARGET ...]

Per family and target, in a fresh process: peak resident memory (VmHWM), wall and CPU time, sizes; besides, the most
that the output's folder ever held, sampled every half second: what is above the artifact's size was a temporary copy.
Writes benchmarks/results/compile_big.json (rows that are not asked for stay). Disk: 15.1 GB for OpenVLA and its largest
artifact, less for pi0; each checkpoint is deleted when its targets are done. --layers is a trial and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from compile_full_size import machine, peak_mb, size_mb, versions

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compile_big.json"
TARGETS = ("gguf-q4", "onnx-int4")
OPTIONS: dict[str, dict[str, Any]] = {
    "openvla": {"unnorm_key": "bridge_orig"},
    "pi0": {},
}


def compile_once(family: str, checkpoint: str, target: str, out: str) -> dict[str, Any]:
    """In its own process: one compile with one golden observation."""
    import vlac

    started = time.perf_counter()
    made = vlac.compile(checkpoint, target=target, out=out, goldens=1, **OPTIONS[family])
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "compile_s": round(seconds, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "peak_rss_gb": round(peak_mb() / 1e3, 2),
        "parameters": made.manifest["parameters"],
        "formats": {k: v["values"] for k, v in made.manifest["census"]["formats"].items()},
    }


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512 if path.is_file() else 0
        except OSError:  # renamed meanwhile
            continue
    return total


def measure(family: str, checkpoint: Path, target: str, work: Path) -> dict[str, Any]:
    room = work / "room"
    room.mkdir(parents=True, exist_ok=True)
    scratch = work / "tmp"
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--compile", family, str(checkpoint), target, str(room / "out")]
    most = 0
    with (work / "log").open("w+", encoding="utf-8") as log:
        environment = {**os.environ, "TMPDIR": str(scratch)}
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        while child.poll() is None:
            most = max(most, folder_bytes(room) + folder_bytes(scratch))
            time.sleep(0.5)
        log.seek(0)
        text = log.read()
    if child.returncode:
        raise SystemExit(f"{family} {target}: exit {child.returncode}\n{text[-4000:]}")
    row: dict[str, Any] = json.loads(text.splitlines()[-1])
    written = size_mb(room / "out") / 1e3
    shutil.rmtree(room)
    return {
        "family": family,
        "target": target,
        **row,
        "checkpoint_gb": round(size_mb(checkpoint) / 1e3, 2),
        "artifact_gb": round(written, 2),
        "disk_high_water_gb": round(max(most / 1e9, written), 2),
        "threads": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 1),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
    }


def save(rows: dict[str, Any]) -> None:
    RESULT.parent.mkdir(exist_ok=True)
    report = {
        "what": "checkpoints of published sizes with random bf16 weights (scripts/make_large.py), one golden answer of "
        "the fp32 reference included",
        "command": "python benchmarks/compile_big.py",
        "machine": machine(),
        "versions": versions(),
        "rows": [rows[k] for k in sorted(rows)],
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    if sys.argv[1:2] == ["--compile"]:
        print(json.dumps(compile_once(*sys.argv[2:6])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET")
    parser.add_argument("--family", choices=OPTIONS, action="append")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    if RESULT.exists():
        stored = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
        rows = {f"{row['family']} {row['target']}": row for row in stored}
    with tempfile.TemporaryDirectory(dir=args.work) as temporary:
        work = Path(temporary)
        for family in args.family or OPTIONS:
            checkpoint = work / family
            layers = [] if args.layers is None else ["--layers", str(args.layers)]
            subprocess.run(
                [sys.executable, ROOT / "scripts" / "make_large.py", family, checkpoint, *layers], check=True
            )
            for target in args.targets:
                row = measure(family, checkpoint, target, work)
                print(json.dumps(row), flush=True)
                if args.layers is None:
                    rows[f"{family} {target}"] = row
                    save(rows)
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
