"""A stage as the torch engine runs it: one call after another, and what nobody reads any more is let go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Tensor = Any
"""torch.Tensor; torch is imported only when a session is made."""

TorchOp = Callable[[Sequence[Tensor], Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Step:
    """One call: env[result] = fn(operands, attrs), then `free` leave the environment."""

    fn: TorchOp
    operands: tuple[str, ...]
    attrs: Mapping[str, Any]
    result: str
    free: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A stage for one bucket; `constants` are values that depend on nothing."""

    steps: tuple[Step, ...]
    constants: Mapping[str, Tensor]


def with_frees(steps: Sequence[Step], keep: set[str]) -> tuple[Step, ...]:
    """Each step with the results that nobody reads after it."""
    last: dict[str, int] = {}
    for at, step in enumerate(steps):
        last.update(dict.fromkeys((*step.operands, step.result), at))
    made = {s.result for s in steps} - keep
    free: dict[int, list[str]] = {}
    for name in sorted(made):
        free.setdefault(last[name], []).append(name)
    return tuple(Step(s.fn, s.operands, s.attrs, s.result, tuple(free.get(i, ()))) for i, s in enumerate(steps))
