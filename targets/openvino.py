"""Targets openvino-int8 and openvino-bf16: the ONNX folder with what OpenVINO runs fastest, and nothing beside it.

int8: weights as DequantizeLinear, which OpenVINO keeps as integers and multiplies with activations that it quantises in
groups while running; all else in bf16 where the CPU has it. Needs no calibration. bf16: weights stored as they are
used, half of onnx-fp32's file. Neither holds the graphs of ONNX Runtime's integer kernels; it runs them all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from vlac.graph import Program
from vlac.registry import Target, targets
from vlac.rewrites.keys import level_suffix_keys
from vlac.rewrites.rounding import shape_rounding
from vlac.targets.onnx import CONTAINERS, FLOATS, OWN_PASSES, emit, lower

ENGINES = ("openvino", "onnxruntime")
FORMS = ("portable",)
_OPTIONS = {"single_file": "one model.onnx that makes the whole chunk, the flow steps in a Loop"}


def _plan(linear: str, name: str, shape: tuple[int, ...], role: str) -> str:
    return linear if role in ("linear", "embed") else "f32"


def fit(program: Program, options: Mapping[str, Any]) -> Program:
    """As for ONNX Runtime, but for q, k and v of integers: activations would be quantised for each of the three. Keys
    are as many for a few actions as for all. bfloat16 rounds with pictures in mind."""
    return shape_rounding(level_suffix_keys(lower(program, options, parts=FLOATS)))


def _target(precision: str, doc: str) -> Target:
    plan, write = partial(_plan, precision), partial(emit, kinds=FORMS)
    own = OWN_PASSES.get(precision, ())
    name = f"openvino-{precision}"
    return targets.add(Target(name, plan, fit, write, ENGINES, _OPTIONS, doc, own, containers=CONTAINERS))


INT8 = _target("int8", "int8 weights for OpenVINO, activations quantised in groups while running, the rest bf16")
BF16 = _target("bf16", "bfloat16 weights and arithmetic for OpenVINO: safe and fast where the CPU has bf16")
