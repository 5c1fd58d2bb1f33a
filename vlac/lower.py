"""Lowering: the visible list of exact rewrites that make a naively drawn program fast, in order.

Each is Program -> Program and changes no result beyond rounding; `vlac inspect --program --after NAME` shows any point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vlac.errors import Unsupported
from vlac.graph import Program, check
from vlac.rewrites.clean import drop_identities, prune, share
from vlac.rewrites.constants import fold, tabulate_steps
from vlac.rewrites.linears import (
    broadcast_tiles,
    compose_linears,
    fold_biases,
    fold_row_biases,
    fold_scales,
    fuse_projections,
    split_concat_linears,
)
from vlac.rewrites.motion import hoist_invariants
from vlac.rewrites.patches import shuffle_as_patch_order
from vlac.rewrites.precision import assign_formats, pad_to_blocks, roles
from vlac.rewrites.rates import split_by_rate
from vlac.rewrites.suffix import free_suffix

__all__ = ["REWRITES", "Rewrite", "assign_formats", "lower", "lower_until", "pad_to_blocks", "roles"]


@dataclass(frozen=True)
class Rewrite:
    """A named step of lowering; its function's docstring says what it does and why it is exact."""

    name: str
    fn: Callable[[Program], Program]


REWRITES: tuple[Rewrite, ...] = (
    Rewrite("share", share),
    Rewrite("prune", prune),
    Rewrite("fold", fold),
    Rewrite("free_suffix", free_suffix),
    Rewrite("fold_scales", fold_scales),
    Rewrite("fold_biases", fold_biases),
    Rewrite("broadcast_tiles", broadcast_tiles),
    Rewrite("split_concat_linears", split_concat_linears),
    Rewrite("tabulate_steps", tabulate_steps),
    Rewrite("hoist_invariants", hoist_invariants),
    Rewrite("compose_linears", compose_linears),
    Rewrite("fold_row_biases", fold_row_biases),
    Rewrite("shuffle_as_patch_order", shuffle_as_patch_order),
    Rewrite("fuse_projections", fuse_projections),
    Rewrite("split_by_rate", split_by_rate),
    Rewrite("drop_identities", drop_identities),
    Rewrite("share_again", share),
    Rewrite("prune_again", prune),
)


def lower(program: Program) -> Program:
    """All rewrites, in order; the result is checked."""
    return lower_until(program, REWRITES[-1].name)


def lower_until(program: Program, name: str) -> Program:
    """The rewrites up to and including `name`, the result checked; Unsupported names those there are."""
    names = [r.name for r in REWRITES]
    if name not in names:
        raise Unsupported(f"no rewrite {name!r}; in order there are: {', '.join(names)}")
    for rewrite in REWRITES[: names.index(name) + 1]:
        program = rewrite.fn(program)
    return check(program)
