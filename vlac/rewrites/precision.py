"""The precision plan lands on the program: what each parameter is for, its format, and widths that fit the format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np

from vlac.errors import Unsupported
from vlac.formats import GRIDS, get_format
from vlac.graph import Node, Param, Program, Repeat
from vlac.ops import NpArray
from vlac.policy import match_format
from vlac.rewrites.draft import Draft, StageDraft, is_weight, node, unique

Plan = Callable[[str, tuple[int, ...], str], str]

PASSES_ALONG = ("scale", "reshape", "slice", "pad", "transpose", "cast", "concat", "tile")
"""Ops that only move or scale values: a value behind them is still the raw state or the flow state."""

MOVES_IDS = ("reshape", "slice", "pad", "concat", "cast", "tile")


def roles(program: Program) -> dict[str, str]:
    """What each parameter is for.

    "embed": a table that `tokens` pick rows of. "head": weights of linears that touch the raw state, the flow state or
    its velocity; these carry physical quantities and stay fp32. "linear": weights of all other linears. "other":
    everything else (norms, biases, tables of steps and positions), and whatever is used in two ways.
    """
    found: dict[str, set[str]] = {name: set() for name in program.params}
    for stage in program.stages:
        steps = [s for s in program.schedule.steps if isinstance(s, Repeat) and s.stage == stage.name]
        into = {"state", *(i for s in steps for _, i, _ in s.carry)}
        raw = _forward(stage.nodes, into, PASSES_ALONG)
        # a carried id (the token that the last turn chose) picks rows of the same table as the prompt's
        carried = {i for i, t in stage.inputs if i in into and t.dtype == "i32"}
        ids = _forward(stage.nodes, {"tokens", *carried}, MOVES_IDS)
        velocity = _backward(stage.nodes, {out for s in steps for out, _, _ in s.carry})
        for n in stage.nodes:
            for k, i in enumerate(n.inputs):
                if not is_weight(i):
                    continue
                role = "other"
                if n.op == "linear" and k == 1:
                    role = "head" if n.inputs[0] in raw or n.name in velocity else "linear"
                elif n.op == "embed" and k == 1 and n.inputs[0] in ids:
                    role = "embed"
                found[i[1:]].add(role)
    return {name: _settle(kinds) for name, kinds in found.items()}


def _settle(kinds: set[str]) -> str:
    for role in ("other", "head", "embed", "linear"):
        if role in kinds:
            return role
    return "other"


def _forward(nodes: Sequence[Node], start: set[str], along: Sequence[str]) -> set[str]:
    reached = set(start)
    for n in nodes:
        if n.op in along and any(i in reached for i in n.inputs):
            reached.add(n.name)
    return reached


def _backward(nodes: Sequence[Node], start: set[str]) -> set[str]:
    """Values that reach `start` through moves, sums and products only."""
    reached = set(start)
    for n in reversed(nodes):
        if n.name in reached and n.op in (*PASSES_ALONG, "add", "sub", "mul"):
            reached.update(i for i in n.inputs if not is_weight(i))
    return reached


def assign_formats(
    program: Program, plan: Plan, overrides: Sequence[tuple[str, str]] = (), containers: Mapping[str, str] | None = None
) -> Program:
    """Every parameter gets the format that `plan(name, shape, role)` asks for, or the last override that matches it.

    Overrides are (shell pattern over names, format). They act on linears and embeddings; on a head only when they spell
    its name out; never on norms, biases and tables. A grid (vlac.formats.GRIDS) acts on linears only and becomes the
    format that `containers` holds it in. Unsupported names an override that acts on nothing.
    """
    held = containers or {}
    kinds = roles(program)
    params: dict[str, Param] = {}
    acted: set[str] = set()
    for name, p in program.params.items():
        allowed = tuple(
            (pat, held.get(fmt, fmt))
            for pat, fmt in overrides
            if _may_override(pat, name, kinds[name]) and (fmt not in GRIDS or kinds[name] == "linear")
        )
        acted.update(pat for pat, _ in allowed)
        fmt = get_format(match_format(name, allowed, plan(name, p.shape, kinds[name])))
        params[name] = Param(p.shape, fmt.name)
    for pattern, _ in overrides:
        if pattern not in acted:
            weights = sorted(n for n, k in kinds.items() if k in ("linear", "embed", "head"))
            near = get_close_matches(pattern, weights, n=3, cutoff=0.3) or weights[:3]
            raise Unsupported(
                f"precision pattern {pattern!r} acts on no linear or embedding of the lowered program; "
                f"of its {len(weights)}, the nearest: {', '.join(near)}",
                remedy="use names as `vlac inspect --program` shows them: q, k, v are one weight, so are gate and up",
            )
    return program.replace(params=params)


def _may_override(pattern: str, name: str, role: str) -> bool:
    if role == "head":
        return pattern == name
    return role in ("linear", "embed") and fnmatchcase(name, pattern)


def pad_to_blocks(program: Program) -> Program:
    """Weights whose rows are no whole number of their format's blocks get zero columns, so that the format asked for is
    the format stored.

    A linear's activation is padded likewise (zeros times zeros: exact); an embedding's result is cut back.
    """
    draft = Draft.of(program)
    padded: dict[str, int] = {}
    for name, p in list(draft.params.items()):
        block = get_format(p.format).block
        width = p.shape[-1] if p.shape else 1
        if width % block:
            padded[name] = -(-width // block) * block
            pad_weight(draft, name, padded[name])
    for stage in draft.stages:
        _pad_stage(stage, padded, {n: program.params[n].shape for n in padded})
    return draft.build()


def pad_weight(draft: Draft, name: str, width: int) -> None:
    """Columns of zeros, up to `width`."""
    p = draft.params[name]
    shape = (*p.shape[:-1], width)

    def pad(w: NpArray) -> NpArray:
        return np.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, width - w.shape[-1])])

    draft.params[name] = Param(shape, p.format)
    if name in draft.weights:
        lazy = draft.weights[name]
        wide = lazy.map_rows(pad, shape[1:]) if len(shape) > 1 else lazy.map(pad, shape)
        known = lazy.importance
        draft.weights[name] = replace(wide, importance=None if known is None else pad(known))


def _pad_stage(stage: StageDraft, padded: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
    pads: dict[tuple[str, int], str] = {}
    result: list[Node] = []
    taken = {n for n, _ in stage.inputs} | {n.name for n in stage.nodes}
    for n in stage.nodes:
        weight = n.inputs[1][1:] if len(n.inputs) > 1 and is_weight(n.inputs[1]) else ""
        if weight in padded and n.op == "linear":
            key = (n.inputs[0], padded[weight])
            if key not in pads:
                pads[key] = unique(f"{n.inputs[0].lstrip('@')}.padded", taken)
                taken.add(pads[key])
                result.append(node(pads[key], "pad", n.inputs[0], size=padded[weight]))
            n = Node(n.name, n.op, (pads[key], *n.inputs[1:]), n.attrs)
        elif weight in padded and n.op == "embed":
            wide = unique(f"{n.name}.padded", taken)
            taken.add(wide)
            result.append(Node(wide, "embed", n.inputs, n.attrs))
            n = node(n.name, "slice", wide, axis=1, start=0, stop=shapes[weight][-1])
        elif any(is_weight(i) and i[1:] in padded for i in n.inputs):
            names = [i[1:] for i in n.inputs if is_weight(i) and i[1:] in padded]
            raise Unsupported(
                f"{names[0]} {list(shapes[names[0]])} is read by {n.op}, which cannot read it in wider blocks",
                remedy="keep it in f32",
            )
        result.append(n)
    stage.nodes = result
