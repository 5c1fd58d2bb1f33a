"""Chunks of fewer actions in ggml: the first rows of more, to the bit, whatever kernel so many rows would meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import open_golden

import vlac
from vlac.artifact import StoredTensor
from vlac.dims import ROWS, symbol
from vlac.engines import ggml_lib
from vlac.engines.ggml_engine import GgmlSession
from vlac.formats import decode, encode
from vlac.goldens import synthetic
from vlac.graph import Call, Param, Program, Schedule, StageBuilder, Symbol
from vlac.ops import NpArray

pytestmark = [
    pytest.mark.skipif(bool(ggml_lib.missing()), reason=ggml_lib.missing() or "ggml is there"),
    pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning"),
]
RNG = np.random.default_rng(12)
FORMATS = ("f32", "f16", "bf16", "q8", "q6", "q5", "q4")
OLD, MOST, WIDTH = 21, 70, 256


@pytest.mark.parametrize("form", FORMATS)
def test_the_first_actions_are_those_of_the_whole_chunk(form: str, tmp_path: Path) -> None:
    golden = open_golden(Path(__file__).parent / "golden" / "smolvla_tiny")
    out = tmp_path / "out"
    path = vlac.compile(golden.checkpoint, f"gguf-{form}", out, goldens=1).path or out
    with vlac.load(path, engine="ggml", threads=1) as policy:
        for i, seen in enumerate(synthetic(policy.io, 5, seed=3)):
            given = {"images": seen.images, "state": seen.state, "noise": seen.noise, "task": seen.task + " again" * i}
            whole = policy.act(**given)
            for n in range(1, len(whole)):
                few = policy.act(**given, n_actions=n)
                assert policy.stats["rows_computed"] < n + len(whole) / 5
                assert np.array_equal(few, whole[:n]), (i, n)


def causal(form: str) -> tuple[Program, dict[str, StoredTensor]]:
    """N rows: a linear, then attention to OLD rows of a cache and to themselves, then the linear again."""
    b = StageBuilder("s")
    n = symbol(ROWS)
    x = b.input("x", "f32", n, WIDTH)
    y = b.linear(x, "@w")
    k, v = (b.concat(b.input(i, "f32", OLD, WIDTH // 2), b.slice(y, axis=1, start=s, stop=s + WIDTH // 2), axis=0)
            for i, s in (("k", 0), ("v", WIDTH // 2)))  # fmt: skip
    mask = b.input("mask", "bool", n, n + OLD)
    y = b.attention(y, k, v, mask, heads=4, kv_heads=2, scale=0.125)
    b.output(b.linear(y, "@w", name="y"))
    values = RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32) / 16
    data = np.ascontiguousarray(encode(form, values)).view(np.uint8).reshape(-1)
    shape = (WIDTH, WIDTH)
    program = Program(
        "toy", (Symbol(ROWS, (1, 3, 10, MOST)),), (b.build(),), {"w": Param(shape, form)}, Schedule((Call("s"),), "y")
    )
    return program, {"w": StoredTensor(shape, form, lambda: decode(form, data, shape), data)}


@pytest.mark.parametrize("form", ["f32", "bf16", "q8_0", "q5_k"])
def test_a_row_does_not_depend_on_how_many_follow(form: str) -> None:
    session = GgmlSession(*causal(form), threads=2)
    x, k, v = (RNG.standard_normal(s).astype(np.float32) for s in ((MOST, WIDTH), *2 * [(OLD, WIDTH // 2)]))
    mask = np.concatenate([np.ones((MOST, OLD), bool), np.tri(MOST, dtype=bool)], axis=1)

    def rows(n: int) -> NpArray:
        return session.run("s", {"x": x[:n], "k": k, "v": v, "mask": mask[:n, : n + OLD]}, {ROWS: n})["y"]

    whole = rows(MOST)
    for n in (10, 3, 1):
        assert np.array_equal(rows(n), whole[:n]), n
    session.close()
