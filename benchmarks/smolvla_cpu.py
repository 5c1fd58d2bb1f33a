"""SmolVLA at its published size on this CPU: our artifacts and LeRobot, interleaved, on the same inputs and noise.

python benchmarks/smolvla_cpu.py [--rounds 5] [--threads 2] [--only NAME ...] [--out FILE.json]
    [--checkpoint DIR] [--work DIR]

Every contender is a process that stays; in each round each answers one observation that nobody has seen before, then
(ours only) one in which only one of the two cameras is new ("camera"), and one in which only state and noise are new
("state"). Ratios are medians over LeRobot's median in float32, of CPU time and of wall time: on a machine that others
use as well only CPU time with --threads 1 means something. Ours is all of `act`, LeRobot's the network alone.
Drift is against LeRobot's own float32 chunk in normalised units, the worst of all rounds. benchmarks/README.md says how
to read the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from compile_full_size import ROOT, child, machine, resident_mb, size_mb, versions

RESULT = ROOT / "benchmarks" / "results" / "smolvla_cpu.json"
LEROBOT = ROOT / ".venv-lerobot" / "bin" / "python"
BASE = "lerobot-fp32"
CASES = ("cold", "camera", "state")
TASK = "pick up the red cube and place it in the box"

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Contender:
    """name -> (target, engine, options), or LeRobot in one precision where there is no target."""

    name: str
    target: str = ""
    engine: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


CONTENDERS = (
    Contender(BASE),
    Contender("lerobot-bf16"),
    Contender("onnx-fp32", "onnx-fp32", "onnxruntime"),
    Contender("onnx-int8", "onnx-int8", "onnxruntime"),
    Contender("openvino-bf16", "onnx-fp32", "openvino", {"precision": "bf16"}),
    Contender("openvino-int8", "onnx-int8", "openvino"),
    Contender("gguf-bf16", "gguf-bf16", "ggml"),
    Contender("gguf-q8", "gguf-q8", "ggml"),
    Contender("gguf-q6", "gguf-q6", "ggml"),
)


# --- a contender's process -------------------------------------------------------------------------------------


def serve(artifact: str, engine: str, threads: int, options: Mapping[str, Any]) -> None:
    """Ours: the protocol of scripts/peers/lerobot_worker.py, timing all of `act`."""
    import vlac
    from vlac.runtime.observation import STATE_STEPS, apply_steps

    began = time.perf_counter()
    policy = vlac.load(artifact, engine=engine, threads=threads, options=options)
    print(json.dumps({"load_s": time.perf_counter() - began}), flush=True)
    normalise = [s for s in policy.io.state_steps if s.step == "normalise"]
    for line in sys.stdin:
        request = json.loads(line)
        with np.load(request["npz"]) as arrays:
            images = {k.removeprefix("image/"): arrays[k] for k in arrays.files if k.startswith("image/")}
            state = apply_steps(STATE_STEPS, normalise, arrays["state"])
            given = {"images": images, "state": state, "noise": arrays["noise"], "task": str(arrays["task"])}
        wall, cpu = time.perf_counter(), time.process_time()
        chunk = policy.act(**given, units="normalized")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        reply = {"wall_s": wall, "cpu_s": cpu, "peak_mb": resident_mb("VmHWM")}
        reply["stages_ms"] = {k: round(v, 1) for k, v in policy.stats.items() if k.endswith("_ms")}
        reply["reused"] = policy.stats["reused"]
        np.save(request["out"], chunk)
        print(json.dumps(reply), flush=True)


class Worker:
    """The process of one contender."""

    def __init__(self, contender: Contender, checkpoint: Path, artifact: Path | None, threads: int) -> None:
        self.contender, self.artifact = contender, artifact
        if artifact is None:
            script = ROOT / "scripts" / "peers" / "lerobot_worker.py"
            command = [LEROBOT, script, checkpoint, threads, contender.name.removeprefix("lerobot-")]
        else:
            command = [sys.executable, __file__, "--serve", artifact, contender.engine, threads]
            command += [json.dumps(dict(contender.options))]
        self._process = subprocess.Popen(
            [str(c) for c in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.start = self._read()
        self.replies: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
        self.drift: list[tuple[float, float]] = []

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                reply: dict[str, Any] = json.loads(line)
                return reply
        raise SystemExit(f"{self.contender.name} ended with {self._process.wait()}")

    def ask(self, npz: Path, out: Path, case: str = "") -> Array:
        """The chunk; the times go to `replies[case]`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"npz": str(npz), "out": str(out)}) + "\n")
        self._process.stdin.flush()
        reply = self._read()
        if case:
            self.replies[case].append(reply)
        chunk: Array = np.load(out)
        return chunk

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


# --- observations ----------------------------------------------------------------------------------------------


def observation(
    rng: np.random.Generator, cameras: Sequence[str], state_dim: int, noise: tuple[int, int]
) -> dict[str, Any]:
    """Blocky pictures of 480 x 640 (noise of single pixels would be smoothed away by the resize)."""
    small = {f"image/{c}": rng.integers(0, 256, (10, 13, 3), dtype=np.uint8) for c in cameras}
    pictures = {k: v.repeat(50, 0).repeat(50, 1)[:480, :640].copy() for k, v in small.items()}
    state = (rng.standard_normal(state_dim) * 12).astype(np.float32)
    return {**pictures, "state": state, "noise": rng.standard_normal(noise).astype(np.float32), "task": TASK}


def changed(base: Mapping[str, Any], new: Mapping[str, Any], case: str) -> dict[str, Any]:
    """`new`, but what the case keeps is the base's: all cameras but the last, or all of them."""
    pictures = [k for k in base if k.startswith("image/")]
    kept = pictures if case == "state" else pictures[:-1]
    return {**new, **{k: base[k] for k in kept}}


# --- the run ---------------------------------------------------------------------------------------------------


def run(workers: Sequence[Worker], rounds: int, io: Any, work: Path) -> list[float]:
    """Fills the workers; returns the load average at the start of every round."""
    rng = np.random.default_rng(0)
    cameras, shape = [c.key for c in io.cameras], (io.chunk_size, io.max_action_dim)
    npz, loads = work / "observation.npz", []
    for turn in range(-1, rounds):  # the first turn warms up and is not counted
        loads.append(os.getloadavg()[0])
        base = observation(rng, cameras, io.state_dim, shape)
        for case in CASES:
            given = base
            if case != "cold":
                given = base = changed(base, observation(rng, cameras, io.state_dim, shape), case)
            np.savez(npz, **given)
            reference: Array | None = None
            for worker in workers:
                if case != "cold" and worker.artifact is None:
                    continue
                chunk = worker.ask(npz, work / "chunk.npy", case if turn >= 0 else "")
                if case == "cold" and worker.contender.name == BASE:
                    reference = chunk
                elif case == "cold" and reference is not None:
                    worker.drift.append(drift(chunk, reference))
        print(f"round {turn + 1} of {rounds} done, load {loads[-1]:.1f}", file=sys.stderr, flush=True)
    return loads[1:]


def drift(chunk: Array, reference: Array) -> tuple[float, float]:
    """(relative L2, largest difference) over the columns that both give."""
    columns = min(chunk.shape[1], reference.shape[1])
    a, b = chunk[:, :columns].astype(np.float64), reference[:, :columns].astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)), float(np.abs(a - b).max())


def row(worker: Worker, base: Worker) -> dict[str, Any]:
    def median(of: Worker, case: str, key: str) -> float:
        return float(np.median([r[key] for r in of.replies[case]]))

    c = worker.contender
    result: dict[str, Any] = {"name": c.name, "target": c.target, "engine": c.engine, "options": dict(c.options)}
    for case in CASES:
        if worker.replies[case]:
            of_base = {k: round(median(worker, case, k) / median(base, "cold", k), 3) for k in ("cpu_s", "wall_s")}
            times = {k: [round(r[k], 3) for r in worker.replies[case]] for k in ("cpu_s", "wall_s")}
            result[case] = {"ratio": of_base, **times, "stages_ms": worker.replies[case][-1].get("stages_ms", {})}
    if "camera" in result:
        cold = median(worker, "cold", "cpu_s")
        result["of_cold"] = {k: round(median(worker, k, "cpu_s") / cold, 3) for k in ("camera", "state")}
        result["mb"] = round(size_mb(worker.artifact), 1) if worker.artifact else None
    result["relative_l2"] = max((d[0] for d in worker.drift), default=0.0)
    result["max_abs"] = max((d[1] for d in worker.drift), default=0.0)
    result["load_s"] = round(worker.start["load_s"], 2)
    result["peak_mb"] = round(max(r["peak_mb"] for case in CASES for r in worker.replies[case]))
    return result


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    head = (
        "| form | CPU time / LeRobot | wall / LeRobot | one camera new | state new | rel. L2 | max abs | MB | peak MB |"
    )
    lines = [head, "|" + "---|" * 9]
    for r in rows:
        part = r.get("of_cold", {})
        cells = [r["name"], *(f"{r['cold']['ratio'][k]:.3f}" for k in ("cpu_s", "wall_s"))]
        cells += [f"{part[k]:.2f} x cold" if part else "" for k in ("camera", "state")]
        cells += [f"{r['relative_l2']:.1e}", f"{r['max_abs']:.1e}", str(r.get("mb", "")), str(r["peak_mb"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]), json.loads(sys.argv[5]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[c.name for c in CONTENDERS])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--checkpoint", type=Path, help="made by scripts/make_full_size.py; default: made anew")
    parser.add_argument("--work", type=Path, help="where artifacts lie or are written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        checkpoint = args.checkpoint or work / "smolvla_450m"
        if not checkpoint.exists():
            subprocess.run([sys.executable, ROOT / "scripts" / "make_full_size.py", checkpoint], check=True)
        chosen = [c for c in CONTENDERS if c.name in {BASE, *args.only}]
        for target in dict.fromkeys(c.target for c in chosen if c.target):
            if not (work / target).exists():
                child("--compile", str(checkpoint.resolve()), target, str(work / target))
        workers = [Worker(c, checkpoint.resolve(), work / c.target if c.target else None, args.threads) for c in chosen]
        loads = run(workers, args.rounds, described(work, chosen), Path(temporary))
        rows = [row(w, workers[0]) for w in workers]
        for w in workers:
            w.close()
    report = {
        "what": "SmolVLA 450.0M, 2 cameras of 480x640 (512 px), 10 steps; CPU time and wall time over LeRobot fp32",
        "command": "python benchmarks/smolvla_cpu.py " + f"--rounds {args.rounds} --threads {args.threads}",
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "threads": args.threads,
        "load_average": [round(x, 1) for x in loads],
        "machine": machine(),
        "versions": versions() | {"lerobot_torch": workers[0].start.get("torch", "")},
        "rows": rows,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def described(work: Path, chosen: Sequence[Contender]) -> Any:
    """The io description of the first artifact."""
    from vlac.artifact import open_artifact

    return open_artifact(next(work / c.target for c in chosen if c.target)).io


if __name__ == "__main__":
    main()
