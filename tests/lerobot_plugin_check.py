"""Run by .venv-lerobot's Python: LeRobot's own way from a policy folder of type vlac to actions.

python tests/lerobot_plugin_check.py FOLDER OBSERVATIONS.npz OUT.npz
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins" / "lerobot_policy_vlac")]


class Installed(importlib.metadata.Distribution):
    """Stands for an installed distribution of the plugin, so that LeRobot finds it the way it finds any."""

    def read_text(self, filename: str) -> str | None:
        return "Metadata-Version: 2.1\nName: lerobot_policy_vlac\nVersion: 0.1.0\n" if "METADATA" in filename else None

    def locate_file(self, path: Any) -> Path:
        return ROOT / "plugins" / "lerobot_policy_vlac" / str(path)


class Finder(importlib.metadata.DistributionFinder):
    def find_distributions(self, context: Any = None) -> Any:
        return [Installed()]

    def find_spec(self, *args: Any) -> None:
        return None


def rollout(policy: Any, before: Any, after: Any, images: dict[str, Any], state: Any, steps: int) -> Any:
    """The loop of lerobot-eval over an environment that always looks the same: actions [1, steps, action_dim].

    Its own `rollout` lives in a module that wants the `datasets` package, which this environment does not have; what it
    does to an observation is LeRobot's code here as well (`preprocess_observation`, both processors, `select_action`).
    """
    from lerobot.envs.utils import preprocess_observation

    pixels = {k.split(".")[-1]: v[None] for k, v in images.items()}
    actions = []
    for _ in range(steps):
        observation = preprocess_observation({"pixels": pixels, "agent_pos": state[None].astype(np.float64)})
        observation["task"] = ["pick up the cube"]
        with torch.inference_mode():
            actions.append(after(policy.select_action(before(observation))))
    return torch.stack(actions, dim=1)


def main(folder: str, observations: str, out: str) -> None:
    sys.meta_path.append(Finder())
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    with np.load(observations) as z:
        images = {k.removeprefix("image/"): z[k] for k in z.files if k.startswith("image/")}
        state, noise = z["state"], z["noise"]
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = Path(folder)
    config.engine = "torch"
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    policy.to(config.device)
    before, after = make_pre_post_processors(config, pretrained_path=folder)

    batch: dict[str, Any] = {k: torch.from_numpy(v).permute(2, 0, 1).to(torch.float32) / 255 for k, v in images.items()}
    batch |= {"observation.state": torch.from_numpy(state), "task": "pick up the cube"}
    ready = before(batch)
    chunk = policy.predict_action_chunk(ready, noise=torch.from_numpy(noise)[None])
    policy.reset()
    rows = [after(policy.select_action(ready, noise=torch.from_numpy(noise)[None])) for _ in range(2)]

    config.seed = 7
    policy.reset()
    rolled = rollout(policy, before, after, images, state, 3)
    np.savez(out, chunk=chunk.numpy(), rows=np.stack([r.numpy() for r in rows]), rolled=rolled.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
