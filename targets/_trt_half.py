"""Attention in float16, written into the program: every engine computes what a graph of 8-bit linears attends with.

Queries (scaled), keys and values are rounded to float16, and so is what attention gives; scores and their softmax
are the kernel's own affair (float32 in ONNX Runtime and in fused kernels).
"""

from __future__ import annotations

from vlac.graph import Node, Program
from vlac.rewrites.draft import Draft, StageDraft, node


def attention_in_f16(program: Program) -> Program:
    """The program with `round_f16` around every attention."""
    draft = Draft.of(program)
    for stage in draft.stages:
        made: dict[tuple[str, float], str] = {}
        for n in [n for n in stage.nodes if n.op == "attention"]:
            stage.replace(n, _around(stage, n, made))
    return draft.build()


def _around(stage: StageDraft, n: Node, made: dict[tuple[str, float], str]) -> list[Node]:
    """The nodes that take the place of one attention; values that were rounded for another are shared."""
    parts: list[Node] = []

    def fresh(name: str) -> str:
        return stage.fresh(name, [p.name for p in parts])

    def rounded(value: str, factor: float = 1.0) -> str:
        if (value, factor) not in made:
            source = value
            if factor != 1.0:
                source = fresh(f"{value}.scaled")
                parts.append(node(source, "scale", value, factor=factor))
            made[value, factor] = fresh(f"{value}.f16")
            parts.append(node(made[value, factor], "round_f16", source))
        return made[value, factor]

    operands = [rounded(n.inputs[0], float(n.attr["scale"])), rounded(n.inputs[1]), rounded(n.inputs[2])]
    wide = fresh(f"{n.name}.f32")
    parts.append(node(wide, "attention", *operands, *n.inputs[3:], **{**n.attr, "scale": 1.0}))
    return [*parts, node(n.name, "round_f16", wide)]
