"""Every op on ggml against the numpy reference: shapes that vector code likes and shapes that it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from vlac.artifact import StoredTensor
from vlac.engines import ggml_lib
from vlac.engines.ggml_engine import GgmlSession
from vlac.engines.ggml_ops import DRAW
from vlac.engines.ggml_plan import DECLINES, FLASH_ROWS, NEVER
from vlac.engines.numpy_engine import run_stage
from vlac.errors import InputError
from vlac.formats import decode, encode
from vlac.graph import Call, Param, Program, Schedule, StageBuilder, check
from vlac.ops import OPS

pytestmark = pytest.mark.skipif(bool(ggml_lib.missing()), reason=ggml_lib.missing() or "ggml is there")

NpArray = np.ndarray[Any, Any]
RNG = np.random.default_rng(11)


def normal(*shape: int) -> NpArray:
    return RNG.standard_normal(shape).astype(np.float32)


def stored(values: NpArray, fmt: str = "f32") -> StoredTensor:
    data = encode(fmt, values)
    return StoredTensor(values.shape, fmt, lambda: decode(fmt, data, values.shape), data)


class Toy:
    """One stage under construction, with its inputs' and weights' values."""

    def __init__(self) -> None:
        self.b = StageBuilder("s")
        self.inputs: dict[str, NpArray] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self.unread: list[int] = []
        """Rows whose values mean nothing; they must only be finite."""

    def input(self, value: NpArray, name: str = "") -> str:
        kind = {"float32": "f32", "int32": "i32", "bool": "bool"}[str(value.dtype)]
        name = name or f"in{len(self.inputs)}"
        self.inputs[name] = value
        return self.b.input(name, kind, *value.shape)

    def weight(self, value: NpArray, fmt: str = "f32") -> str:
        name = f"w{len(self.tensors)}.weight"
        self.tensors[name] = stored(value, fmt)
        return "@" + name

    def program(self) -> Program:
        params = {name: Param(t.shape, t.format) for name, t in self.tensors.items()}
        return Program("toy", (), (self.b.build(),), params, Schedule((Call("s"),), self.b._outputs[0]))

    def session(self) -> GgmlSession:
        return GgmlSession(self.program(), self.tensors, threads=2)

    def reference(self, inputs: Mapping[str, NpArray] | None = None) -> dict[str, NpArray]:
        return run_stage(self.program(), "s", inputs or self.inputs, lambda n: self.tensors[n].decode())

    def compare(self, limit: float) -> None:
        session = self.session()
        want = self.reference()
        for _ in range(3):  # compute buffers are reused: a second run is where stale inputs would show
            got = session.run("s", self.inputs, {})
            for name, value in want.items():
                assert got[name].dtype == value.dtype
                assert got[name].shape == value.shape
                assert np.isfinite(got[name]).all()
                got[name][self.unread] = value[self.unread]
                scale = max(float(np.abs(value).max()), 1e-6)
                assert np.abs(got[name].astype(np.float64) - value).max() <= limit * scale, name
        session.close()


def unary(op: str, x: NpArray, **attrs: Any) -> Toy:
    t = Toy()
    t.b.output(t.b.op(op, t.input(x), **attrs))
    return t


def binary(op: str, x: NpArray, y: NpArray, weight: bool = False) -> Toy:
    t = Toy()
    a = t.input(x)
    t.b.output(t.b.op(op, a, t.weight(y) if weight else t.input(y)))
    return t


def linear(m: int, k: int, n: int, fmt: str, bias: bool) -> Toy:
    t = Toy()
    operands = [t.input(normal(m, k)), t.weight(normal(n, k), fmt)]
    t.b.output(t.b.op("linear", *operands, *([t.weight(normal(n))] if bias else [])))
    return t


def attention(nq: int, nk: int, h: int, g: int, d: int, e: int, mask: str) -> Toy:
    t = Toy()
    # computed (not fed) operands, so that they are strided views in the graph
    qkv = [
        t.b.slice(t.input(normal(n, w + 8)), axis=1, start=8, stop=w + 8)
        for n, w in ((nq, h * d), (nk, g * d), (nk, g * e))
    ]
    extra = []
    if mask:
        m = RNG.random((nq, nk)) < 0.6
        m[:, 0] = True
        if mask == "empty rows":
            m[nq // 2] = False
            t.unread = [nq // 2]
        extra = [t.input(m)]
    t.b.output(t.b.op("attention", *qkv, *extra, heads=h, kv_heads=g, scale=float(d) ** -0.5))
    return t


def cached_attention(nq: int, old: int, new: int, h: int, g: int, d: int, joined: bool, masked: bool = True) -> Toy:
    """Keys and values from a cache (stage inputs), alone or followed by new ones."""
    t = Toy()
    q = t.b.scale(t.input(normal(nq, h * d)), factor=1.0)
    k, v = t.input(normal(old, g * d)), t.input(normal(old, g * d))
    nk = old
    if joined:
        k = t.b.concat(k, t.b.scale(t.input(normal(new, g * d)), factor=1.0), axis=0)
        v = t.b.concat(v, t.b.scale(t.input(normal(new, g * d)), factor=1.0), axis=0)
        nk += new
    allowed = RNG.random((nq, nk)) < 0.7
    allowed[:, 1] = True
    mask = [t.input(allowed)] if masked else []
    t.b.output(t.b.op("attention", q, k, v, *mask, heads=h, kv_heads=g, scale=0.3))
    return t


def rope(n: int, width: int, d: int, view: bool) -> Toy:
    t = Toy()
    x = t.input(normal(n, width + (8 if view else 0)))
    x = t.b.slice(x, axis=1, start=8, stop=width + 8) if view else x
    positions = t.input(RNG.integers(0, 150, n).astype(np.int32))
    t.b.output(t.b.rope(x, positions, head_dim=d, base=10000.0))
    return t


def embed(fmt: str, width: int) -> Toy:
    t = Toy()
    t.b.output(t.b.embed(t.input(np.array([3, 0, 6, 6], dtype=np.int32)), t.weight(normal(7, width), fmt)))
    return t


def norm(op: str, m: int, n: int, affine: int) -> Toy:
    t = Toy()
    operands = [t.input(normal(m, n) + 3), *(t.weight(normal(n)) for _ in range(affine))]
    t.b.output(t.b.op(op, *operands, eps=1e-6))
    return t


def views() -> Toy:
    """Slices of slices through unary ops, reshape, transpose and concat."""
    t = Toy()
    x = t.b.scale(t.input(normal(10, 24)), factor=0.5)
    a = t.b.slice(x, axis=1, start=4, stop=20)
    c = t.b.slice(a, axis=0, start=2, stop=9)
    r = t.b.reshape(c, shape=(7, 2, 8))
    p = t.b.transpose(r, perm=(1, 0, 2))
    q = t.b.reshape(p, shape=(14, 8))
    s = t.b.silu(t.b.slice(q, axis=0, start=3, stop=13))
    t.b.output(s, t.b.concat(q, s, axis=0), t.b.slice(q, axis=1, start=0, stop=4), t.b.transpose(c, perm=(1, 0)))
    return t


def gated(shared: bool) -> Toy:
    t = Toy()
    x = t.b.linear(t.input(normal(5, 16)), t.weight(normal(64, 16)))
    gate = t.b.silu(t.b.slice(x, axis=1, start=0, stop=32))
    y = t.b.mul(gate, t.b.slice(x, axis=1, start=32, stop=64))
    t.b.output(t.b.add(y, gate) if shared else y)
    return t


def host_arithmetic() -> Toy:
    """Masks and positions from validity, as families draw them; outputs of every dtype."""
    t = Toy()
    valid = t.input(np.array([True, True, False, True, False]))
    counted = t.b.cumsum(t.b.cast(valid, dtype="i32"))
    positions = t.b.sub(counted, t.b.full(shape=(5,), value=1.0, dtype="i32"))
    block = t.b.arange(start=0, stop=5)
    mask = t.b.attention_mask(block, block, valid)
    x = t.b.rope(t.input(normal(5, 24)), positions, head_dim=12, base=100.0)
    weighted = t.b.mul(x, t.b.reshape(t.b.cast(valid, dtype="f32"), shape=(5, 1)))
    y = t.b.attention(weighted, x, x, mask, heads=2, kv_heads=2, scale=0.25)
    t.b.output(y, mask, positions, t.b.reduce_sum(counted), t.b.repeat_each(valid, times=2), "in0")
    return t


def decoding(start: int = 17) -> Toy:
    """A cache that is written at a row from outside and read; a token chosen from logits after the graph."""
    t = Toy()
    cache, at = t.input(normal(20, 8)), t.input(np.array([start], dtype=np.int32))
    x = t.b.scale(t.input(normal(3, 8)), factor=0.5)
    k = t.b.write_rows(cache, x, at)
    zero, zeros = (t.b.full(shape=(n,), value=0.0, dtype="i32") for n in (3, 20))
    mask = t.b.attention_mask(zero, zeros, t.input(RNG.random(20) < 0.8))
    y = t.b.attention(x, k, cache, mask, heads=2, kv_heads=2, scale=0.5)
    token = t.b.argmax(t.b.linear(y, t.weight(normal(50, 8))))
    t.b.output(k, y, token, "in0")
    return t


def pixels() -> Toy:
    t = Toy()
    patches = t.b.patchify(t.input(normal(3, 16, 16)), patch=2, block=4)
    t.b.output(t.b.linear(patches, t.weight(normal(6, 12))))
    return t


def timed() -> Toy:
    t = Toy()
    emb = t.b.time_embedding(t.input(np.array([[0.7]], dtype=np.float32)), dim=16, min_period=4e-3, max_period=4.0)
    t.b.output(t.b.tile(t.b.linear(emb, t.weight(normal(8, 16))), rows=6))
    return t


F32 = 4e-6
CASES: dict[str, tuple[Callable[[], Toy], float]] = {
    **{f"{op} {s}": (lambda op=op, s=s: unary(op, 3 * normal(*s)), F32)
       for op in ("silu", "sigmoid", "tanh", "relu", "softmax") for s in ((1, 1), (5, 33), (17, 64))},
    **{f"gelu {a}": (lambda a=a: unary("gelu", 4 * normal(9, 37), approximate=a), F32)
       for a in ("tanh", "none", "quick")},
    **{f"{op} {sx} {sy} {w}": (lambda op=op, sx=sx, sy=sy, w=w: binary(op, normal(*sx), normal(*sy), w), F32)
       for op in ("add", "sub", "mul")
       for sx, sy in (((4, 6), (4, 6)), ((4, 6), (6,)), ((4, 6), (1, 6)), ((4, 6), (4, 1)), ((1, 1), (1, 1)))
       for w in (False, True)},
    **{f"linear f32 {m}x{k}x{n} {bias}": (lambda m=m, k=k, n=n, bias=bias: linear(m, k, n, "f32", bias), F32)
       for m, k, n in ((1, 1, 1), (1, 36, 5), (3, 16, 8), (7, 37, 11), (70, 48, 64)) for bias in (False, True)},
    "linear f16": (lambda: linear(9, 64, 8, "f16", True), 2e-3),
    "linear bf16": (lambda: linear(9, 64, 8, "bf16", True), 1.5e-2),
    "linear q8_0": (lambda: linear(9, 64, 8, "q8_0", True), 2e-2),
    "linear q5_0": (lambda: linear(9, 64, 8, "q5_0", True), 2e-2),
    "linear q4_0": (lambda: linear(9, 64, 8, "q4_0", True), 2e-2),
    "linear iq4_nl": (lambda: linear(9, 64, 8, "iq4_nl", True), 2e-2),
    **{f"linear {f}": (lambda f=f: linear(9, 512, 8, f, True), 2e-2) for f in ("q6_k", "q5_k", "q4_k")},
    **{f"{op} {m}x{n} {a}": (lambda op=op, m=m, n=n, a=a: norm(op, m, n, a), F32)
       for op, most in (("layer_norm", 2), ("rms_norm", 1)) for a in range(most + 1) for m, n in ((1, 36), (5, 64))},
    **{f"embed {f}": (lambda f=f: embed(f, 256), F32) for f in ("f32", "f16", "bf16", "q8_0", "q4_0", "q6_k", "q4_k")},
    **{f"rope {n}x{w}/{d} {v}": (lambda n=n, w=w, d=d, v=v: rope(n, w, d, v), 3e-5)
       for n, w, d in ((1, 12, 12), (5, 24, 12), (33, 128, 64)) for v in (False, True)},
    **{f"attention {nq}x{nk} {h}/{g} {d},{e} {m}": (lambda a=(nq, nk, h, g, d, e, m): attention(*a), F32)
       for nq, nk, h, g, d, e in ((1, 1, 1, 1, 4, 4), (5, 7, 2, 2, 12, 12), (16, 32, 4, 2, 8, 8), (9, 21, 3, 1, 12, 20),
                                  (FLASH_ROWS - 1, 64, 2, 1, 64, 64), (FLASH_ROWS, 64, 2, 1, 64, 64),
                                  (70, 71, 3, 3, 12, 12), (65, 33, 15, 5, 20, 20), (128, 191, 4, 2, 72, 72))
       for m in ("", "mask", "empty rows")},
    **{f"cached attention {a}": (lambda a=a: cached_attention(*a), F32)
       for a in ((5, 13, 0, 4, 2, 8, False), (5, 13, 0, 4, 2, 8, False, False), (5, 13, 5, 4, 2, 8, True),
                 (6, 16, 16, 4, 4, 12, True), (6, 16, 16, 4, 4, 12, True, False), (70, 30, 70, 2, 1, 16, True))},
    "views": (views, F32),
    "gate": (lambda: gated(False), F32),
    "shared gate": (lambda: gated(True), F32),
    "host arithmetic": (host_arithmetic, 1e-5),
    "decoding": (decoding, F32),
    "patchify": (pixels, F32),
    "pixel_shuffle": (lambda: unary("pixel_shuffle", normal(64, 5), factor=4), 0.0),
    "pad": (lambda: unary("pad", normal(3, 20), size=32), 0.0),
    "scale": (lambda: unary("scale", normal(3, 20), factor=0.1), 0.0),
    "time": (timed, F32),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_op(case: str) -> None:
    make, limit = CASES[case]
    toy = make()
    check_stage(toy)
    toy.compare(limit)


def check_stage(toy: Toy) -> None:
    program = toy.program()
    if not set(toy.inputs) - {"noise"}:
        check(program)


def test_every_op_is_drawn_or_declined_by_name() -> None:
    assert set(OPS) - set(DRAW) == set(DECLINES) | set(NEVER)


@pytest.mark.parametrize("start", [-1, 18, 2**31 - 1])
def test_rows_outside_a_cache_never_reach_ggml(start: int) -> None:
    toy = decoding(start)
    session = toy.session()
    with pytest.raises(InputError, match="of 20"):
        session.run("s", toy.inputs, {})
    session.close()
