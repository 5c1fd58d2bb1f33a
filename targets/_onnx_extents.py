"""Dimensions that are known only when a graph runs, computed from the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlac.dims import Affine
from vlac.errors import Unsupported
from vlac.ops import Type
from vlac.targets._onnx_graph import Graph


@dataclass(frozen=True)
class Source:
    """`factor` times the extent of an input along an axis."""

    value: str
    axis: int
    factor: int


def is_static(dims: Iterable[object]) -> bool:
    """Whether no dimension (or attribute) among these holds a symbol."""
    return not any(isinstance(d, Affine) or (isinstance(d, tuple) and not is_static(d)) for d in dims)


def sources(dim: Affine, inputs: Sequence[tuple[str, Type]]) -> tuple[list[Source], int]:
    """(sources, number) whose sum is `dim`: one input's extent, or one for each symbol; Unsupported without."""
    known = [(n, axis, d) for n, t in inputs for axis, d in enumerate(t.shape) if isinstance(d, Affine)]
    for name, axis, d in known:
        factor = dim.terms[0][1] // d.terms[0][1]
        rest = dim - d * factor
        if isinstance(rest, int):
            return [Source(name, axis, factor)], rest
    found, rest = [], dim.const
    for symbol, count in dim.terms:
        fits = [(n, axis, d) for n, axis, d in known if d.terms == ((symbol, 1),)]
        if not fits:
            raise Unsupported(f"dimension {dim} cannot be told from the shapes of {', '.join(n for n, _ in inputs)}")
        name, axis, d = fits[0]
        found.append(Source(name, axis, count))
        rest -= count * d.const
    return found, rest


def emit_dim(graph: Graph, dim: Affine, inputs: Sequence[tuple[str, Type]], names: Mapping[str, str]) -> str:
    """The dimension as an i64 vector of one; `names` are those of the inputs in the graph."""
    found, rest = sources(dim, inputs)
    total = ""
    for s in found:
        value = names[s.value]
        term = graph.node("Shape", [value], graph.unique(f"{value}/extent"), start=s.axis, end=s.axis + 1)
        if s.factor != 1:
            term = graph.node("Mul", [term, graph.const([s.factor], "int64")], graph.unique(f"{value}/extents"))
        total = graph.node("Add", [total, term], graph.unique(f"{value}/sum")) if total else term
    if rest:
        total = graph.node("Add", [total, graph.const([rest], "int64")], graph.unique(f"{total}/dim"))
    return total
