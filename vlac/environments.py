"""Gymnasium environments as a policy sees them: an adapter says which parts of an observation are cameras and state.

`PUSH_CUBES` is the bundled one; others come from a small JSON or YAML file (docs/closed-loop.md). A `World` is an open
environment that speaks in observations {"images", "state", "task"} and tells success as a fact of each step.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlac.errors import InputError, VlacError

NpArray = np.ndarray[Any, Any]
Observation = dict[str, Any]

HOLDS = ("last", "zero")
LONGEST = 1000
"""Steps after which an episode ends where neither the environment nor its adapter bounds it."""


@dataclass(frozen=True)
class Adapter:
    """How a policy is connected to a Gymnasium environment. Paths are keys joined by "/", from `obs` or `info`.

    Attributes:
        env: the environment's id.
        cameras: the policy's camera key -> path of a uint8 [H, W, 3] picture in the observation.
        state: paths whose values, flattened and joined, are the state; none for a policy that takes none.
        task: the instruction; or task_from: its path in the info of `reset`.
        goal: paths in the info of `reset` that name what is asked for in fewer words; they group the results and tell
            which instructions ask for something else. Default: the instruction.
        success: path of a boolean in the info of `step`.
        hold: what the robot does when it has no action left: "last" repeats it (positions), "zero" stands still
            (displacements, velocities).
        displacements: columns of an action that move the robot by so much, all in one unit: with real-time chunking
            late chunks make up for what they missed (vlac.runtime.hand_over).
        fps: control rate; default: the environment's render_fps.
        max_steps: where the environment bounds its episodes too late, or not at all.
        imports: modules that register the environment.
        options: for `gymnasium.make`.
        extra: what to install when the environment is not there.
        unseen_below: seeds from here on were trained on and are refused; None = not known.
    """

    env: str
    cameras: Mapping[str, str]
    state: tuple[str, ...] = ()
    task: str = ""
    task_from: str = ""
    goal: tuple[str, ...] = ()
    success: str = "is_success"
    hold: str = "last"
    displacements: tuple[int, ...] = ()
    fps: float | None = None
    max_steps: int | None = None
    imports: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    extra: str = ""
    unseen_below: int | None = None


PUSH_CUBES = Adapter(
    env="vlac/PushCubes-v0",
    cameras={"observation.images.top": "pixels/top", "observation.images.follow": "pixels/follow"},
    state=("agent_pos",),
    task_from="instruction",
    goal=("target", "direction"),
    success="success",
    hold="zero",
    displacements=(0, 1),
    imports=("vlac.sim",),
    extra="pip install 'vlac-compiler[sim]'",
    unseen_below=100_000,
)
BUNDLED: Mapping[str, Adapter] = {"push-cubes": PUSH_CUBES}
_FILE_KEYS = {f.name for f in dataclasses.fields(Adapter)} - {"env", "extra", "unseen_below"}


def named(environment: str, adapter: str | Path | None) -> Adapter:
    """ "push-cubes", or "gym:ENV_ID" with an adapter file; InputError tells what there is."""
    if environment in BUNDLED:
        if adapter is not None:
            raise InputError(f"{environment} needs no --adapter")
        return BUNDLED[environment]
    prefix, _, env = environment.partition(":")
    if prefix != "gym" or not env:
        raise InputError(
            f"no environment {environment!r}; there are {', '.join(BUNDLED)} and gym:ENV_ID",
            remedy="write gym:gym_pusht/PushT-v0 --adapter FILE.json for an environment of Gymnasium",
        )
    if adapter is None:
        raise InputError(
            f"{environment} needs --adapter FILE.json (or .yaml): which keys are cameras and state",
            remedy="docs/closed-loop.md has examples",
        )
    return read_adapter(Path(adapter), env)


def read_adapter(path: Path, env: str) -> Adapter:
    """An adapter from a JSON or YAML file with the fields of `Adapter`; InputError names a key that does not fit."""
    found = _parsed(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a mapping", remedy="docs/closed-loop.md has examples")
    if unknown := sorted(map(str, set(found) - _FILE_KEYS)):
        raise InputError(f"{path}: unknown key {unknown[0]!r}; there are: {', '.join(sorted(_FILE_KEYS))}")
    cameras, options = found.get("cameras"), found.get("options", {})
    if not isinstance(cameras, dict) or not all(isinstance(v, str) for v in cameras.values()):
        raise InputError(f"{path}: cameras must map the policy's camera keys to paths in the observation")
    if not isinstance(options, dict):
        raise InputError(f"{path}: options must be a mapping")
    lists: dict[str, Any] = {key: _texts(path, key, found.get(key, [])) for key in ("state", "goal", "imports")}
    lists["displacements"] = _columns(path, found.get("displacements", []))
    plain = {key: _plain(path, key, found[key]) for key in _KINDS if key in found}
    if bool(plain.get("task")) == bool(plain.get("task_from")):
        raise InputError(f"{path}: give either task (a text) or task_from (its path in the info of reset)")
    if plain.get("hold", "last") not in HOLDS:
        raise InputError(f"{path}: hold is {plain['hold']!r}, expected {' or '.join(HOLDS)}")
    return Adapter(env=env, cameras=cameras, options=options, **lists, **plain)


_KINDS: Mapping[str, type] = dict.fromkeys(("task", "task_from", "success", "hold"), str) | {
    "fps": float,
    "max_steps": int,
}


def _plain(path: Path, key: str, value: Any) -> Any:
    kind = _KINDS[key]
    fits = isinstance(value, str) if kind is str else isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or (kind is not str and not (value > 0 and kind(value) == value)):
        raise InputError(f"{path}: {key} is {value!r}, expected {'a text' if kind is str else 'a positive number'}")
    return kind(value)


def _texts(path: Path, key: str, value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise InputError(f"{path}: {key} is {value!r}, expected a list of texts")
    return tuple(values)


def _columns(path: Path, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value):
        raise InputError(f"{path}: displacements is {value!r}, expected a list of columns of an action, from 0 on")
    return tuple(value)


def _parsed(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"--adapter: {path} does not exist") from None
    except UnicodeDecodeError:
        raise InputError(f"--adapter: {path} is not UTF-8 text") from None
    if path.suffix.lower() not in (".yaml", ".yml"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {error}") from None
    try:
        import yaml
    except ImportError:
        raise VlacError(
            f"{path}: PyYAML is not installed", remedy="pip install pyyaml, or write the adapter as JSON"
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}") from None


# --- the open environment --------------------------------------------------------------------------------------


def _at(path: str, values: Any, what: str) -> Any:
    """What lies at "a/b" of nested mappings; InputError tells which key is missing and what is there."""
    here, walked = values, what
    for key in path.split("/"):
        if not isinstance(here, Mapping) or key not in here:
            there = ", ".join(map(str, here)) if isinstance(here, Mapping) else f"an array of {np.shape(here)}"
            raise InputError(f"adapter: {walked} has no {key!r}; it has {there}")
        here, walked = here[key], f"{walked}/{key}"
    return here


class World:
    """An environment behind an adapter: `reset` and `step` give what a policy takes.

    Attributes: task, goal (of the episode), fps, max_steps, action_dim.
    """

    def __init__(self, adapter: Adapter, env: Any) -> None:
        self.adapter, self.env = adapter, env
        fps = adapter.fps or env.metadata.get("render_fps")
        if not fps:
            raise InputError(f"{adapter.env} tells no render_fps", remedy="put fps into the adapter")
        self.fps = float(fps)
        limit = getattr(getattr(env, "spec", None), "max_episode_steps", None) or getattr(
            env.unwrapped, "max_steps", None
        )
        self.max_steps = min(v for v in (adapter.max_steps, limit, LONGEST if not limit else None) if v)
        self.action_dim = math.prod(env.action_space.shape)
        self.task = self.goal = ""

    def reset(self, seed: int) -> Observation:
        """The first observation of episode `seed`."""
        observation, info = self._asked("reset", lambda: self.env.reset(seed=seed))
        a = self.adapter
        self.task = a.task or str(_at(a.task_from, info, "info"))
        self.goal = " ".join(str(_at(path, info, "info")) for path in a.goal) or self.task
        return self._seen(observation)

    def step(self, action: NpArray) -> tuple[Observation, bool, bool]:
        """(next observation, success, ended) after one action [action_dim]."""
        observation, _, terminated, truncated, info = self._asked("step", lambda: self.env.step(action))
        success = _at(self.adapter.success, info, "info")
        return self._seen(observation), bool(success), bool(terminated or truncated)

    def render(self) -> NpArray | None:
        """A picture for people, uint8 [H, W, 3]; None where the environment draws none."""
        picture = self.env.render()
        return None if picture is None else np.asarray(picture, dtype=np.uint8)

    def close(self) -> None:
        """Frees what the environment holds."""
        self.env.close()

    def _asked(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever the environment raises: its physics may break under a policy's actions
            raise VlacError(
                f"{self.adapter.env} failed in {what}: {type(error).__name__}: {error}",
                remedy="actions far outside its range can do that: was the policy trained for this environment?",
            ) from error

    def _seen(self, observation: Any) -> Observation:
        a = self.adapter
        parts = [np.asarray(_at(path, observation, "obs"), dtype=np.float32).ravel() for path in a.state]
        return {
            "images": {key: np.asarray(_at(path, observation, "obs")) for key, path in a.cameras.items()},
            "state": np.concatenate(parts) if parts else None,
            "task": self.task,
        }


def open_world(adapter: Adapter) -> World:
    """Makes the environment; VlacError tells what to install when it is not there."""
    try:
        import gymnasium

        for module in adapter.imports:
            importlib.import_module(module)
    except ImportError as error:
        raise VlacError(
            f"{adapter.env} cannot be opened: {error}",
            remedy=adapter.extra or "install gymnasium and the package that brings the environment",
        ) from None
    options = {"render_mode": "rgb_array", "disable_env_checker": True, **adapter.options}
    try:
        return World(adapter, gymnasium.make(adapter.env, **options))
    except gymnasium.error.Error as error:
        raise InputError(
            f"{adapter.env}: {error}", remedy="name the module that registers it under imports in the adapter"
        ) from None


def opener(adapter: Adapter) -> Callable[[], World]:
    """`open_world` of one adapter, as `rollout` wants it."""

    def factory() -> World:
        return open_world(adapter)

    return factory


def push_cubes() -> World:
    """The bundled environment."""
    return open_world(PUSH_CUBES)
