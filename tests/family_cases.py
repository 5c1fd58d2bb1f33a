"""Every golden checkpoint as one kind of thing: how it is compiled, what it is asked, what the original answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint_files import GOLDEN

from vlac.engines.base import EngineSession
from vlac.graph import Program, Repeat, Schedule
from vlac.registry import ReadOptions
from vlac.runtime.session import Session, execute, prepare

NpArray = np.ndarray[Any, Any]
Asked = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A golden folder. `options` go to vlac.compile; asked(arrays, facts, i) are the arguments of `act`; told(arrays,
    i) is the original's action in robot units, ids(arrays, i) its tokens where it picks them one by one."""

    name: str
    asked: Callable[[Mapping[str, NpArray], Mapping[str, Any], int], Asked]
    told: Callable[[Mapping[str, NpArray], int], NpArray]
    ids: Callable[[Mapping[str, NpArray], int], NpArray] | None = None
    observations: tuple[int, ...] = (0, 1)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return GOLDEN / self.name

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def read_options(self) -> ReadOptions:
        return ReadOptions(**self.options)

    @cached_property
    def arrays(self) -> dict[str, NpArray]:
        with np.load(self.folder / "golden.npz", allow_pickle=False) as file:
            return dict(file)

    @cached_property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "golden.json").read_text(encoding="utf-8"))
        return found

    def observation(self, i: int) -> Asked:
        return self.asked(self.arrays, self.facts, i)

    def answer(self, i: int) -> NpArray:
        return np.atleast_2d(self.told(self.arrays, i))

    def tokens(self, i: int) -> list[int]:
        """The ids of the original, up to its last that is not padding."""
        assert self.ids is not None
        return [int(t) for t in np.trim_zeros(self.ids(self.arrays, i), "b")]


def _lerobot(a: Mapping[str, NpArray], facts: Mapping[str, Any], i: int) -> Asked:
    pictures = f"obs{i}/image/"
    noise = {} if f"obs{i}/noise" not in a else {"noise": a[f"obs{i}/noise"][0]}
    images = {k.removeprefix(pictures): v for k, v in a.items() if k.startswith(pictures)}
    return {"images": images, "state": a[f"obs{i}/state"], "task": facts["tasks"][i], **noise}


def _lerobot_chunk(a: Mapping[str, NpArray], i: int) -> NpArray:
    return a[f"obs{i}/chunk_robot"][0]


def _one_picture(a: Mapping[str, NpArray], facts: Mapping[str, Any], i: int) -> Asked:
    return {"images": {"image": a[f"obs{i}_image"]}, "task": facts["observations"][i]["task"]}


def _two_pictures(a: Mapping[str, NpArray], facts: Mapping[str, Any], i: int) -> Asked:
    images = {"image": a[f"obs{i}_image0"], "wrist_image": a[f"obs{i}_image1"]}
    return {"images": images, "task": facts["observations"][i]["task"], "state": a[f"obs{i}_state"]}


def _groot(a: Mapping[str, NpArray], facts: Mapping[str, Any], i: int) -> Asked:
    images = {c: a[f"obs{i}_image_{c}"] for c in facts["cameras"]}
    task, state, noise = facts["observations"][i]["task"], a[f"obs{i}_state"], a[f"obs{i}_noise"]
    return {"images": images, "task": task, "state": state, "noise": noise}


def _action(a: Mapping[str, NpArray], i: int) -> NpArray:
    return a[f"obs{i}_action"]


HEADS = {"spec": {"vision.num_attention_heads": 3}}
OFT = {"unnorm_key": "bridge_orig", "spec": {"num_images_in_input": 2}}

CASES = {
    case.name: case
    for case in (
        Case("smolvla_tiny", _lerobot, _lerobot_chunk),
        Case("smolvla_letterbox", _lerobot, _lerobot_chunk),
        Case("pi0_tiny", _lerobot, _lerobot_chunk, options=HEADS),
        Case("pi05_tiny", _lerobot, _lerobot_chunk, options=HEADS),
        Case(
            "pi0fast_tiny",
            _lerobot,
            _lerobot_chunk,
            lambda a, i: a[f"obs{i}/tap/tokens_generated"],
            (0, 1, 2),
            HEADS,
        ),
        Case(
            "openvla_tiny",
            _one_picture,
            _action,
            lambda a, i: a[f"obs{i}_action_tokens"],
            (0, 2, 3),
            {"unnorm_key": "bridge_orig"},
        ),
        Case("openvla_oft_tiny", _two_pictures, _action, observations=(0, 1, 3), options=OFT),
        Case("groot_n17_tiny", _groot, _action),
        Case("tinyvla_tiny", _one_picture, _action),
        Case("tinyvla_v1_tiny", _one_picture, _action),
    )
}


def first_turn(program: Program, session: EngineSession, ready: Any) -> NpArray:
    """What the first turn of a loop that picks tokens computes: its logits where the artifact keeps them, else the last
    layer's values, which all layers before it have made. The schedule is run with one turn of the loop."""
    steps = tuple(
        Repeat(s.stage, 1, s.index, s.carry, s.collect) if isinstance(s, Repeat) else s for s in program.schedule.steps
    )
    taps: dict[str, NpArray] = {}
    once = program.replace(schedule=Schedule(steps, program.schedule.result))
    execute(once, session, ready.env, ready.symbols, taps=taps)
    if any("step_logits" in (name for _, name in s.collect) for s in steps if isinstance(s, Repeat)):
        return taps["logits"][0]
    layers = [int(n.removeprefix("next_v.")) for n in taps if n.startswith("next_v.")]
    return taps[f"next_v.{max(layers)}"][0]


def first_turn_of(session: Session, asked: Asked) -> NpArray:
    """`first_turn` of a loaded artifact."""
    artifact = session.artifact
    assert session._engine is not None
    ready = prepare(artifact.io, session._tokenizer, artifact.program, **asked)
    return first_turn(artifact.program, session._engine, ready)


def reference_turn(case: Case, i: int) -> NpArray:
    """The same of the checkpoint as drawn, in fp32 (its tokens are the original's: see the families' own tests)."""
    from vlac.api import draw
    from vlac.checkpoint import read_policy
    from vlac.goldens import reference_session

    policy = read_policy(str(case.checkpoint), case.read_options)
    program = draw(policy)
    ready = prepare(policy.io, policy.tokenizer, program, **case.observation(i))
    session = reference_session(program)
    try:
        return first_turn(program, session, ready)
    finally:
        session.close()
