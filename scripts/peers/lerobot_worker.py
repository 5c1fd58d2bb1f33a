"""LeRobot as a contender of benchmarks/smolvla_cpu.py: run with the Python of .venv-lerobot (see lerobot.sh).

python scripts/peers/lerobot_worker.py CHECKPOINT THREADS fp32|bf16

Reads one JSON request per line, {"npz": observation, "out": where the normalised chunk goes}, answers with one JSON
line of seconds. Only the network is timed (predict_action_chunk), not LeRobot's processors.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost ten times when cores are shared
import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.processor import PolicyProcessorPipeline


def frame_of(arrays: Any) -> dict[str, Any]:
    frame: dict[str, Any] = {
        key.removeprefix("image/"): torch.from_numpy(arrays[key]).permute(2, 0, 1).to(torch.float32) / 255
        for key in arrays.files
        if key.startswith("image/")
    }
    return frame | {"observation.state": torch.from_numpy(arrays["state"]), "task": str(arrays["task"])}


def main() -> None:
    checkpoint, threads, precision = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(threads)
    began = time.perf_counter()
    with contextlib.chdir(checkpoint):
        policy = SmolVLAPolicy.from_pretrained(".").to(torch.float32).eval()
        before = PolicyProcessorPipeline.from_pretrained(".", config_filename="policy_preprocessor.json")
    print(json.dumps({"load_s": time.perf_counter() - began, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with np.load(request["npz"]) as arrays:
            batch, noise = before(frame_of(arrays)), torch.from_numpy(arrays["noise"][None])
        policy.reset()
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            chunk = policy.predict_action_chunk(batch, noise=noise)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        np.save(request["out"], chunk[0].to(torch.float32).numpy())
        peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        print(json.dumps({"wall_s": wall, "cpu_s": cpu, "peak_mb": int(peak.split()[1]) * 1024 / 1e6}), flush=True)


if __name__ == "__main__":
    main()
