"""lerobot-eval's own rollout of push-cubes with policy type "vlac"; run by push_cubes_plugin.py in .venv-lerobot.

python benchmarks/push_cubes_plugin_lerobot.py POLICY_FOLDER SEED EPISODES [ENGINE]

The sampler's noise is what every driver of vlac meets at that moment; all else is what lerobot-eval does.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.scripts.lerobot_eval import rollout
from lerobot_policy_vlac.modeling_vlac import VlacPolicy

from vlac.drivers import noise_at
from vlac.sim import PushCubes


class World(gymnasium.Wrapper[Any, Any, Any, Any]):
    """push-cubes under the names that LeRobot asks environments for."""

    @property
    def task_description(self) -> str:
        return str(self.env.unwrapped.instruction)

    task = task_description

    @property
    def _max_episode_steps(self) -> int:
        return int(self.env.unwrapped.max_steps)

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "is_success": info["success"]}


class Paired(VlacPolicy):
    """The plugin's policy; where it would draw noise it takes that of (seed of the episode, step)."""

    seed = 0
    step = 0

    def reset(self) -> None:
        super().reset()
        self.step = 0

    def select_action(self, batch: dict[str, Any], noise: Any = None, **kwargs: Any) -> Any:
        if not self._left:
            io = self.session.io
            noise = torch.from_numpy(noise_at((self.seed, self.step), io.noise_shape))[None]
        self.step += 1
        return super().select_action(batch, noise=noise, **kwargs)


def main(folder: str, seed: int, episodes: int, engine: str | None) -> list[dict[str, Any]]:
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = Path(folder)
    config.engine, config.threads = engine, 1
    policy = Paired.from_pretrained(folder, config=config)
    before, after = make_pre_post_processors(config, pretrained_path=folder)
    nothing = PolicyProcessorPipeline[Any, Any](steps=[])
    env = gymnasium.vector.SyncVectorEnv([lambda: World(PushCubes())])
    rows = []
    for s in range(seed, seed + episodes):
        policy.seed = s
        with torch.inference_mode():
            said = rollout(env, policy, nothing, lambda x: x, before, after, seeds=[s])
        success = bool(said["success"].any())
        done = said["done"][0].int()
        rows.append({"seed": s, "success": success, "steps": int(done.argmax()) + 1 if done.any() else len(done)})
    env.close()
    return rows


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # LeRobot prints while it works
        found = main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)
    print(json.dumps(found))
