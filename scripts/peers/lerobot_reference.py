"""LeRobot's own answers, for tests: run with the Python of .venv-lerobot (see lerobot.sh).

python scripts/peers/lerobot_reference.py WORK

WORK/cases.json is a list of cases:
    name          folder in WORK that receives the checkpoint (unless it is there already) and the answers
    shape         fields of smolvla_checkpoint.Shape, when LeRobot is to make the checkpoint and save it
    seed          of weights, statistics and observations
    tasks         one instruction per observation
    images        camera name -> [height, width] of the raw pictures; declared cameras left out are absent
Per case it writes golden.npz and golden.json beside `checkpoint/`, in the layout of tests/golden.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from smolvla_checkpoint import Shape, drawn, policy_config, statistics, tensors, write_vlm

Array = np.ndarray[Any, Any]


def make(folder: Path, shape: Shape, seed: int) -> None:
    """A checkpoint built and saved by LeRobot's classes, with seeded weights put into its state dict."""
    folder.mkdir(parents=True)
    write_vlm(folder / "vlm", shape)
    with contextlib.chdir(folder):
        config = lerobot_config(policy_config(shape))
        policy = SmolVLAPolicy(config)
        state = policy.state_dict()
        expected = tensors(shape)
        found = {k: tuple(v.shape) for k, v in state.items()}
        assert found == expected, sorted(set(found.items()) ^ set(expected.items()))
        draw = drawn(seed)
        policy.load_state_dict({k: torch.from_numpy(draw(k, v)) for k, v in found.items()})
        policy.save_pretrained(".")
        stats: dict[str, dict[str, torch.Tensor]] = {}
        for key, values in statistics(shape, seed).items():
            feature, stat = key.rsplit(".", 1)
            stats.setdefault(feature, {})[stat] = torch.from_numpy(values)
        for processor in make_smolvla_pre_post_processors(config, stats):
            processor.save_pretrained(".")


def lerobot_config(config: dict[str, Any]) -> SmolVLAConfig:
    features = {
        side: {name: PolicyFeature(FeatureType(f["type"]), tuple(f["shape"])) for name, f in config.pop(side).items()}
        for side in ("input_features", "output_features")
    }
    modes = {k: NormalizationMode(v) for k, v in config.pop("normalization_mapping").items()}
    resize = config.pop("resize_imgs_with_padding")
    config.pop("type")
    return SmolVLAConfig(
        **config,
        **features,
        normalization_mapping=modes,
        resize_imgs_with_padding=tuple(resize) if resize else None,
    )


def observations(case: dict[str, Any], config: SmolVLAConfig) -> list[dict[str, Array]]:
    """Raw pictures, a raw state and noise for each task."""
    rng = np.random.default_rng([case["seed"], 99])
    result = []
    for _ in case["tasks"]:
        one: dict[str, Array] = {}
        for name, (height, width) in case["images"].items():
            cell = max(3, min(height, width) // 9)
            small = rng.integers(0, 256, (height // cell + 1, width // cell + 1, 3))
            picture = small.repeat(cell, 0).repeat(cell, 1)[:height, :width]
            one[f"image/observation.images.{name}"] = picture.astype(np.uint8)
        one["state"] = (rng.standard_normal(config.robot_state_feature.shape[0]) * 12).astype(np.float32)
        one["noise"] = rng.standard_normal((1, config.chunk_size, config.max_action_dim)).astype(np.float32)
        result.append(one)
    return result


def run(case: dict[str, Any], work: Path) -> None:
    """Loads the checkpoint from disk as a user would, and answers every observation."""
    folder = work / case["name"]
    with contextlib.chdir(folder / "checkpoint"):
        policy = SmolVLAPolicy.from_pretrained(".").to(torch.float32).eval()
        before = PolicyProcessorPipeline.from_pretrained(".", config_filename="policy_preprocessor.json")
        after = PolicyProcessorPipeline.from_pretrained(
            ".",
            config_filename="policy_postprocessor.json",
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        )
        arrays: dict[str, Array] = {}
        for i, (one, task) in enumerate(zip(observations(case, policy.config), case["tasks"], strict=True)):
            frame: dict[str, Any] = {
                key.removeprefix("image/"): torch.from_numpy(value).permute(2, 0, 1).to(torch.float32) / 255
                for key, value in one.items()
                if key.startswith("image/")
            }
            frame |= {"observation.state": torch.from_numpy(one["state"]), "task": task}
            batch = before(frame)
            policy.reset()
            chunk = policy.predict_action_chunk(batch, noise=torch.from_numpy(one["noise"]))
            one["tokens"] = batch["observation.language.tokens"].numpy()
            one["mask"] = batch["observation.language.attention_mask"].numpy()
            one["chunk_normalised"] = chunk.numpy()
            one["chunk_robot"] = after(chunk).numpy()
            arrays |= {f"obs{i}/{key}": value for key, value in one.items()}
    np.savez(folder / "golden.npz", **arrays)
    (folder / "golden.json").write_text(json.dumps({"name": case["name"], "tasks": case["tasks"]}), encoding="utf-8")


def main() -> None:
    work = Path(sys.argv[1]).resolve()
    torch.manual_seed(0)
    for case in json.loads((work / "cases.json").read_text(encoding="utf-8")):
        checkpoint = work / case["name"] / "checkpoint"
        if not checkpoint.exists():
            make(checkpoint, Shape.from_json(case["shape"]), case["seed"])
        run(case, work)
        print(f"{case['name']}: answered", flush=True)


if __name__ == "__main__":
    main()
