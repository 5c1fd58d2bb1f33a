"""Saves a GR00T N1.7 folder of NVIDIA's layout as LeRobot does: run with the Python of .venv-lerobot (see lerobot.sh).

python scripts/peers/lerobot_groot.py CHECKPOINT OUT TAG CAMERA,CAMERA STATE_DIM ACTION_DIM

OUT receives config.json, model.safetensors and the processors. Nothing is downloaded: the VLM's folder must lie in
CHECKPOINT.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.groot.configuration_groot import GrootConfig
from lerobot.policies.groot.modeling_groot import GrootPolicy
from lerobot.policies.groot.processor_groot import make_groot_pre_post_processors


def main() -> None:
    checkpoint, out, tag, cameras, states, actions = sys.argv[1:]
    target = Path(out).resolve()
    os.chdir(checkpoint)
    features = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 61, 83)) for name in cameras.split(",")
    }
    features["observation.state"] = PolicyFeature(FeatureType.STATE, (int(states),))
    config = GrootConfig(
        base_model_path=str(Path(checkpoint).resolve()),
        embodiment_tag=tag,
        device="cpu",
        use_bf16=False,
        input_features=features,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (int(actions),))},
    )
    policy = GrootPolicy(config)
    policy.save_pretrained(target)
    for processor in make_groot_pre_post_processors(config):
        processor.save_pretrained(target)
    print("saved", sorted(p.name for p in target.iterdir()))


if __name__ == "__main__":
    main()
