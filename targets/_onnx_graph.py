"""One ONNX graph being written: nodes in order, constants, parameters in external data, the model file at the end.

Names: a program value keeps its name; "@w" is parameter w (its scales "@w.scale"), "#1" a constant, "a/b" a helper
value of the program value a. The same program gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlac.artifact import NpArray
from vlac.layouts import INT4
from vlac.ops import Type
from vlac.targets._folder import Part, Stored, TensorStore

OPSET = 23
"""Opset 23 brings RMSNormalization and RotaryEmbedding (ONNX Runtime 1.23, OpenVINO 2025.4 and later)."""
IR_VERSIONS = {20: 9, 21: 10, 23: 11}
"""Opset -> the version of the file format that came with it."""
MICROSOFT = "com.microsoft"
INLINE_BYTES = 1024

_ONNX_OF_DTYPE = {
    "<f4": "FLOAT",
    "<f2": "FLOAT16",
    "<f8": "DOUBLE",
    "<i4": "INT32",
    "<i8": "INT64",
    "|i1": "INT8",
    "|u1": "UINT8",
    "|b1": "BOOL",
    "<u2": "BFLOAT16",
}
Value = tuple[str, Type]
"""A value's name in the graph, and its type."""

_ONNX_OF_TYPE = {"f32": "FLOAT", "i32": "INT32", "bool": "BOOL"}


def graph_names(stage: str, forms: Sequence[str]) -> dict[str, str]:
    """form -> file name: the first form is {stage}.onnx."""
    return {form: f"{stage}.onnx" if form == forms[0] else f"{stage}.{form}.onnx" for form in forms}


def onnx_type(name: str) -> int:
    """Number of an element type ("FLOAT") in onnx.TensorProto."""
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(name))


@dataclass(frozen=True)
class Weight:
    """A parameter in a graph: names of its initialisers (scale only for integers), its format and layout."""

    values: str
    scale: str
    format: str
    layout: str


class Graph:
    """Nodes and initialisers of a graph. `body()` starts a subgraph (of a Loop) that sees this graph's values."""

    def __init__(self, store: TensorStore, data_file: str, outer: Graph | None = None, opset: int = OPSET) -> None:
        self.store = store
        self.data_file = data_file
        self.opset: int = opset if outer is None else outer.opset
        self.nodes: list[Any] = []
        self._outer = outer
        self._initializers: dict[str, Any] = {}
        self._weights: dict[str, Weight] = {}
        self._constants: dict[str, str] = {}
        self._names: set[str] = set() if outer is None else outer._names
        self._domains: set[str] = {""} if outer is None else outer._domains

    def body(self) -> Graph:
        """A subgraph with its own parameters (ONNX Runtime fuses int4 only there); names stay unique over both."""
        return Graph(self.store, self.data_file, self)

    def unique(self, wish: str) -> str:
        """`wish`, or `wish.2` ... if that name is taken."""
        name, i = wish, 2
        while name in self._names:
            name, i = f"{wish}.{i}", i + 1
        self._names.add(name)
        return name

    def node(self, op: str, inputs: Sequence[str], out: str | Sequence[str], domain: str = "", **attrs: Any) -> str:
        """Adds a node; returns its (first) output. Output names must come from `unique`."""
        from onnx import helper

        outputs = [out] if isinstance(out, str) else list(out)
        self._domains.add(domain)
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=outputs[0], domain=domain, **attrs))
        return outputs[0]

    def const(self, value: Any, dtype: Any = None) -> str:
        """A constant's name; small ones lie in the graph file, others in the data file. Equal ones are shared."""
        if self._outer is not None:
            return self._outer.const(value, dtype)
        array = np.asarray(value, dtype=dtype)
        key = f"{array.dtype.str}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
        if key not in self._constants:
            name = self._constants[key] = self.unique(f"#{len(self._constants)}")
            if array.nbytes < INLINE_BYTES:
                self._initializers[name] = _inline(name, array)
            else:
                self._add_external(name, self.store.constant(array, self.data_file))
        return self._constants[key]

    def float8_zero(self) -> str:
        """The constant 0 of type FLOAT8E4M3FN, which numpy does not have."""
        if self._outer is not None:
            return self._outer.float8_zero()
        if "float8" not in self._constants:
            from onnx import TensorProto

            name = self._constants["float8"] = self.unique(f"#{len(self._constants)}")
            kind = onnx_type("FLOAT8E4M3FN")
            self._initializers[name] = TensorProto(name=name, data_type=kind, dims=[], raw_data=b"\0")
        return self._constants["float8"]

    def param(self, name: str) -> Weight:
        """A parameter as initialisers of this graph; written to the data file when first asked for."""
        if name not in self._weights:
            stored = self.store.param(name, self.data_file)
            values = self.unique(f"@{name}")
            scale = self.unique(f"@{name}.scale") if "scale" in stored.parts else ""
            for part, at in stored.parts.items():
                self._add_external(scale if part == "scale" else values, at, stored)
            self._weights[name] = Weight(values, scale, stored.format, stored.layout)
        return self._weights[name]

    def _add_external(self, name: str, part: Part, stored: Stored | None = None) -> None:
        from onnx import TensorProto

        kind, dims = _ONNX_OF_DTYPE[part.dtype], part.shape
        if stored is not None and stored.format in INT4 and kind == "UINT8":
            kind, dims = "INT4", stored.shape[::-1]
        if stored is not None and stored.format == "fp8" and kind == "UINT8":
            kind = "FLOAT8E4M3FN"
        tensor = TensorProto(name=name, data_type=onnx_type(kind), dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", part.file), ("offset", part.offset), ("length", part.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor

    def loop_body(
        self, name: str, turn: str, keep: str, carried: Sequence[Value], again: str, results: Sequence[Value]
    ) -> Any:
        """This graph as the body of a Loop: (turn, keep, carried...) -> (again, results...)."""
        from onnx import helper

        counter = helper.make_tensor_value_info(turn, onnx_type("INT64"), [])
        inputs = [counter, *_infos([(keep, Type("bool", ())), *carried])]
        outputs = _infos([(again, Type("bool", ())), *results])
        return helper.make_graph(self.nodes, name, inputs, outputs, list(self._initializers.values()))

    def save(self, path: Path, name: str, inputs: Sequence[Value], outputs: Sequence[Value]) -> None:
        """Writes the model file; the data lies beside it already."""
        from onnx import helper

        import vlac

        domains = [helper.make_opsetid(d, self.opset if d == "" else 1) for d in sorted(self._domains)]
        initializers = list(self._initializers.values())
        model = helper.make_model(
            helper.make_graph(self.nodes, name, _infos(inputs), _infos(outputs), initializers),
            opset_imports=domains,
            ir_version=IR_VERSIONS[self.opset],
            producer_name="vlac",
            producer_version=vlac.__version__,
        )
        path.write_bytes(model.SerializeToString(deterministic=True))


def _infos(values: Sequence[Value]) -> list[Any]:
    from onnx import helper

    # a dimension with symbols is named by its formula: equal formulas are equal dimensions
    return [
        helper.make_tensor_value_info(
            n, onnx_type(_ONNX_OF_TYPE[t.dtype]), [d if isinstance(d, int) else str(d) for d in t.shape]
        )
        for n, t in values
    ]


def _inline(name: str, array: NpArray) -> Any:
    from onnx import TensorProto

    kind = onnx_type(_ONNX_OF_DTYPE[array.dtype.str])
    return TensorProto(name=name, data_type=kind, dims=array.shape, raw_data=array.tobytes())
