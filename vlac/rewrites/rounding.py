"""bfloat16 weights of linears that read pictures: rounded where pictures vary least."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vlac.graph import Node, Program
from vlac.layouts import bf16_from_f32, f32_from_bf16
from vlac.ops import NpArray, Type
from vlac.rewrites.draft import Draft, is_weight, static_shape

PIXELS, COLOURS, TOKENS = 0.97, 0.95, 0.9
"""Second moments, of 1 each: of pixels side by side (photographs have 0.95 and more about their mean), of the colours
of a pixel, of a feature in tokens side by side. The bundled policy's have 0.99, 0.98 and 0.90."""
GRAIN = 0.2
"""Share of a pixel that is texture and noise of its own. Without it, errors in noise would be five times as large, in
square, as those of rounding to nearest; with it 1.1 times, and those in what is smooth still a fortieth."""


def shape_rounding(program: Program) -> Program:
    """Weights in bfloat16 of linears whose input is a patch of pixels, or tokens side by side in one row.

    Rounding each weight by itself makes an output's error sum_j e_j x_j, whose square is e^T H e on average, H the
    second moments of x. Here what rounding one weight does to the output is taken up by weights that are still to be
    rounded, as far as H says that their inputs move together (the update of GPTQ, arXiv 2210.17323, with an H that the
    layout gives instead of data). The errors then cancel for what is smooth, and are a little larger in sum of
    squares: for noise that is independent in every pixel this loses. Costs nothing at run time.
    """
    draft = Draft.of(program)
    for stage in draft.stages:
        types, made = draft.types(stage), stage.producers()
        for n in [n for n in stage.nodes if n.op == "linear" and is_weight(n.inputs[1])]:
            name, source = n.inputs[1][1:], made.get(n.inputs[0])
            if source is None or draft.params[name].format != "bf16" or draft.reads(name) != 1:
                continue
            moments = _moments(types, source)
            if moments is None:
                continue
            lazy = draft.lazy(name)
            shaped = lazy.map_rows(lambda rows, h=moments: rounded(rows, h))  # type: ignore[misc]
            draft.weights[name] = replace(shaped, importance=lazy.importance)
    return draft.build()


def _moments(types: dict[str, Type], n: Node) -> NpArray | None:
    """Of the groups of columns, next to each other, that a value is made of: [groups, groups]. None: nothing known."""
    before, after = static_shape(types[n.inputs[0]]), static_shape(types[n.name])
    if before is None or after is None:
        return None
    if n.op == "patchify":
        side = np.arange(n.attr["patch"])
        line = PIXELS ** np.abs(side[:, None] - side)
        smooth = np.kron(_alike(before[0], COLOURS), np.kron(line, line))
        return (1 - GRAIN) * smooth + GRAIN * np.eye(len(smooth))
    if n.op not in ("reshape", "pixel_shuffle") or len(before) != 2 or len(after) != 2:
        return None
    tokens, rest = divmod(after[1], before[1])
    return _alike(tokens, TOKENS) if tokens > 1 and rest == 0 else None


def _alike(n: int, correlation: float) -> NpArray:
    return np.full((n, n), correlation) + (1 - correlation) * np.eye(n)


def rounded(rows: NpArray, moments: NpArray) -> NpArray:
    """rows [n, groups * width] f32 as numbers that bfloat16 holds; what is lost in a group of columns is made up for in
    the later ones, column by column, by the moments [groups, groups] of the groups."""
    left = rows.astype(np.float64).reshape(len(rows), len(moments), -1)
    upper = np.linalg.cholesky(np.linalg.inv(moments)).T
    for j in range(len(moments)):
        held = f32_from_bf16(bf16_from_f32(left[:, j].astype(np.float32)))
        error = (left[:, j] - held) / upper[j, j]
        left[:, j] = held
        left[:, j + 1 :] -= upper[j, j + 1 :, None] * error[:, None]
    return left.reshape(rows.shape).astype(np.float32)
