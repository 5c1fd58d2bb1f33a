"""The walk: every op x awkward shapes x every engine that is installed, against the numpy reference.

Each case is a program of one op, compiled by the plainest target of the engine and opened again like any artifact;
torch runs it from the program. An op that an engine neither runs nor declines by name (`DECLINES` of its module) fails.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlac import kv_codes
from vlac.artifact import Sidecars, open_artifact
from vlac.engines.base import NAMES, EngineSession, get_engine
from vlac.engines.numpy_engine import NumpySession
from vlac.errors import VlacError
from vlac.graph import Call, Param, Program, Schedule, StageBuilder, check
from vlac.io import IO, Camera
from vlac.ops import OPS
from vlac.program_text import parse
from vlac.registry import silent, targets
from vlac.weights import LazyTensor, Weights

NpArray = np.ndarray[Any, Any]

TARGET = {"onnxruntime": "onnx-fp32", "openvino": "onnx-fp32", "ggml": "gguf-f32"}
"""The target that writes what an engine reads, with nothing rounded."""

TOLERANCE = {"torch": 2e-6, "onnxruntime": 1e-5, "openvino": 1e-5, "ggml": 1e-5}
"""max |difference| over the largest value of the reference."""

NAMES_OF = {
    "f32": ("noise", "state", "pixels"),
    "i32": ("tokens", "camera_valid"),
    "bool": ("image_valid", "token_valid"),
}
"""A stage reads what the runtime gives under these names; a program of one op borrows them."""


def normal(*shape: int, scale: float = 1.0) -> NpArray:
    rng = np.random.default_rng(zlib.crc32(repr(shape).encode()))
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def ints(*values: int) -> NpArray:
    return np.array(values, dtype=np.int32)


def bools(text: str) -> NpArray:
    return np.array([c == "1" for c in text])


@dataclass(frozen=True)
class W:
    """An operand that is a parameter."""

    values: NpArray


@dataclass(frozen=True)
class Case:
    """One op with operands (arrays: stage inputs, W: parameters) and attributes; `unread` rows need only be finite."""

    op: str
    operands: tuple[NpArray | W, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[int, ...] = ()

    def __str__(self) -> str:
        shapes = [f"{'@' * isinstance(x, W)}{'x'.join(map(str, _values(x).shape))}" for x in self.operands]
        return "-".join([self.op, *shapes, *(str(v) for v in self.attrs.values())])


def _values(x: NpArray | W) -> NpArray:
    return x.values if isinstance(x, W) else x


def case(op: str, *operands: NpArray | W, unread: tuple[int, ...] = (), **attrs: Any) -> Case:
    return Case(op, operands, attrs, unread)


def weight(*shape: int) -> W:
    return W(normal(*shape, scale=shape[-1] ** -0.5))


def attention_case(
    nq: int, nk: int, heads: int, kv: int, d: int, e: int, mask: NpArray | None = None, counts: NpArray | None = None
) -> Case:
    operands = [normal(nq, heads * d), normal(nk, kv * d), normal(nk, kv * e)]
    unread = tuple(int(i) for i in np.flatnonzero(~mask.any(1))) if mask is not None else ()
    return case(
        "attention",
        *operands,
        *([] if mask is None else [mask]),
        *([] if counts is None else [counts]),
        unread=unread,
        heads=heads,
        kv_heads=kv,
        scale=d**-0.5,
    )


def packed(rows: int, width: int, bits: int, d: int, form: str) -> NpArray:
    """Codes that pack_codes could give."""
    return kv_codes.encode(normal(rows, width), None, bits, d, 0, "norm", form)


CAUSAL = np.tril(np.ones((7, 7), dtype=bool))
HOLES = np.array([[True, False, True, True, False], [False] * 5, [False, False, False, False, True]])
LENGTHS = ((1, 1), (1, 5), (3, 8), (7, 24), (2, 65), (33, 48))

CASES: tuple[Case, ...] = (
    case("arange", start=0, stop=7),
    case("arange", start=5, stop=6),
    case("full", shape=(3,), value=2.0, dtype="i32"),
    case("full", shape=(2, 5), value=-0.25, dtype="f32"),
    case("full", shape=(4,), value=1.0, dtype="bool"),
    case("cast", bools("10110"), dtype="i32"),
    case("cast", bools("10110"), dtype="f32"),
    case("cast", ints(-2, 0, 7), dtype="bool"),
    case("cast", ints(-2, 0, 7), dtype="f32"),
    case("cast", np.array([1.75, -1.75, 0.0], np.float32), dtype="i32"),
    case("cumsum", ints(1, 0, 1, 1, 0)),
    case("cumsum", ints(-3)),
    case("reduce_sum", ints(1, 0, 1, 1, 0)),
    case("repeat_each", ints(4, 0, -1), times=3),
    case("repeat_each", bools("101"), times=1),
    case("attention_mask", ints(0, 1, 1), ints(0, 0, 1, 2), bools("1011")),
    case("attention_mask", ints(3), ints(5), bools("1")),
    case("weighted_mask", CAUSAL, ints(1, 4, 4, 1, 9, 1, 2)),
    case("weighted_mask", HOLES, ints(4, 1, 1, 16, 1)),
    case("argmax", normal(1, 33)),
    case("argmax", np.array([[1, 5, 5, 2], [7, 0, 0, 7], [-3, -3, -3, -3]], np.float32)),
    case("pick", ints(4, 0, -1), ints(2)),
    case("pick", bools("101"), ints(0)),
    case("write_rows", normal(5, 8), normal(1, 8), ints(3)),
    case("write_rows", normal(7, 24), normal(3, 24), ints(0)),
    case("write_rows", normal(3, 5), normal(3, 5), ints(0)),
    case("concat", normal(3, 8), normal(1, 8), axis=0),
    case("concat", normal(3, 8), normal(3, 5), normal(3, 1), axis=1),
    case("concat", ints(1, 2), ints(3), axis=0),
    case("concat", bools("10"), bools("011"), axis=0),
    case("concat", normal(2, 8), weight(3, 8), axis=0),
    case("slice", normal(5, 24), axis=1, start=3, stop=17),
    case("slice", normal(5, 24), axis=0, start=4, stop=5),
    case("slice", ints(1, 2, 3, 4), axis=0, start=1, stop=3),
    case("reshape", normal(6, 8), shape=(3, 16)),
    case("reshape", normal(6, 8), shape=(2, 4, 6)),
    case("transpose", normal(5, 8), perm=(1, 0)),
    case("transpose", normal(2, 3, 8), perm=(1, 0, 2)),
    case("pad", normal(3, 5), size=8),
    case("pad", normal(3, 5), size=5),
    case("tile", normal(1, 5), rows=7),
    case("tile", normal(1, 24), rows=1),
    case("patchify", normal(3, 12, 12), patch=3, block=1),
    case("patchify", normal(3, 12, 12), patch=3, block=2),
    case("patchify", normal(1, 4, 4), patch=4, block=1),
    case("pixel_shuffle", normal(16, 6), factor=2),
    case("pixel_shuffle", normal(36, 5), factor=3),
    *(case(op, normal(*shape), weight(*shape)) for op in ("add", "sub", "mul") for shape in ((1, 5), (7, 24))),
    *(case(op, normal(7, 24), normal(1, 24)) for op in ("add", "sub", "mul")),
    *(case(op, normal(7, 24), normal(1, 1)) for op in ("add", "mul")),
    case("add", normal(7, 24), weight(24)),
    case("mul", normal(5, 8), normal(5, 1)),
    case("add", ints(1, 2, 3), ints(10)),
    case("sub", ints(1, 2, 3), ints(3, 2, 1)),
    case("scale", normal(3, 5), factor=960**0.5),
    *(case("linear", normal(m, k), weight(n, k)) for m, k, n in ((1, 5, 3), (7, 24, 33), (33, 65, 8), (50, 32, 48))),
    *(case("linear", normal(m, k), weight(n, k), weight(n)) for m, k, n in ((1, 8, 1), (5, 36, 24))),
    case("embed", ints(0, 10, 3), weight(11, 24)),
    case("embed", ints(1), weight(2, 5)),
    *(case("layer_norm", normal(*s), weight(s[1]), weight(s[1]), eps=1e-6) for s in LENGTHS[1:]),
    case("layer_norm", normal(3, 8), eps=1e-5),
    case("layer_norm", normal(3, 8), weight(8), eps=1e-5),
    *(case("rms_norm", normal(*s), weight(s[1]), eps=1e-5) for s in LENGTHS),
    case("rms_norm", normal(3, 8), eps=1e-6),
    *(case(op, normal(*s, scale=3)) for op in ("silu", "sigmoid", "tanh", "relu", "softmax") for s in LENGTHS[1:5:2]),
    *(
        case("round_int8", normal(5, w), form=f, largest=2.5)
        for f in ("token", "block32", "tensor")
        for w in (64, 40, 3)
    ),
    case("round_int8", normal(5, 40, scale=9), form="tensor", largest=2.5),  # most lie beyond: codes -128 and 127
    case("round_f16", normal(5, 40, scale=30)),
    *(case("round_fp8", normal(5, w, scale=s), largest=2.5) for w, s in ((64, 1.0), (40, 0.01), (3, 9.0))),
    *(case("gelu", normal(7, 24, scale=4), approximate=kind) for kind in ("tanh", "none", "quick")),
    attention_case(4, 4, 1, 1, 4, 4),
    attention_case(5, 9, 3, 3, 8, 8),
    attention_case(7, 7, 6, 2, 12, 12, CAUSAL),
    attention_case(3, 5, 4, 1, 6, 6, HOLES),
    attention_case(3, 5, 4, 1, 6, 6, HOLES, ints(4, 1, 9, 1, 16)),
    attention_case(7, 7, 2, 2, 8, 4, CAUSAL, ints(1, 1, 4, 4, 1, 2, 1)),
    attention_case(70, 7, 2, 1, 64, 64, np.tile(CAUSAL, (10, 1)), ints(1, 1, 4, 4, 1, 2, 1)),
    attention_case(1, 3, 2, 1, 8, 8),
    attention_case(3, 5, 2, 2, 8, 4),
    attention_case(33, 70, 3, 1, 64, 64),
    case("rope", normal(3, 8), bools("011"), head_dim=4, base=10000.0),
    case("rope", normal(5, 36), bools("10101"), head_dim=12, base=100.0),
    case("rope", normal(130, 64), bools("110" + "1" * 127), head_dim=64, base=10000.0),
    case("column_mean", normal(5, 12), bools("10110")),
    case("column_mean", normal(1, 3)),
    case("pack_codes", normal(5, 24), bits=4, head_dim=12, seed=0, scale="norm", form="groups"),
    case("pack_codes", normal(9, 256), bits=2, head_dim=128, seed=2, scale="norm", form="groups"),
    case("pack_codes", normal(7, 64), normal(1, 64), bits=3, head_dim=64, seed=5, scale="least_squares", form="head"),
    case("pack_codes", normal(4, 128), bits=5, head_dim=64, seed=-1, scale="least_squares", form="groups"),
    case("pack_codes", normal(3, 72), bits=4, head_dim=36, seed=3, scale="raw", form="inner"),
    case("pack_codes", normal(1, 18) * 0, bits=8, head_dim=6, seed=1, scale="raw", form="head"),
    case("unpack_codes", packed(5, 24, 4, 12, "groups"), bits=4, head_dim=12, seed=0, form="groups"),
    case("unpack_codes", packed(6, 256, 8, 128, "groups"), bits=8, head_dim=128, seed=1, form="groups"),
    case("unpack_codes", packed(7, 64, 3, 64, "head"), normal(1, 64), bits=3, head_dim=64, seed=5, form="head"),
    case("unpack_codes", packed(4, 72, 5, 36, "inner"), bits=5, head_dim=36, seed=0, form="inner"),
    case("unpack_codes", packed(3, 128, 5, 64, "groups"), bits=5, head_dim=64, seed=-1, form="groups"),
    case("time_embedding", np.array([[1.0]], np.float32), dim=24, min_period=4e-3, max_period=4.0),
    case("time_embedding", np.array([[0.9], [0.1]], np.float32), dim=6, min_period=4e-3, max_period=4.0),
)

SIDECAR_IO = IO(
    cameras=(Camera("observation.images.top", (3, 8, 8)),),
    image_steps=(),
    state_key="observation.state",
    state_dim=4,
    state_steps=(),
    text_steps=(),
    action_key="action",
    action_dim=4,
    max_action_dim=4,
    chunk_size=1,
    n_action_steps=1,
    action_steps=(),
    normalised_action_steps=(),
)


def program_of(c: Case) -> tuple[Program, dict[str, NpArray]]:
    """The program of one op, and its inputs; rope's positions are counted from a mask, so that their range is known."""
    b = StageBuilder("only")
    weights: dict[str, LazyTensor] = {}
    inputs: dict[str, NpArray] = {}
    operands: list[str] = []
    free = {kind: list(names) for kind, names in NAMES_OF.items()}
    for x in c.operands:
        if isinstance(x, W):
            name = f"part{len(weights)}.weight"
            weights[name] = LazyTensor.of(x.values)
            operands.append("@" + name)
        else:
            kind = {"f": "f32", "i": "i32", "b": "bool"}[x.dtype.kind]
            name = free[kind].pop(0)
            inputs[name] = x
            operands.append(b.input(name, kind, *x.shape))
            if c.op == "rope" and kind == "bool":
                operands[-1] = b.cumsum(b.cast(operands[-1], dtype="i32"))
            if c.op == "attention" and kind == "i32":
                operands[-2:] = [b.weighted_mask(*operands[-2:])]
    b.output(b.op(c.op, *operands, name="result", **c.attrs))
    params = {name: Param(t.shape) for name, t in weights.items()}
    program = Program("one_op", (), (b.build(),), params, Schedule((Call("only"),), "result"), Weights(weights))
    return check(program), inputs


def open_session(engine: str, program: Program, folder: Path) -> EngineSession:
    """The program in an engine: torch takes it as it is, the others through the file that their target writes."""
    if engine == "torch":
        from vlac.engines.torch_engine import TorchSession

        return TorchSession(program, lambda name: program.weights[name].load())
    target = targets.get(TARGET[engine])
    lowered = target.lower(program, {})
    manifest = {
        "format_version": 1,
        "target": target.name,
        "family": "one_op",
        "engines": list(target.engines),
        "files": {},
        "name": "one op",
    }
    target.emit(lowered, Sidecars(str(lowered), SIDECAR_IO.to_json(), manifest, None, None), folder, {}, silent)
    return get_engine(engine).open(open_artifact(folder), threads=1)


def run_single_op(engine: str, c: Case, folder: Path) -> tuple[NpArray, NpArray]:
    """(what the reference gives, what the engine gives)."""
    program, inputs = program_of(c)
    weight = lambda name: program.weights[name].load()  # noqa: E731
    want = NumpySession(program, weight).run("only", inputs, {})["result"]
    session = open_session(engine, program, folder)
    try:
        return want, session.run("only", inputs, {})["result"]
    finally:
        session.close()


def declines(engine: str) -> Mapping[str, str]:
    return getattr(importlib.import_module(NAMES[engine]), "DECLINES", {})


ENGINES = ("torch", *TARGET)


def test_every_engine_is_walked_and_every_op_has_a_case() -> None:
    # tensorrt needs a GPU; tests/test_tensorrt.py walks its graphs
    assert {*ENGINES, "numpy", "tensorrt"} == set(NAMES)
    assert {c.op for c in CASES} == set(OPS)
    for engine in ENGINES:
        assert set(declines(engine)) <= set(OPS), f"{engine} declines an op that does not exist"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("c", CASES, ids=str)
def test_op_agrees_with_the_reference(c: Case, engine: str, tmp_path: Path) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(f"{engine}: {why}")
    if c.op in declines(engine):
        with pytest.raises(VlacError, match=c.op):
            run_single_op(engine, c, tmp_path)
        return
    want, got = run_single_op(engine, c, tmp_path)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    want, got = np.delete(want, c.unread, axis=0), np.delete(got, c.unread, axis=0)
    if want.dtype == np.float32:
        assert np.abs(want - got).max() <= TOLERANCE[engine] * max(np.abs(want).max(), 1e-3)
    else:
        assert (want == got).all()


@pytest.mark.parametrize("c", CASES, ids=str)
def test_the_shape_rule_says_what_the_reference_gives(c: Case) -> None:
    program, inputs = program_of(c)
    assert parse(str(program)) == program
    want = NumpySession(program, lambda name: program.weights[name].load()).run("only", inputs, {})["result"]
    kind = {"f": "f32", "i": "i32", "b": "bool"}[want.dtype.kind]
    assert f"result = {c.op}" in str(program)
    assert f": {kind}[{','.join(map(str, want.shape))}]" in str(program)
