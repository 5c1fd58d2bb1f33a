"""Rotated linears: x W^T = (x R)(W R)^T for an orthogonal R, so that W is stored in the basis where it rounds best.

R is block-diagonal with one small rotation in every block: it costs `block` multiplications per value, works for every
width that has a factor of two, and is drawn with ops that every engine has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from vlac.errors import Unsupported
from vlac.graph import Node, Param, Program
from vlac.ops import NpArray, Type
from vlac.rewrites.draft import Draft, StageDraft, node
from vlac.rewrites.precision import roles
from vlac.rotations import rotation
from vlac.weights import LazyTensor


def block_of(width: int, wish: int) -> int:
    """The size of the blocks for rows of `width`: the largest common divisor with `wish`, a power of two."""
    return math.gcd(width, wish)


def rotated(weight: NpArray, block: int, back: bool = False) -> NpArray:
    """Every `block` columns of a weight [n, k] times the rotation of that size, or its inverse; float64."""
    r = rotation(block, seed=0)
    parts = weight.astype(np.float64).reshape(len(weight), -1, block)
    return np.asarray(parts @ (r.T if back else r)).reshape(weight.shape)


def rotate_inputs(program: Program, plan: Sequence[tuple[str, int]]) -> Program:
    """Linears of role "linear" whose weight a pattern of `plan` matches (last match wins, block 0: none) read a
    rotated input; linears that read one value share its rotation. Runs after formats are assigned: a rotation is f32.
    """
    if not plan:
        return program
    kinds = roles(program)
    chosen: dict[str, int] = {}
    for pattern, wish in plan:
        hits = [n for n, kind in kinds.items() if kind == "linear" and fnmatchcase(n, pattern)]
        if not hits:
            raise Unsupported(f"rotation pattern {pattern!r} matches no linear of the lowered program")
        chosen.update({n: block_of(program.params[n].shape[1], wish) if wish else 0 for n in hits})
    chosen = {n: b for n, b in chosen.items() if b > 1}
    draft = Draft.of(program)
    for stage in draft.stages:
        _rotate_stage(draft, stage, chosen)
    for name, block in chosen.items():
        draft.weights[name] = draft.weights[name].map(lambda w, b=block: rotated(w, b).astype(np.float32))  # type: ignore[misc]
    return draft.build()


def _rotate_stage(draft: Draft, stage: StageDraft, chosen: dict[str, int]) -> None:
    types = draft.types(stage)
    made: dict[tuple[str, int], str] = {}
    result: list[Node] = []
    for n in stage.nodes:
        weight = n.inputs[1][1:] if n.op == "linear" else ""
        if weight in chosen:
            key = (n.inputs[0], chosen[weight])
            if key not in made:
                new = _rotation_of(draft, stage, key, types[n.inputs[0]], result)
                result += new
                made[key] = new[-1].name
            n = Node(n.name, n.op, (made[key], *n.inputs[1:]), n.attrs)
        result.append(n)
    stage.nodes = result


def _rotation_of(
    draft: Draft, stage: StageDraft, key: tuple[str, int], kind: Type, before: Sequence[Node]
) -> list[Node]:
    """Nodes of x R: rows cut into blocks, each times the small rotation, joined again."""
    x, block = key
    rows, width = kind.shape
    assert isinstance(width, int)
    name = f"rotation.{block}.weight"
    if name not in draft.params:
        draft.params[name] = Param((block, block))
        draft.weights[name] = LazyTensor.of(rotation(block, seed=0).T, name)
    taken = [n.name for n in before]
    cut, turned, whole = (stage.fresh(f"{x}.{part}{block}", taken) for part in ("blocks", "turned", "rotated"))
    return [
        node(cut, "reshape", x, shape=(rows * (width // block), block)),
        node(turned, "linear", cut, f"@{name}"),
        node(whole, "reshape", turned, shape=(rows, width)),
    ]
