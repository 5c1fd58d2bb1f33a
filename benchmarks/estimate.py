"""How close `vlac estimate --calibrate` comes: for every target and size, a chunk predicted beside one measured.

python benchmarks/estimate.py [--targets onnx-fp32,gguf-q8,...] [--sizes push-cubes,middle] [--full DIR] [--runs N]

Sizes: push-cubes (the bundled policy, 1.4M parameters), middle (a SmolVLA of 21M random parameters, made here), and
with --full a folder of artifacts of one large model, named by their targets. One thread and its CPU time, so that other
work on the machine changes little. Rows are written as they come to benchmarks/results/estimate.json; rows of other
targets and sizes stay, and of a row that was there the ratios of all its runs are kept: their median counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import vlac
from vlac import machine
from vlac.errors import VlacError
from vlac.estimate.calibrate import CLOSE, calibrate, text

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "estimate.json"
TARGETS = "onnx-fp32,onnx-int8,onnx-int4,openvino-int8,openvino-bf16,gguf-q8,gguf-f16,gguf-q4"
KEPT = (
    "target",
    "engine",
    "threads",
    "clock",
    "gmac",
    "predicted_ms",
    "measured_ms",
    "ratio",
    "close",
    "runs",
    "costs",
)


def middle(folder: Path) -> Path:
    """A SmolVLA between push-cubes and the published size: 256 px, 256 and 320 wide, 6 layers each."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from smolvla_checkpoint import Shape, write_checkpoint

    shape = Shape(
        text={
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
        vision={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": 256,
            "patch_size": 16,
        },
        cameras={"top": (240, 320), "wrist": (240, 320)},
        policy={"pad_language_to": "max_length", "num_vlm_layers": 8, "resize_imgs_with_padding": [256, 256]},
    )
    write_checkpoint(folder, shape, 0)
    return folder


def save(size: str, report: dict[str, Any]) -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {"rows": []}
    row = {"size": size, **{k: report[k] for k in KEPT}}
    same = [r for r in found["rows"] if (r["size"], r["target"]) == (size, row["target"])]
    others = [r for r in found["rows"] if r not in same]
    row["ratios"] = [ratio for r in same for ratio in r.get("ratios", [r["ratio"]])] + [report["ratio"]]
    row["ratio"] = statistics.median(row["ratios"])
    row["close"] = abs(row["ratio"] - 1) <= CLOSE
    rows = sorted([*others, row], key=lambda r: (r["gmac"], r["target"]))
    whole = {
        "machine": machine.describe(),
        "close_means": CLOSE,
        "close": sum(r["close"] for r in rows),
        "of": len(rows),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=TARGETS)
    parser.add_argument("--sizes", default="push-cubes,middle")
    parser.add_argument("--full", type=Path, help="a folder of artifacts of a large model, named by target")
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    targets = args.targets.split(",")
    with tempfile.TemporaryDirectory(prefix="vlac-estimate-") as temporary:
        work = Path(temporary)
        for size in filter(None, args.sizes.split(",")):
            checkpoint = ROOT / "vlac" / "zoo" / "push_cubes" if size == "push-cubes" else middle(work / "checkpoint")
            for target in targets:
                made = work / size / target
                vlac.compile(checkpoint, target, made, goldens=1)
                tell(size, made, args.runs)
        for target in targets if args.full else ():
            if (args.full / target).is_dir():
                tell("full", args.full / target, min(args.runs, 3))


def tell(size: str, path: Path, runs: int) -> None:
    try:
        report = calibrate(path, threads=1, runs=runs)
    except VlacError as error:
        print(f"{size} {path.name}: {error}", file=sys.stderr)
        return
    save(size, report)
    print(text(report), "\n", flush=True)


if __name__ == "__main__":
    main()
