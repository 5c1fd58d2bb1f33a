"""LeRobot's own RobotClient drives push-cubes through a server; run in .venv-lerobot by test_serve_lerobot.py.

Arguments: address, first seed, episodes; and actions_per_chunk, chunk_size_threshold, fps (5, 0, 50: every chunk is
executed to its end). Prints one JSON line per episode.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lerobot.async_inference.configs import RobotClientConfig
from lerobot.async_inference.robot_client import RobotClient
from lerobot.robots import Robot, RobotConfig

import vlac.sim  # noqa: F401  (registers the environment)
from vlac.sim.push_cubes import PushCubes

logging.disable(logging.WARNING)
MOTORS = ("x", "y", "vx", "vy")


@RobotConfig.register_subclass("push_cubes_in_lerobot")
@dataclass
class CubesConfig(RobotConfig):
    seed: int = 0


class Cubes(Robot):
    """push-cubes as a robot: every action is one step of the environment."""

    config_class, name = CubesConfig, "push_cubes_in_lerobot"

    def __init__(self, config: CubesConfig) -> None:
        super().__init__(config)
        self.env = PushCubes()
        self.seen, info = self.env.reset(seed=config.seed)
        self.task, self.seed = info["instruction"], config.seed
        self.steps, self.success, self.over = 0, False, False
        self.sent: list[list[float]] = []

    @property
    def observation_features(self) -> dict[str, Any]:
        pictures = {k: v.shape for k, v in self.seen["pixels"].items()}
        return {**dict.fromkeys(MOTORS, float), **pictures}

    @property
    def action_features(self) -> dict[str, Any]:
        return {"dx": float, "dy": float}

    is_connected = is_calibrated = True

    def connect(self, calibrate: bool = True) -> None: ...

    def calibrate(self) -> None: ...

    def configure(self) -> None: ...

    def disconnect(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        state = dict(zip(MOTORS, map(float, self.seen["agent_pos"]), strict=True))
        # the moment is not among the features, so that LeRobot's own server would pass over it
        return {**state, **self.seen["pixels"], "moment": [self.seed, self.steps]}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        if not self.over:
            self.sent.append([action["dx"], action["dy"]])
            self.seen, _, terminated, truncated, info = self.env.step(np.array(self.sent[-1], np.float32))
            self.steps += 1
            self.success = bool(info["success"])
            self.over = self.success or terminated or truncated
        return action


def episode(address: str, seed: int, per_chunk: int, threshold: float, fps: int) -> dict[str, Any]:
    config = RobotClientConfig(
        policy_type="smolvla",
        pretrained_name_or_path="served",
        robot=CubesConfig(seed=seed),
        actions_per_chunk=per_chunk,
        server_address=address,
        chunk_size_threshold=threshold,
        fps=fps,
        aggregate_fn_name="latest_only",
    )
    client = RobotClient(config)
    assert client.start()
    receiver = threading.Thread(target=client.receive_actions, daemon=True)
    receiver.start()
    robot = client.robot

    def watch() -> None:
        while not robot.over:
            threading.Event().wait(0.05)
        client.shutdown_event.set()

    threading.Thread(target=watch, daemon=True).start()
    threading.Timer(90, client.shutdown_event.set).start()
    client.control_loop(task=robot.task)
    receiver.join(5)
    client.stop()
    return {"seed": seed, "success": robot.success, "steps": robot.steps, "sent": robot.sent[:5]}


if __name__ == "__main__":
    import lerobot.async_inference.robot_client as module

    module.make_robot_from_config = lambda config: Cubes(config)  # where LeRobot looks up its drivers of robots
    per_chunk, threshold, fps = sys.argv[4:] or ("5", "0.0", "50")
    for seed in range(int(sys.argv[2]), int(sys.argv[2]) + int(sys.argv[3])):
        print(json.dumps(episode(sys.argv[1], seed, int(per_chunk), float(threshold), int(fps))), flush=True)
    import os

    os._exit(0)
