"""LeRobot's own real-time chunking, for tests: run with the Python of .venv-lerobot (see lerobot.sh).

python scripts/peers/lerobot_rtc.py OUT

Writes OUT/NAME.npz for each golden checkpoint of a flow policy: chunks that LeRobot's policy makes with its rtc_config
("NAME/chunk", normalised) from what is left of an earlier one ("prev"), and OUT/queues.json: random operations on its
ActionQueue and on its RobotClient's queue, with what each of them answered.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import types
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from lerobot.async_inference.configs import AGGREGATE_FUNCTIONS
from lerobot.async_inference.helpers import TimedAction
from lerobot.async_inference.robot_client import RobotClient
from lerobot.configs import RTCAttentionSchedule
from lerobot.policies.rtc import ActionQueue, RTCConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.processor import PolicyProcessorPipeline

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
POLICIES = {"smolvla_tiny": "smolvla", "smolvla_letterbox": "smolvla", "pi0_tiny": "pi0", "pi05_tiny": "pi05"}
CASES = (  # schedule, inference_delay, execution_horizon, first row that is left, max_guidance_weight
    ("LINEAR", 2, 8, 3, 10.0),
    ("EXP", 1, 6, 2, 10.0),
    ("ONES", 2, 5, 2, 10.0),
    ("ZEROS", 3, 10, 1, 10.0),
    ("LINEAR", 0, 10, 6, 2.5),
)


def policy_class(kind: str, dims: dict[str, Any]) -> Any:
    """LeRobot's policy class; of pi0 and pi0.5 with the sizes that their source has as constants replaced by `dims`."""
    if kind == "smolvla":
        return SmolVLAPolicy
    name = f"lerobot.policies.{kind}.modeling_{kind}"
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    vision = dims["vision"]
    sizes = "; ".join(f"vlm_config_hf.vision_config.{k} = {v}" for k, v in vision.items() if k != "image_size")
    text = Path(spec.origin).read_text(encoding="utf-8").replace("257152", str(dims["vocab"]))
    text = text.replace("vlm_config_hf.vision_config.intermediate_size = 4304", sizes)
    text = text.replace("projection_dim = 2048", f"projection_dim = {dims['vlm']['width']}")
    module = types.ModuleType(name)
    module.__dict__.update(__package__=name.rpartition(".")[0], __spec__=spec, __file__=spec.origin)
    sys.modules[name] = module
    exec(compile(text, spec.origin, "exec"), module.__dict__)
    made = {"gemma_2b": dims["vlm"], "gemma_300m": dims["expert"]}
    module.__dict__["get_gemma_config"] = lambda variant: module.__dict__["GemmaConfig"](**made[variant])
    return getattr(module, {"pi0": "PI0Policy", "pi05": "PI05Policy"}[kind])


def chunks(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """What the policy answers to every observation and case."""
    folder = GOLDEN / name
    told = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    arrays = dict(np.load(folder / "golden.npz"))
    answers: dict[str, np.ndarray[Any, Any]] = {}
    with contextlib.chdir(folder / "checkpoint"):
        policy = policy_class(POLICIES[name], told["dims"]).from_pretrained(".").to(torch.float32).eval()
        before = PolicyProcessorPipeline.from_pretrained(".", config_filename="policy_preprocessor.json")
        for i, task in enumerate(told["tasks"]):
            mine = {k.removeprefix(f"obs{i}/"): v for k, v in arrays.items() if k.startswith(f"obs{i}/")}
            frame: dict[str, Any] = {
                k.removeprefix("image/"): torch.from_numpy(v).permute(2, 0, 1).to(torch.float32) / 255
                for k, v in mine.items()
                if k.startswith("image/")
            }
            frame |= {"observation.state": torch.from_numpy(mine["state"]), "task": task}
            batch, noise = before(frame), torch.from_numpy(mine["noise"])
            policy.config.rtc_config = None
            policy.init_rtc_processor()
            policy.reset()
            plain = policy.predict_action_chunk(dict(batch), noise=noise).numpy()
            assert np.abs(plain - mine["chunk_normalised"]).max() <= 1e-5 * np.abs(plain).max(), name
            # another start of the same observation: a chunk that differs, as the one before would
            earlier = policy.predict_action_chunk(dict(batch), noise=noise.flip(1)).numpy()
            for n, (schedule, delay, horizon, first, most) in enumerate(CASES):
                config = RTCConfig(True, RTCAttentionSchedule(schedule), most, horizon)
                policy.config.rtc_config = config
                policy.init_rtc_processor()
                policy.reset()
                left = torch.from_numpy(earlier[:, first:])
                made = policy.predict_action_chunk(
                    dict(batch),
                    noise=noise,
                    inference_delay=delay,
                    prev_chunk_left_over=left,
                    execution_horizon=horizon,
                )
                answers[f"obs{i}/{n}/prev"], answers[f"obs{i}/{n}/chunk"] = left[0].numpy(), made[0].numpy()
    return answers


def merged(rng: np.random.Generator, replace: bool) -> dict[str, Any]:
    """Random operations on LeRobot's ActionQueue."""
    queue = ActionQueue(RTCConfig(enabled=replace))
    steps: list[dict[str, Any]] = []
    for turn in range(40):
        if rng.random() < 0.25:
            rows, delay = int(rng.integers(1, 9)), int(rng.integers(-3, 11))
            raw = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2) + 100 * turn
            queue.merge(torch.from_numpy(raw), torch.from_numpy(raw * -2), delay)
            steps.append({"merge": raw.tolist(), "delay": delay})
        elif rng.random() < 0.03:
            queue.clear()
            steps.append({"clear": True})
        else:
            action = queue.get()
            steps.append({"got": None if action is None else action.tolist()})
        left, done = queue.get_left_over(), queue.get_processed_left_over()
        steps[-1] |= {
            "size": queue.qsize(),
            "index": queue.get_action_index(),
            "left": None if left is None else left.tolist(),
            "processed": None if done is None else done.tolist(),
        }
    return {"replace": replace, "steps": steps}


def aggregated(rng: np.random.Generator, name: str) -> dict[str, Any]:
    """Random operations on the queue of LeRobot's RobotClient, of which only the queue is made."""
    client = types.SimpleNamespace(
        action_queue=Queue(), action_queue_lock=threading.Lock(), latest_action=-1, latest_action_lock=threading.Lock()
    )
    steps: list[dict[str, Any]] = []
    for _ in range(40):
        if rng.random() < 0.3:
            first, rows = max(0, client.latest_action + int(rng.integers(-4, 5))), int(rng.integers(1, 9))
            chunk = rng.standard_normal((rows, 2)).astype(np.float32)
            actions = [TimedAction(0.0, first + i, torch.from_numpy(row)) for i, row in enumerate(chunk)]
            RobotClient._aggregate_action_queues(client, actions, AGGREGATE_FUNCTIONS[name])
            steps.append({"put": chunk.tolist(), "first": first})
        elif client.action_queue.empty():
            steps.append({"got": None})
        else:
            action = client.action_queue.get_nowait()
            client.latest_action = action.get_timestep()
            steps.append({"got": [action.get_timestep(), action.get_action().tolist()]})
        steps[-1]["size"] = client.action_queue.qsize()
    return {"aggregate": name, "steps": steps}


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rng = np.random.default_rng(15)
    queues = {
        "merged": [merged(rng, replace) for replace in (True, False, True, False)],
        "aggregated": [aggregated(rng, name) for name in AGGREGATE_FUNCTIONS for _ in range(2)],
    }
    (out / "queues.json").write_text(json.dumps(queues, separators=(",", ":")) + "\n", encoding="utf-8")
    for name in POLICIES:
        np.savez_compressed(out / f"{name}.npz", **chunks(name))
        print(f"{name}: answered", flush=True)


if __name__ == "__main__":
    main()
