"""`vlac prepare`: what an engine makes of an artifact while loading is kept beside it, for this machine.

ONNX Runtime: weights packed as its kernels want them, which are mapped then instead of copied. OpenVINO: its compiled
models. Both are measured before and after, each in a process of its own, and must answer the same bits:
python -m vlac.prepare PATH ENGINE THREADS PREPARED.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vlac.artifact import PREPARED, open_artifact
from vlac.engines.base import get_engine
from vlac.errors import EngineError, Unsupported
from vlac.registry import Progress, silent
from vlac.runtime.session import choose_engine

ENGINES = ("onnxruntime", "openvino")


def prepare(
    path: str | Path, engine: str | None = None, threads: int | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Makes or renews what is prepared for one engine, the artifact's best without a name.

    Returns: engine, folder, bytes on disk, and "before" and "after": load_s (wall), load_cpu_s, private_mb and peak_mb
    after one act.

    Raises: Unsupported for an artifact that gains nothing (GGUF files are used where they are mapped), EngineError
    where nothing can be written or the engine fails.
    """
    artifact = open_artifact(path)
    if "tensorrt" in artifact.manifest:
        raise Unsupported(
            f"{artifact.path} is for TensorRT, whose plans take the place of preparing",
            remedy=f"run `vlac build {artifact.path}` on the machine that will run it",
        )
    name = choose_engine(artifact, engine).name
    if artifact.container != "folder" or name not in ENGINES:
        raise Unsupported(
            f"{artifact.path} on engine {name} needs no preparing: weights are used where they are mapped",
            remedy=f"prepare is for artifacts of the onnx and openvino targets, on {' or '.join(ENGINES)}",
        )
    progress("measuring as it is", 0, 3)
    before = _measured(artifact.path, name, threads, prepared=False)
    progress("preparing", 1, 3)
    get_engine(name).open(artifact, threads=threads, options={"prepare": True}).close()
    progress("measuring again", 2, 3)
    after = _measured(artifact.path, name, threads, prepared=True)
    folder = artifact.path / PREPARED / name
    if before.pop("chunk") != after.pop("chunk"):
        shutil.rmtree(folder, ignore_errors=True)
        raise EngineError(
            f"{name} answers otherwise with what it prepared of {artifact.path}; it was removed again",
            remedy="use the artifact as it is; this is a defect of that version of the engine",
        )
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return {"engine": name, "folder": str(folder), "bytes": size, "before": before, "after": after}


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"{report['folder']}: {report['bytes'] / 1e6:.0f} MB for {report['engine']} on this machine"]
    for when in ("before", "after"):
        r = report[when]
        lines.append(
            f"  {when:6s} load {r['load_s']:.2f} s ({r['load_cpu_s']:.2f} s of CPU), "
            f"{r['private_mb']:.0f} MB private after an act, peak {r['peak_mb']:.0f} MB"
        )
    return "\n".join(lines)


def _measured(path: Path, engine: str, threads: int | None, *, prepared: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "vlac.prepare", str(path), engine, str(threads or 0), str(int(prepared))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"{path} does not run on {engine}: {done.stderr.strip()[-800:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """The measured process."""
    from vlac.bench_worker import inputs_of
    from vlac.peers.serve import resident_mb
    from vlac.runtime.session import load

    path, engine, threads, prepared = sys.argv[1:5]
    wall, cpu = time.perf_counter(), time.process_time()
    policy = load(path, engine=engine, threads=int(threads) or None, options={"prepared": bool(int(prepared))})
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    chunk = policy.act(**inputs_of(path)[0])
    memory = {"private_mb": resident_mb("RssAnon"), "peak_mb": resident_mb("VmHWM")}
    digest = hashlib.sha256(chunk.tobytes()).hexdigest()
    print(json.dumps({"load_s": wall, "load_cpu_s": cpu, **memory, "chunk": digest}))


if __name__ == "__main__":
    main()
