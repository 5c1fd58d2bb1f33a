"""Targets tensorrt, tensorrt-fp16, -bf16, -int8, -fp8, -int4: one strongly typed ONNX file per stage for TensorRT.

fp16, bf16: weights and what is multiplied in half precision. int8, fp8: weights per output channel, activations with
one fixed scale for each value, measured on observations while compiling; attention in float16. int4: weights in blocks
of 128 inputs, multiplied in float16. What _trt_ops.py names stays float32, the flow state above all.

Beside the graphs lies build.py, which makes plans on the board (vlac/engines/tensorrt_build.py, as it is), and
manifest["tensorrt"] says what it needs: dialect, least compute capability, shapes of every input. `--trt 10.3` (JetPack
6; the default) or `--trt 10.16` (JetPack 7.2) chooses operators. No file leaves that vlac/trt_rules.py objects to.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlac import trt_rules
from vlac.artifact import NpArray, Sidecars
from vlac.dims import bind_dim
from vlac.engines import tensorrt_build
from vlac.errors import Unsupported, VlacError
from vlac.float8 import encode_e4m3
from vlac.formats import FORMATS
from vlac.graph import Param, Program, Stage, infer_stage
from vlac.layouts import INT4, half_scales
from vlac.registry import Progress, Target, targets
from vlac.rewrites.draft import Draft, node
from vlac.targets._folder import TensorStore, encode, write_sidecars
from vlac.targets._onnx_graph import Graph
from vlac.targets._onnx_ranges import Range, ranges
from vlac.targets._trt_activations import ROUNDS, fixed
from vlac.targets._trt_half import attention_in_f16
from vlac.targets._trt_ops import TensorRTEmitter
from vlac.targets.onnx import CONTAINERS, STATIC_OPS, _need_onnx

DIALECTS = {"10.3": 20, "10.16": 23}
"""Dialect -> opset; a stage with 4-bit weights has 21 at least."""
OPTIONS = {"trt": f"operators of this TensorRT: {' or '.join(DIALECTS)}"}
PLANS = {
    "": ("f32", "f32", ""),
    "-fp16": ("f16", "f16", "f16"),
    "-bf16": ("bf16", "bf16", "bf16"),
    "-int8": ("int8", "f16", "f16"),
    "-fp8": ("fp8", "f16", "f16"),
    "-int4": ("int4g128", "f16", "f16"),
}
"""Suffix -> formats of linears and embedding tables, and the half precision; everything else is float32."""
LEAST_SM = {"fp8": 89, "bf16": 80, **dict.fromkeys(INT4, 80)}
"""Format or type -> compute capability times ten from which GPUs have it; 75 for all others."""


def lower(program: Program, options: Mapping[str, Any], narrow_attention: bool = False) -> Program:
    """Linears padded to the blocks of their format; all shapes static where the graph must be. narrow_attention: the
    program says that attention is in float16 (see _trt_half.py)."""
    from vlac.lower import pad_to_blocks

    _need_onnx()
    _dialect(options)
    ops = {n.op for s in program.stages for n in s.nodes}
    static = not ops.isdisjoint(STATIC_OPS)
    program = attention_in_f16(program) if narrow_attention else program
    return _even_columns(pad_to_blocks(program.bind(program.max_symbols()) if static else program))


def _even_columns(program: Program) -> Program:
    """Weights of 4 bits with an odd number of outputs get a row of zeros, whose result is cut off again."""
    draft = Draft.of(program)
    odd = {name for name, p in program.params.items() if p.format in INT4 and p.shape[0] % 2}
    for name in odd:
        rows, width = draft.params[name].shape
        draft.params[name] = Param((rows + 1, width), draft.params[name].format)
        draft.weights[name] = draft.weights[name].map(lambda w: np.pad(w, ((0, 1), (0, 0))), (rows + 1, width))
    for stage in draft.stages:
        for n in [n for n in stage.nodes if n.op == "linear" and n.inputs[1][1:] in odd]:
            wide, cut = stage.fresh(f"{n.name}.even"), stage.fresh(f"{n.name}.cut")
            rows = program.params[n.inputs[1][1:]].shape[0]
            biased = len(n.inputs) > 2
            made = [node(wide, "linear", *n.inputs[:2])]
            made.append(node(cut if biased else n.name, "slice", wide, axis=1, start=0, stop=rows))
            stage.replace(n, [*made, node(n.name, "add", cut, n.inputs[2])] if biased else made)
    return draft.build()


def _dialect(options: Mapping[str, Any]) -> str:
    name = str(options.get("trt", "10.3"))
    if name not in DIALECTS:
        raise VlacError(
            f"--trt {name!r}; there are: {', '.join(DIALECTS)}",
            remedy="10.3 for JetPack 6 (and everything newer), 10.16 for JetPack 7.2",
        )
    return name


class _Store(TensorStore):
    """Scales in float16 for weights of integers that are multiplied in half precision."""

    def __init__(self, *args: Any, half: str, integer: frozenset[str]) -> None:
        super().__init__(*args)
        self._half, self._integer = half, integer

    def encoded(self, name: str, layout: str) -> dict[str, NpArray]:
        """As every store, but for the scales."""
        tensor, fmt = self._program.weights[name], self._program.params[name].format
        parts = encode(tensor, fmt, layout, name)
        if "scale" not in parts or not self._half or name in self._integer:
            return parts
        return _halved(tensor.load(), fmt, layout, parts)


def _halved(w: NpArray, fmt: str, layout: str, parts: Mapping[str, NpArray]) -> dict[str, NpArray]:
    if fmt == "fp8":
        scale = np.maximum(parts["scale"].astype(np.float16), np.float16(2.0**-24))
        codes = encode_e4m3(w / scale.astype(np.float64)[:, None])
        return {"q": np.ascontiguousarray(codes.T if layout == "columns" else codes), "scale": scale}
    return half_scales(w, fmt, layout, parts)


def emit(
    program: Program,
    sidecars: Sidecars,
    folder: Path,
    options: Mapping[str, Any],
    progress: Progress,
    half: str = "",
) -> None:
    """Writes the folder; Unsupported names what TensorRT would refuse."""
    dialect = _dialect(options)
    integer = _by_integers(program)
    store = _Store(folder, program, progress, half=half, integer=integer)
    bounds = ranges(program.bind(program.max_symbols()))
    for stage in program.stages:
        reads = {program.params[i[1:]].format for n in stage.nodes for i in n.inputs if i.startswith("@")}
        opset = max(DIALECTS[dialect], trt_rules.BLOCKED_OPSET if reads & set(INT4) else 0)
        graph = Graph(store, f"{stage.name}.onnx.data", opset=opset)
        _write_stage(graph, program, stage, bounds[stage.name], folder, (half, dialect, integer))
    for name in program.params:
        store.param(name, f"{program.stages[-1].name}.onnx.data")
    broken = trt_rules.check_folder(folder, dialect)
    if broken:
        shown = "\n  ".join(str(b) for b in broken[:8])
        raise Unsupported(
            f"{len(broken)} nodes that TensorRT {dialect} does not take:\n  {shown}", remedy="use another target"
        )
    (folder / "build.py").write_bytes(Path(tensorrt_build.__file__).read_bytes())
    about = {
        "dialect": dialect,
        "half": half,
        "least_sm": max(LEAST_SM.get(f, 75) for f in (half, *(p.format for p in program.params.values()))),
        "inputs": {s.name: _profile(program, s) for s in program.stages},
    }
    graphs = {s.name: {"portable": f"{s.name}.onnx"} for s in program.stages}
    hosts = [] if half == "bf16" else ["onnxruntime"]  # which has no bfloat16 kernels for CPUs
    tensors = {"tensors": store.index()}
    write_sidecars(folder, sidecars, {**tensors, "onnx": graphs, "tensorrt": about, "host_engines": hosts})


def _write_stage(
    graph: Graph,
    program: Program,
    stage: Stage,
    bounds: Mapping[str, Range],
    folder: Path,
    how: tuple[str, str, frozenset[str]],
) -> None:
    half, dialect, integer = how
    given = {n: graph.unique(n) for n, _ in stage.inputs}
    emitter = TensorRTEmitter(
        *(graph, program, stage, bounds, "portable", given), half=half, modern=dialect != "10.3", integer=integer
    )
    made, types = emitter.emit(), infer_stage(stage, program.params)
    graph.save(folder / f"{stage.name}.onnx", stage.name, stage.inputs, [(made[o], types[o]) for o in stage.outputs])


def _by_integers(program: Program) -> frozenset[str]:
    """Parameters of int8 and fp8 of which every reader is a linear whose input is rounded with a fixed scale."""
    found: dict[str, bool] = {}
    for stage in program.stages:
        rounded = {
            n.name for n in stage.nodes if n.op == "round_fp8" or (n.op == "round_int8" and n.attr["form"] == "tensor")
        }
        for n in stage.nodes:
            for i, name in enumerate(n.inputs):
                if name.startswith("@") and program.params[name[1:]].format in ("int8", "fp8"):
                    fits = n.op == "linear" and i == 1 and n.inputs[0] in rounded
                    found[name[1:]] = found.get(name[1:], True) and fits
    return frozenset(name for name, fits in found.items() if fits)


def _profile(program: Program, stage: Stage) -> dict[str, dict[str, list[int]]]:
    """Input -> its least and largest shape; equal where there is no symbol."""
    least = {s.name: s.buckets[0] for s in program.symbols}
    ends = {"least": least, "largest": program.max_symbols()}
    return {
        name: {end: [int(str(bind_dim(d, symbols))) for d in t.shape] for end, symbols in ends.items()}
        for name, t in stage.inputs
    }


def _plan(linear: str, embed: str, name: str, shape: tuple[int, ...], role: str) -> str:
    return {"linear": linear, "embed": embed}.get(role, "f32")


def _target(suffix: str, doc: str) -> Target:
    linear, embed, half = PLANS[suffix]
    own = ("smooth-norms",) if FORMATS[linear].bits <= 9 else ()
    codes = linear in ROUNDS  # of activations too
    return targets.add(
        Target(
            name=f"tensorrt{suffix}",
            plan=partial(_plan, linear, embed),
            lower=partial(lower, narrow_attention=True) if codes else lower,
            emit=partial(emit, half=half),
            engines=("tensorrt",),
            options=OPTIONS,
            doc=doc,
            passes=own,
            containers=CONTAINERS,
            observe=fixed if codes else None,
        )
    )


FP32 = _target("", "float32 throughout, strongly typed ONNX for TensorRT")
FP16 = _target("-fp16", "float16 weights and products, float32 norms, sums and flow state")
BF16 = _target("-bf16", "bfloat16 weights and products, float32 norms, sums and flow state")
INT8 = _target("-int8", "int8 weights per channel, int8 activations with scales from calibration, attention in float16")
FP8 = _target("-fp8", "the same in float8 E4M3, for Ada, Hopper and Thor")
INT4_WEIGHTS = _target("-int4", "int4 weights in blocks of 128, multiplied in float16")
