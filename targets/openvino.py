"""Targets openvino-int8 and openvino-bf16: the ONNX folder with what OpenVINO runs fastest, and nothing beside it.

int8: weights as DequantizeLinear, which OpenVINO keeps as integers and multiplies with activations that it quantises in
groups while running; all else in bf16 where the CPU has it and gains time by it. Needs no calibration. bf16: weights
stored as they are used, half of onnx-fp32's file. Neither holds the graphs of ONNX Runtime's integer kernels; it runs
them all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from vlac.graph import Node, Program
from vlac.ops import Type
from vlac.registry import Target, targets
from vlac.rewrites.draft import StageDraft
from vlac.rewrites.gates import part_gates
from vlac.rewrites.keys import level_suffix_keys
from vlac.rewrites.pairs import pair_weights
from vlac.rewrites.parts import many_rows, part_projections
from vlac.targets.onnx import CONTAINERS, FLOATS, OWN_PASSES, emit, lower

ENGINES = ("openvino", "onnxruntime")
FORMS = ("portable",)
PARTED = (*FLOATS, "int8")
"""Formats whose weights are held in parts."""
FEW_ROWS = 32
"""Products of fewer rows are faster in one than in parts."""
_OPTIONS = {"single_file": "one model.onnx that makes the whole chunk, the flow steps in a Loop"}


def _plan(linear: str, name: str, shape: tuple[int, ...], role: str) -> str:
    return linear if role in ("linear", "embed") else "f32"


def _better_apart(stage: StageDraft, n: Node, made: Type, form: str) -> bool:
    """Few rows are not; nor are integers of many rows, where activations would be quantised for each part, unless on
    fixed scales: once for all."""
    rows = made.shape[0]
    if isinstance(rows, int) and rows < FEW_ROWS:
        return False
    rounding = stage.producers().get(n.inputs[0])
    fixed = rounding is not None and rounding.op == "round_int8" and rounding.attr["form"] == "tensor"
    return form in FLOATS or fixed or not many_rows(stage, n, made, form)


def _apart(program: Program) -> Program:
    return part_projections(part_gates(program, PARTED), PARTED, _better_apart)


def fit(program: Program, options: Mapping[str, Any]) -> Program:
    """As for ONNX Runtime, but every product that is taken apart afterwards is made in parts, MLPs in parts of their
    hidden units. Keys are as many for a few actions as for all. bfloat16 weights that read pictures are pairs."""
    return pair_weights(level_suffix_keys(lower(program, options, _apart)))


def _target(precision: str, doc: str) -> Target:
    plan, write = partial(_plan, precision), partial(emit, kinds=FORMS)
    own = OWN_PASSES.get(precision, ())
    name = f"openvino-{precision}"
    return targets.add(Target(name, plan, fit, write, ENGINES, _OPTIONS, doc, own, containers=CONTAINERS))


INT8 = _target("int8", "int8 weights for OpenVINO, activations quantised in groups while running, the rest bf16")
BF16 = _target("bf16", "bfloat16 weights and arithmetic for OpenVINO: safe and fast where the CPU has bf16")
