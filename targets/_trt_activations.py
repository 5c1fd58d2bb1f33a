"""What linears on integers read, measured on observations: one fixed scale for each value, written into the program.

The program then says round_int8 or round_fp8 where a graph quantises, and every engine computes what the graph means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vlac import calibrate
from vlac.float8 import LARGEST
from vlac.graph import Node, Program
from vlac.rewrites.draft import Draft, node

if TYPE_CHECKING:
    from vlac.artifact import NpArray
    from vlac.policy import Policy

ROUNDS = {"int8": ("round_int8", 127.0), "fp8": ("round_fp8", LARGEST)}
"""Format of a weight -> the op that rounds what it multiplies, and the largest code."""
SAMPLES = 8
"""Observations; every turn of a sampler counts."""

Place = tuple[str, str]
"""Stage and value."""


def fixed(policy: Policy, program: Program, samples: int = SAMPLES) -> tuple[Program, dict[str, Any]]:
    """The lowered program with every input of an int8 or fp8 linear rounded on its own grid, and figures for the
    manifest. Scales are largest magnitude seen over largest code. Where a pass has chosen roundings, these stay."""
    reads = set() if policy.activations else _reads(program)
    if not reads:
        return program, {}
    largest = _largest(policy, program, reads, samples)
    kind = "recorded" if policy.recorded is not None else "synthetic"
    figures = {
        "observations": samples,
        "kind": kind,
        "values": len(reads),
        "dead": sum(v == 0 for v in largest.values()),
    }
    return _rounded(program, largest), figures


def _reads(program: Program) -> set[Place]:
    """Values that linears with int8 or fp8 weights read."""
    return {(s.name, n.inputs[0]) for s in program.stages for n in s.nodes if _format(program, n) in ROUNDS}


def _format(program: Program, n: Node) -> str:
    """Of the weight of a linear; "" for what is none."""
    weight = program.params.get(n.inputs[1][1:]) if n.op == "linear" else None
    return "" if weight is None else weight.format


def _largest(policy: Policy, program: Program, reads: set[Place], samples: int) -> dict[Place, float]:
    names: dict[str, set[str]] = {}
    for stage, value in reads:
        names.setdefault(stage, set()).add(value)
    largest = dict.fromkeys(reads, 0.0)

    def see(_: int, stage: str, values: Mapping[str, NpArray]) -> None:
        for name, value in values.items():
            if (stage, name) in largest:
                largest[stage, name] = max(largest[stage, name], float(np.abs(value).max(initial=0)))

    calibrate.watch(policy, calibrate.observations(policy, samples), names, see, program=program)
    return largest


def _rounded(program: Program, largest: Mapping[Place, float]) -> Program:
    draft = Draft.of(program)
    for stage in draft.stages:
        names: dict[tuple[str, str], str] = {}
        result: list[Node] = []
        for n in stage.nodes:
            fmt = _format(program, n)
            if fmt in ROUNDS:
                key = (n.inputs[0], fmt)
                if key not in names:
                    names[key] = stage.fresh(f"{n.inputs[0]}.{fmt}", [r.name for r in result])
                    result.append(_round(names[key], n.inputs[0], fmt, largest[stage.name, n.inputs[0]]))
                n = Node(n.name, n.op, (names[key], *n.inputs[1:]), n.attrs)
            result.append(n)
        stage.nodes = result
    return draft.build()


def _round(name: str, value: str, format: str, largest: float) -> Node:
    """Its scale is a float32, so that a graph that keeps it as one means the same."""
    op, top = ROUNDS[format]
    scale = float(max(np.float32(largest / top), np.float32(2.0**-100))) if largest else 1.0
    form = {"form": "tensor"} if op == "round_int8" else {}
    return node(name, op, value, **form, largest=scale * top)
