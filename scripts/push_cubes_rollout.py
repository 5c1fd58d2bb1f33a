"""Closed loop of the trained policy through LeRobot's own loading, processors and sampling; many episodes at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from push_cubes_data import FIRST_SEED
from push_cubes_policy import load_policy
from tqdm import tqdm

from vlac.datasets import Writer
from vlac.sim import TASKS, Expert, PushCubes

Array = np.ndarray[Any, Any]
Act = Callable[[list[dict[str, Any]], list[str], list[int]], Array]
"""(observations, instructions, seeds of the noise) -> chunks in table units, f32 [B, N, 2]."""


def lerobot_act(folder: Path) -> Act:
    """The policy in `folder`, loaded and run as a LeRobot user would."""
    policy = load_policy(folder)
    with contextlib.chdir(folder):
        before = PolicyProcessorPipeline.from_pretrained(".", config_filename="policy_preprocessor.json")
        after = PolicyProcessorPipeline.from_pretrained(
            ".",
            config_filename="policy_postprocessor.json",
            to_transition=policy_action_to_transition,
            to_output=transition_to_policy_action,
        )

    def act(observations: list[dict[str, Any]], tasks: list[str], seeds: list[int]) -> Array:
        frame: dict[str, Any] = {
            f"observation.images.{name}": torch.from_numpy(np.stack([o["pixels"][name] for o in observations]))
            .permute(0, 3, 1, 2)
            .float()
            / 255
            for name in ("top", "follow")
        }
        frame["observation.state"] = torch.from_numpy(np.stack([o["agent_pos"] for o in observations]))
        shape = (policy.config.chunk_size, policy.config.max_action_dim)
        noise = np.stack([np.random.default_rng(s).standard_normal(shape, dtype=np.float32) for s in seeds])
        batch = before({**frame, "task": tasks})
        return np.asarray(after(policy.predict_action_chunk(batch, noise=torch.from_numpy(noise))).numpy())

    return act


def wrong_instruction(env: PushCubes, seed: int) -> str:
    """An instruction with another meaning."""
    random = np.random.default_rng([seed, 13])
    others = [phrases for task, phrases in TASKS.items() if task != (env.target, env.direction)]
    phrases = others[int(random.integers(len(others)))]
    return phrases[int(random.integers(len(phrases)))]


def run(
    act: Act, seeds: Sequence[int], steps: int = 5, control: str = "none", together: int = 50
) -> list[dict[str, Any]]:
    """One episode per seed, `steps` actions of each chunk executed. control: "none", "instruction" (a wrong one is
    given, the right one is judged), "blank" (black pictures). Returns {seed, instruction, success, length} each."""
    results: list[dict[str, Any]] = []
    for start in tqdm(range(0, len(seeds), together), desc=f"episodes ({control})"):
        results += _some(act, list(seeds[start : start + together]), steps, control)
    return results


def _some(act: Act, seeds: list[int], steps: int, control: str) -> list[dict[str, Any]]:
    envs = [PushCubes() for _ in seeds]
    observations = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    tasks = [
        wrong_instruction(env, seed) if control == "instruction" else env.instruction
        for env, seed in zip(envs, seeds, strict=True)
    ]
    results: list[dict[str, Any]] = [
        {"seed": seed, "instruction": env.instruction, "success": False, "length": 0}
        for env, seed in zip(envs, seeds, strict=True)
    ]
    active = list(range(len(seeds)))
    calls = 0
    while active:
        seen = [observations[i] for i in active]
        if control == "blank":
            seen = [{**o, "pixels": {k: np.zeros_like(v) for k, v in o["pixels"].items()}} for o in seen]
        chunks = act(seen, [tasks[i] for i in active], [seeds[i] * 1000 + calls for i in active])
        calls += 1
        ended = set()
        for i, chunk in zip(active, chunks, strict=True):
            for action in chunk[:steps]:
                observations[i], _, done, late, info = envs[i].step(action)
                results[i]["length"] += 1
                if done or late:
                    results[i]["success"] = bool(info["success"])
                    ended.add(i)
                    break
        active = [i for i in active if i not in ended]
    return results


def correct(path: Path, act: Act, episodes: int, together: int = 40) -> None:
    """Adds episodes to the dataset until it holds `episodes`: the policy acts, the recorded action is the expert's.

    So the dataset shows the way back from where the policy itself goes (DAgger, Ross et al. 2011).
    """
    expert = Expert()
    with Writer.resume(path) as writer, tqdm(total=episodes, initial=writer.episodes, desc="correcting") as bar:
        while writer.episodes < episodes:
            first = FIRST_SEED + writer.episodes
            seeds = list(range(first, first + min(together, episodes - writer.episodes)))
            for instruction, frames in _own(act, expert, seeds):
                for observation, action in frames:
                    frame = {f"observation.images.{c}": picture for c, picture in observation["pixels"].items()}
                    frame |= {"observation.state": observation["agent_pos"], "action": action}
                    writer.add_frame(frame, instruction)
                writer.save_episode()
                bar.update()


def _own(act: Act, expert: Expert, seeds: list[int], longest: int = 40) -> list[tuple[str, list[Any]]]:
    """Episodes of the policy, a random number of each chunk executed: (instruction, [(observation, the expert's
    action)])."""
    random = np.random.default_rng([seeds[0], 17])
    envs = [PushCubes() for _ in seeds]
    observations = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    frames: list[list[Any]] = [[] for _ in seeds]
    active, calls = list(range(len(seeds))), 0
    while active:
        tasks, noise = [envs[i].instruction for i in active], [seeds[i] * 1000 + calls for i in active]
        chunks = act([observations[i] for i in active], tasks, noise)
        calls += 1
        ended = set()
        for i, chunk in zip(active, chunks, strict=True):
            for action in chunk[: random.integers(2, 9)]:
                frames[i].append((observations[i], expert.act(envs[i])))
                observations[i], _, done, _, _ = envs[i].step(action)
                if done or len(frames[i]) >= longest:
                    ended.add(i)
                    break
        active = [i for i in active if i not in ended]
    return [(env.instruction, some) for env, some in zip(envs, frames, strict=True)]


def wilson(successes: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion."""
    p = successes / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(p * (1 - p) / count + z * z / (4 * count * count)))
    return middle - half, middle + half
