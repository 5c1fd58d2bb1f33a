"""`StageEmitter` walks a stage and writes it into an ONNX graph, node by node.

The functions that write ops are in _onnx_ops.py and _onnx_codes.py; they join its table when these are imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlac.artifact import NpArray
from vlac.dims import Affine, Dim
from vlac.errors import Unsupported
from vlac.graph import Node, Program, Stage, infer_stage
from vlac.ops import OPS, Type
from vlac.targets._onnx_attention import long_attention
from vlac.targets._onnx_extents import emit_dim, is_static
from vlac.targets._onnx_graph import Graph, Weight, onnx_type
from vlac.targets._onnx_parts import parted
from vlac.targets._onnx_ranges import Range

FOLD_BYTES = 1 << 20

_ONNX_DTYPE = {"f32": "FLOAT", "i32": "INT32", "bool": "BOOL"}

Emit = Callable[["StageEmitter", Node, str], object]
EMITTERS: dict[str, Emit] = {}


def emits_into(table: dict[str, Emit]) -> Callable[..., Callable[[Emit], Emit]]:
    """A decorator that puts a function into the table under the names of the ops that it writes."""

    def emits(*ops: str) -> Callable[[Emit], Emit]:
        def register(fn: Emit) -> Emit:
            table.update(dict.fromkeys(ops, fn))
            return fn

        return register

    return emits


emits = emits_into(EMITTERS)
"""Puts a function into the table of standard ONNX."""


class StageEmitter:
    """Writes the nodes of one stage into a graph.

    Args:
        graph: where nodes go.
        program: what symbols it has left become free dimensions of the graph.
        ranges: of the stage's integer values (vlac.targets._onnx_ranges).
        form: "portable", "fused", "integer", "linears" or "unrounded", see _onnx_ops.py.
        given: names in the graph of the stage's inputs; prefix: before every name this emitter makes.
    """

    emitters: Mapping[str, Emit] = EMITTERS

    def __init__(
        self,
        graph: Graph,
        program: Program,
        stage: Stage,
        ranges: Mapping[str, Range],
        form: str,
        given: Mapping[str, str],
        prefix: str = "",
    ) -> None:
        self.graph = graph
        self.program = program
        self.stage = stage
        self.ranges = ranges
        self.form = form
        self.types = infer_stage(stage, program.params)
        self._nodes = {n.name: n for n in stage.nodes}
        self.constants: dict[str, NpArray] = {}
        self.cache: dict[tuple[Any, ...], Any] = {}
        self._names = dict(given)
        self._prefix = prefix

    def emit(self) -> dict[str, str]:
        """All nodes; returns the name in the graph of every output of the stage."""
        for node in self.stage.nodes:
            if not self._fold(node) and not self._absorbed(node) and parted(self, node.name) is None:
                if node.op not in self.emitters:
                    raise Unsupported(
                        f"stage {self.stage.name}: {node.name} = {node.op} has no ONNX form", remedy="use a gguf target"
                    )
                self.write(node)
        for name in self.stage.outputs:
            if name in self.constants:
                out = self.graph.unique(self._prefix + name)
                self._names[name] = self.graph.node("Identity", [self.graph.const(self.constants[name])], out)
        return {name: self._names[name] for name in self.stage.outputs}

    def write(self, node: Node) -> None:
        """One node, under its own name."""
        out = self.graph.unique(self._prefix + node.name)
        self.emitters[node.op](self, node, out)
        self._names[node.name] = out

    def _fold(self, node: Node) -> bool:
        """Index arithmetic that depends on nothing is evaluated here."""
        op, out = OPS[node.op], self.types[node.name]
        if not op.host or any(i not in self.constants for i in node.inputs) or not is_static(out.shape):
            return False
        if not is_static(node.attr.values()) or 4 * math.prod(ints(out)) > FOLD_BYTES:
            return False
        self.constants[node.name] = np.asarray(op.reference([self.constants[i] for i in node.inputs], node.attr))
        return True

    def producer(self, operand: str) -> Node | None:
        """The node of this stage that made an operand."""
        return self._nodes.get(operand)

    def columns(self, w: Weight) -> str:
        """The codes of a weight as [K, N]."""
        return self.turned(w.values, w.layout == "columns")

    def turned(self, values: str, already: bool) -> str:
        """A weight as [K, N]; one stored as rows (an embedding reads it, too) is turned when the engine loads it."""
        if already:
            return values
        return str(self.once(("T", values), lambda: self.transpose(values, self.tmp(values, "T"), 1, 0)))

    def fixed(self, operand: str) -> Node | None:
        """The node that rounds this operand with a scale that is known, if it is one."""
        node = self._nodes.get(operand)
        return node if node is not None and node.op == "round_int8" and node.attr["form"] == "tensor" else None

    def integer(self, node: Node) -> bool:
        """Whether this is a linear that multiplies integers in this form of the graph."""
        weight = self.program.params.get(node.inputs[1][1:]) if node.op == "linear" else None
        return self.form in ("integer", "linears") and weight is not None and weight.format == "int8"

    def _absorbed(self, node: Node) -> bool:
        """A rounding whose readers all read its codes."""
        if self.fixed(node.name) is None or node.name in self.stage.outputs:
            return False
        return all(self._reads_codes(n, node.name) for n in self.stage.nodes if node.name in n.inputs)

    def _reads_codes(self, reader: Node, operand: str) -> bool:
        if self.form == "integer" and long_attention(reader, self.types):
            return operand not in reader.inputs[2:]
        return self.integer(reader) and reader.inputs[0] == operand

    # names and shapes

    def __call__(self, operand: str) -> str:
        """Name in the graph of an operand: a value, a constant, or a parameter as float32."""
        if operand.startswith("@"):
            return self._float_param(operand[1:])
        if operand in self.constants:
            return self.graph.const(self.constants[operand])
        return self._names[operand]

    def shape(self, operand: str) -> tuple[int, ...]:
        """Shape of an operand; -1 for a dimension with symbols, as a Reshape takes it (at most one)."""
        if operand.startswith("@"):
            return self.program.params[operand[1:]].shape
        return tuple(d if isinstance(d, int) else -1 for d in self.types[operand].shape)

    def extent(self, *dims: Dim) -> str:
        """Dimensions as an i64 vector; those with symbols are taken from the shapes of the stage's inputs."""
        parts = [self.i64(d) if isinstance(d, int) else self._free(d) for d in dims]
        if is_static(dims) or len(parts) == 1:
            return parts[0] if len(parts) == 1 else self.i64(*ints(Type("i32", dims)))
        return str(self.once(("extent", dims), lambda: self.node("Concat", parts, self.graph.unique("extent"), axis=0)))

    def _free(self, dim: Affine) -> str:
        return str(self.once(("dim", dim), lambda: emit_dim(self.graph, dim, self.stage.inputs, self._names)))

    def tmp(self, out: str, suffix: str) -> str:
        """A name for a helper value of `out`."""
        return self.graph.unique(f"{out}/{suffix}")

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """`make()` at the first call with this key, its result afterwards."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]

    def _float_param(self, name: str) -> str:
        w = self.graph.param(name)
        if w.format in ("f16", "bf16"):
            return str(self.once(("float", name), lambda: self.cast(w.values, self.tmp(w.values, "f32"), "f32")))
        if w.format != "f32":
            raise Unsupported(
                f"tensor {name} is {w.format}, stage {self.stage.name} reads it with an op for float weights only",
                remedy="int8 and int4 are for weights of linears (int8 also for embedding tables)",
            )
        return w.values

    # building blocks

    def node(self, op: str, inputs: list[str], out: str, **attrs: Any) -> str:
        return self.graph.node(op, inputs, out, **attrs)

    def cast(self, x: str, out: str, dtype: str) -> str:
        return self.node("Cast", [x], out, to=onnx_type(_ONNX_DTYPE[dtype]))

    def reshape(self, x: str, out: str, *shape: int) -> str:
        return self.node("Reshape", [x, self.graph.const(shape, np.int64)], out)

    def scalar(self, x: str) -> str:
        """A vector of one as a number."""
        return self.node("Squeeze", [x], self.tmp(x, "number"))

    def transpose(self, x: str, out: str, *perm: int) -> str:
        return self.node("Transpose", [x], out, perm=list(perm))

    def f32(self, value: float) -> str:
        return self.graph.const(value, np.float32)

    def i64(self, *value: int) -> str:
        return self.graph.const(value, np.int64)


def ints(t: Type) -> tuple[int, ...]:
    """Shape of a type without symbols."""
    if not all(isinstance(d, int) for d in t.shape):
        raise Unsupported(f"{t} still holds symbols; bind the program first")
    return tuple(int(str(d)) for d in t.shape)
