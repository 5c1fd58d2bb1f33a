"""The cube-pushing task: the same episode from the same seed, success as geometry, the expert, the drawing."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("pymunk")

import gymnasium

import vlac.sim.push_cubes as task
from vlac.sim import DIRECTIONS, INSTRUCTIONS, TASKS, Expert, PushCubes
from vlac.sim.draw import Canvas, Window

SEED_1 = {
    "instruction": "slide the blue cube up",
    "start": (0.0842520222, 0.7230915427, 0, 0),
    "after 12 steps": (0.457910418, 0.567184448),
    "mean of top": 219.7686,
}


def episode(env: PushCubes, seed: int, act=None) -> tuple[bool, int]:
    expert = Expert()
    env.reset(seed=seed)
    while True:
        _, reward, done, late, info = env.step(expert.act(env) if act is None else act(env))
        assert reward == float(info["success"]) and done == info["success"]
        if done or late:
            break
    return bool(info["success"]), env._steps


def test_expert_solves_nearly_all() -> None:
    env = PushCubes(image_size=16)
    solved = [episode(env, seed) for seed in range(60)]
    assert sum(ok for ok, _ in solved) >= 59
    assert np.mean([n for _, n in solved]) < 30


@pytest.mark.parametrize("what", ["nothing", "other cube", "opposite"])
def test_success_needs_the_named_push(what: str) -> None:
    """Standing still, pushing the other cube and pushing the other way never succeed."""
    wrong = Expert()

    def act(env: PushCubes) -> np.ndarray:
        if what == "nothing":
            return np.zeros(2, np.float32)
        target, way = env.target, env.direction
        if what == "other cube":
            env.target = env.other
        else:
            env.direction = {"left": "right", "right": "left", "up": "down", "down": "up"}[way]
        action = wrong.act(env)
        env.target, env.direction = target, way
        return action

    env = PushCubes(image_size=16, max_steps=45)
    assert not any(episode(env, seed, act)[0] for seed in range(6))


def test_success_is_where_the_cubes_are() -> None:
    env = PushCubes(image_size=16)
    env.reset(seed=4, options={"instruction": "push the red cube up"})
    red, blue = env._cubes["red"], env._cubes["blue"]
    start, other = env.cube_position("red"), env.cube_position("blue")
    cases = {
        (0, 0.149): False,
        (0, 0.151): True,
        (0.069, 0.2): True,
        (0.071, 0.2): False,
        (-0.071, 0.2): False,
        (0, -0.2): False,
        (0.2, 0): False,
    }
    for (x, y), expected in cases.items():
        red.position = tuple(start + np.array([x, y]))
        assert env.success is expected, (x, y)
    red.position = tuple(start + np.array([0, 0.16]))
    blue.position = tuple(other + np.array([0.04, 0.04]))
    assert not env.success


def trace(seed: int) -> str:
    env = PushCubes()
    random = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    digest = hashlib.sha256()
    for _ in range(15):
        for picture in observation["pixels"].values():
            digest.update(picture.tobytes())
        digest.update(observation["agent_pos"].tobytes())
        observation, *_ = env.step(Expert().act(env) + random.normal(0, 0.01, 2).astype(np.float32))
    return digest.hexdigest()


def test_same_seed_same_episode_also_in_another_process() -> None:
    assert trace(11) == trace(11) != trace(12)
    code = f"import sys; sys.path[:0] = {sys.path!r}; from test_push_cubes import trace; print(trace(11))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == trace(11)
    assert not done.stderr


def test_seed_1_is_the_same_everywhere() -> None:
    """Written down once; another platform must draw the same layout and nearly the same end."""
    env = PushCubes()
    observation, info = env.reset(seed=1)
    assert info["instruction"] == SEED_1["instruction"]
    assert np.allclose(observation["agent_pos"], SEED_1["start"], atol=1e-6)
    for _ in range(12):
        observation, *_ = env.step(Expert().act(env))
    assert np.allclose(observation["agent_pos"][:2], SEED_1["after 12 steps"], atol=1e-4)
    assert observation["pixels"]["top"].mean() == pytest.approx(SEED_1["mean of top"], abs=0.05)


def test_layout_does_not_depend_on_the_instruction() -> None:
    """Every layout allows every instruction, so that a policy deaf to language cannot guess it."""
    env = PushCubes(image_size=16)
    seen = set()
    for instruction in INSTRUCTIONS[::7]:
        observation, info = env.reset(seed=21, options={"instruction": instruction})
        assert info["instruction"] == instruction
        assert instruction in TASKS[info["target"], info["direction"]]
        seen.add(observation["pixels"]["top"].tobytes())
    assert len(seen) == 1
    drawn = {env.reset(seed=s)[1]["instruction"] for s in range(300)}
    assert len({(t, d) for (t, d), phrases in TASKS.items() if drawn & set(phrases)}) == 8
    with pytest.raises(ValueError, match="no instruction of this task"):
        env.reset(seed=0, options={"instruction": "push the green cube up"})


def test_instructions_mean_what_they_say() -> None:
    assert len(set(INSTRUCTIONS)) == len(INSTRUCTIONS) == 8 * len(next(iter(TASKS.values())))
    for (cube, way), phrases in TASKS.items():
        assert all(cube in p.split() and way in p for p in phrases)


def test_gymnasium_accepts_it() -> None:
    env = gymnasium.make("vlac/PushCubes-v0", disable_env_checker=True)
    observation, _ = env.reset(seed=3)
    assert env.observation_space.contains(observation)
    observation, *_ = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation)
    assert env.render().shape == (256, 256, 3)
    env.close()


def test_pusher_stays_on_the_table_and_steps_are_short() -> None:
    env = PushCubes(image_size=16)
    env.reset(seed=8)
    for action in ([9, 9], [np.nan, -9], [np.inf, 0], [-0.03, 0.0]):
        before = env.pusher_position
        observation, *_ = env.step(np.array(action, np.float32))
        assert np.hypot(*(env.pusher_position - before)) <= task.MAX_STEP + 1e-9
        assert np.isfinite(observation["agent_pos"]).all()
    for _ in range(40):
        env.step(np.array([0.04, 0.0], np.float32))
    assert env.pusher_position[0] == pytest.approx(1 - task.RADIUS, abs=1e-9)


def test_cubes_keep_off_the_pusher() -> None:
    """The solver leaves at most a trace of overlap, and a cube that nobody touches stays where it is."""
    env = PushCubes(image_size=16)
    env.reset(seed=2)
    still = env.cube_position(env.other)
    for _ in range(env.max_steps):
        *_, done, late, _ = env.step(Expert().act(env))
        gap = min(s.point_query(tuple(env.pusher_position)).distance for b in env._cubes.values() for s in b.shapes)
        assert gap > task.RADIUS - 0.003
        if done or late:
            break
    assert np.array_equal(env.cube_position(env.other), still)


def test_coverage_is_the_area_of_the_shape() -> None:
    """Anti-aliasing by coverage: the picture's mean brightness is the area, wherever the shape lies."""
    for x, y, turn in ((0.5, 0.5, 0.0), (0.41, 0.63, 0.4), (0.507, 0.499, 0.7)):
        canvas = Canvas(64, Window(0.5, 0.5, 1.0), (0, 0, 0))
        canvas.square(x, y, 0.2, np.cos(turn), np.sin(turn), (255, 255, 255))
        assert canvas.pixels().mean() / 255 == pytest.approx(0.16, rel=0.01)
        canvas = Canvas(64, Window(0.5, 0.5, 1.0), (0, 0, 0))
        canvas.disc(x, y, 0.2, (255, 255, 255))
        assert canvas.pixels().mean() / 255 == pytest.approx(np.pi * 0.04, rel=0.01)


def test_pictures_show_where_things_are() -> None:
    env = PushCubes()
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        top = observation["pixels"]["top"].astype(int)
        red = (top[..., 0] - top[..., 2] > 60).nonzero()
        found = np.array([np.mean(red[1]) + 0.5, 64 - np.mean(red[0]) - 0.5]) / 64
        assert np.abs(found - env.cube_position("red")).max() < 0.012
        x, y = env.pusher_position
        follow = observation["pixels"]["follow"].astype(int)
        assert follow[32, 32, 1] - follow[32, 32, 0] > 60, "the pusher is in the middle of its own view"
        row, column = int(64 * (1 - y)), int(64 * x)
        assert top[row, column, 1] - top[row, column, 0] > 30


def test_directions_are_the_pictures() -> None:
    """Up is up in the picture, right is right."""
    assert DIRECTIONS["up"] == (0, 1) and DIRECTIONS["right"] == (1, 0)
    env = PushCubes()
    env.reset(seed=0)
    before = env._observation()["pixels"]["top"].astype(int)
    for _ in range(4):
        after = env.step(np.array([0.0, 0.04], np.float32))[0]["pixels"]["top"].astype(int)

    def centre(picture: np.ndarray) -> np.ndarray:
        return np.array([a.mean() for a in (picture[..., 1] - picture[..., 0] > 60).nonzero()])

    move = centre(after) - centre(before)
    assert move[0] < -4 and abs(move[1]) < 0.5
