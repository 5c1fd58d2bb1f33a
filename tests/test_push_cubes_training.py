"""How the bundled policy is trained: the task's symmetries, which part of a chunk is taught, the loss, going on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("gymnasium")
pytest.importorskip("pymunk")
pytest.importorskip("tqdm")
sys.path.insert(0, str(ROOT / "scripts"))

import push_cubes_data as data

import vlac.sim.push_cubes as task
from vlac.sim import DIRECTIONS, Expert, PushCubes

PYTHON = ROOT / ".venv-lerobot" / "bin" / "python"
needs_lerobot = [
    pytest.mark.lerobot,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-lerobot; scripts/peers/lerobot.sh sets it up"),
]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "scripts"))), "OMP_NUM_THREADS": "1"}


def frame(env: PushCubes) -> data.Demonstrations:
    """What is on the table now, as a dataset of one frame."""
    observation = env._observation()
    phrase = (task.CUBES.index(env.target), list(DIRECTIONS).index(env.direction), 0)
    pictures = {k: v[None] for k, v in observation["pixels"].items()}
    chunk = Expert().act(env)[None, None]
    cubes = np.array([[env.cube_position(c) for c in task.CUBES]], np.float32)
    state = observation["agent_pos"][None]
    return data.Demonstrations(pictures, state, chunk, np.ones((1, 1), bool), np.array([phrase]), cubes)


def turned_table(env: PushCubes, symmetry: tuple[bool, bool, bool, bool], instruction: str) -> PushCubes:
    """The same table, really mirrored, with the bodies where they then are."""
    transpose, mirror_x, mirror_y, swap = symmetry

    def turn(place: Any) -> tuple[float, float]:
        x, y = np.asarray(place)[::-1] if transpose else place
        return (1 - x if mirror_x else x, 1 - y if mirror_y else y)

    def name(cube: str) -> str:
        return task.CUBES[task.CUBES.index(cube) ^ swap]

    sense = -1 if (transpose + mirror_x + mirror_y) % 2 else 1
    centres = {name(c): turn(env.cube_position(c)) for c in task.CUBES}
    angles = {name(c): sense * env._cubes[c].angle + np.pi / 2 * transpose for c in task.CUBES}
    other = PushCubes()
    other._instruct(instruction)
    other._place(centres, angles, turn(env.pusher_position), env._physics)
    return other


@pytest.mark.parametrize("symmetry", data.SYMMETRIES)
def test_a_turned_frame_is_the_turned_table(symmetry: tuple[bool, bool, bool, bool]) -> None:
    env = PushCubes()
    for seed in (3, 4):
        env.reset(seed=seed)
        found = data._turned(frame(env), np.array([0]), symmetry)
        other = turned_table(env, symmetry, found["task"][0])
        expected = other._observation()
        for camera, picture in expected["pixels"].items():
            assert np.abs(found[camera][0].astype(int) - picture).max() <= 1
        assert np.allclose(found["state"][0], expected["agent_pos"], atol=1e-6)
        assert np.allclose(found["action"][0, 0], Expert().act(other), atol=1e-6)
        assert np.allclose(found["named"][0], other.cube_position(other.target), atol=1e-6)
        assert np.allclose(found["other"][0], other.cube_position(other.other), atol=1e-6)
        assert np.allclose(found["way"][0], DIRECTIONS[other.direction])


def test_cubes_are_found_by_colour() -> None:
    env = PushCubes()
    for seed in range(6):
        observation, _ = env.reset(seed=seed)
        found = data.find_cubes(observation["pixels"]["top"][None])[0]
        assert np.abs(found - [env.cube_position(c) for c in task.CUBES]).max() < 0.004


def test_a_chunk_is_taught_up_to_the_first_knock() -> None:
    """Two episodes of 4 and 3 frames; the action of frame 1 was not carried out."""
    action = np.full((7, 2), 0.01, np.float32)
    state = np.zeros((7, 4), np.float32)
    state[:4, :2] = np.array([0, 1, 5, 6])[:, None] * 0.01
    state[4:, :2] = 0.5 + np.array([0, 1, 2])[:, None] * 0.01
    chunks, valid = data._chunks(state, action, np.array([0, 0, 0, 0, 1, 1, 1]), 4)
    assert chunks.shape == (7, 4, 2)
    assert valid.sum(1).tolist() == [2, 1, 2, 1, 3, 2, 1]


def test_demonstrations_recover_and_succeed() -> None:
    env, expert = PushCubes(), Expert()
    ended, knocked = 0, 0
    for seed in range(20):
        frames = data.demonstration(env, expert, data.FIRST_SEED + seed)
        ended += env.success
        state, action = np.array([f[1] for f in frames]), np.array([f[2] for f in frames])
        moved = np.diff(state[:, :2], axis=0) - action[:-1]
        knocked += bool((np.hypot(*moved.T) > data.KNOCK).any())
        again = data.demonstration(env, expert, data.FIRST_SEED + seed)
        assert all(np.array_equal(a[1], b[1]) for a, b in zip(frames, again, strict=True))
    assert ended >= 18 and 8 <= knocked < 20


LOSS = """
import sys
from pathlib import Path
import torch
import push_cubes_policy as small
folder = Path(sys.argv[1])
small.write_backbone(folder)
policy = small.new_policy(folder, 0)
torch.manual_seed(1)
batch = {"observation.images.top": torch.rand(4, 3, 64, 64), "observation.images.follow": torch.rand(4, 3, 64, 64)}
batch |= {"observation.state": torch.randn(4, 4), "observation.language.tokens": torch.randint(0, 300, (4, 8))}
batch["observation.language.attention_mask"] = torch.arange(8)[None] < torch.tensor([5, 6, 8, 8])[:, None]
batch |= {"action": torch.randn(4, 10, 2), "action_is_pad": torch.rand(4, 10) < 0.3}
weights = [w for w in policy.parameters() if w.requires_grad]
results = []
for loss in (lambda: small.flow_loss(policy, batch, 1), lambda: policy.forward(dict(batch))[0]):
    torch.manual_seed(5)
    value = loss()
    results.append((value, torch.autograd.grad(value, weights, allow_unused=True)))
(a, first), (b, second) = results
assert abs(a - b) < 1e-5 * b, (a, b)
used = [(x, y) for x, y in zip(first, second, strict=True) if x is not None]
assert len(used) > 100 and all((x is None) == (y is None) for x, y in zip(first, second, strict=True))
assert max((x - y).abs().max() for x, y in used) < 1e-5 < max(x.abs().max() for x, _ in used)
"""


class TestWithLeRobot:
    pytestmark = needs_lerobot

    def test_the_loss_is_lerobots(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [PYTHON, "-c", LOSS, tmp_path], capture_output=True, text=True, timeout=300, env=ENVIRONMENT
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.slow
    def test_killed_and_started_again_it_ends_with_the_same_weights(self, tmp_path: Path) -> None:
        script = ROOT / "scripts" / "train_push_cubes.py"
        options = ["--episodes", "3", "--corrections", "2", "--steps", "6", "--batch", "16"]

        def start(out: Path) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [PYTHON, script, "--out", out, *options], stderr=subprocess.DEVNULL, env=ENVIRONMENT
            )

        whole, parts = tmp_path / "whole", tmp_path / "parts"
        assert start(whole).wait(300) == 0
        first = start(parts)
        while first.poll() is None and not (parts / "training.pt").exists():
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert not (parts / "training.json").exists(), "killed too late to show anything"
        assert start(parts).wait(300) == 0
        name = "policy/model.safetensors"
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
