"""How each op of the table becomes ggml tensors: one small function per op, and the drawing of a stage as a graph.

Index, mask and pixel arithmetic on stage inputs stays on the host (numpy references); its results enter the graph as
feeds. Masks enter as finite additive numbers, because a row of -inf gives NaN in ggml. Every value in a graph is
float32 with nb[0] = 4. All shapes have been checked by `infer_stage` and `plan_stage` before anything here calls ggml,
since an assertion there would end the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlac.engines.ggml_lib import Ggml, InitParams, Tensor
from vlac.engines.ggml_plan import StagePlan, absorbed, gate, ints, split
from vlac.errors import EngineError, InputError
from vlac.graph import Node
from vlac.ops import Type

Array = np.ndarray[Any, Any]

F32, F16, I32, I64 = 0, 1, 26, 27

KEY_BLOCK = 16
"""tinyBLAS leaves its fast path when the key count is no multiple of this (AVX512; 8 and 4 elsewhere)."""

LEAST_ROWS = 8
"""ggml multiplies fewer rows in other kernels (K-quants below 8, floats with 1), which sum in another order."""

LOW_F32, LOW_F16 = -1e30, -65504.0

_TENSORS_PER_NODE = 40

# --- feeds: arrays from the host ---------------------------------------------------------------------------------


def _plain(a: Array) -> Array:
    return a.astype(np.float32, copy=False)


def _ids(a: Array, limit: int = 0) -> Array:
    """ids below `limit` (0: any): ggml aborts the process on an id outside the table."""
    if limit and a.size and (int(a.min()) < 0 or int(a.max()) >= limit):
        raise InputError(f"ids {int(a.min())}..{int(a.max())} for a table of {limit} rows")
    return a.astype(np.int32, copy=False)


def _additive(a: Array, parts: tuple[tuple[int, int, int], ...], half: bool) -> Array:
    """bool [Nq, Nk] to 0 or a large negative number, float32 as it is: columns start..stop of each part, one after the
    other, and behind each so many that nobody sees."""
    hidden = LOW_F32 if a.dtype == np.float32 else False
    cut = [np.pad(a[:, start:stop], ((0, 0), (0, pad)), constant_values=hidden) for start, stop, pad in parts]
    full: Array = np.concatenate(cut, axis=1)
    if a.dtype == np.float32:
        return full
    if half:
        return np.where(full, np.float16(0), np.float16(LOW_F16))
    return np.where(full, np.float32(0), np.float32(LOW_F32))


def _heads_first(a: Array, groups: int, before: int, pad: int, owner: str) -> Array:
    """[n, G*d] to [G, before+n+pad, d], zeros around; `owner` is the node that fills what lies before."""
    v = a.reshape(a.shape[0], groups, -1).transpose(1, 0, 2)
    return np.pad(v, ((0, 0), (before, pad), (0, 0)))


def _transposed(a: Array, groups: int, before: int, pad: int, owner: str) -> Array:
    """[n, G*e] to [G, e, before+n+pad], zeros around."""
    v = a.reshape(a.shape[0], groups, -1).transpose(1, 2, 0)
    return np.pad(v, ((0, 0), (0, 0), (before, pad)))


def _row_range(a: Array, count: int, limit: int) -> Array:
    """start, ..., start + count - 1 as int64; ggml aborts the process on a row outside."""
    first = int(a[0])
    if first < 0 or first + count > limit:
        raise InputError(f"rows {first}..{first + count - 1} of {limit}")
    return np.arange(first, first + count, dtype=np.int64)


LAYOUTS: dict[str, Callable[..., Array]] = {
    "row_range": _row_range,
    "plain": _plain,
    "ids": _ids,
    "additive": _additive,
    "heads_first": _heads_first,
    "transposed": _transposed,
    "zeros": lambda value, name, rows, size: np.zeros((rows, size), np.float32),
}


@dataclass(frozen=True)
class Feed:
    """A leaf of the graph filled from a host value, or from none (name ""): LAYOUTS[layout](value, *args)."""

    name: str
    layout: str
    args: tuple[Any, ...]
    tensor: int


# --- drawing -----------------------------------------------------------------------------------------------------


class Drawing:
    """A stage being drawn as ggml tensors in a context without memory.

    `context` holds computed tensors, `leaves` the feeds (they get a buffer of their own: tensors in the compute buffer
    are overwritten during a run). `weights` maps parameter names to placed tensors. `careful`: see `_in_two_parts`.
    """

    def __init__(self, lib: Ggml, plan: StagePlan, weights: Mapping[str, int], careful: bool = False) -> None:
        self.lib, self.plan, self.weights, self.careful = lib, plan, weights, careful
        self.limit = _TENSORS_PER_NODE * (len(plan.graph) + 4)
        overhead = lib.tensor_overhead()
        self.context = lib.init(InitParams(self.limit * overhead, None, True))
        self.leaves = lib.init(InitParams((4 * len(plan.graph) + 16) * overhead, None, True))
        if not self.context or not self.leaves:
            raise EngineError(f"stage {plan.stage.name}: out of memory while building its graph")
        self.values: dict[str, int] = {}
        self.feeds: dict[tuple[Any, ...], Feed] = {}
        self.count = 0

    def free(self) -> None:
        self.lib.free(self.context)
        self.lib.free(self.leaves)

    def op(self, name: str, *args: Any) -> int:
        """lib.name(context, ...): adds a tensor."""
        self.count += 1
        if self.count > self.limit:
            raise EngineError(f"stage {self.plan.stage.name}: {name} would be tensor {self.count} of {self.limit}")
        result = getattr(self.lib, name)(self.context, *args)
        if not result:
            raise EngineError(f"stage {self.plan.stage.name}: ggml_{name} gave no tensor")
        return int(result)

    def feed(self, name: str, layout: str, args: tuple[Any, ...], kind: int, ne: tuple[int, ...]) -> int:
        """The leaf for a host value under a layout; made once."""
        key = (name, layout, args)
        if key not in self.feeds:
            if len(self.feeds) >= 4 * len(self.plan.graph) + 8:
                raise EngineError(f"stage {self.plan.stage.name}: too many inputs")
            full = (*ne, 1, 1, 1, 1)[:4]
            tensor = self.lib.new_tensor_4d(self.leaves, kind, *full)
            self.lib.set_input(tensor)
            self.feeds[key] = Feed(name, layout, args, int(tensor))
        return self.feeds[key].tensor

    def value(self, name: str) -> int:
        """A float32 operand: computed, fed, or a weight (converted when it is stored in another format)."""
        if name in self.values:
            return self.values[name]
        if name.startswith("@"):
            tensor = self.weights[name[1:]]
            if Tensor.from_address(tensor).type != F32:
                tensor = self.op("cast", tensor, F32)
                self.values[name] = tensor
            return tensor
        return self.feed(name, "plain", (), F32, ne_of(self.plan.types[name]))

    def dense(self, tensor: int) -> int:
        """The same values without gaps."""
        return tensor if self.lib.is_contiguous(tensor) else self.op("cont", tensor)

    def shape(self, name: str) -> tuple[int, ...]:
        return ints(self.plan.types[name])

    def draw(self) -> dict[str, int]:
        """Draws every needed node; stage outputs that are computed -> tensors without gaps."""
        for node in self.plan.graph.values():
            if node.name not in self.values and not absorbed(self.plan, node):
                tensor = self.values[node.name] = DRAW[node.op](self, node)
                have, want = tuple(Tensor.from_address(tensor).ne), (*ne_of(self.plan.types[node.name]), 1, 1, 1, 1)[:4]
                if have != want:
                    raise EngineError(f"stage {self.plan.stage.name}, {node.name}: ggml has ne {have}, expected {want}")
        result = {}
        wanted = (*self.plan.stage.outputs, *(i for n in self.plan.after.values() for i in n.inputs))
        for name in dict.fromkeys(wanted):
            if name in self.values:
                tensor = self.dense(self.values[name])
                result[name] = tensor
                # a view has no memory of its own: what it looks at must survive too
                self.lib.set_output(tensor)
                root = Tensor.from_address(tensor).view_src
                if root:
                    self.lib.set_output(root)
        return result


def ne_of(t: Type) -> tuple[int, ...]:
    """A type's shape as ggml has it: reversed."""
    return tuple(reversed(ints(t)))


# --- ops ---------------------------------------------------------------------------------------------------------

Draw = Callable[[Drawing, Node], int]
DRAW: dict[str, Draw] = {}


def _draws(*names: str) -> Callable[[Draw], Draw]:
    def register(fn: Draw) -> Draw:
        for name in names:
            DRAW[name] = fn
        return fn

    return register


@_draws("silu", "sigmoid", "tanh", "relu")
def _unary(d: Drawing, n: Node) -> int:
    return d.op(n.op, d.value(n.inputs[0]))


@_draws("gelu")
def _gelu(d: Drawing, n: Node) -> int:
    """Composed from silu: ggml's own tanh and quick forms look x up in a float16 table (4.6e-4 of a chunk)."""
    x = d.value(n.inputs[0])
    if n.attr["approximate"] == "none":
        return d.op("gelu_erf", x)
    if n.attr["approximate"] == "quick":
        return d.op("scale", d.op("silu", d.op("scale", d.dense(x), 1.702)), 1 / 1.702)
    # gelu(x) = x*sigmoid(x*a) = silu(x*a)/a with a = 2*sqrt(2/pi)*(1 + 0.044715 x^2) > 0
    c = 2 * math.sqrt(2 / math.pi)
    a = d.op("scale_bias", d.op("sqr", d.dense(x)), 0.044715 * c, c)
    return d.op("div", d.op("silu", d.op("mul", x, a)), a)


@_draws("add", "sub", "mul")
def _binary(d: Drawing, n: Node) -> int:
    silu = gate(d.plan, n)
    if silu is not None:
        return d.op("swiglu_split", d.value(silu.inputs[0]), d.value(n.inputs[1]))
    return d.op(n.op, d.value(n.inputs[0]), d.value(n.inputs[1]))


@_draws("scale")
def _scale(d: Drawing, n: Node) -> int:
    return d.op("scale", d.dense(d.value(n.inputs[0])), n.attr["factor"])


@_draws("linear")
def _linear(d: Drawing, n: Node) -> int:
    w = n.inputs[1]
    weight = d.weights[w[1:]] if w.startswith("@") else d.dense(d.value(w))
    x = d.dense(d.value(n.inputs[0]))
    in_parts = d.careful and Tensor.from_address(weight).type == F16
    y = _in_two_parts(d, weight, x) if in_parts else _product(d, weight, x)
    return d.op("add", y, d.value(n.inputs[2])) if len(n.inputs) > 2 else y


def _product(d: Drawing, weight: int, x: int) -> int:
    """The product of ggml. Where the rows are the first of perhaps more, it is the one that more rows would meet."""
    t = Tensor.from_address(x)
    rows = t.ne[1]
    if not d.plan.one_form or rows >= LEAST_ROWS:
        return d.op("mul_mat", weight, x)
    y = d.op("mul_mat", weight, d.op("pad", x, 0, LEAST_ROWS - rows, 0, 0))
    t = Tensor.from_address(y)
    return d.op("cont", d.op("view_4d", y, t.ne[0], rows, t.ne[2], t.ne[3], t.nb[1], t.nb[2], t.nb[3], 0))


def _in_two_parts(d: Drawing, weight: int, x: int) -> int:
    """A float16 weight times x, of which ggml would keep 11 bits: it rounds the activations of such a product to
    float16. x goes in as two float16 numbers whose sum has 22 bits, their rows in one product: the weight is read once.
    """
    t = Tensor.from_address(x)
    high = d.op("cast", d.op("cast", x, F16), F32)
    both = d.op("mul_mat", weight, d.op("concat", high, d.op("sub", x, high), 1))
    y = Tensor.from_address(both)
    parts = (
        d.op("view_4d", both, y.ne[0], t.ne[1], 1, 1, y.nb[1], y.nb[2], y.nb[3], first * t.ne[1] * y.nb[1])
        for first in (0, 1)
    )
    return d.op("add", *parts)


@_draws("embed")
def _embed(d: Drawing, n: Node) -> int:
    ids, table = n.inputs
    weight = d.weights[table[1:]] if table.startswith("@") else d.dense(d.value(table))
    rows = int(Tensor.from_address(weight).ne[1])
    return d.op("get_rows", weight, d.feed(ids, "ids", (rows,), I32, ne_of(d.plan.types[ids])))


@_draws("layer_norm", "rms_norm")
def _norm(d: Drawing, n: Node) -> int:
    y = d.op("norm" if n.op == "layer_norm" else "rms_norm", d.value(n.inputs[0]), n.attr["eps"])
    for op, w in zip(("mul", "add"), n.inputs[1:], strict=False):
        y = d.op(op, y, d.value(w))
    return y


@_draws("softmax")
def _softmax(d: Drawing, n: Node) -> int:
    return d.op("soft_max_ext", d.dense(d.value(n.inputs[0])), None, 1.0, 0.0)


@_draws("concat")
def _concat(d: Drawing, n: Node) -> int:
    dim = len(d.plan.types[n.name].shape) - 1 - n.attr["axis"]
    y = d.value(n.inputs[0])
    for name in n.inputs[1:]:
        y = d.op("concat", y, d.value(name), dim)
    return y


@_draws("write_rows")
def _write_rows(d: Drawing, n: Node) -> int:
    """Rows set in a copy: what the host fed stays as it is for the next run."""
    x, rows, start = n.inputs
    height, count = d.shape(x)[0], d.shape(rows)[0]
    at = d.feed(start, "row_range", (count, height), I64, (count,))
    return d.op("set_rows", d.op("cont", d.value(x)), d.dense(d.value(rows)), at)


@_draws("slice")
def _slice(d: Drawing, n: Node) -> int:
    """A view; nothing is copied."""
    x = d.value(n.inputs[0])
    t = Tensor.from_address(x)
    dim = len(d.plan.types[n.name].shape) - 1 - n.attr["axis"]
    ne = (*ne_of(d.plan.types[n.name]), 1, 1, 1)[:4]
    return d.op("view_4d", x, *ne, t.nb[1], t.nb[2], t.nb[3], n.attr["start"] * t.nb[dim])


@_draws("reshape")
def _reshape(d: Drawing, n: Node) -> int:
    return d.op("reshape_4d", d.dense(d.value(n.inputs[0])), *(*ne_of(d.plan.types[n.name]), 1, 1, 1)[:4])


@_draws("transpose")
def _transpose(d: Drawing, n: Node) -> int:
    perm = n.attr["perm"]
    last = len(perm) - 1
    to = list(range(4))
    for i, p in enumerate(perm):
        to[last - p] = last - i
    return d.op("cont", d.op("permute", d.value(n.inputs[0]), *to))


@_draws("pad")
def _pad(d: Drawing, n: Node) -> int:
    """Rows are copied into room that holds zeros from the start: ggml's own op asks for every value where it lies."""
    x, size = d.value(n.inputs[0]), n.attr["size"]
    width, rows, *others = Tensor.from_address(x).ne
    if width == size:
        return x
    if any(o != 1 for o in others):
        return d.op("pad", d.dense(x), size - width, 0, 0, 0)
    room = d.feed("", "zeros", (n.name, rows, size), F32, (size, rows))
    strides = (4 * size, 4 * size * rows, 4 * size * rows, 0)
    inner = d.op("cpy", d.dense(x), d.op("view_4d", room, width, rows, 1, 1, *strides))
    return d.op("view_4d", inner, size, rows, 1, 1, *strides)


@_draws("tile")
def _tile(d: Drawing, n: Node) -> int:
    return d.op("repeat_4d", d.dense(d.value(n.inputs[0])), *(*ne_of(d.plan.types[n.name]), 1, 1, 1)[:4])


@_draws("pixel_shuffle")
def _pixel_shuffle(d: Drawing, n: Node) -> int:
    """Rows are (Y, dy, X, dx): exchanging dy and X brings the f*C channels of a block's rows together."""
    rows, width = ints(d.plan.types[n.name])
    f = n.attr["factor"]
    grid = math.isqrt(rows)
    x = d.op("reshape_4d", d.dense(d.value(n.inputs[0])), width // f, grid, f, grid)
    return d.op("reshape_4d", d.op("cont", d.op("permute", x, 0, 2, 1, 3)), width, rows, 1, 1)


def _heads(d: Drawing, tensor: int, heads: int) -> int:
    """[n, heads*d] seen as ne (d, heads, n); rows may lie apart."""
    t = Tensor.from_address(tensor)
    width = t.ne[0] // heads
    return d.op("view_4d", tensor, width, heads, t.ne[1], 1, width * 4, t.nb[1], t.nb[1] * t.ne[1], 0)


@_draws("rope")
def _rope(d: Drawing, n: Node) -> int:
    x, positions = n.inputs
    rows, width = ints(d.plan.types[x])
    head = n.attr["head_dim"]
    ids = d.feed(positions, "ids", (), I32, (rows,))
    heads = _heads(d, d.value(x), width // head)
    # mode 2: half-split pairs
    y = d.op("rope_ext", heads, ids, None, head, 2, 0, n.attr["base"], 1.0, 0.0, 1.0, 0.0, 0.0)
    return d.op("reshape_4d", y, width, rows, 1, 1)


# --- attention ---------------------------------------------------------------------------------------------------


@_draws("attention")
def _attention(d: Drawing, n: Node) -> int:
    q, k, v = n.inputs[:3]
    heads, groups, scale = n.attr["heads"], n.attr["kv_heads"], n.attr["scale"]
    nq, nk = d.shape(q)[0], d.shape(k)[0]
    query = d.op("permute", _heads(d, d.value(q), heads), 0, 2, 1, 3)
    # flash attention takes the mask in float16: too coarse for logarithms of counts
    if d.plan.flash(nq) and (len(n.inputs) < 4 or d.plan.types[n.inputs[3]].dtype == "bool"):
        keys, values = (d.op("permute", _heads(d, d.value(i), groups), 0, 2, 1, 3) for i in (k, v))
        mask = d.feed(n.inputs[3], "additive", (((0, nk, 0),), True), F16, (nk, nq)) if len(n.inputs) > 3 else None
        y = d.op("flash_attn_ext", query, keys, values, mask, scale, 0.0, 0.0)
    else:
        keys, values, parts = _joined(d, n) or _padded(d, n)
        scores = _product(d, keys, d.op("cont", query))
        count = int(Tensor.from_address(keys).ne[1])
        if len(n.inputs) > 3:
            mask = d.feed(n.inputs[3], "additive", (parts, False), F32, (count, nq))
        else:
            mask = _tail_mask(d, nq, nk, count - nk)
        weights = d.op("soft_max_ext", scores, mask, scale, 0.0)
        y = d.op("cont", d.op("permute", _product(d, values, weights), 0, 2, 1, 3))
    return d.op("reshape_4d", y, d.shape(n.name)[1], nq, 1, 1)


def _tail_mask(d: Drawing, nq: int, nk: int, pad: int) -> int | None:
    """A mask that hides padded keys of an attention without one."""
    return d.feed("", "tail", (nq, nk, pad), F32, (nk + pad, nq)) if pad else None


def _tail(a: Array, nq: int, nk: int, pad: int) -> Array:
    return np.repeat(np.array([[0.0] * nk + [LOW_F32] * pad], dtype=np.float32), nq, axis=0)


LAYOUTS["tail"] = _tail

Parts = tuple[tuple[int, int, int], ...]
"""Which keys lie where: (start, stop, padded columns behind them), see `_additive`."""


def _joined(d: Drawing, n: Node) -> tuple[int, int, Parts] | None:
    """Keys and values (as `_padded` has them) of which the first come from the host and the others from the graph.

    The others are written into the feed, in front of those from the host, each part in whole blocks: the n-th key is
    summed in the same place however many others there are, so that fewer rows are the first ones of more, to the bit.
    """
    joined = split(d.plan, n)
    if joined is None:
        return None
    groups = n.attr["kv_heads"]
    (old_k, new_k), (old_v, new_v) = (c.inputs for c in joined)
    old, new = d.shape(old_k)[0], d.shape(new_k)[0]
    before, pad = new + -new % KEY_BLOCK, -old % KEY_BLOCK
    total = before + old + pad
    room = _cached(d, old_k, groups, before, pad, False, n.name)
    width = int(Tensor.from_address(room).ne[0])
    fresh = d.op("permute", _heads(d, d.value(new_k), groups), 0, 2, 1, 3)
    keys = _written(d, room, fresh, (width, new, groups), (width, total, groups))
    room = _cached(d, old_v, groups, before, pad, True, n.name)
    width = int(Tensor.from_address(room).ne[1])
    fresh = d.op("permute", _heads(d, d.value(new_v), groups), 1, 2, 0, 3)
    values = _written(d, room, fresh, (new, width, groups), (total, width, groups))
    return keys, values, ((old, old + new, before - new), (0, old, pad))


def _written(d: Drawing, room: int, fresh: int, part: tuple[int, int, int], whole: tuple[int, int, int]) -> int:
    """The float32 tensor `room` of shape `whole` with `fresh`, of shape `part`, copied into its beginning."""
    strides = [4 * math.prod(whole[:i]) for i in (1, 2, 3)]
    written = d.op("cpy", fresh, d.op("view_4d", room, *part, 1, *strides, 0))
    return d.op("view_4d", written, *whole, 1, *strides, 0)


def _padded(d: Drawing, n: Node) -> tuple[int, int, Parts]:
    """Keys as ne (d, Nk+pad, G), values transposed as (Nk+pad, e, G), and which keys lie where.

    Keys and values that come from the host (a cache) are laid out there, once for all turns of a loop.
    """
    k, v = n.inputs[1:3]
    groups, nk = n.attr["kv_heads"], d.shape(n.inputs[1])[0]
    pad = -nk % KEY_BLOCK
    if d.plan.on_host(k):
        keys = _cached(d, k, groups, 0, pad, False)
    else:
        keys = d.op("permute", _heads(d, d.value(k), groups), 0, 2, 1, 3)
        keys = d.op("pad", d.op("cont", keys), 0, pad, 0, 0) if pad else keys
    if d.plan.on_host(v):
        values = _cached(d, v, groups, 0, pad, True)
    else:
        values = d.op("cont", d.op("permute", _heads(d, d.value(v), groups), 1, 2, 0, 3))
        values = d.op("pad", values, pad, 0, 0, 0) if pad else values
    return keys, values, ((0, nk, pad),)


def _cached(d: Drawing, name: str, groups: int, before: int, pad: int, transposed: bool, owner: str = "") -> int:
    rows, width = ints(d.plan.types[name])
    rows, width = before + rows + pad, width // groups
    ne = (rows, width, groups) if transposed else (width, rows, groups)
    return d.feed(name, "transposed" if transposed else "heads_first", (groups, before, pad, owner), F32, ne)
