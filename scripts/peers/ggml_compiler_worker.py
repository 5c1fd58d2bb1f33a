"""ggml-compiler as a contender of `vlac bench --peers`: run with the Python of .venv-ggml-compiler.

python scripts/peers/ggml_compiler_worker.py MODEL.gguf THREADS

Reads one JSON request per line, {"npz": inputs that LeRobot prepared, "out": where the chunk goes}, answers with one
JSON line of seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from ggml_compiler import Session


def resident_mb(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def main() -> None:
    began = time.perf_counter()
    session = Session(sys.argv[1], backend="cpu", n_threads=int(sys.argv[2]))
    print(json.dumps({"load_s": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with np.load(request["npz"]) as arrays:
            given = {t.name: arrays[t.name].astype(np.float32) for t in session.inputs if t.name != "tokens"}
            given["tokens"] = arrays["tokens"].astype(np.int32)
        wall, cpu = time.perf_counter(), time.process_time()
        chunk = next(iter(session.run(**given).values()))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        np.save(request["out"], chunk.reshape(chunk.shape[-2:]))
        reply = {"wall_s": wall, "cpu_s": cpu, "peak_mb": resident_mb("VmHWM"), "private_mb": resident_mb("RssAnon")}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
