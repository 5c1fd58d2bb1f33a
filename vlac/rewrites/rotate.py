"""Rotated linears: x W^T = (x R)(W R)^T for an orthogonal R, so that W is stored in the basis where it rounds best.

R is the Kronecker product of two small rotations, R = A (x) B: with A = 1 (block-diagonal) it costs `B` products per
value, with A and B of about the square root of the width it is a full Hadamard matrix. Either is drawn with ops that
every engine has, and works for every width that has such factors.
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
from vlac.rotations import has_hadamard, rotation
from vlac.weights import LazyTensor

FULL = -1
"""As a wish: over the whole width."""


def factors_of(width: int, wish: int) -> tuple[int, int]:
    """Sizes (a, b) of the two rotations for rows of `width`; (1, 1): none.

    (1, largest common divisor with `wish`), or for FULL the two factors of the width nearest to its square root for
    which there are Hadamard matrices.
    """
    if wish != FULL:
        return 1, math.gcd(width, wish) if wish else 1
    pairs = [(a, width // a) for a in range(1, math.isqrt(width) + 1) if width % a == 0]
    usable = [(a, b) for a, b in pairs if has_hadamard(a) and has_hadamard(b)]
    # a width such as 16 * 269 has no Hadamard matrix of its own: blocks, then
    return max(usable, default=(1, math.gcd(width, 64)))


def rotated(weight: NpArray, sizes: tuple[int, int], back: bool = False) -> NpArray:
    """Every row of a weight [n, k] times the rotation of these sizes, or its inverse; float64."""
    a, b = sizes
    left, right = rotation(a, seed=0), rotation(b, seed=0)
    if back:
        left, right = left.T, right.T
    parts = weight.astype(np.float64).reshape(-1, a, b) @ right
    if a > 1:
        parts = np.swapaxes(np.swapaxes(parts, 1, 2) @ left, 1, 2)
    return np.asarray(parts).reshape(weight.shape)


def rotate_inputs(program: Program, plan: Sequence[tuple[str, int]]) -> Program:
    """Linears of role "linear" whose weight a pattern of `plan` matches (last match wins, block 0: none) read a
    rotated input; linears that read one value share its rotation. Runs after formats are assigned: a rotation is f32.
    """
    if not plan:
        return program
    kinds = roles(program)
    chosen: dict[str, tuple[int, int]] = {}
    for pattern, wish in plan:
        hits = [n for n, kind in kinds.items() if kind == "linear" and fnmatchcase(n, pattern)]
        if not hits:
            raise Unsupported(f"rotation pattern {pattern!r} matches no linear of the lowered program")
        chosen.update({n: factors_of(program.params[n].shape[1], wish) for n in hits})
    chosen = {n: sizes for n, sizes in chosen.items() if sizes != (1, 1)}
    draft = Draft.of(program)
    for stage in draft.stages:
        _rotate_stage(draft, stage, chosen)
    for name, sizes in chosen.items():
        draft.weights[name] = draft.weights[name].map(lambda w, s=sizes: rotated(w, s).astype(np.float32))  # type: ignore[misc]
    return draft.build()


def _rotate_stage(draft: Draft, stage: StageDraft, chosen: dict[str, tuple[int, int]]) -> None:
    types = draft.types(stage)
    made: dict[tuple[str, tuple[int, int]], str] = {}
    result: list[Node] = []
    for n in stage.nodes:
        weight = n.inputs[1][1:] if n.op == "linear" else ""
        if weight in chosen:
            key = (n.inputs[0], chosen[weight])
            if key not in made:
                new = _rotation_of(draft, stage, *key, types[n.inputs[0]], result)
                result += new
                made[key] = new[-1].name
            n = Node(n.name, n.op, (made[key], *n.inputs[1:]), n.attrs)
        result.append(n)
    stage.nodes = result


def _rotation_of(
    draft: Draft, stage: StageDraft, x: str, sizes: tuple[int, int], kind: Type, before: Sequence[Node]
) -> list[Node]:
    """Nodes of x R: rows cut into blocks, each times the small rotation; for a full one across the blocks as well."""
    rows, width = kind.shape
    a, b = sizes
    taken = [n.name for n in before]
    full = [] if a == 1 else ["across", "sides", "crossed", "again", "blocks"]
    names = {part: stage.fresh(f"{x}.{part}{b}", taken) for part in ("cut", "turned", *full, "rotated")}
    nodes = [
        node(names["cut"], "reshape", x, shape=(rows * a * (width // a // b), b)),
        node(names["turned"], "linear", names["cut"], _matrix(draft, b)),
    ]
    if a > 1:
        nodes += [
            node(names["across"], "reshape", names["turned"], shape=(rows, a, b)),
            node(names["sides"], "transpose", names["across"], perm=(0, 2, 1)),
            node(names["crossed"], "reshape", names["sides"], shape=(rows * b, a)),
            node(names["again"], "linear", names["crossed"], _matrix(draft, a)),
            node(names["blocks"], "reshape", names["again"], shape=(rows, b, a)),
        ]
        back = stage.fresh(f"{x}.back{b}", [*taken, *names.values()])
        nodes.append(node(back, "transpose", names["blocks"], perm=(0, 2, 1)))
    nodes.append(node(names["rotated"], "reshape", nodes[-1].name, shape=(rows, width)))
    return nodes


def _matrix(draft: Draft, size: int) -> str:
    name = f"rotation.{size}.weight"
    if name not in draft.params:
        draft.params[name] = Param((size, size))
        draft.weights[name] = LazyTensor.of(rotation(size, seed=0).T, name)
    return f"@{name}"
