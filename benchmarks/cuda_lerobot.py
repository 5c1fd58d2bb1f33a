"""LeRobot's side of benchmarks/cuda.py, in a Python that has LeRobot: CHECKPOINT FOLDER RUNS MODE [MODE ...].

Reads FOLDER/seen.npz; writes FOLDER/MODE.npy (normalised chunk) and FOLDER/lerobot.json (milliseconds). Timed is
predict_action_chunk alone, the device synchronised before and after. "bf16" is torch.autocast, "compiled" torch.compile
of sample_actions with its defaults; compiling falls into the warm-up.
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
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "peers"))
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.processor import PolicyProcessorPipeline
from lerobot_worker import frame_of

WARM_UPS = 5


def measure(policy: SmolVLAPolicy, batch: dict[str, Any], noise: torch.Tensor, bf16: bool, runs: int) -> Any:
    def once() -> tuple[float, torch.Tensor]:
        policy.reset()
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            chunk = policy.predict_action_chunk(dict(batch), noise=noise)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began), chunk

    began = time.perf_counter()
    for _ in range(WARM_UPS):
        once()
    warm = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    times, chunk = [], noise
    for _ in range(runs):
        took, chunk = once()
        times.append(took)
    points = {f"p{p}": float(np.percentile(times, p)) for p in (50, 90, 99)}
    peak = int(torch.cuda.max_memory_allocated())
    return {"warm_up_s": warm, "runs": runs, "network_ms": points, "gpu_peak_bytes": peak}, chunk


def main() -> None:
    checkpoint, folder, runs, *modes = sys.argv[1:]
    with contextlib.chdir(checkpoint):
        policy = SmolVLAPolicy.from_pretrained(".").to("cuda", torch.float32).eval()
        before = PolicyProcessorPipeline.from_pretrained(".", config_filename="policy_preprocessor.json")
    with np.load(Path(folder) / "seen.npz") as arrays:
        batch, noise = before(frame_of(arrays)), torch.from_numpy(arrays["noise"][None]).cuda()
    batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    eager = policy.model.sample_actions
    rows: dict[str, Any] = {}
    for mode in modes:
        torch.compiler.reset()
        policy.model.sample_actions = torch.compile(eager) if mode.startswith("compiled") else eager
        try:
            rows[mode], chunk = measure(policy, batch, noise, mode.endswith("bf16"), int(runs))
        except Exception as error:  # a compiler may fail in any way; the other modes go on
            rows[mode] = {"error": f"{type(error).__name__}: {error}"[:500]}
            continue
        np.save(Path(folder) / f"{mode.replace(' ', '_')}.npy", chunk[0].float().cpu().numpy())
    (Path(folder) / "lerobot.json").write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
