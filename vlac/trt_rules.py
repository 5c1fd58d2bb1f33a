"""What TensorRT's ONNX parser takes, as rules over a graph: checked before a file leaves, and on any folder.

    python -m vlac.trt_rules out/ [--trt 10.3|10.16]

Sources: onnx-tensorrt's operators.md (10.0, 10.15) and changelog, NVIDIA's pages on explicit quantization, and what the
builder of TensorRT for RTX accepted. The rules are stricter than the parser where that costs nothing: what they pass is
strongly typed, quantises symmetrically, and holds integers below 32 bits only between Q and DQ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlac.errors import VlacError

_COMMON = (
    "Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil "
    "Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear "
    "Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu "
    "Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization "
    "HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization "
    "LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean "
    "MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow "
    "QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 "
    "ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare "
    "Relu Reshape Resize ReverseSequence RoiAlign Round Scan ScatterElements ScatterND Selu Shape Shrink Sigmoid "
    "Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh "
    "ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor"
)
OPERATORS = {
    "10.3": frozenset(_COMMON.split()),
    "10.16": frozenset(f"{_COMMON} Attention RMSNormalization RotaryEmbedding Swish TensorScatter".split()),
}
"""Dialect -> operators of the default domain; there is no other domain in it."""
OPSETS = {"10.3": range(9, 21), "10.16": range(9, 25)}
BLOCKED_OPSET = 21
"""Where DequantizeLinear has blocks: allowed in dialect 10.3, too, whose parser takes the block from the shapes."""
FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
TYPES = (*FLOATS, "INT32", "INT64", "BOOL")
CODES = ("INT8", "FLOAT8E4M3FN", "INT4")
"""Types that live between QuantizeLinear and DequantizeLinear, or in a weight that DequantizeLinear reads."""
CONSTANT = {
    **dict.fromkeys(
        ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"), (1,)
    ),
    **dict.fromkeys(("ReduceLogSum", "ReduceLogSumExp", "ReduceProd"), (1,)),
    "Slice": (3, 4),
    "Split": (1,),
    "TopK": (1,),
    "OneHot": (1,),
}
"""Operator -> operands that must be initializers (where given)."""
CONSTANT_OLD = {"Squeeze": (1,), "Unsqueeze": (1,), "CumSum": (1,), "Pad": (3,)}
"""The same, of dialect 10.3 alone."""
HEADS = range(16, 257)
"""Widths of heads that the Attention operator has kernels for."""
MOST_TOP_K = 3840


@dataclass(frozen=True)
class Broken:
    """A node that breaks a rule."""

    file: str
    node: str
    operator: str
    why: str

    def __str__(self) -> str:
        return f"{self.file}: {self.node} ({self.operator}): {self.why}"


@dataclass
class _Graph:
    """One graph with what the rules ask about: types by value, constants, who makes and who reads."""

    proto: Any
    dialect: str
    outer: _Graph | None = None
    types: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    makers: dict[str, Any] = field(default_factory=dict)
    readers: dict[str, list[Any]] = field(default_factory=dict)

    def kind(self, name: str) -> str:
        """Element type, "" where unknown."""
        return self.types.get(name) or (self.outer.kind(name) if self.outer else "")

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        return self.shapes.get(name) if name in self.shapes else self.outer.shape(name) if self.outer else None

    def weight(self, name: str) -> Any:
        """The initializer of that name, None for a value."""
        return self.weights.get(name) or (self.outer.weight(name) if self.outer else None)

    def maker(self, name: str) -> Any:
        return self.makers.get(name) or (self.outer.maker(name) if self.outer else None)

    def constant(self, name: str) -> Any:
        """Values of a small initializer, None where they are elsewhere or the type has no numpy form."""
        from onnx import TensorProto, numpy_helper

        w = self.weight(name)
        if w is None or w.data_location == TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(w)


Rule = Callable[[_Graph, Any, Mapping[str, Any]], Iterator[str]]
_RULES: dict[str, list[Rule]] = {}


def _rule(*operators: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        for name in operators:
            _RULES.setdefault(name, []).append(fn)
        return fn

    return register


def check_folder(folder: Path, dialect: str = "10.3") -> list[Broken]:
    """Every broken rule in the .onnx files of a folder; VlacError for a folder without any, or an unknown dialect."""
    files = sorted(folder.glob("*.onnx"))
    if not files:
        raise VlacError(f"{folder} holds no .onnx files", remedy="give the folder of a tensorrt target")
    return [b for path in files for b in check_file(path, dialect)]


def check_file(path: Path, dialect: str = "10.3") -> list[Broken]:
    """Every broken rule of one file; its data files are not read."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own error class differs between versions
        raise VlacError(f"{path} is not an ONNX file: {error}", remedy="copy it again, or compile again") from None
    return check_model(model, dialect, path.name)


def check_model(model: Any, dialect: str = "10.3", file: str = "") -> list[Broken]:
    """Every broken rule of a model."""
    if dialect not in OPERATORS:
        raise VlacError(f"no dialect {dialect!r} of TensorRT; there are: {', '.join(OPERATORS)}")
    found = [Broken(file, "the file", "model", why) for why in _model_rules(model, dialect)]
    typed, why = _inferred(model)
    if why:
        return [*found, Broken(file, "the file", "model", why)]
    found += [Broken(file, *row) for row in _graph_rules(_graph_of(typed.graph, dialect, None))]
    return found


def _model_rules(model: Any, dialect: str) -> Iterator[str]:
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            yield f"domain {entry.domain}: plugins are not assumed to be there"
            continue
        blocked = any(n.op_type == "DequantizeLinear" and _attributes(n).get("block_size") for n in model.graph.node)
        if entry.version not in OPSETS[dialect] and not (blocked and entry.version == BLOCKED_OPSET):
            yield f"opset {entry.version}, TensorRT {dialect} reads {OPSETS[dialect][0]} to {OPSETS[dialect][-1]}"


def _inferred(model: Any) -> tuple[Any, str]:
    """The model with the type and shape of every value, or why it has none: ONNX's own rules come first."""
    import onnx

    why = ""
    for values in (True, False):  # with values where they are at hand: integers in data files cannot be followed
        try:
            return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=values), ""
        except Exception as error:  # onnx raises classes of its native module
            why = str(error)
            if "external" not in why:
                break
    return model, f"not valid ONNX: {why.strip()[:300]}"


def _graph_of(proto: Any, dialect: str, outer: _Graph | None) -> _Graph:
    from onnx import TensorProto

    g = _Graph(proto, dialect, outer)
    for v in (*proto.input, *proto.output, *proto.value_info):
        t = v.type.tensor_type
        g.types[v.name] = TensorProto.DataType.Name(t.elem_type)
        if t.HasField("shape"):
            g.shapes[v.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in t.shape.dim)
    for w in proto.initializer:
        g.weights[w.name], g.shapes[w.name] = w, tuple(w.dims)
        g.types[w.name] = TensorProto.DataType.Name(w.data_type)
    for n in proto.node:
        for o in filter(None, n.output):
            g.makers[o] = n
        for i in filter(None, n.input):
            g.readers.setdefault(i, []).append(n)
    return g


def _graph_rules(g: _Graph) -> Iterator[tuple[str, str, str]]:
    for kind, values in (("input", g.proto.input), ("output", g.proto.output)):
        for v in values:
            if g.kind(v.name) not in TYPES:
                yield v.name, kind, f"type {g.kind(v.name)}; networks take {', '.join(TYPES)}"
    for node in g.proto.node:
        for why in _node_rules(g, node):
            yield node.name or node.output[0], node.op_type, why
        for a in node.attribute:
            for body in ([a.g] if a.HasField("g") else []) + list(a.graphs):
                yield from _graph_rules(_graph_of(body, g.dialect, g))


def _node_rules(g: _Graph, node: Any) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"operator of domain {node.domain}"
        return
    if node.op_type not in OPERATORS[g.dialect]:
        yield f"no importer in TensorRT {g.dialect}"
        return
    yield from _type_rules(g, node)
    constants = {**CONSTANT, **(CONSTANT_OLD if g.dialect == "10.3" else {})}
    for i in constants.get(node.op_type, ()):
        if i < len(node.input) and node.input[i] and g.weight(node.input[i]) is None:
            yield f"operand {i} ({node.input[i]}) must be an initializer"
    attributes = _attributes(node)
    for rule in _RULES.get(node.op_type, ()):
        yield from rule(g, node, attributes)


def _type_rules(g: _Graph, node: Any) -> Iterator[str]:
    quantises = {"QuantizeLinear": "output", "DequantizeLinear": "input"}.get(node.op_type, "")
    for side, names in (("input", node.input), ("output", node.output)):
        for i, name in enumerate(n for n in names if n):
            kind = g.kind(name)
            if kind in TYPES:
                continue
            own = quantises == side and (i == 0 or side == "input")
            zero = node.op_type == "QuantizeLinear" and side == "input" and i == 2
            if not kind:
                yield f"{side} {name} has no known type"
            elif kind not in CODES or not (own or zero):
                yield f"{side} {name} is {kind}"


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


# --- quantisation ----------------------------------------------------------------------------------------------


@_rule("QuantizeLinear", "DequantizeLinear")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    """Symmetric, with a constant positive scale."""
    scale = g.weight(node.input[1])
    if scale is None:
        yield f"scale {node.input[1]} is computed while running"
    elif g.kind(node.input[1]) not in FLOATS:
        yield f"scale is {g.kind(node.input[1])}"
    else:
        values = g.constant(node.input[1])
        if values is not None and not (np.asarray(values, np.float64) > 0).all():
            yield "scales must be positive"
    if len(node.input) > 2 and node.input[2]:
        zero = g.weight(node.input[2])
        if zero is None or _nonzero(zero):
            yield "zero point is not 0: quantisation must be symmetric"
        elif g.kind(node.input[2]) == "UINT8":
            yield "zero point is UINT8: codes must be signed"
    elif node.op_type == "QuantizeLinear":
        yield "no zero point, which tells the type of the codes: without one it is UINT8"


def _nonzero(zero: Any) -> bool:
    """Whether an initializer of any type has a bit set."""
    if zero.raw_data:
        return any(zero.raw_data)
    return any(int(v) for v in (*zero.int32_data, *zero.int64_data)) or any(float(v) != 0 for v in zero.float_data)


@_rule("QuantizeLinear")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    """Activations have one scale, and go nowhere but into DequantizeLinear with the same one."""
    if g.shape(node.input[1]) not in ((), (1,)):
        yield f"activations have one scale for the tensor, this has {g.shape(node.input[1])}"
    if g.kind(node.input[0]) != g.kind(node.input[1]):
        yield f"input is {g.kind(node.input[0])}, scale {g.kind(node.input[1])}"
    readers = g.readers.get(node.output[0], [])
    if not readers:
        yield "nothing reads its codes"
    for reader in readers:
        if reader.op_type != "DequantizeLinear":
            yield f"its codes are read by {reader.op_type}"
        elif reader.input[1] != node.input[1]:
            yield f"DequantizeLinear {reader.output[0]} has another scale"


@_rule("DequantizeLinear")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    """Weights: one scale, one for each channel, or blocks along one axis; int4 only in weights."""
    kind, codes, scale = g.kind(node.input[0]), g.shape(node.input[0]), g.shape(node.input[1])
    if kind not in CODES:
        yield f"codes are {kind}; there are: {', '.join(CODES)}"
    if g.weight(node.input[0]) is None:
        maker = g.maker(node.input[0])
        if maker is None or maker.op_type != "QuantizeLinear":
            yield "codes come neither from QuantizeLinear nor from an initializer"
        if kind == "INT4":
            yield "int4 is for weights only"
        return
    if codes is None or scale is None or None in codes or None in scale:
        yield "weight or scale of unknown shape"
        return
    sizes, counts = [int(d or 0) for d in codes], [int(d or 0) for d in scale]
    if kind == "INT4" and sizes[-1] % 2:
        yield f"int4 weight {sizes}: the last dimension must be even"
    if len(counts) <= 1:
        axis = int(attributes.get("axis", 1))
        if len(counts) == 1 and counts != [1] and counts[0] != sizes[axis]:
            yield f"{counts[0]} scales for axis {axis} of {sizes}"
        return
    blocked = [i for i, (n, m) in enumerate(zip(sizes, counts, strict=False)) if n != m]
    if len(sizes) != len(counts) or len(blocked) != 1:
        yield f"blocks must lie along exactly one axis: weight {sizes}, scales {counts}"
    elif sizes[blocked[0]] % counts[blocked[0]]:
        yield f"{counts[blocked[0]]} blocks do not divide {sizes[blocked[0]]}"
    elif (
        attributes.get("block_size") != sizes[blocked[0]] // counts[blocked[0]] or attributes.get("axis") != blocked[0]
    ):
        yield f"axis and block_size do not say what the shapes {sizes}, {counts} do"


@_rule("MatMul", "Gemm", "Conv")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    """Quantised activations meet quantised weights of the same kind, whose scales lie on the output axis."""
    a, b = (_dequantized(g, name) for name in node.input[:2])
    if a is not None and (b is None or g.kind(a.input[0]) != g.kind(b.input[0])):
        yield "only one operand is quantised (or the two differently): both need Q/DQ"
    if node.op_type == "MatMul" and b is not None and g.weight(b.input[0]) is not None:
        scale = g.shape(b.input[1]) or ()
        turned = g.maker(node.input[1]) is not b
        if len(scale) == 1 and scale != (1,) and int(_attributes(b).get("axis", 1)) != (0 if turned else 1):
            yield "scales of the weight are not on its output axis"


def _dequantized(g: _Graph, name: str) -> Any:
    """The DequantizeLinear that makes a value, also through Transpose and Cast."""
    node = g.maker(name)
    while node is not None and node.op_type in ("Transpose", "Cast"):
        node = g.maker(node.input[0])
    return node if node is not None and node.op_type == "DequantizeLinear" else None


# --- single operators ------------------------------------------------------------------------------------------


@_rule("LayerNormalization")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    if any(node.output[1:]):
        yield "only the first output is there"


@_rule("TopK")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    k = g.constant(node.input[1])
    if k is not None and int(np.max(k)) >= MOST_TOP_K:
        yield f"k is {int(np.max(k))}, must be below {MOST_TOP_K}"


@_rule("Resize")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    mode = attributes.get("mode", b"nearest").decode()
    if mode not in ("nearest", "linear") or attributes.get("antialias"):
        yield f"mode {mode}{' with antialias' if attributes.get('antialias') else ''}: nearest and linear are there"


@_rule("CumSum")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    if g.dialect == "10.3" and g.kind(node.input[0]) not in FLOATS:
        yield f"sums {g.kind(node.input[0])}; TensorRT 10.3 sums floats"


@_rule("Pow")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    if g.dialect == "10.3" and g.kind(node.input[0]) not in FLOATS:
        yield f"power of {g.kind(node.input[0])}; TensorRT 10.3 has it for floats"


@_rule("ScatterND", "ScatterElements")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    reduction = attributes.get("reduction", b"none").decode()
    named = node.op_type == "ScatterND" and "reduction" in attributes  # "none" as well
    if g.dialect == "10.3" and (reduction != "none" or named):
        yield f"reduction {reduction}; TensorRT 10.3 has none"


@_rule("Einsum")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    if g.dialect == "10.3" and b"..." in attributes.get("equation", b""):
        yield "an ellipsis, which TensorRT 10.3 does not read"


@_rule("TensorScatter")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    if len(g.shape(node.input[0]) or ()) != 4 or attributes.get("axis", -2) != -2:
        yield "only four dimensions and axis -2 are there"


@_rule("Range")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    if g.kind(node.input[0]) in FLOATS and any(g.weight(i) is None for i in node.input):
        yield "floats must be initializers"


@_rule("Gather", "GatherElements", "GatherND")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    if g.kind(node.input[1]) not in ("INT32", "INT64"):
        yield f"indices are {g.kind(node.input[1])}"


@_rule("Attention")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    """Four dimensions, half precision, one output, no caches."""
    if g.kind(node.input[0]) == "FLOAT":
        yield "no kernel for float32"
    if any(node.output[1:]):
        yield "only the first output is there"
    if any(node.input[4:]):
        yield "past keys and values, and lengths of keys, are not read"
    for name in filter(None, node.input[:4]):
        if len(g.shape(name) or ()) != 4:
            yield f"{name} has not four dimensions"
    for key in ("softcap", "qk_matmul_output_mode", "softmax_precision"):
        if attributes.get(key):
            yield f"attribute {key}"
    if (g.shape(node.input[0]) or (1, 2))[1] == 1 and any(node.input[3:4]):
        yield "no kernel for a single head with a mask"
    width = (g.shape(node.input[0]) or (None,))[-1]
    if width is not None and width not in HEADS:
        yield f"heads of {width}; kernels are for {HEADS[0]} to {HEADS[-1]}"


@_rule("RotaryEmbedding")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    """[batch, heads, rows, width], as TensorRT's layer has it."""
    if len(g.shape(node.input[0]) or ()) != 4:
        yield f"{node.input[0]} has not four dimensions"


@_rule("Loop")
def _(g: _Graph, node: Any, attributes: Mapping[str, Any]) -> Iterator[str]:
    """An explicit condition, carried values of constant shape, results that are gathered of known length."""
    if len(node.input) < 2 or not node.input[1]:
        yield "no condition operand"
    body, carried = attributes["body"], len(node.input) - 2
    for v in list(body.input)[2:]:
        t = v.type.tensor_type
        if not t.HasField("shape") or any(not d.HasField("dim_value") for d in t.shape.dim):
            yield f"carried value {v.name} has no constant shape"
    if len(body.output) > 1 + carried and g.weight(node.input[0]) is None:
        yield "gathers values over a number of turns that is no initializer"


def main(arguments: list[str]) -> int:
    """Prints every broken rule of a folder; 1 if there is one."""
    dialect = arguments.pop(arguments.index("--trt") + 1) if "--trt" in arguments[:-1] else "10.3"
    folders = [Path(a) for a in arguments if a != "--trt"]
    broken = [b for folder in folders for b in check_folder(folder, dialect)]
    for b in broken:
        print(b)
    print(f"{len(broken)} broken rules for TensorRT {dialect}")
    return 1 if broken or not folders else 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(sys.argv[1:]))
    except VlacError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
