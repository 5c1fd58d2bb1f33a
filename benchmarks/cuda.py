"""SmolVLA on a CUDA device: vlac's torch engine in each of its numbers against LeRobot, eager and compiled, and how far
each answer lies from float32 on the CPU. For a machine with a GPU; exits with 2 where there is none.

    python benchmarks/cuda.py --checkpoint DIR [--lerobot PYTHON] [--runs 100] [--out FILE.json]

Every contender answers the same observation with the same noise. "network" is the time from prepared inputs to the
normalised chunk, all that is timed of LeRobot (its inputs lie on the device already, ours do not); "chunk" adds
our own resizing and tokenising. --lerobot: a Python that has LeRobot and a CUDA build of torch, "" to leave it out;
--checkpoint: a LeRobot SmolVLA (scripts/make_full_size.py makes one of the published size).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
OUT = ROOT / "benchmarks" / "results" / "cuda.json"
WARM_UPS = 5
"""The first calls record graphs and compile."""
BASE = "cpu f32"
OURS: dict[str, dict[str, Any]] = {
    BASE: {"device": "cpu"},
    "cuda f32": {"device": "cuda"},
    "cuda f32, plain attention": {"device": "cuda", "sdpa": "math"},
    "cuda f32, no graphs": {"device": "cuda", "graphs": False},
    "cuda f32, TF32": {"device": "cuda", "tf32": True},
    "cuda bf16": {"device": "cuda", "dtype": "bf16"},
    "cuda bf16, no graphs": {"device": "cuda", "dtype": "bf16", "graphs": False},
    "cuda bf16, compiled": {"device": "cuda", "dtype": "bf16", "compile": True},
    "cuda f16": {"device": "cuda", "dtype": "f16"},
    "cuda int8": {"device": "cuda", "dtype": "int8"},
    "cuda int8, compiled": {"device": "cuda", "dtype": "int8", "compile": True},
}
LEROBOT = ("eager", "eager bf16", "compiled", "compiled bf16")


def measured(artifact: Path, options: dict[str, Any], runs: int) -> tuple[dict[str, Any], np.ndarray]:
    """Milliseconds of one contender of ours, and its normalised chunk."""
    import vlac

    with vlac.load(artifact, engine="torch", options=options) as policy:
        seen = policy.artifact.goldens()[0]

        def act() -> dict[str, float]:
            began = time.perf_counter()
            policy.act(seen.images, seen.state, seen.task, noise=seen.noise, reuse=False)  # ends with a download
            stats = policy.stats
            network = sum(v for k, v in stats.items() if k.endswith("_ms") and k not in ("preprocess_ms", "total_ms"))
            return {"chunk_ms": 1e3 * (time.perf_counter() - began), "network_ms": network}

        began = time.perf_counter()
        for _ in range(WARM_UPS):
            act()
        warm = time.perf_counter() - began
        few = max(3, runs // 20) if options["device"] == "cpu" else runs
        times = [act() for _ in range(few)]
        chunk = np.array(policy.normalised)
        memory = _peak_bytes(options["device"])
    return {"warm_up_s": warm, "runs": few, **_quantiles(times), "gpu_peak_bytes": memory, "info": policy.info}, chunk


def _peak_bytes(device: str) -> int | None:
    import torch

    if device == "cpu":
        return None
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak


def _quantiles(times: list[dict[str, float]]) -> dict[str, Any]:
    values = {k: np.array([t[k] for t in times]) for k in times[0]}
    points = {"p50": 50, "p90": 90, "p99": 99}
    return {k: {name: float(np.percentile(v, p)) for name, p in points.items()} for k, v in values.items()}


def lerobot(python: str, checkpoint: Path, artifact: Path, runs: int, folder: Path) -> dict[str, Any]:
    """Figures and chunks of LeRobot's modes, in a process of its own."""
    from vlac.artifact import open_artifact

    seen = open_artifact(artifact).goldens()[0]
    pictures = {f"image/{name}": picture for name, picture in seen.images.items()}
    np.savez(folder / "seen.npz", **pictures, state=seen.state, noise=seen.noise, task=np.array(seen.task))
    command = [python, str(ROOT / "benchmarks" / "cuda_lerobot.py"), str(checkpoint), str(folder), str(runs), *LEROBOT]
    subprocess.run(command, check=True)
    return json.loads((folder / "lerobot.json").read_text(encoding="utf-8"))


def compared(chunk: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """How far a normalised chunk lies from the base's."""
    from vlac import metrics

    return {"max": float(np.abs(chunk - base).max()), "relative_l2": metrics.relative_l2(chunk, base)}


def table(report: dict[str, Any]) -> str:
    lines = ["| contender | network ms p50 | p99 | chunk ms p50 | GPU MB | max d to CPU f32 | relative L2 |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, r in report["contenders"].items():
        if "error" in r:
            lines.append(f"| {name} | {r['error'][:80]} | | | | | |")
            continue
        memory = "" if not r.get("gpu_peak_bytes") else f"{r['gpu_peak_bytes'] / 1e6:.0f}"
        chunk = f"{r['chunk_ms']['p50']:.2f}" if "chunk_ms" in r else ""
        drift = f"{r['drift']['max']:.1e} | {100 * r['drift']['relative_l2']:.3f} %"
        times = f"{r['network_ms']['p50']:.2f} | {r['network_ms']['p99']:.2f}"
        lines.append(f"| {name} | {times} | {chunk} | {memory} | {drift} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--lerobot", default=str(ROOT / ".venv-lerobot" / "bin" / "python"))
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--only", action="append", choices=[*OURS], help="these of ours, and the base; repeatable")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    import torch

    import vlac
    from vlac.errors import VlacError

    names = [n for n in OURS if n == BASE or not given.only or n in given.only]
    if not torch.cuda.is_available() and names != [BASE]:
        print(f"no CUDA device: torch {torch.__version__} sees cpu only", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "checkpoint": given.checkpoint.name,
        "contenders": {},
    }
    rows = report["contenders"]
    with tempfile.TemporaryDirectory(prefix="vlac-cuda-") as work:
        folder = Path(work)
        artifact = vlac.compile(given.checkpoint, target="gguf-f32", out=folder / "out.gguf", goldens=1).path
        chunks: dict[str, np.ndarray] = {}
        for name in names:
            try:
                rows[f"vlac {name}"], chunks[name] = measured(artifact, OURS[name], given.runs)
            except (VlacError, RuntimeError) as error:  # one that fails must not hide the others
                rows[f"vlac {name}"] = {"error": f"{type(error).__name__}: {error}"[:500]}
                continue
            rows[f"vlac {name}"]["drift"] = compared(chunks[name], chunks[BASE])
        if given.lerobot and torch.cuda.is_available():
            for name, row in lerobot(given.lerobot, given.checkpoint, artifact, given.runs, folder).items():
                rows[f"LeRobot {name}"] = row
                if "error" not in row:
                    theirs = np.load(folder / f"{name.replace(' ', '_')}.npy")[:, : chunks[BASE].shape[1]]
                    row["drift"] = compared(theirs, chunks[BASE])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
