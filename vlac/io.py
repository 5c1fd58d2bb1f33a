"""What goes into a policy and what comes out, as data: cameras in order, steps of pre- and post-processing, statistics.

An `IO` is written into every artifact as JSON; `runtime/` interprets its steps by name, so no family code runs on a
robot. Arrays in step parameters are lists of numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vlac.errors import ArtifactError, InputError


@dataclass(frozen=True)
class Step:
    """One named step with its parameters (JSON values). The names and their meaning are in vlac/runtime/."""

    step: str
    params: Mapping[str, Any] = field(default_factory=dict)


CHOSEN = ("state_steps", "action_steps")
"""What a choice of statistics replaces."""


@dataclass(frozen=True)
class Camera:
    """A camera slot: feature key ("observation.images.top"), the dataset's (3, H, W), and whether it may be absent."""

    key: str
    shape: tuple[int, int, int]
    optional: bool = False

    @property
    def name(self) -> str:
        """The key's last part ("top")."""
        return self.key.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class IO:
    """Inputs and outputs of a policy.

    Steps, by list (parameters in vlac/runtime/observation.py, tokenizer.py, actions.py):
      image_steps   uint8 HWC (or float [0,1]) -> pixels f32[3,S,S]: resize_with_pad, affine, ...
      state_steps   raw state [d] -> f32 [1, max_state_dim]: normalise, pad
      text_steps    task string -> tokens i32[T], valid bool[T]: ensure_suffix, tokenise, ...
      action_steps  normalised chunk f32 [N, A] -> f32 [N, action_dim] in robot units: take, unnormalise, ...
    `normalised_action_steps` is the same up to units="normalized" (usually only `take`).

    Attributes:
        max_missing_cameras: how many cameras may be absent from one observation.
        units: "robot", or "normalized" when compiled without statistics (state in and actions out stay normalised).
        rename: observation keys of the caller -> feature keys, applied first.
        n_action_steps: how many rows of a chunk a robot executes before asking again.
        choices: name -> fields of this IO that it replaces: state and action steps under other statistics, for a policy
            that was trained on several datasets (`act(unnorm_key=)`). One of them is what stands here already.
        sampled_rows: rows of noise that the sampler starts from, where the chunk keeps fewer; 0 = chunk_size.
    """

    cameras: tuple[Camera, ...]
    image_steps: tuple[Step, ...]
    state_key: str
    state_dim: int
    state_steps: tuple[Step, ...]
    text_steps: tuple[Step, ...]
    action_key: str
    action_dim: int
    max_action_dim: int
    chunk_size: int
    n_action_steps: int
    action_steps: tuple[Step, ...]
    normalised_action_steps: tuple[Step, ...]
    max_missing_cameras: int = 0
    image_size: int = 0
    vocab_size: int = 0
    units: str = "robot"
    rename: Mapping[str, str] = field(default_factory=dict)
    action_names: tuple[str, ...] = ()
    choices: Mapping[str, Mapping[str, tuple[Step, ...]]] = field(default_factory=dict)
    sampled_rows: int = 0

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Rows and columns of the noise that a sampler starts from."""
        return self.sampled_rows or self.chunk_size, self.max_action_dim

    def chosen(self, name: str | None) -> IO:
        """This IO under one of its choices; None leaves it. InputError names those there are."""
        if name is None:
            return self
        if name not in self.choices:
            raise InputError(
                f"no statistics under {name!r} in this artifact; to choose from: {', '.join(self.choices) or 'none'}",
                remedy="compile with --unnorm-key NAME,NAME",
            )
        chosen = self.choices[name]
        return replace(self, state_steps=chosen["state_steps"], action_steps=chosen["action_steps"])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> IO:
        """Raises ArtifactError when a field is missing, unknown or of another kind."""
        try:
            d = json.loads(text)
            d["cameras"] = tuple(Camera(c["key"], tuple(c["shape"]), c["optional"]) for c in d["cameras"])
            for name in ("image_steps", "state_steps", "text_steps", "action_steps", "normalised_action_steps"):
                d[name] = tuple(Step(s["step"], s["params"]) for s in d[name])
            d["action_names"] = tuple(d["action_names"])
            d["choices"] = {
                name: {f: tuple(Step(s["step"], s["params"]) for s in d["choices"][name][f]) for f in CHOSEN}
                for name in d.get("choices", {})
            }
            return IO(**d)
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"io description is broken: {type(error).__name__} {error}") from None
