"""Algebra of linears: what follows or precedes them goes into their weights, and those that read one value become one.

x [M, K], weight [N, K], bias [N]: linear(x) = x W^T + b. Products of weights are taken in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlac.dims import Dim
from vlac.graph import Node, Program
from vlac.ops import NpArray, Type
from vlac.rewrites.clean import prune
from vlac.rewrites.draft import Draft, StageDraft, is_weight, node, stem
from vlac.weights import LazyTensor

ROW_WISE = ("linear", "layer_norm", "rms_norm", "silu", "sigmoid", "tanh", "relu", "gelu", "softmax", "scale")
"""Ops whose result row i is a function of row i of the first operand (the others are weights)."""


def _weights_only(operands: Sequence[str]) -> bool:
    return all(is_weight(i) for i in operands)


def _is_linear(n: Node | None) -> bool:
    """A linear whose weight and bias are parameters."""
    return n is not None and n.op == "linear" and _weights_only(n.inputs[1:])


# --- scales ----------------------------------------------------------------------------------------------------


def fold_scales(program: Program) -> Program:
    """scale(linear(x)) and scale(embed(ids)) with a single user: the factor goes into weight and bias, or the table."""
    draft = Draft.of(program)
    for stage in draft.stages:
        for n in [n for n in stage.nodes if n.op == "scale"]:
            inner = stage.producers().get(n.inputs[0])
            if inner is None or stage.single_user(inner.name) is None or not _weights_only(inner.inputs[1:]):
                continue
            # a table that others read too would be stored twice
            if inner.op == "embed" and draft.reads(inner.inputs[1][1:]) > 1:
                continue
            if inner.op in ("linear", "embed"):
                factor = np.float32(n.attr["factor"])
                scaled = [draft.redefine_rows(i, lambda w, f=factor: w * f) for i in inner.inputs[1:]]  # type: ignore[misc]
                stage.remove(inner)
                stage.replace(n, [Node(n.name, inner.op, (inner.inputs[0], *scaled), inner.attrs)])
    return draft.build()


# --- biases ----------------------------------------------------------------------------------------------------


def fold_biases(program: Program) -> Program:
    """Biases of keys vanish and biases of values move behind the attention.

    q (k + b)^T adds a constant to every logit of a query: softmax does not see it. The probabilities of a query sum to
    1, so that b passes through a value unchanged into the linear that follows: W_o (y + b) + b_o.
    """
    draft = Draft.of(program)
    for stage in draft.stages:
        for n in [n for n in stage.nodes if n.op == "attention"]:
            made = stage.producers()
            key, value = made.get(n.inputs[1]), made.get(n.inputs[2])
            if key is not None and _is_linear(key) and len(key.inputs) == 3 and stage.single_user(key.name) is n:
                stage.replace(key, [Node(key.name, "linear", key.inputs[:2])])
            after = stage.single_user(n.name)
            if value is None or after is None or not (_is_linear(value) and len(value.inputs) == 3):
                continue
            if stage.single_user(value.name) is n and _is_linear(after) and after.inputs[0] == n.name:
                bias = _through_attention(draft, n, value.inputs[2], after)
                stage.replace(value, [Node(value.name, "linear", value.inputs[:2])])
                stage.replace(after, [Node(after.name, "linear", (*after.inputs[:2], bias))])
    return prune(draft.build())


def _through_attention(draft: Draft, attention: Node, bias: str, after: Node) -> str:
    """The bias of `after` plus its weight times the value bias, repeated for the query heads that share a kv head."""
    heads, groups = attention.attr["heads"], attention.attr["kv_heads"]
    lazy = [draft.lazy(i[1:]) for i in (bias, *after.inputs[1:])]

    def load() -> NpArray:
        b, w = (t.load().astype(np.float64) for t in lazy[:2])
        total = w @ np.repeat(b.reshape(groups, -1), heads // groups, axis=0).reshape(-1)
        return np.asarray(total + (lazy[2].load() if len(lazy) > 2 else 0), dtype=np.float32)

    tensor = LazyTensor((lazy[1].shape[0],), load, "f32", f"bias of {after.name}")
    if len(after.inputs) > 2:
        return draft.redefine_as(after.inputs[2], tensor)
    return draft.add_param(f"{stem(after.inputs[1][1:])}.bias", tensor)


def fold_row_biases(program: Program) -> Program:
    """add(linear(x, W, b), @c) and add(linear(x, W, b), embed(ids, @table)): b goes into c, or into the table."""
    draft = Draft.of(program)
    for stage in draft.stages:
        for n in [n for n in stage.nodes if n.op == "add"]:
            made = stage.producers()
            inner, other = made.get(n.inputs[0]), n.inputs[1]
            if (
                inner is None
                or not _is_linear(inner)
                or len(inner.inputs) < 3
                or stage.single_user(inner.name) is not n
            ):
                continue
            pick = made.get(other)
            table = other if is_weight(other) else pick.inputs[1] if pick is not None and pick.op == "embed" else ""
            if (
                not is_weight(table)
                or draft.reads(table[1:]) > 1
                or (pick is not None and not stage.single_user(other))
            ):
                continue
            width = draft.params[inner.inputs[2][1:]].shape[0]
            if draft.params[table[1:]].shape[-1:] == (width,):
                bias = draft.lazy(inner.inputs[2][1:])
                draft.redefine(table, lambda t, b=bias: t + b.load())  # type: ignore[misc]
                stage.replace(inner, [Node(inner.name, "linear", inner.inputs[:2])])
    return prune(draft.build())


# --- rows said once --------------------------------------------------------------------------------------------


def broadcast_tiles(program: Program) -> Program:
    """A repeated row is computed once: row-wise ops go before the `tile`, and sums and products broadcast instead."""
    draft = Draft.of(program)
    for stage in draft.stages:
        types = draft.types(stage)
        for n in list(stage.nodes):
            tiles = {t.name: t for t in stage.nodes if t.op == "tile"}
            if n.op in ROW_WISE and n.inputs[0] in tiles and _weights_only(n.inputs[1:]):
                tile = tiles[n.inputs[0]]
                row = stage.fresh(f"{n.name}.row")
                inner = Node(row, n.op, (tile.inputs[0], *n.inputs[1:]), n.attrs)
                stage.replace(n, [inner, Node(n.name, "tile", (row,), tile.attrs)])
            elif n.op in ("add", "sub", "mul"):
                x, y = n.inputs
                if n.op != "sub" and x in tiles and y not in tiles and types.get(y) == types[n.name]:
                    x, y = y, x
                y = tiles[y].inputs[0] if y in tiles else y
                if (x, y) != n.inputs:
                    stage.replace(n, [Node(n.name, n.op, (x, y), n.attrs)])
    return prune(draft.build())


def split_concat_linears(program: Program) -> Program:
    """linear(concat(a, tile(row))) on features = linear(a, W1) + (linear(row, W2) + b), the row part broadcast.

    So that the row part is computed once, and is free to leave a loop or to become a table.
    """
    draft = Draft.of(program)
    for stage in draft.stages:
        types = draft.types(stage)
        for n in [n for n in stage.nodes if _is_linear(n)]:
            made = stage.producers()
            joined = made.get(n.inputs[0])
            if joined is None or joined.op != "concat" or joined.attr["axis"] != 1:
                continue
            parts = [(i, made.get(i)) for i in joined.inputs]
            tiled = [p is not None and p.op == "tile" for _, p in parts]
            if any(tiled) and not all(tiled):
                rows = [(p.inputs[0] if t and p is not None else i) for (i, p), t in zip(parts, tiled, strict=True)]
                widths = [types[i].shape[1] for i in joined.inputs]
                stage.replace(n, _split(draft, stage, n, rows, tiled, widths))
    return prune(draft.build())


def _split(
    draft: Draft, stage: StageDraft, n: Node, operands: list[str], tiled: list[bool], widths: list[Dim]
) -> list[Node]:
    name = n.inputs[1][1:]
    lazy, rows = draft.lazy(name), draft.params[name].shape[0]
    new: list[Node] = []
    sums: dict[bool, str] = {}
    start = 0
    for k, (operand, is_row, width) in enumerate(zip(operands, tiled, widths, strict=True)):
        assert isinstance(width, int)
        cut = lazy.map(lambda w, a=start, b=start + width: w[:, a:b], (rows, width))  # type: ignore[misc]
        inputs = [operand, draft.add_param(f"{stem(name)}.part{k}.weight", cut)]
        if is_row and True not in sums:
            inputs += n.inputs[2:]
        part = stage.fresh(f"{stem(name)}.part{k}", (m.name for m in new))
        new.append(node(part, "linear", *inputs))
        if is_row in sums:
            total = stage.fresh(f"{stem(name)}.sum{k}", (m.name for m in new))
            new.append(node(total, "add", sums[is_row], part))
            part = total
        sums[is_row] = part
        start += width
    return [*new, node(n.name, "add", sums[False], sums[True])]


# --- linears of linears, linears side by side -------------------------------------------------------------------


def compose_linears(program: Program) -> Program:
    """linear(linear(x)) with a single user becomes one linear when that is less work: N*K < H*K + N*H."""
    draft = Draft.of(program)
    for stage in draft.stages:
        for n in list(stage.nodes):
            n = stage.producers().get(n.name, n)
            inner = _composable(draft, stage, n)
            if inner is not None:
                (_, k), (rows, _) = (draft.params[m.inputs[1][1:]].shape for m in (inner, n))
                operands = _compose(draft, inner, n, (rows, k))
                stage.remove(inner)
                stage.replace(n, [Node(n.name, "linear", (inner.inputs[0], *operands))])
    return prune(draft.build())


def composable(program: Program) -> tuple[tuple[str, str], ...]:
    """(inner, outer) weights of which `compose_linears` would make the product outer * inner, each read once."""
    draft = Draft.of(program)
    pairs = [(_composable(draft, stage, n), n) for stage in draft.stages for n in stage.nodes]
    names = [(inner.inputs[1][1:], n.inputs[1][1:]) for inner, n in pairs if inner is not None]
    return tuple((a, b) for a, b in names if draft.reads(a) == draft.reads(b) == 1)


def _composable(draft: Draft, stage: StageDraft, n: Node) -> Node | None:
    """The linear that a linear alone reads, where one for both is less work."""
    inner = stage.producers().get(n.inputs[0]) if _is_linear(n) else None
    if inner is None or not _is_linear(inner) or stage.single_user(inner.name) is not n:
        return None
    (h, k), (rows, _) = (draft.params[m.inputs[1][1:]].shape for m in (inner, n))
    return inner if rows * k < h * k + rows * h else None


def _compose(draft: Draft, inner: Node, outer: Node, shape: tuple[int, int]) -> list[str]:
    first, second = ([draft.lazy(i[1:]) for i in m.inputs[1:]] for m in (inner, outer))

    def weight() -> NpArray:
        return np.asarray(second[0].load().astype(np.float64) @ first[0].load().astype(np.float64), dtype=np.float32)

    def bias() -> NpArray:
        total = second[0].load().astype(np.float64) @ first[1].load().astype(np.float64) if len(first) > 1 else 0.0
        return np.asarray(total + (second[1].load() if len(second) > 1 else 0.0), dtype=np.float32)

    source = f"{outer.inputs[1][1:]} * {inner.inputs[1][1:]}"
    result = [draft.redefine_as(outer.inputs[1], LazyTensor(shape, weight, "f32", source))]
    if len(second) > 1 or len(first) > 1:
        tensor = LazyTensor(shape[:1], bias, "f32", source)
        if len(second) > 1:
            result.append(draft.redefine_as(outer.inputs[2], tensor))
        else:
            result.append(draft.add_param(f"{stem(outer.inputs[1][1:])}.bias", tensor))
    return result


def fuse_projections(program: Program) -> Program:
    """Linears of one stage that read the same value become one linear and slices (q, k, v; gate, up).

    A weight that anything else reads stays as it is: fusing would store it twice.
    """
    draft = Draft.of(program)
    groups = [(s, g) for s in draft.stages for g in _groups(s)]
    counts: dict[tuple[tuple[str, ...], ...], int] = {}
    for _, g in groups:
        key = tuple(n.inputs[1:] for n in g)
        counts[key] = counts.get(key, 0) + 1
    reads = {name: draft.reads(name) for name in draft.params}
    fused: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for stage, g in groups:
        key = tuple(n.inputs[1:] for n in g)
        names = [i[1:] for operands in key for i in operands]
        if len(set(names)) < len(names) or any(reads[name] != counts[key] for name in names):
            continue
        if key not in fused:
            fused[key] = _fused_params(draft, g)
        types = draft.types(stage)
        _fuse_group(stage, g, fused[key], types)
    return prune(draft.build())


def _groups(stage: StageDraft) -> list[list[Node]]:
    by_value: dict[str, list[Node]] = {}
    for n in stage.nodes:
        if _is_linear(n):
            by_value.setdefault(n.inputs[0], []).append(n)
    return [g for g in by_value.values() if len(g) > 1]


def _fused_params(draft: Draft, group: list[Node]) -> list[str]:
    weights = [n.inputs[1][1:] for n in group]
    base = fused_name([stem(w) for w in weights])
    result = [draft.add_param(f"{base}.weight", LazyTensor.concat([draft.lazy(w) for w in weights]))]
    if any(len(n.inputs) > 2 for n in group):
        parts = []
        for n in group:
            rows = draft.params[n.inputs[1][1:]].shape[0]
            zeros = LazyTensor((rows,), lambda r=rows: np.zeros(r, np.float32), "f32", "zeros")  # type: ignore[misc]
            parts.append(draft.lazy(n.inputs[2][1:]) if len(n.inputs) > 2 else zeros)
        result.append(draft.add_param(f"{base}.bias", LazyTensor.concat(parts)))
    return result


def _fuse_group(stage: StageDraft, group: list[Node], params: list[str], types: dict[str, Type]) -> None:
    name = stage.fresh(stem(params[0][1:]))
    start: Dim = 0
    for k, n in enumerate(group):
        stop = types[n.name].shape[1] + start
        cut = node(n.name, "slice", name, axis=1, start=start, stop=stop)
        joint = [node(name, "linear", n.inputs[0], *params)] if k == 0 else []
        stage.replace(n, [*joint, cut])
        start = stop


def fused_name(names: Sequence[str]) -> str:
    """A name for several: (..q_proj, ..k_proj, ..v_proj) -> ..qkv_proj, (..gate_proj, ..up_proj) -> ..gate_up_proj."""
    parent, _, _ = names[0].rpartition(".")
    last = [n.rpartition(".")[2] for n in names]
    heads = [w.partition("_")[0] for w in last]
    tails = {w.partition("_")[2] for w in last}
    if len(tails) == 1 and (tail := tails.pop()):
        joined = ("" if all(len(h) == 1 for h in heads) else "_").join(heads) + "_" + tail
    else:
        joined = "_".join(last)
    return f"{parent}.{joined}" if parent else joined
