"""What each target's precision costs, on a trained language model's weights and against LeRobot's own answers.

python benchmarks/precision.py [--real CHECKPOINT]

Columns: chunk against fp32 on a policy built on a real SmolLM2-135M (scripts/make_real_backbone.py, made anew unless
--real names it), and max|d|/max against LeRobot's recorded chunks on the tiny golden checkpoints. Deterministic on one
kind of machine; nothing is timed. Writes benchmarks/results/precision.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from compile_full_size import ROOT, TARGETS, machine, size_mb, versions

import vlac
from vlac.errors import VlacWarning

sys.path.insert(0, str(ROOT / "tests"))
from conftest import open_golden

RESULT = ROOT / "benchmarks" / "results" / "precision.json"


def engines(target: str) -> tuple[str, ...]:
    return ("onnxruntime", "openvino") if target.startswith("onnx") else ("ggml",)


def cost(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    return {
        "cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        "relative_l2": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
        "max_relative": float(np.abs(a - b).max() / np.abs(b).max()),
    }


def worst(rows: list[dict[str, float]]) -> dict[str, float]:
    return {k: (min if k == "cosine" else max)(r[k] for r in rows) for k in rows[0]}


def against_fp32(artifact: Path, engine: str) -> dict[str, float]:
    """The artifact against the fp32 answers that it carries."""
    with vlac.load(artifact, engine=engine) as policy:
        return worst(
            [
                cost(policy.act(images=g.images, state=g.state, task=g.task, noise=g.noise), g.chunk)
                for g in policy.artifact.goldens()
            ]
        )


def against_lerobot(target: str, engine: str, work: Path) -> dict[str, float]:
    rows = []
    for name in ("smolvla_tiny", "smolvla_letterbox"):
        golden = open_golden(ROOT / "tests" / "golden" / name)
        out = work / name / target
        if not out.exists():
            vlac.compile(golden.checkpoint, target=target, out=out)
        with vlac.load(out, engine=engine) as policy:
            rows += [cost(policy.act(**golden.observation(i)), golden.chunk(i)) for i in range(len(golden.tasks))]
    return worst(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore", VlacWarning)  # prompts of the goldens are longer than the policy allows, on purpose
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        real = args.real or work / "smollm2_135m"
        if not real.exists():
            subprocess.run([sys.executable, ROOT / "scripts" / "make_real_backbone.py", real], check=True)
        for target in TARGETS:
            out = work / "real" / target
            vlac.compile(real, target=target, out=out)
            for engine in engines(target):
                row = {"target": target, "engine": engine, "mb": round(size_mb(out), 1)}
                row |= {"real": against_fp32(out, engine), "lerobot": against_lerobot(target, engine, work)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    report = {
        "what": "Worst observation; fp32: a 172M policy on SmolLM2-135M; LeRobot: the two tiny golden checkpoints",
        "command": "python benchmarks/precision.py",
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
