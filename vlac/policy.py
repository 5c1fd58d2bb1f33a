"""A Policy is a checkpoint as a value: spec, weights, io, precision plan, history. A pass maps it to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from vlac.io import IO
from vlac.spec import FlowSpec
from vlac.weights import LazyTensor, Weights

if TYPE_CHECKING:
    from vlac.recorded import Recorded


@dataclass(frozen=True)
class Applied:
    """A pass that was applied: its name, its parameters, and the figures it reports (sizes before and after, ...)."""

    name: str
    params: Mapping[str, Any]
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where a policy came from: what was asked for, the revision, and each file's sha256 and size."""

    checkpoint: str
    revision: str = ""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Policy:
    """The value that passes change.

    Attributes:
        family: registered name of the family that draws it.
        name: short name for files ("smolvla_base").
        spec: the family's frozen dataclass of dimensions (parts named vision, text, expert, ... see vlac.spec).
        weights: canonical name -> LazyTensor ("vision.layers.0.self_attn.q_proj.weight").
        io: inputs and outputs. tokenizer: bytes of tokenizer.json, if the policy reads text.
        precision: (pattern, format) pairs over weight names, last match wins; overrides the target's own plan.
        flow: solver and time grid, None for families without one.
        rotations: (pattern, block) pairs: linears whose inputs are rotated block by block before they are multiplied,
            their weights stored in that basis (vlac.rewrites.rotate); the weights here are in the plain one.
        biases: weight name -> bias [n] of a linear that the family draws without one (vlac.rewrites.corrections).
        activations: (pattern, rounding, largest) triples: linears whose inputs are rounded to 8 bits
            (vlac.rewrites.corrections.round_inputs).
        importance: name of a lowered weight -> mean squares [k] of what its linear reads, for formats that weigh.
        kv: format of the keys and values that a loop reads: "f32", or codes as vlac.rewrites.cache writes them.
        history: what was applied. source: where it came from. warnings: what a person should know.
        ignored: config keys that do not act on inference, listed by `inspect`.
        parameters: how many the checkpoint holds, dead ones included (the number people call the model by).
        recorded: observations that calibration takes when a pass names none, and that golden answers are made of.
    """

    family: str
    name: str
    spec: Any
    weights: Weights
    io: IO
    source: Source
    tokenizer: bytes | None = None
    precision: tuple[tuple[str, str], ...] = ()
    rotations: tuple[tuple[str, int], ...] = ()
    biases: Mapping[str, LazyTensor] = field(default_factory=dict)
    activations: tuple[tuple[str, str, float], ...] = ()
    importance: Mapping[str, Any] = field(default_factory=dict)
    flow: FlowSpec | None = None
    kv: str = "f32"
    history: tuple[Applied, ...] = ()
    warnings: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    parameters: int = 0
    recorded: Recorded | None = None

    def replace(self, **changes: Any) -> Policy:
        return dataclasses.replace(self, **changes)


def match_format(name: str, plan: tuple[tuple[str, str], ...], default: str) -> str:
    """Format that a plan gives to a tensor: the last matching pattern (shell style, case-sensitive) wins."""
    chosen = default
    for pattern, fmt in plan:
        if fnmatchcase(name, pattern):
            chosen = fmt
    return chosen
