"""QVAC's real engine for tests: sets up inputs as it wants them and runs it in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vlac.graph import Program
from vlac.io import IO
from vlac.runtime.inputs import prepare

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = ROOT / ".venv-qvac"
BARE = INSTALLED / "node_modules" / ".bin" / "bare"

Array = np.ndarray[Any, Any]


@lru_cache
def environment() -> dict[str, str]:
    """For the engine's process: with scripts/peers/qvac_one_thread.c where a C compiler is, else as it is (slower)."""
    source, made = ROOT / "scripts" / "peers" / "qvac_one_thread.c", INSTALLED / "one_thread.so"
    compiler = shutil.which("cc")
    if compiler and (not made.exists() or made.stat().st_mtime < source.stat().st_mtime):
        built = made.with_name(f"one_thread.{os.getpid()}")
        done = subprocess.run([compiler, "-O2", "-fPIC", "-shared", "-o", str(built), str(source), "-ldl"], check=False)
        if done.returncode == 0:
            built.replace(made)
    return {**os.environ, **({"LD_PRELOAD": str(made)} if made.exists() else {})}


def reason() -> str:
    """Why the engine cannot run here, empty when it can."""
    return "" if BARE.exists() else "QVAC's engine is not set up (scripts/peers/qvac.sh)"


def call(
    io: IO, tokenizer: bytes | None, program: Program, *, prompt_length: int = 0, **observation: Any
) -> dict[str, Array]:
    """One observation as the engine's arrays: pictures, state, tokens and mask as vlac's own runtime makes them.

    prompt_length: pads the prompt to it (pi0.5's engine takes no shorter one).
    """
    ready = prepare(io, tokenizer, program, **observation)
    valid = ready.env["image_valid"].reshape(-1)
    more = max(0, prompt_length - len(ready.env["tokens"]))
    return {
        "images": ready.env["pixels"][valid],
        "state": ready.env["state"].reshape(-1) if "state" in ready.env else np.zeros(0, np.float32),
        "tokens": np.pad(ready.env["tokens"].astype(np.int32), (0, more)),
        "mask": np.pad(ready.env["token_valid"].astype(np.uint8), (0, more)),
        "noise": ready.env["noise"],
    }


def run(model: Path, calls: Sequence[dict[str, Array]], io: IO, folder: Path) -> tuple[list[Array], dict[str, Any]]:
    """(normalised actions [chunk_size, action_dim] per call, the engine's hparams). CalledProcessError if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    job: dict[str, Any] = {"model": str(model.resolve()), "size": io.image_size, "calls": []}
    for i, values in enumerate(calls):
        row: dict[str, Any] = {"out": str(folder / f"{i}.out"), "images": []}
        for name, array in values.items():
            parts = array if name == "images" else [array]
            for k, part in enumerate(parts):
                file = folder / f"{i}.{name}.{k}"
                file.write_bytes(np.ascontiguousarray(part).tobytes())
                row[name] = [*row["images"], str(file)] if name == "images" else str(file)
        job["calls"].append(row)
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [str(BARE), "run.js", str(folder / "job.json")],
        cwd=INSTALLED,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"QVAC's engine ended with {done.returncode}: {done.stderr[-600:]}")
    answers = [np.fromfile(row["out"], "<f4").reshape(io.chunk_size, -1)[:, : io.action_dim] for row in job["calls"]]
    return answers, json.loads(done.stdout.strip().splitlines()[-1])["hparams"]


def probe(models: Sequence[Path], folder: Path, limit: float = 1500) -> dict[Path, dict[str, Any]]:
    """Loads and runs each file in the engine: {"ran": values, "finite": bool}, {"refused": why}, or {"died": code}.

    Where a file ended the engine's process the others go on in a new one. {"slow": limit} is one that was still running
    after `limit` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[Path, dict[str, Any]] = {}
    waiting = [m.resolve() for m in models]
    job, said = folder / "probe.json", folder / "probe.out"
    while waiting:
        job.write_text(json.dumps({"probe": [str(m) for m in waiting]}))
        with said.open("w") as out:
            try:
                code = subprocess.run(
                    [str(BARE), "run.js", str(job)],
                    cwd=INSTALLED,
                    env=environment(),
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                ).returncode
                outcome: dict[str, Any] = {"died": code}
            except subprocess.TimeoutExpired:
                outcome = {"slow": limit}
        rows = [json.loads(line) for line in said.read_text(errors="replace").splitlines() if line.startswith('{"')]
        ended = {Path(row["end"]): {k: v for k, v in row.items() if k != "end"} for row in rows if "end" in row}
        begun = [Path(row["begin"]) for row in rows if "begin" in row]
        if not begun:
            raise RuntimeError(f"QVAC's engine did not start: {outcome} {said.read_text(errors='replace')[-600:]}")
        # a process that was stopped while it worked through many: none of them was slow by itself
        late = "slow" in outcome and bool(ended)
        found |= ended | {m: outcome for m in begun if m not in ended and not late}
        waiting = [m for m in waiting if m not in found]
    return found
