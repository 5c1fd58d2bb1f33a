"""Hidden units of MLPs in numbers whose rows do not all begin at the same place of a page.

A product of 1024 rows and 3072 hidden units in float32 writes rows that lie exactly three pages apart: its tiles are
columns of such rows, all of which want the same few lines of a cache. SmolVLA's vision tower takes 4 % less time with
16 units more in ONNX Runtime, 3 % less with 32 in ggml (bfloat16), an MLP alone 5 to 15 %: most where other programs
use the cache, too. What is added is zeros in every weight: exact, and the same bits where it was measured. Kernels that
multiply integers write less, and OpenVINO's in tiles of their own: they gain nothing. Shares
by hand, old and new in turns; no file holds them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from vlac.graph import Node, Param, Program
from vlac.ops import Attr, Type
from vlac.rewrites.draft import Draft, StageDraft, is_weight, node
from vlac.rewrites.precision import pad_weight
from vlac.weights import LazyTensor

ALIASED = 1024
"""Hidden units, float32, whose rows are whole pages apart."""
UNITS = 16
"""As many are added: a line of the cache."""
ACTIVATIONS = ("silu", "gelu", "relu")
"""What makes zeros of zeros."""
BETWEEN = ("round_int8",)
"""May stand before the second linear: zeros stay zeros, and the largest value of a row what it was."""


@dataclass(frozen=True)
class _Mlp:
    """A stage's MLP: linears that make hidden units, the slices that take a gate and its partner apart, if they are
    one linear, and the linear that reads the units."""

    stage: StageDraft
    ups: tuple[Node, ...]
    slices: tuple[Node, ...]
    down: Node

    @property
    def weights(self) -> tuple[str, ...]:
        return (*(i for up in self.ups for i in up.inputs[1:]), self.down.inputs[1])


def pad_hidden_units(program: Program, formats: Collection[str], units: int = UNITS) -> Program:
    """MLPs of a multiple of ALIASED hidden units get `units` more, all zero, gated or not.

    Only weights held in `formats`, and only where everything that reads one of an MLP's weights is such an MLP.
    """
    draft = Draft.of(program)
    found = [m for s in draft.stages for m in _mlps(draft, s, draft.types(s)) if _held(draft, m, formats)]
    by_weights: dict[tuple[str, ...], list[_Mlp]] = {}
    for mlp in found:
        by_weights.setdefault(mlp.weights, []).append(mlp)
    for weights, mlps in by_weights.items():
        ends = [tuple(_end(s) for s in m.slices) for m in mlps]
        if any(draft.reads(w[1:]) != len(mlps) * weights.count(w) for w in weights) or len(set(ends)) > 1:
            continue
        *ups, down = weights
        width = draft.params[down[1:]].shape[1]
        for operand in dict.fromkeys(ups):
            _insert(draft, operand[1:], units, sorted(ends[0]) or [draft.params[operand[1:]].shape[0]])
        pad_weight(draft, down[1:], width + units)
        for mlp in mlps:
            for s in mlp.slices:
                _move(mlp.stage, s, width + units)
    return draft.build()


def _mlps(draft: Draft, stage: StageDraft, types: dict[str, Type]) -> list[_Mlp]:
    found = []
    for down in stage.nodes:
        if down.op == "linear" and is_weight(down.inputs[1]):
            width = types[down.inputs[0]].shape[1]
            if isinstance(width, int) and width % ALIASED == 0 and (mlp := _mlp(stage, down)) is not None:
                found.append(mlp)
    return found


def _held(draft: Draft, mlp: _Mlp, formats: Collection[str]) -> bool:
    return all(draft.params[up.inputs[1][1:]].format in formats for up in (*mlp.ups, mlp.down))


def _mlp(stage: StageDraft, down: Node) -> _Mlp | None:
    made = stage.producers()

    def maker(value: str) -> Node | None:
        """The node behind a value that nobody else reads."""
        return made.get(value) if stage.single_user(value) is not None else None

    n = maker(down.inputs[0])
    while n is not None and n.op in BETWEEN:
        n = maker(n.inputs[0])
    if n is None:
        return None
    factors = [maker(i) for i in n.inputs] if n.op == "mul" else [n]
    sources = [maker(f.inputs[0]) if f is not None and f.op in ACTIVATIONS else f for f in factors]
    if not any(f is not None and f.op in ACTIVATIONS for f in factors) or len(set(map(id, sources))) < len(sources):
        return None
    slices = [s for s in sources if s is not None and s.op == "slice" and s.attr["axis"] == 1]
    if slices:
        inside = {s.inputs[0] for s in slices}
        readers = [r for r in stage.nodes if inside & set(r.inputs)]
        whole = made.get(slices[0].inputs[0])
        if len(slices) != 2 or len(inside) > 1 or len(readers) != 2 or inside & set(stage.outputs):
            return None
        return _Mlp(stage, (whole,), tuple(slices), down) if _linear(whole) and _halves(slices) else None  # type: ignore[arg-type]
    return _Mlp(stage, tuple(sources), (), down) if all(map(_linear, sources)) else None  # type: ignore[arg-type]


def _linear(n: Node | None) -> bool:
    return n is not None and n.op == "linear" and all(map(is_weight, n.inputs[1:]))


def _end(n: Node) -> int:
    stop = n.attr["stop"]
    assert isinstance(stop, int)
    return stop


def _halves(slices: list[Node]) -> bool:
    """Whether they are the first and the second half of their operand, in any order."""
    a, b = sorted(slices, key=_end)
    return a.attr["start"] == 0 and b.attr["start"] == a.attr["stop"] and _end(b) == 2 * _end(a)


def _move(stage: StageDraft, s: Node, width: int) -> None:
    start = 0 if s.attr["start"] == 0 else width
    attrs: dict[str, Attr] = {"axis": 1, "start": start, "stop": start + width}
    stage.replace(s, [node(s.name, "slice", s.inputs[0], **attrs)])


def _insert(draft: Draft, name: str, units: int, after: list[int]) -> None:
    """So many rows of zeros (entries of a bias) after each of these."""
    held, lazy = draft.params[name], draft.lazy(name)
    row = held.shape[1:]
    zeros = LazyTensor.of(np.zeros((units, *row), np.float32), "zeros")
    zeros = replace(zeros, load_rows=lambda i, j: np.zeros((j - i, *row), np.float32))
    parts = [p for start, stop in zip([0, *after], after, strict=False) for p in (lazy.cut(start, stop), zeros)]
    wide = LazyTensor.concat(parts)
    draft.params[name] = Param(wide.shape, held.format)
    draft.weights[name] = replace(wide, importance=lazy.importance, dtype=lazy.dtype, source=lazy.source)
