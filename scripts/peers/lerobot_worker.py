"""LeRobot as a contender of `vlac bench --peers`: run with the Python of .venv-lerobot (see lerobot.sh).

python scripts/peers/lerobot_worker.py CHECKPOINT THREADS

Reads one JSON request per line, {"npz": observation, "out": where the normalised chunk goes, "mode": fp32|bf16|compile,
"prepared": where to leave the preprocessed inputs, for peers that want them}, answers with one JSON line of seconds.
bf16 is autocast; compile is torch.compile with its defaults, whose compiling falls into the first request. Only the
network is timed (predict_action_chunk), not LeRobot's processors.
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
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS


def frame_of(arrays: Any) -> dict[str, Any]:
    frame: dict[str, Any] = {
        key.removeprefix("image/"): torch.from_numpy(arrays[key]).permute(2, 0, 1).to(torch.float32) / 255
        for key in arrays.files
        if key.startswith("image/")
    }
    return frame | {"observation.state": torch.from_numpy(arrays["state"]), "task": str(arrays["task"])}


def save_prepared(policy: SmolVLAPolicy, batch: dict[str, Any], noise: torch.Tensor, path: str) -> None:
    """What sample_actions is given, as image0, image1, ..., tokens, mask, state, noise."""
    images, _ = policy.prepare_images(batch)
    arrays = {f"image{i}": x.numpy() for i, x in enumerate(images)}
    arrays |= {"tokens": batch[OBS_LANGUAGE_TOKENS].numpy(), "mask": batch[OBS_LANGUAGE_ATTENTION_MASK].numpy()}
    np.savez(path, **arrays, state=policy.prepare_state(batch).numpy(), noise=noise.numpy())


def peak_mb() -> float:
    peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 / 1e6


def main() -> None:
    checkpoint, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    began = time.perf_counter()
    with contextlib.chdir(checkpoint):
        policy = SmolVLAPolicy.from_pretrained(".").to(torch.float32).eval()
        before = PolicyProcessorPipeline.from_pretrained(".", config_filename="policy_preprocessor.json")
    print(json.dumps({"load_s": time.perf_counter() - began, "torch": torch.__version__}), flush=True)
    eager = policy.model.sample_actions
    samplers = {"fp32": eager, "bf16": eager, "compile": torch.compile(eager)}
    for line in sys.stdin:
        request = json.loads(line)
        mode = request.get("mode", "fp32")
        with np.load(request["npz"]) as arrays:
            batch, noise = before(frame_of(arrays)), torch.from_numpy(arrays["noise"][None])
        policy.reset()
        if "prepared" in request:
            save_prepared(policy, batch, noise, request["prepared"])
        policy.model.sample_actions = samplers[mode]
        try:
            wall, cpu = time.perf_counter(), time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "bf16"):
                chunk = policy.predict_action_chunk(batch, noise=noise)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        except Exception as error:  # a compiler may fail in any way; the other modes go on
            print(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}), flush=True)
            continue
        np.save(request["out"], chunk[0].to(torch.float32).numpy())
        print(json.dumps({"wall_s": wall, "cpu_s": cpu, "peak_mb": peak_mb()}), flush=True)


if __name__ == "__main__":
    main()
