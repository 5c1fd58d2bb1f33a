"""Linears on fixed scales whose results are taken apart: a product for every part, so that scales stay in the product.

OpenVINO lets the scale of codes wait until after a split. The product then leaves as 32-bit numbers, and every part is
multiplied by itself: 13 % of the time of SmolVLA's prefix, whose q, k, v and gate, up are one weight each. Slices of
constants are taken when the engine loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlac.graph import Node

if TYPE_CHECKING:
    from vlac.targets._onnx_emitter import StageEmitter


def parted(e: StageEmitter, operand: str) -> Node | None:
    """The linear that made this operand, where each reader of its columns multiplies them itself."""
    n = e.producer(operand)
    if n is None or n.op != "linear" or n.name in e.stage.outputs or e.integer(n) or e.fixed(n.inputs[0]) is None:
        return None
    params = [p for i in n.inputs[1:] if (p := e.program.params.get(i[1:])) is not None]
    if len(params) < len(n.inputs) - 1 or params[0].format != "int8" or any(len(p.shape) != 1 for p in params[1:]):
        return None
    readers = [r for r in e.stage.nodes if n.name in r.inputs]
    return n if readers and all(r.op == "slice" and r.attr["axis"] == 1 for r in readers) else None


def emit_part(e: StageEmitter, whole: Node, n: Node, out: str) -> None:
    """The columns that slice `n` takes of linear `whole`."""
    w = e.graph.param(whole.inputs[1][1:])
    ends = [e.i64(n.attr["start"]), e.i64(n.attr["stop"])]

    def cut(values: str, axis: int, suffix: str) -> str:
        return e.node("Slice", [values, *ends, e.i64(axis)], e.tmp(out, suffix))

    values = [cut(e.columns(w), 1, "codes"), cut(w.scale, 0, "scales")]
    weight = e.node("DequantizeLinear", values, e.tmp(out, "weight"), axis=1)
    biased = len(whole.inputs) > 2
    product = e.node("MatMul", [e(whole.inputs[0]), weight], e.tmp(out, "product") if biased else out)
    if biased:
        e.node("Add", [product, cut(e(whole.inputs[2]), 0, "bias")], out)
