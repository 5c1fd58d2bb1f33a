"""Targets onnx-fp32, onnx-fp16, onnx-int8, onnx-int4: a folder, one ONNX file per stage, for ONNX Runtime and OpenVINO.

{stage}.onnx holds the graph, {stage}.onnx.data the weights, aligned for mapping. What the number of prompt tokens, of
cameras or of actions decides is a free dimension of the graph: padding is not computed. int8 has more graphs per
stage over the same data file, {stage}.portable.onnx, and {stage}.linears.onnx where there is long attention (see
_onnx_ops.py), {stage}.unrounded.onnx where activations have fixed scales; the others have {stage}.fused.onnx where
there is long attention. manifest["onnx"] tells which graph is which.
`--single-file` writes one model.onnx that makes the whole chunk (see _onnx_single.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlac.artifact import Sidecars
from vlac.errors import VlacError
from vlac.graph import Program, Stage, infer_stage
from vlac.registry import Progress, Target, targets
from vlac.rewrites.parts import part_projections
from vlac.rewrites.strides import pad_hidden_units
from vlac.targets import _onnx_codes as _onnx_codes  # what writes ops joins the emitter's table
from vlac.targets import _onnx_ops as _onnx_ops
from vlac.targets._engines import engines_for
from vlac.targets._folder import TensorStore, write_sidecars
from vlac.targets._onnx_attention import long_attention
from vlac.targets._onnx_emitter import StageEmitter
from vlac.targets._onnx_graph import Graph, graph_names
from vlac.targets._onnx_ranges import Range, ranges

ENGINES = ("onnxruntime", "openvino")
_WIDTHS = {"fp16": ("f16", "f16"), "int8": ("int8", "int8"), "int4": ("int4", "int8"), "fp32": ("f32", "f32")}
"""precision -> formats of (weights of linears, embedding tables); everything else is f32."""
FLOATS = ("f32", "f16", "bf16")
STATIC_OPS = ("column_mean", "pack_codes", "unpack_codes")
"""Ops that are written for known shapes only."""


CONTAINERS = {
    "w4g16": "int4g16",
    "w4g32": "int4",
    "w4g64": "int4g64",
    "w4g128": "int4g128",
    "w4row": "int4g128",
    "w8row": "int8",
}


OWN_PASSES = {"int8": ("smooth-norms",), "int4": ("smooth-norms",)}
"""Channels that tower over the others would take the codes of all: they move into the weights, exactly."""


def _plan(precision: str) -> Callable[[str, tuple[int, ...], str], str]:
    linear, embed = _WIDTHS[precision]
    return lambda name, shape, role: {"linear": linear, "embed": embed}.get(role, "f32")


def _apart(program: Program) -> Program:
    return part_projections(pad_hidden_units(program, FLOATS), (*FLOATS, "int8"))


def lower(program: Program, options: Mapping[str, Any], apart: Callable[[Program], Program] = _apart) -> Program:
    """Linears padded to the blocks of their format, joined ones `apart`, q, k and v of many rows above all, factors on
    scores in the weights of queries; all shapes static where the graph must be."""
    from vlac.lower import pad_to_blocks
    from vlac.rewrites.scores import fold_score_scales

    _need_onnx()  # here, before the reference spends a minute on golden answers
    program = fold_score_scales(apart(program))
    ops = {n.op for s in program.stages for n in s.nodes}
    static = options.get("single_file") or not ops.isdisjoint(STATIC_OPS)
    return pad_to_blocks(program.bind(program.max_symbols()) if static else program)


def emit(
    program: Program,
    sidecars: Sidecars,
    folder: Path,
    options: Mapping[str, Any],
    progress: Progress,
    kinds: Sequence[str] = (),
) -> None:
    """Writes the folder, with the forms `kinds` (default: all that differ); peak memory is a few copies of the largest
    tensor."""
    store = TensorStore(folder, program, progress)
    bounds, kinds = ranges(program.bind(program.max_symbols())), (*(kinds or forms(program)), *_unrounded(program))
    if options.get("single_file"):
        from vlac.targets._onnx_single import write_single

        stages = write_single(program, store, folder, bounds, tuple(k for k in kinds if k != "fused"))
    else:
        stages = {s.name: write_stage(program, s, store, folder, bounds[s.name], kinds) for s in program.stages}
    for name in program.params:  # those no stage reads, too: an artifact holds every parameter of its program
        store.param(name, f"{list(stages)[-1]}.onnx.data")
    extra = {"tensors": store.index(), "onnx": stages, "single_file": bool(options.get("single_file"))}
    write_sidecars(folder, sidecars, {**extra, **engines_for(program, sidecars.manifest.get("engines", ENGINES))})


def forms(program: Program) -> tuple[str, ...]:
    """Forms of graphs to write, that of {stage}.onnx first. They differ in int8 linears and in long attention."""
    weights = {n.inputs[1] for s in program.stages for n in s.nodes if n.op == "linear"}
    integer = any(p.format == "int8" and f"@{name}" in weights for name, p in program.params.items())
    long = any(_long_attention(program, s) for s in program.stages)
    if not integer:
        return ("portable", "fused") if long else ("portable",)
    return ("integer", "linears", "portable") if long else ("integer", "portable")


def _unrounded(program: Program) -> tuple[str, ...]:
    """The form for CPUs on which OpenVINO's products of codes saturate, where scales are fixed."""
    fixed = any(n.op == "round_int8" and n.attr["form"] == "tensor" for s in program.stages for n in s.nodes)
    return ("unrounded",) if fixed else ()


def _long_attention(program: Program, stage: Stage) -> bool:
    types = infer_stage(stage, program.params)
    return any(long_attention(n, types) for n in stage.nodes)


def write_stage(
    program: Program,
    stage: Stage,
    store: TensorStore,
    folder: Path,
    bounds: Mapping[str, Range],
    kinds: Sequence[str],
) -> dict[str, str]:
    """The graph files of one stage; returns form -> file name."""
    kinds = [f for f in kinds if f not in ("linears", "fused") or _long_attention(program, stage)]
    files = graph_names(stage.name, kinds)
    types = infer_stage(stage, program.params)
    for form, name in files.items():
        graph = Graph(store, f"{stage.name}.onnx.data")
        given = {n: graph.unique(n) for n, _ in stage.inputs}
        made = StageEmitter(graph, program, stage, bounds, form, given).emit()
        graph.save(folder / name, stage.name, stage.inputs, [(made[o], types[o]) for o in stage.outputs])
    return files


def _need_onnx() -> None:
    from importlib.util import find_spec

    if find_spec("onnx") is None:
        raise VlacError("the onnx targets need the package onnx", remedy="pip install 'vlac-compiler[onnx]'")


def _target(precision: str, doc: str) -> Target:
    return targets.add(
        Target(
            name=f"onnx-{precision}",
            plan=_plan(precision),
            lower=lower,
            emit=emit,
            engines=ENGINES,
            containers=CONTAINERS,
            options={"single_file": "one model.onnx that makes the whole chunk, the flow steps in a Loop"},
            doc=doc,
            passes=OWN_PASSES.get(precision, ()),
        )
    )


FP32 = _target("fp32", "float32 weights; one file per stage for ONNX Runtime and OpenVINO")
FP16 = _target("fp16", "float16 weights, computed in float32: half the file at the same speed")
INT8 = _target("int8", "int8 weights per output row, activations quantised per row while running")
INT4 = _target("int4", "int4 weights in blocks of 32, embeddings int8; smallest file")
