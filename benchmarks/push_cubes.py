"""What compiling does to success: the bundled policy in closed loop, every precision against fp32 on the same episodes.

python benchmarks/push_cubes.py [--episodes 400] [--seed 0] [--workers N] [--no-lerobot] [--out FILE.json]
    [TARGET ...]

Rows: the untouched checkpoint in fp32 (with its controls: wrong instructions, black pictures), LeRobot itself on the
same checkpoint and the same noise (.venv-lerobot), and each target. Success with Wilson's interval, the paired
difference to fp32 with its interval and McNemar's exact p; beside it the drift on the bundled observations, and sizes.
Nothing is timed; results do not depend on the number of workers. Writes benchmarks/results/push_cubes.json after every
row; rows of the same checkpoint and seeds that are there already are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from compile_full_size import ROOT, machine, size_mb, versions

import vlac
from vlac.environments import PUSH_CUBES
from vlac.evaluate import evaluate
from vlac.machine import usable_cores
from vlac.parity import parity
from vlac.progress import progress
from vlac.statistics import paired

RESULT = ROOT / "benchmarks" / "results" / "push_cubes.json"
LEROBOT = ROOT / ".venv-lerobot" / "bin" / "python"
POLICY = ROOT / "vlac" / "zoo" / "push_cubes"
REFERENCE, LEROBOT_ROW = "checkpoint fp32", "LeRobot 0.6.1"
CONTROLS = 200
"""Episodes of a control; they fail, and so take all their steps."""
TARGETS = ("gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8", "gguf-q6", "gguf-q5", "gguf-q4")
TARGETS += ("onnx-fp32", "onnx-fp16", "onnx-int8", "onnx-int4")

Row = dict[str, Any]


def engine_of(target: str) -> str:
    return "onnxruntime" if target.startswith("onnx") else "ggml"


def kept(report: dict[str, Any]) -> Row:
    """The figures of a run that the table needs, and who succeeded."""
    figures = {k: report[k] for k in ("success", "mean_steps", "mean_steps_succeeded", "jerk", "by_goal")}
    return {**figures, "succeeded": "".join(str(int(r["success"])) for r in report["rows"])}


def against(row: Row, base: Row) -> Row:
    """The row with its paired difference to fp32."""
    table = paired([c == "1" for c in row["succeeded"]], [c == "1" for c in base["succeeded"]])
    low, high = table.interval()
    counts = {"only_this": table.only_first, "only_fp32": table.only_second}
    return {**row, "paired": {**counts, "difference": table.difference, "low": low, "high": high, "p": table.p}}


def drift(artifact: Path, show: Any) -> Row:
    """Chunks against the checkpoint's on the bundled observations, same noise."""
    report = parity(artifact, reference="push-cubes", limits=["cos>=-1"], progress=show)
    cost = report["cost"]
    return {
        "observations": report["observations"]["count"],
        "cosine": cost["cosine"],
        "relative_l2": cost["relative_l2"],
        "noise_floor": cost["noise_floor"]["relative_l2"],
    }


def of_target(target: str, args: argparse.Namespace, show: Any) -> Row:
    engine = engine_of(target)
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / target
        vlac.compile("push-cubes", target=target, out=out, progress=show)
        report = closed_loop(out, args, show, engine=engine)
        return {"target": target, "engine": engine, "mb": size_mb(out), **kept(report), "drift": drift(out, show)}


def closed_loop(path: str | Path, args: argparse.Namespace, show: Any, **options: Any) -> dict[str, Any]:
    run = {"episodes": args.episodes, "seed": args.seed, "workers": args.workers, "progress": show}
    return evaluate(path, PUSH_CUBES, **run, **options)


def of_lerobot(args: argparse.Namespace) -> Row:
    """LeRobot's own loading, processors and sampling, in its own environment."""
    script = ROOT / "benchmarks" / "push_cubes_lerobot.py"
    command = [LEROBOT, script, POLICY, str(args.seed), str(args.episodes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"target": LEROBOT_ROW, "engine": "torch, fp32", **kept(json.loads(done.stdout))}


def of_reference(args: argparse.Namespace, show: Any) -> Row:
    row = {"target": REFERENCE, "engine": "torch", **kept(closed_loop("push-cubes", args, show))}
    row["mb"] = (POLICY / "model.safetensors").stat().st_size / 1e6
    fewer = argparse.Namespace(**{**vars(args), "episodes": min(args.episodes, CONTROLS)})
    runs = {c: closed_loop("push-cubes", fewer, show, control=c) for c in ("shuffled", "blank")}
    return {**row, "controls": {c: kept(run) for c, run in runs.items()}}


def earlier(args: argparse.Namespace, digest: str) -> dict[str, Row]:
    """Rows that an earlier run wrote for the same weights and episodes."""
    if not args.out.exists():
        return {}
    report = json.loads(args.out.read_text(encoding="utf-8"))
    same = (report["weights_sha256"], report["seeds"]) == (digest, [args.seed, args.seed + args.episodes - 1])
    return {r["target"]: r for r in report["rows"]} if same else {}


def write(rows: Sequence[Row], args: argparse.Namespace, digest: str) -> None:
    own = {name: metadata.version(name) for name in ("gymnasium", "pymunk")}
    report = {
        "what": f"The bundled policy, {args.episodes} unseen starts, each judged on the same ones with the same noise",
        "command": "python benchmarks/push_cubes.py",
        "machine": machine(),
        "versions": {**versions(), **own},
        "weights_sha256": digest,
        "seeds": [args.seed, args.seed + args.episodes - 1],
        "rows": rows,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--no-lerobot", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    digest = hashlib.sha256((POLICY / "model.safetensors").read_bytes()).hexdigest()
    rows = earlier(args, digest)
    with progress(quiet=not sys.stderr.isatty()) as show:
        wanted = [REFERENCE, *([] if args.no_lerobot or not LEROBOT.exists() else [LEROBOT_ROW]), *args.targets]
        for name in wanted:
            if name in rows:
                continue
            if name == REFERENCE:
                rows[name] = of_reference(args, show)
            else:
                row = of_lerobot(args) if name == LEROBOT_ROW else of_target(name, args, show)
                rows[name] = against(row, rows[REFERENCE])
            done = rows[name]["success"]
            print(f"{name}: {done['count']} of {done['of']} ({done['low']:.3f}..{done['high']:.3f})", flush=True)
            write(
                [rows[n] for n in dict.fromkeys((REFERENCE, LEROBOT_ROW, *TARGETS, *rows)) if n in rows], args, digest
            )


if __name__ == "__main__":
    main()
