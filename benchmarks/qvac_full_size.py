"""A SmolVLA of the published size in QVAC's layout: megabytes, parity in vlac's engine, and the real engine's answer.

python benchmarks/qvac_full_size.py CHECKPOINT [--target gguf-q8] [--pass P ...] [--work DIR] [--no-engine] [--out FILE]

CHECKPOINT: a folder of scripts/make_full_size.py, or a real one. The file is checked strictly, opened again through the
reader of foreign files, held against its own golden observation by `vlac parity`, then run by QVAC's engine on the same
observation (needs scripts/peers/qvac.sh and about 4 GB). Distances are of the normalised chunk to the fp32 reference
of the untouched checkpoint. Writes benchmarks/results/qvac_full_size.json; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import qvac_peer  # noqa: E402
from compile_full_size import machine, peak_mb, versions  # noqa: E402

import vlac  # noqa: E402
from vlac.adopt import runnable  # noqa: E402
from vlac.api import draw  # noqa: E402
from vlac.artifact import read_goldens  # noqa: E402
from vlac.checkpoint import read_policy  # noqa: E402
from vlac.gguf import GOLDEN, read_gguf  # noqa: E402
from vlac.gguf_dialects import check_file  # noqa: E402
from vlac.parity import parity  # noqa: E402

PUBLISHED_MB = 1900
"""QVAC's own SmolVLA file: its vision linears Q8_0, the rest F32."""


def distance(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> dict[str, float]:
    a, b = np.float64(got).ravel(), np.float64(want).ravel()
    return {
        "cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        "relative_l2": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
    }


def in_their_engine(checkpoint: str, file: Path, folder: Path) -> dict[str, Any]:
    policy = read_policy(checkpoint)
    golden = read_goldens(read_gguf(file).data(GOLDEN).tobytes(), str(file))[0]
    call = qvac_peer.call(
        *(policy.io, policy.tokenizer, draw(policy)),
        images=dict(golden.images),
        state=golden.state,
        task=golden.task,
        noise=golden.noise,
    )
    (actions,), hparams = qvac_peer.run(file, [call], policy.io, folder)
    return {**distance(actions, golden.chunk_normalised), "hparams": hparams}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    made = vlac.compile(
        options.checkpoint, options.target, folder / "smolvla.gguf", options.passes, dialect="qvac", goldens=1
    )
    assert made.path is not None
    findings = check_file(made.path, "qvac")
    with runnable(made.path) as artifact:
        report = parity(artifact, threads=1)
    record = {
        "what": "SmolVLA in QVAC's layout, one golden observation, normalised chunk against fp32",
        "command": f"python benchmarks/qvac_full_size.py CHECKPOINT --target {options.target}"
        + "".join(f" --pass {p}" for p in options.passes),
        "machine": machine(),
        "versions": versions(),
        "mb": round(made.path.stat().st_size / 1e6, 1),
        "published_mb": PUBLISHED_MB,
        "formats": made.manifest["census"]["formats"],
        "warnings": list(findings.warnings),
        "parity": {"engine": report["engine"], "compiler_ok": report["compiler"]["ok"], **_cost(report["cost"])},
        "peak_mb": round(peak_mb()),
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not options.no_engine and not qvac_peer.reason():
        record["qvac_engine"] = in_their_engine(options.checkpoint, made.path, folder / "run")
    return record


def _cost(found: dict[str, Any]) -> dict[str, Any]:
    return {k: found[k] for k in ("reference", "cosine", "relative_l2", "max_relative")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--target", default="gguf-q8")
    parser.add_argument("--pass", dest="passes", action="append", default=[])
    parser.add_argument("--work", type=Path, help="Where the file is kept; default: a temporary folder.")
    parser.add_argument("--no-engine", action="store_true", help="without QVAC's engine")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "qvac_full_size.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        record = measure(options, folder)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
