"""The process of one of our artifacts: python -m vlac.peers.serve ARTIFACT ENGINE OPTIONS THREADS

Reads one JSON request per line, {"npz": observation, "out": where the normalised chunk goes}, answers with one JSON
line of seconds. All of `act` is timed: pictures resized, text tokenised, actions unpacked.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np


def resident_mb(field: str) -> float:
    """A field of /proc/self/status in 10^6 bytes; 0 where there is none."""
    from vlac.machine import read_text

    for line in read_text("/proc/self/status").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def main() -> None:
    """Loads, then answers until stdin ends."""
    from vlac.runtime.observation import STATE_STEPS, apply_steps
    from vlac.runtime.session import load

    path, engine, options, threads = sys.argv[1:5]
    began, cpu = time.perf_counter(), time.process_time()
    policy = load(path, engine=engine or None, threads=int(threads), options=json.loads(options))
    began, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"load_s": began, "load_cpu_s": cpu, "info": policy.info}, default=str), flush=True)
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
        reply: dict[str, object] = {
            "wall_s": wall,
            "cpu_s": cpu,
            "peak_mb": resident_mb("VmHWM"),
            "private_mb": resident_mb("RssAnon"),
        }
        reply["stages_ms"] = {k: round(v, 1) for k, v in policy.stats.items() if k.endswith("_ms")}
        np.save(request["out"], chunk)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
