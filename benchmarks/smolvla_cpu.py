"""SmolVLA at its published size on this CPU: our artifacts, LeRobot and whatever other engine is set up, interleaved.

python benchmarks/smolvla_cpu.py [--rounds 5] [--threads 2] [--only NAME ...] [--out FILE.json] [--plot FILE.svg]
    [--checkpoint DIR] [--work DIR] [--compile-only]

Every contender is a process that stays; in each round each answers one observation that nobody has seen before, then
(ours only) one in which only one of the two cameras is new ("camera"), and one in which only state and noise are new
("state"). Ratios are medians over LeRobot's median in float32, of wall time and of CPU time: on a machine that others
use as well only CPU time with --threads 1 means something. Ours is all of `act`, LeRobot's the network alone.
Drift is against LeRobot's own float32 chunk in normalised units, the worst of all rounds. benchmarks/README.md says how
to read the table. Artifacts that lie in --work are not compiled again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compile_full_size import ROOT, child

from vlac.peers.compare import compare, ours
from vlac.peers.contenders import BASE, ggml_compiler, lerobot, qvac
from vlac.peers.figures import save_plot, table

RESULT = ROOT / "benchmarks" / "results" / "smolvla_cpu.json"

FIXED = ("smooth-norms", "quantize-weights:bits=8,group=channel,act=int8-tensor,samples=4")
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "onnx-int8-fixed": ("onnx-int8", FIXED),
    "openvino-int8-fixed": ("openvino-int8", (FIXED[0], f"{FIXED[1]},attend=true")),
}
"""Artifact -> (target, passes); the others are their target's without passes. "fixed": scales of activations from
observations, checked and smoothed."""

OURS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    "onnx-fp32": ("onnx-fp32", "onnxruntime", {}),
    "onnx-fp32-openvino": ("onnx-fp32", "openvino", {}),
    "onnx-int8": ("onnx-int8", "onnxruntime", {}),
    "onnx-int8-fixed": ("onnx-int8-fixed", "onnxruntime", {}),
    "openvino-int8": ("openvino-int8", "openvino", {}),
    "openvino-int8-fixed": ("openvino-int8-fixed", "openvino", {}),
    "openvino-bf16": ("openvino-bf16", "openvino", {}),
    "gguf-f16": ("gguf-f16", "ggml", {}),
    "gguf-bf16": ("gguf-bf16", "ggml", {}),
    "gguf-q8": ("gguf-q8", "ggml", {}),
    "gguf-q6": ("gguf-q6", "ggml", {}),
    "gguf-q5": ("gguf-q5", "ggml", {}),
    "gguf-q4": ("gguf-q4", "ggml", {}),
}
"""name -> (artifact, engine, options)."""


def said(what: str, done: int, total: int) -> None:
    print(f"[{done}/{total}] {what}", file=sys.stderr, flush=True)


def compiled(checkpoint: Path, name: str, work: Path) -> Path:
    """The artifact in the work folder, made if it is not there."""
    out = work / name
    if not out.exists():
        said(f"compiling {name}", 0, 0)
        target, passes = RECIPES.get(name, (name, ()))
        child("--compile", str(checkpoint), target, str(out), *passes)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows besides LeRobot's in float32")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, help="default: beside --out")
    parser.add_argument("--checkpoint", type=Path, help="made by scripts/make_full_size.py; default: made anew")
    parser.add_argument("--work", type=Path, help="where artifacts lie or are written")
    parser.add_argument("--compile-only", action="store_true", help="fill --work and measure nothing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        checkpoint = (args.checkpoint or work / "smolvla_450m").resolve()
        if not checkpoint.exists():
            subprocess.run([sys.executable, ROOT / "scripts" / "make_full_size.py", checkpoint], check=True)
        rows = [name for name in OURS if not args.only or name in args.only]
        artifacts = {name: compiled(checkpoint, name, work) for name in {OURS[name][0] for name in rows}}
        if args.compile_only:
            return
        mine = [ours(artifacts[OURS[name][0]], OURS[name][1], OURS[name][2], name) for name in rows]
        peers = [*lerobot(checkpoint), *ggml_compiler(work / "ggml-compiler"), *qvac(work / "qvac")]
        peers = [p for p in peers if not args.only or p.name in {BASE, *args.only}]
        report = compare(mine, checkpoint, rounds=args.rounds, threads=args.threads, peers=peers, progress=said)
    what = "SmolVLA 450.0M, 2 cameras of 480x640 (512 px), 10 steps; CPU time and wall time over LeRobot fp32"
    command = f"python benchmarks/smolvla_cpu.py --rounds {args.rounds} --threads {args.threads}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"what": what, "command": command, **report}, indent=1) + "\n", encoding="utf-8")
    save_plot(report["rows"], f"SmolVLA 450M on {report['machine']['cpu']}", args.plot or args.out.with_suffix(".svg"))
    print(table(report["rows"]))


if __name__ == "__main__":
    main()
