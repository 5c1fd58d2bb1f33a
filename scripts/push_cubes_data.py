"""Demonstrations of PushCubes as a LeRobotDataset v3, and training batches from it with the task's symmetries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vlac.datasets import Writer, open_dataset
from vlac.sim import DIRECTIONS, TASKS, Expert, PushCubes

Array = np.ndarray[Any, Any]
CAMERAS = ("top", "follow")
FIRST_SEED = 1_000_000
"""Seeds of demonstrations start here; evaluation uses seeds below 100 000."""
NOISE, KNOCK = 0.005, 0.02
"""Small noise on every executed action; what differs by more than KNOCK from the expert's action is a disturbance."""
FEATURES = {
    **{f"observation.images.{c}": {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
       for c in CAMERAS},
    "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "vx", "vy"]},
    "action": {"dtype": "float32", "shape": (2,), "names": ["dx", "dy"]},
}  # fmt: skip


def record(path: Path, episodes: int) -> None:
    """Goes on with the dataset until it holds `episodes`; each depends on its seed alone.

    The recorded action is what the expert would do; what is executed carries noise, and in most episodes a knock or
    two that throws the pusher off for some steps, so that the dataset holds recoveries. Episodes end at success.
    """
    done = (path / "meta" / "info.json").exists()
    with Writer.resume(path) if done else Writer(path, FEATURES, fps=10, robot_type="vlac/PushCubes-v0") as writer:
        env, expert = PushCubes(), Expert()
        for number in tqdm(range(writer.episodes, episodes), desc="recording", initial=writer.episodes, total=episodes):
            for pixels, state, action in demonstration(env, expert, FIRST_SEED + number):
                frame = {f"observation.images.{c}": pixels[c] for c in CAMERAS}
                writer.add_frame({**frame, "observation.state": state, "action": action}, env.instruction)
            writer.save_episode()


def demonstration(env: PushCubes, expert: Expert, seed: int) -> list[tuple[dict[str, Array], Array, Array]]:
    """(pictures, state, the expert's action) of every step, up to success or 60 steps."""
    random = np.random.default_rng([seed, 7])
    observation, _ = env.reset(seed=seed)
    knocks = [(int(random.integers(1, 22)), int(random.integers(2, 6))) for _ in range(random.integers(0, 3))]
    pushed = [random.uniform(-1, 1, 2) for _ in knocks]
    frames = []
    for step in range(60):
        action = expert.act(env)
        frames.append((observation["pixels"], observation["agent_pos"], action))
        executed = action + random.normal(0, NOISE, 2)
        for (start, length), push in zip(knocks, pushed, strict=True):
            if start <= step < start + length:
                executed = push / np.hypot(*push) * 0.04
        observation, _, done, _, _ = env.step(executed)
        if done:
            break
    return frames


@dataclass(frozen=True)
class Demonstrations:
    """All frames in memory: pictures u8 [n, 64, 64, 3], state f32 [n, 4], chunks f32 [n, N, 2] with `valid` [n, N]."""

    pictures: dict[str, Array]
    state: Array
    chunks: Array
    valid: Array
    phrase: Array
    """i64 [n, 3]: cube, direction, phrasing."""
    cubes: Array
    """f32 [n, 2, 2]: where the red and the blue cube are, found by their colour in the top view."""

    def __len__(self) -> int:
        return len(self.state)


def load(path: Path, chunk: int) -> Demonstrations:
    """Reads the dataset. A chunk is valid up to the first disturbance behind its frame, and inside the episode."""
    dataset = open_dataset(path)
    count = len(dataset)
    pictures = {c: np.empty((count, 64, 64, 3), np.uint8) for c in CAMERAS}
    state, action = np.empty((count, 4), np.float32), np.empty((count, 2), np.float32)
    phrase, episode = np.empty((count, 3), np.int64), np.empty(count, np.int64)
    meaning = {p: (i // 4, i % 4, j) for i, phrases in enumerate(TASKS.values()) for j, p in enumerate(phrases)}
    for i, frame in enumerate(tqdm(dataset.frames(range(count)), desc="reading", total=count)):
        for name, picture in frame["images"].items():
            pictures[name.removeprefix("observation.images.")][i] = picture
        state[i], action[i] = frame["state"], frame["action"]
        phrase[i], episode[i] = meaning[frame["task"]], frame["episode"]
    chunks, valid = _chunks(state, action, episode, chunk)
    return Demonstrations(pictures, state, chunks, valid, phrase, find_cubes(pictures["top"]))


def find_cubes(top: Array) -> Array:
    """Centres of red and of blue in top views u8 [n, 64, 64, 3], f32 [n, 2, 2] in table units."""
    places = ((np.arange(64) + 0.5) / 64).astype(np.float32)
    result = np.empty((len(top), 2, 2), np.float32)
    for cube, (more, less) in enumerate(((0, 2), (2, 0))):
        for start in range(0, len(top), 1024):
            some = top[start : start + 1024].astype(np.float32)
            weight = np.maximum(some[..., more] - some[..., less] - 8, 0)
            total = np.maximum(weight.sum((1, 2)), 1e-6)
            result[start : start + 1024, cube, 0] = weight.sum(1) @ places / total
            result[start : start + 1024, cube, 1] = weight.sum(2) @ places[::-1] / total
    return result


def _chunks(state: Array, action: Array, episode: Array, length: int) -> tuple[Array, Array]:
    count = len(state)
    moved = np.zeros_like(action)
    moved[:-1] = state[1:, :2] - state[:-1, :2]
    calm = np.hypot(*(moved - action).T) < KNOCK
    index = np.arange(count)[:, None] + np.arange(length)
    inside = index < count
    index = np.minimum(index, count - 1)
    inside &= episode[index] == episode[:, None]
    before = np.concatenate([np.ones((count, 1), bool), np.cumprod(calm[index], 1)[:, :-1].astype(bool)], 1)
    return action[index], inside & before


SYMMETRIES: tuple[tuple[bool, bool, bool, bool], ...] = tuple(
    (bool(i & 1), bool(i & 2), bool(i & 4), bool(i & 8)) for i in range(16)
)
"""(transpose, mirror x, mirror y, swap the cubes' colours): the task looks and behaves the same under each."""
_PHRASES = [list(phrases) for phrases in TASKS.values()]


def batch(data: Demonstrations, random: np.random.Generator, size: int) -> dict[str, Any]:
    """A random batch, a random symmetry for each sixteenth of it; pictures u8, the rest float32, "task" texts.

    The velocity is hidden in part of the batch: a policy that copies its own last motion cannot recover.
    """
    parts: list[dict[str, Any]] = []
    for group in np.array_split(random.integers(0, len(data), size), 16):
        parts.append(_turned(data, group, SYMMETRIES[random.integers(16)]))
    result: dict[str, Any] = {k: np.concatenate([p[k] for p in parts]) for k in parts[0] if k != "task"}
    result["task"] = [text for p in parts for text in p["task"]]
    result["state"][random.random(size) < 0.3, 2:] = 0
    return result


def _turned(data: Demonstrations, chosen: Array, symmetry: tuple[bool, bool, bool, bool]) -> dict[str, Any]:
    transpose, mirror_x, mirror_y, swap = symmetry
    ways = np.array(list(DIRECTIONS.values()))
    result: dict[str, Any] = {}
    for name, pictures in data.pictures.items():
        picture = pictures[chosen]
        if transpose:  # x <-> y, with rows counted downwards: about the other diagonal
            picture = picture.transpose(0, 2, 1, 3)[:, ::-1, ::-1]
        picture = picture[:, ::-1] if mirror_y else picture
        picture = picture[:, :, ::-1] if mirror_x else picture
        result[name] = np.ascontiguousarray(picture[..., ::-1] if swap else picture)

    def turn(vectors: Array) -> Array:
        vectors = vectors[..., ::-1] if transpose else vectors
        return vectors * np.array([-1 if mirror_x else 1, -1 if mirror_y else 1], vectors.dtype)

    state = data.state[chosen]
    result["state"] = np.concatenate([turn(state[:, :2] - 0.5) + np.float32(0.5), turn(state[:, 2:])], 1)
    result["action"], result["valid"] = turn(data.chunks[chosen]), data.valid[chosen]
    cubes = turn(data.cubes[chosen] - 0.5) + np.float32(0.5)
    result["cubes"] = cubes[:, ::-1] if swap else cubes
    new_way = [int(np.argmax(ways @ turn(w))) for w in ways]
    named = data.phrase[chosen, 0] ^ swap
    rows = np.arange(len(chosen))
    result["named"], result["other"] = result["cubes"][rows, named], result["cubes"][rows, 1 - named]
    result["way"] = ways[[new_way[w] for w in data.phrase[chosen, 1]]].astype(np.float32)
    result["task"] = [_PHRASES[(c ^ swap) * 4 + new_way[w]][p] for c, w, p in data.phrase[chosen]]
    return result
