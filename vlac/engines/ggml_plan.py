"""Sorts a stage for ggml: what the host computes, what the graph computes, what is drawn together, what is declined.

Pure Python on types: nothing native is called, so a program that ggml cannot run is refused when it is opened.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

from vlac.errors import EngineError
from vlac.graph import Node, Param, Stage, infer_stage
from vlac.ops import OPS, Type

FLASH_ROWS = 64
"""From this many queries flash attention is faster; below it runs a slow kernel, and matmul + softmax wins."""


def ints(t: Type) -> tuple[int, ...]:
    """The shape of a bound type."""
    shape = tuple(d for d in t.shape if isinstance(d, int))
    assert len(shape) == len(t.shape), "stages are bound before they are drawn"
    return shape


# --- what runs where ---------------------------------------------------------------------------------------------

# f32 results that stay on the host when they depend on stage inputs only; other f32 arithmetic goes into the graph
_HOST_F32 = ("patchify", "time_embedding", "cast", "full", "column_mean", "unpack_codes", "weighted_mask")

DECLINES = dict.fromkeys(
    (
        *("arange", "full", "cast", "cumsum", "reduce_sum", "repeat_each", "attention_mask"),
        *("patchify", "time_embedding", "pick", "argmax"),
        *("column_mean", "pack_codes", "unpack_codes", "weighted_mask"),
    ),
    "only on values that depend on stage inputs alone, not on results of this stage's network",
)
"""Ops without a ggml form: they run on the host, and a program that wants them inside a graph is declined by name."""

NEVER = dict.fromkeys(
    ("round_int8", "round_f16", "round_fp8"),
    "no rounding between ops; kernels round what meets 4- and 8-bit weights in blocks of 32",
)
"""Ops that run nowhere in this engine."""


@dataclass(frozen=True)
class StagePlan:
    """A stage, sorted: types of all values, nodes for the host and for the graph in order, and readers per value."""

    stage: Stage
    types: Mapping[str, Type]
    host: Mapping[str, Node]
    graph: Mapping[str, Node]
    readers: Mapping[str, int]
    depends: Mapping[str, frozenset[str]]
    """host value -> stage inputs it is computed from."""
    after: Mapping[str, Node]
    """what the host computes from results of the graph, in order, when it has run."""
    one_form: bool = False
    """whether the first rows of a result must have the bits that they have in the result of more rows."""

    def flash(self, queries: int) -> bool:
        """Whether an attention of so many queries is flash attention: another sum in another order."""
        return queries >= FLASH_ROWS and not self.one_form

    def on_host(self, name: str) -> bool:
        return name in self.depends


def plan_stage(stage: Stage, params: Mapping[str, Param], able: Container[str], one_form: bool = False) -> StagePlan:
    """Sorts a stage without symbols; `able` holds the ops that can be drawn. EngineError names a node that cannot."""
    types = infer_stage(stage, params) | {f"@{name}": Type("f32", p.shape) for name, p in params.items()}
    depends: dict[str, frozenset[str]] = {name: frozenset((name,)) for name, _ in stage.inputs}
    host: dict[str, Node] = {}
    rest: dict[str, Node] = {}
    for node in stage.nodes:
        known = all(i in depends for i in node.inputs)
        if known and OPS[node.op].host and (types[node.name].dtype != "f32" or node.op in _HOST_F32):
            host[node.name] = node
            depends[node.name] = frozenset().union(*(depends[i] for i in node.inputs))
        else:
            rest[node.name] = node
    graph, readers = _needed(stage, rest)
    after = _after(graph, types)
    graph = {name: n for name, n in graph.items() if name not in after}
    plan = StagePlan(stage, types, host, graph, readers, depends, after, one_form)
    for node in graph.values():
        reason = _declined(plan, node, able)
        if reason:
            raise EngineError(
                f"engine ggml declines stage {stage.name}, {node.name} = {node.op}({', '.join(node.inputs)}): {reason}",
                remedy="run this artifact with --engine torch",
            )
    return plan


def _after(graph: Mapping[str, Node], types: Mapping[str, Type]) -> dict[str, Node]:
    """An argmax or packed codes, and the index arithmetic behind it, where nothing of the graph reads them: the host
    does these, because ggml's own argmax takes the last of equal values and packs nothing."""
    after: dict[str, Node] = {}
    for name, n in graph.items():
        follows = OPS[n.op].host and types[name].dtype != "f32" and any(i in after for i in n.inputs)
        if n.op in ("argmax", "column_mean", "pack_codes") or follows:
            after[name] = n
    read = {i for name, n in graph.items() if name not in after for i in n.inputs}
    return {} if read & set(after) else after


def _needed(stage: Stage, rest: Mapping[str, Node]) -> tuple[dict[str, Node], dict[str, int]]:
    """Nodes that an output depends on, in order, and how often each value is read by them."""
    readers: dict[str, int] = dict.fromkeys(stage.outputs, 1)
    for node in reversed(list(rest.values())):
        if node.name in readers:
            for i in node.inputs:
                readers[i] = readers.get(i, 0) + 1
    return {name: node for name, node in rest.items() if name in readers}, readers


def _declined(plan: StagePlan, node: Node, able: Container[str]) -> str:
    if node.op in (*DECLINES, *NEVER):
        return {**DECLINES, **NEVER}[node.op]
    if node.op not in able:
        return "this op has no ggml form"
    if any(len(plan.types[i].shape) > 4 for i in (node.name, *node.inputs) if not i.startswith("@")):
        return "more than four dimensions"
    if any(min(ints(plan.types[i]), default=1) < 1 for i in (node.name, *node.inputs)):
        return "a dimension below 1"
    if plan.types[node.name].dtype != "f32":
        return f"{plan.types[node.name]}: the graph computes f32 only"
    wants_host = {"embed": (0,), "rope": (1,), "attention": (3,), "write_rows": (2,)}.get(node.op, ())
    for index in wants_host:
        if index < len(node.inputs) and not plan.on_host(node.inputs[index]):
            return f"operand {node.inputs[index]} must depend on stage inputs alone"
    return ""


# --- how much work ----------------------------------------------------------------------------------------------


def macs(plan: StagePlan) -> int:
    """Multiply-accumulates of the graph's linears and attentions."""
    total = 0
    for n in plan.graph.values():
        rows = [ints(plan.types[i]) for i in n.inputs]
        if n.op == "linear":
            total += rows[0][0] * math.prod(rows[1])
        elif n.op == "attention":
            total += rows[0][0] * rows[1][0] * (rows[0][1] + rows[2][1] * n.attr["heads"] // n.attr["kv_heads"])
    return total


# --- what is drawn together ---------------------------------------------------------------------------------------


def gate(plan: StagePlan, n: Node) -> Node | None:
    """The silu node that a product absorbs (silu(a) * b as one op): read by nobody else, same shape."""
    silu = plan.graph.get(n.inputs[0]) if n.op == "mul" else None
    if silu is None or silu.op != "silu" or plan.readers[silu.name] != 1 or n.inputs[1].startswith("@"):
        return None
    return silu if plan.types[n.inputs[1]] == plan.types[silu.name] else None


def absorbed(plan: StagePlan, node: Node) -> bool:
    """Whether the only reader of a node draws it in its own way."""
    if plan.readers[node.name] != 1 or node.name in plan.stage.outputs:
        return False
    if node.op == "silu":
        return any(gate(plan, n) is node for n in plan.graph.values() if n.op == "mul" and n.inputs[0] == node.name)
    if node.op == "concat":
        attentions = (n for n in plan.graph.values() if n.op == "attention" and node.name in n.inputs[1:3])
        return any(split(plan, n) is not None for n in attentions)
    return False


def split(plan: StagePlan, n: Node) -> tuple[Node, Node] | None:
    """The two concats (old rows from the host, then new rows) that feed keys and values, if both are like that."""
    if len(n.inputs) < 4 or plan.flash(ints(plan.types[n.inputs[0]])[0]):
        return None
    found = [plan.graph.get(i) for i in n.inputs[1:3]]
    k, v = found
    for c in found:
        if c is None or c.op != "concat" or c.attr["axis"] != 0 or len(c.inputs) != 2 or c.name in plan.stage.outputs:
            return None
        if not plan.on_host(c.inputs[0]) or plan.readers[c.name] != 1 or c.inputs[1].startswith("@"):
            return None
    assert k is not None and v is not None
    return (k, v) if plan.types[k.inputs[0]].shape[0] == plan.types[v.inputs[0]].shape[0] else None
