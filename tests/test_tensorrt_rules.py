"""vlac.trt_rules: graphs that TensorRT refuses are refused, each for its own reason, and legal neighbours are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlac import trt_rules
from vlac.errors import VlacError

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

Constants = dict[str, Any]
F, H, I32, I64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT32, TensorProto.INT64


def tensor(name: str, kind: int, dims: Sequence[int], fill: int = 0) -> Any:
    """An initializer of a type that numpy has not."""
    bits = {TensorProto.INT4: 4, TensorProto.UINT4: 4}.get(kind, 8)
    raw = bytes([fill]) * -(-int(np.prod(dims)) * bits // 8)
    return helper.make_tensor(name, kind, list(dims), raw, raw=True)


def model(
    *nodes: Any,
    x: tuple[int, Sequence[Any]] = (F, (4, 8)),
    y: tuple[int, Sequence[Any] | None] = (F, None),
    opset: int = 20,
    more: Sequence[Any] = (),
    **constants: Any,
) -> Any:
    """x -> nodes -> y, with constants by name (arrays, or tensors of odd types in `more`)."""
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", x[0], x[1])],
        [helper.make_tensor_value_info("y", y[0], y[1])],
        [*initializers, *more],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def n(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> Any:
    names = ["" if i == "_" else i for i in inputs.split()]
    return helper.make_node(op, names, outputs.split(), name=outputs.split()[0], **attributes)


ONE, I8 = np.float32(1), np.int8(0)
W8 = np.ones((8, 6), np.int8)
S6, S8 = np.ones(6, np.float32), np.ones(8, np.float32)
Q, DQ = n("QuantizeLinear", "x s z", "q"), n("DequantizeLinear", "q s z", "d")


def w8a8(axis: int = 1, scale: Any = S6, **change: Any) -> Any:
    given = {"s": ONE, "z": I8, "w": W8, "ws": scale, **change}
    return model(Q, DQ, n("DequantizeLinear", "w ws", "wd", axis=axis), n("MatMul", "d wd"), **given)


def w4(
    kind: int = TensorProto.INT4, dims: Sequence[int] = (8, 6), scales: Sequence[int] = (2, 6), **attributes: Any
) -> Any:
    at = {"axis": 0, "block_size": 4, **attributes}
    nodes = (n("DequantizeLinear", "w ws", "wd", **at), n("MatMul", "x wd"))
    return model(*nodes, opset=21, more=[tensor("w", kind, dims)], ws=np.ones(scales, np.float32), x=(F, (4, dims[0])))


def loop(condition: str, body_shape: Sequence[Any] = (4, 8)) -> Any:
    value = [helper.make_tensor_value_info(k, F, body_shape) for k in ("a", "b")]
    flags = [helper.make_tensor_value_info(k, TensorProto.BOOL, []) for k in ("keep", "again")]
    turn = helper.make_tensor_value_info("i", I64, [])
    inner = [n("Relu", "a", "b"), n("Identity", "keep", "again")]
    body = helper.make_graph(inner, "body", [turn, flags[0], value[0]], [flags[1], value[1]])
    return model(n("Loop", f"times {condition} x", body=body), times=np.int64(3), go=np.array(True))


def attention(
    opset: int = 23, kind: int = H, inputs: str = "q q q", outputs: str = "y", d: int = 64, **attributes: Any
) -> Any:
    x = (kind, (1, 4, 6, d))
    return model(
        n("Identity", "x", "q"), n("Attention", inputs, outputs, **attributes), x=x, y=(kind, None), opset=opset
    )


LEGAL: dict[str, Callable[[], Any]] = {
    "w8a8": w8a8,
    "w8a8, weight as rows": lambda: model(
        *(
            Q,
            DQ,
            n("DequantizeLinear", "w ws", "wd", axis=0),
            n("Transpose", "wd", "wt", perm=[1, 0]),
            n("MatMul", "d wt"),
        ),
        s=ONE,
        z=I8,
        w=W8.T.copy(),
        ws=S6,
    ),
    "int4 in blocks": w4,
    "fp8": lambda: model(
        *(Q, DQ, n("DequantizeLinear", "w ws", "wd", axis=1), n("MatMul", "d wd")),
        more=[tensor("z", TensorProto.FLOAT8E4M3FN, ()), tensor("w", TensorProto.FLOAT8E4M3FN, (8, 6), 0x38)],
        s=ONE,
        ws=S6,
    ),
    "loop": lambda: loop("go"),
    "float sums": lambda: model(n("CumSum", "x axis"), axis=np.int64(0)),
    "ids": lambda: model(n("Gather", "t x"), x=(I64, (3,)), t=np.ones((9, 2), np.float32)),
}

ILLEGAL: dict[str, tuple[str, Callable[[], Any]]] = {
    # operators
    "dynamic quantisation": ("no importer", lambda: model(n("DynamicQuantizeLinear", "x", "y a b"), y=(2, None))),
    "products of integers": (
        "no importer",
        lambda: model(n("MatMulInteger", "x w"), x=(3, (4, 8)), y=(I32, None), w=W8),
    ),
    "bits": ("no importer", lambda: model(n("BitwiseAnd", "x x"), x=(I32, (3,)), y=(I32, None))),
    "unique": ("no importer", lambda: model(n("Unique", "x"))),
    "norm of 10.15": ("no importer", lambda: model(n("RMSNormalization", "x s"), opset=23, s=S8)),
    "attention of 10.14": ("no importer", lambda: attention()),
    "another domain": (
        "plugins",
        lambda: _with_domain(model(n("Gelu", "x", domain="com.microsoft"))),
    ),
    "a newer opset": ("opset 22", lambda: model(n("Relu", "x"), opset=22)),
    # types
    "float64": ("is DOUBLE", lambda: model(n("Cast", "x", "d", to=11), n("Sin", "d", "e"), n("Cast", "e", to=1))),
    "network of float64": ("type DOUBLE", lambda: model(n("Relu", "x"), x=(11, (3,)), y=(11, None))),
    "two types": ("not valid ONNX", lambda: model(n("Cast", "x", "h", to=10), n("Add", "x h"))),
    "int8 outside": (
        "is INT8",
        lambda: model(n("Cast", "x", "c", to=3), n("Cast", "c", to=1)),
    ),
    "integers gathered": (
        "is INT8",
        lambda: model(n("Gather", "t x", "r"), n("Cast", "r", to=1), x=(I64, (3,)), t=W8),
    ),
    "uint4": ("codes are UINT4", lambda: w4(TensorProto.UINT4)),
    # Q and DQ
    "activation zero point": ("symmetric", lambda: w8a8(z=np.int8(3))),
    "weight zero point": (
        "symmetric",
        lambda: model(
            n("DequantizeLinear", "w ws z", "wd", axis=1), n("MatMul", "x wd"), w=W8, ws=S6, z=np.ones(6, np.int8)
        ),
    ),
    "unsigned": ("must be signed", lambda: w8a8(z=np.uint8(0), w=W8.astype(np.uint8))),
    "no zero point": (
        "tells the type",
        lambda: model(n("QuantizeLinear", "x s", "q"), n("DequantizeLinear", "q s"), s=ONE),
    ),
    "another scale": (
        "another scale",
        lambda: model(Q, n("DequantizeLinear", "q t z"), s=ONE, t=np.float32(2), z=I8),
    ),
    "activation by channel": (
        "one scale for the tensor",
        lambda: model(
            n("QuantizeLinear", "x s z", "q", axis=1),
            n("DequantizeLinear", "q s z", axis=1),
            s=S8,
            z=np.zeros(8, np.int8),
        ),
    ),
    "half input, float scale": ("not valid ONNX", lambda: model(Q, DQ, n("Relu", "d"), x=(H, (4, 8)), s=ONE, z=I8)),
    "scale 0": ("positive", lambda: w8a8(s=np.float32(0))),
    "computed scale": (
        "computed while running",
        lambda: model(
            n("ReduceMax", "x", "m", keepdims=0),
            n("QuantizeLinear", "x m z", "q"),
            n("DequantizeLinear", "q m z"),
            z=I8,
        ),
    ),
    "codes read by others": (
        "read by Transpose",
        lambda: model(Q, n("Transpose", "q", "t"), n("DequantizeLinear", "t s z"), s=ONE, z=I8),
    ),
    "one operand": ("both need", lambda: model(Q, DQ, n("MatMul", "d w"), s=ONE, z=I8, w=np.ones((8, 6), np.float32))),
    "scales on the input axis": ("output axis", lambda: w8a8(axis=0, scale=S8)),
    "scales that do not fit": ("scales for axis", lambda: w8a8(axis=1, scale=np.ones(5, np.float32))),
    "int4, odd": ("must be even", lambda: w4(dims=(8, 5), scales=(2, 5))),
    "int4, two axes": ("exactly one axis", lambda: w4(scales=(2, 3))),
    "int4, uneven blocks": ("do not divide", lambda: w4(scales=(3, 6))),
    "int4, wrong block": ("block_size do not say", lambda: w4(block_size=2)),
    # single operators
    "axes while running": (
        "must be an initializer",
        lambda: model(n("Cast", "x", "a", to=7), n("ReduceSum", "f a"), x=(I64, (1,)), f=np.ones((2, 3), np.float32)),
    ),
    "sums of integers": (
        "sums INT32",
        lambda: model(n("CumSum", "x axis"), x=(I32, (5,)), y=(I32, None), axis=np.int64(0)),
    ),
    "powers of integers": (
        "power of INT32",
        lambda: model(n("Pow", "x e"), x=(I32, (5,)), y=(I32, None), e=np.int32(2)),
    ),
    "added into rows": (
        "reduction add",
        lambda: model(
            n("ScatterND", "x i u", reduction="add"), i=np.zeros((1, 1), np.int64), u=np.ones((1, 8), np.float32)
        ),
    ),
    "second output": (
        "only the first output",
        lambda: model(n("LayerNormalization", "x s", "y m"), s=S8),
    ),
    "many of the largest": (
        "must be below 3840",
        lambda: model(n("TopK", "x k", "y i"), x=(F, (1, 5000)), k=np.array([3840], np.int64)),
    ),
    "cubic": (
        "nearest and linear",
        lambda: model(n("Resize", "x _ s", mode="cubic"), x=(F, (1, 3, 8, 8)), s=np.float32([1, 1, 2, 2])),
    ),
    "ellipsis": ("an ellipsis", lambda: model(n("Einsum", "x x", equation="...i,...i->..."))),
    "loop without a condition": ("no condition", lambda: loop("_")),
    "loop of changing shape": ("no constant shape", lambda: loop("go", ("n", 8))),
}

MODERN: dict[str, tuple[str, Callable[[], Any]]] = {
    "attention in float32": ("no kernel for float32", lambda: attention(kind=F)),
    "attention with caches": (
        "only the first output",
        lambda: attention(inputs="q q q _ q q", outputs="y k v"),
    ),
    "attention of three dimensions": (
        "four dimensions",
        lambda: model(n("Attention", "x x x", q_num_heads=2, kv_num_heads=2), x=(H, (1, 4, 64)), y=(H, None), opset=23),
    ),
    "attention, capped": ("softcap", lambda: attention(softcap=30.0)),
    "attention, narrow heads": ("heads of 8", lambda: attention(d=8)),
    "attention, softmax in float32": ("attribute softmax_precision", lambda: attention(softmax_precision=1)),
    "attention of one masked head": (
        "a single head with a mask",
        lambda: model(
            n("Attention", "x x x m"), x=(H, (1, 1, 6, 64)), y=(H, None), opset=23, m=np.zeros((1, 1, 6, 6), np.float16)
        ),
    ),
    "rotation of three dimensions": (
        "four dimensions",
        lambda: model(
            n("RotaryEmbedding", "x c c", num_heads=2), x=(F, (1, 4, 8)), opset=23, c=np.ones((1, 4, 2), np.float32)
        ),
    ),
}


def _with_domain(m: Any) -> Any:
    m.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return m


@pytest.mark.parametrize("name", LEGAL)
def test_legal(name: str) -> None:
    assert [str(b) for b in trt_rules.check_model(LEGAL[name]())] == []


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_for_the_older_parser(name: str) -> None:
    why, make = ILLEGAL[name]
    found = [str(b) for b in trt_rules.check_model(make())]
    assert any(why in text for text in found), found


@pytest.mark.parametrize("name", MODERN)
def test_illegal_for_the_newer_parser(name: str) -> None:
    why, make = MODERN[name]
    found = [str(b) for b in trt_rules.check_model(make(), "10.16")]
    assert any(why in text for text in found), found


def test_what_the_newer_parser_brings() -> None:
    for made in (attention(), model(n("RMSNormalization", "x s"), opset=23, s=S8)):
        assert trt_rules.check_model(made, "10.16") == []


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(VlacError, match=r"holds no \.onnx files"):
        trt_rules.check_folder(tmp_path)
    (tmp_path / "a.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(VlacError, match="is not an ONNX file"):
        trt_rules.check_folder(tmp_path)
    with pytest.raises(VlacError, match=r"there are: 10\.3, 10\.16"):
        trt_rules.check_model(w8a8(), "9.9")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(w8a8(), str(tmp_path / "good.onnx"))
    assert trt_rules.main([str(tmp_path)]) == 0
    onnx.save(attention(), str(tmp_path / "new.onnx"))
    assert trt_rules.main([str(tmp_path)]) == 1
    assert "new.onnx: y (Attention): no importer in TensorRT 10.3" in capsys.readouterr().out
    assert trt_rules.main([str(tmp_path), "--trt", "10.16"]) == 0
