"""LeRobot itself in the closed loop of push_cubes.py; run with the Python of .venv-lerobot, prints JSON.

python benchmarks/push_cubes_lerobot.py POLICY SEED EPISODES
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from push_cubes_policy import load_policy

from vlac.drivers import noise_at
from vlac.environments import push_cubes
from vlac.evaluate import rollout, summary


class LeRobot:
    """The policy in a folder, loaded and run as a LeRobot user would, with the noise that every driver meets."""

    def __init__(self, folder: Path) -> None:
        self.policy = load_policy(folder)
        with contextlib.chdir(folder):
            self.before = PolicyProcessorPipeline.from_pretrained(".", config_filename="policy_preprocessor.json")
            self.after = PolicyProcessorPipeline.from_pretrained(
                ".",
                config_filename="policy_postprocessor.json",
                to_transition=policy_action_to_transition,
                to_output=transition_to_policy_action,
            )

    def act(self, observation: dict[str, Any]) -> np.ndarray[Any, Any]:
        """f32 [N, A] in the robot's units."""
        frame: dict[str, Any] = {
            key: torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
            for key, picture in observation["images"].items()
        }
        frame |= {"observation.state": torch.from_numpy(observation["state"]), "task": observation["task"]}
        config = self.policy.config
        noise = noise_at(observation["moment"], (1, config.chunk_size, config.max_action_dim))
        with torch.no_grad():
            chunk = self.policy.predict_action_chunk(self.before(frame), noise=torch.from_numpy(noise))
        return np.asarray(self.after(chunk)[0].numpy())


def main() -> None:
    folder, seed, episodes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):  # LeRobot prints while it loads
        driver = LeRobot(folder)

    def show(what: str, done: int, total: int) -> None:
        if done % 20 == 0:
            print(f"LeRobot: {done} of {total} {what}", file=sys.stderr, flush=True)

    found = rollout(
        driver, push_cubes, range(seed, seed + episodes), driver.policy.config.n_action_steps, progress=show
    )
    sys.stdout.write(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
