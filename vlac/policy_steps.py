"""The steps around a policy package's model, as classes of Intel's physicalai; its runtime makes them by name.

Only physicalai imports this module (`class_path` in a package's manifest). It needs vlac's base install and no engine
of vlac's: the model runs in physicalai's own adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from physicalai.inference.postprocessors.base import Postprocessor
from physicalai.inference.preprocessors.base import Preprocessor
from physicalai.inference.runners import SinglePass

from vlac.errors import InputError, VlacWarning
from vlac.policy_package import open_package
from vlac.runtime.actions import apply_action_steps
from vlac.runtime.inputs import prepare
from vlac.runtime.schedule import finite_chunk
from vlac.runtime.tokenizer import load_tokenizer

NpArray = np.ndarray[Any, Any]
IMAGES, STATE, TASK, NOISE, ACTION = "images", "state", "task", "noise", "action"
_PREFIX = "observation."


class OnePass(SinglePass):  # type: ignore[misc]
    """physicalai's single pass that also tells how many rows a chunk has."""

    def __init__(self, chunk_size: int) -> None:
        super().__init__()
        self.chunk_size = chunk_size


class Before(Preprocessor):  # type: ignore[misc]
    """An observation -> the model's inputs: pixels, tokens, state, noise.

    Takes physicalai's keys and LeRobot's: images.NAME or observation.images.NAME ([H, W, 3] or [3, H, W], uint8 or
    float in [0, 1]), state, task (a text, or a list of one), each with or without a batch dimension of 1; and `noise`
    [chunk_size, max_action_dim] for an answer that can be repeated, else it is drawn.
    """

    def __init__(self, artifact: str) -> None:
        self._package = open_package(artifact)
        tokenizer = self._package.tokenizer
        self._tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, NpArray]:
        io = self._package.io
        images: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for key, value in _flat(inputs):
            name = key.removeprefix(_PREFIX)
            if name == IMAGES or name.startswith((f"{IMAGES}.", "image.")) or key in {c.key for c in io.cameras}:
                images[self._camera(key, name)] = _picture(value, key)
            elif name in (STATE, TASK, NOISE):
                rest[name] = value
        task = rest.get(TASK)
        state, noise = (
            None if rest.get(k) is None else _single(rest[k], rank, k) for k, rank in ((STATE, 1), (NOISE, 2))
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VlacWarning)
            ready = prepare(
                io,
                self._tokenizer,
                self._package.program,
                images=images,
                state=state,
                task=_text(task) if io.text_steps else None,
                noise=noise,
            )
        return ready.env

    def _camera(self, key: str, name: str) -> str:
        """What `prepare` calls the camera; physicalai gives a single one no name."""
        cameras = self._package.io.cameras
        if name == IMAGES:
            if len(cameras) != 1:
                raise InputError(
                    f"one picture without a name, for {len(cameras)} cameras", remedy="name it images.NAME"
                )
            return cameras[0].key
        return key if key in {c.key for c in cameras} else name.partition(".")[2]


class After(Postprocessor):  # type: ignore[misc]
    """The model's normalised chunk -> {"action": float32 [1, chunk_size, action_dim]} in the robot's units."""

    def __init__(self, artifact: str) -> None:
        self._package = open_package(artifact)

    def __call__(self, outputs: Mapping[str, NpArray]) -> dict[str, NpArray]:
        io = self._package.io
        (chunk,) = outputs.values()
        steps = io.action_steps if io.units == "robot" else io.normalised_action_steps
        actions = apply_action_steps(steps, finite_chunk(chunk, "the model"))
        return {ACTION: finite_chunk(actions, "the model").copy()[None]}


def _flat(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in inputs.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{k}", v) for k, v in value.items())
        else:
            yield key, value


def _text(task: Any) -> Any:
    if not isinstance(task, str) and task is not None:
        task = list(task)
        if len(task) != 1:
            raise InputError(f"{len(task)} tasks for one observation")
        task = str(task[0])
    return task


def _single(value: Any, rank: int, key: str) -> NpArray:
    """`value` without its batch dimension."""
    array = np.asarray(value)
    if array.ndim == rank + 1 and len(array) == 1:
        array = array[0]
    if array.ndim != rank:
        raise InputError(f"{key} has shape {list(np.shape(value))}, expected {rank} dimensions, or one more of size 1")
    return array


def _picture(value: Any, key: str) -> NpArray:
    """[H, W, 3]; [3, H, W] is turned."""
    picture = _single(value, 3, key)
    turned = picture.shape[0] == 3 and picture.shape[-1] != 3
    return np.ascontiguousarray(picture.transpose(1, 2, 0) if turned else picture)
