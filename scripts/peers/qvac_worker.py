"""QVAC's engine as a contender of `vlac bench --peers`: one process of Bare that stays, fed by this one.

python scripts/peers/qvac_worker.py MODEL.gguf THREADS

Reads one JSON request per line, {"npz": inputs that LeRobot prepared, "out": where the chunk goes}, answers with one
JSON line of seconds. The engine takes as many threads as it sees cores; it is shown THREADS of them.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

INSTALLED = Path(__file__).resolve().parents[2] / ".venv-qvac"


def used(pid: int) -> tuple[float, float, float]:
    """(CPU seconds, peak MB, private MB) of a process, or of the one that it started: `bare` is a launcher."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    peak, private = (int(status[k].split()[0]) * 1024 / 1e6 for k in ("VmHWM", "RssAnon"))
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), peak, private


def write(folder: Path, name: str, array: np.ndarray) -> str:
    path = folder / name
    path.write_bytes(np.ascontiguousarray(array).tobytes())
    return str(path)


def call_of(arrays: np.lib.npyio.NpzFile, folder: Path) -> tuple[dict[str, object], int]:
    """The files of one call, and how many actions a chunk has."""
    images = [arrays[k] for k in sorted(k for k in arrays.files if k.startswith("image"))]
    kinds = {"state": "<f4", "tokens": "<i4", "mask": "u1", "noise": "<f4"}
    call: dict[str, object] = {k: write(folder, k, arrays[k].reshape(-1).astype(t)) for k, t in kinds.items()}
    call["images"] = [write(folder, f"image{i}", x.astype("<f4")) for i, x in enumerate(images)]
    return call | {"size": images[0].shape[-1], "out": str(folder / "out")}, arrays["noise"].shape[-2]


def main() -> None:
    model, threads = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:threads])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="vlac-qvac-") as temporary:
        folder, began = Path(temporary), time.perf_counter()
        (folder / "job.json").write_text(json.dumps({"serve": str(model)}))
        command = [str(INSTALLED / "node_modules" / ".bin" / "bare"), "run.js", str(folder / "job.json")]
        with subprocess.Popen(
            command, cwd=INSTALLED, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as engine:
            assert engine.stdin is not None and engine.stdout is not None
            if not engine.stdout.readline():
                sys.exit(f"QVAC's engine ended with {engine.wait()}")
            print(json.dumps({"load_s": time.perf_counter() - began}), flush=True)
            for line in sys.stdin:
                request = json.loads(line)
                with np.load(request["npz"]) as arrays:
                    call, rows = call_of(arrays, folder)
                before = used(engine.pid)[0]
                engine.stdin.write(json.dumps(call) + "\n")
                engine.stdin.flush()
                reply = engine.stdout.readline()
                if not reply:
                    sys.exit(f"QVAC's engine ended with {engine.wait()}")
                cpu, peak, private = used(engine.pid)
                actions = np.fromfile(folder / "out", "<f4").reshape(rows, -1)
                np.save(request["out"], actions)
                seconds = {"wall_s": json.loads(reply)["ms"] / 1e3, "cpu_s": cpu - before}
                print(json.dumps(seconds | {"peak_mb": peak, "private_mb": private}), flush=True)


if __name__ == "__main__":
    main()
