"""bfloat16 weights of linears that read pictures: pairs of numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from checkpoint_files import GOLDEN
from conftest import GoldenFolder
from lower_toys import program_of, run

from vlac.api import lower_for
from vlac.checkpoint import read_policy
from vlac.graph import Param, Program, StageBuilder, check
from vlac.layouts import bf16_from_f32, f32_from_bf16
from vlac.ops import NpArray
from vlac.registry import ReadOptions, targets
from vlac.rewrites.pairs import halves, pair_weights


def nearest(w: NpArray) -> NpArray:
    return np.asarray(f32_from_bf16(bf16_from_f32(w)))


def test_a_pair_holds_sixteen_bits() -> None:
    w = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)
    high, low = np.split(halves(w), 2, axis=1)
    np.testing.assert_array_equal(high, nearest(w))
    assert np.abs(high + nearest(low) - w).max() <= 2.0**-17 * np.abs(w).max()
    assert (np.abs(high + nearest(low) - w) <= 2.0**-17 * np.abs(w)).all()


def patches(linears: int = 1, joined: bool = False) -> Program:
    """Linears of patches of a picture, or of four tokens side by side."""
    b = StageBuilder("one")
    x = b.input("pixels", "f32", *((8, 12) if joined else (3, 8, 8)))
    read = b.op("reshape", x, shape=(2, 48)) if joined else b.op("patchify", x, block=1, patch=4)
    b.output(b.op("concat", *(b.linear(read, "@w.weight", "@w.bias") for _ in range(linears)), axis=1, name="out"))
    program = program_of(b, shapes={"w.weight": (7, 48), "w.bias": (7,)})
    return program.replace(params={**program.params, "w.weight": Param((7, 48), "bf16")})


@pytest.mark.parametrize("linears", [1, 2])
@pytest.mark.parametrize("joined", [False, True])
def test_the_product_is_that_of_the_weights_themselves(linears: int, joined: bool) -> None:
    program = patches(linears, joined)
    done = check(pair_weights(program))
    assert {n: (p.shape, p.format) for n, p in done.params.items()} == {
        "w.pair.weight": ((7, 96), "bf16"),
        "w.bias": ((7,), "f32"),
    }
    seen = {"pixels": np.random.default_rng(1).normal(size=(8, 12) if joined else (3, 8, 8)).astype(np.float32)}
    np.testing.assert_allclose(run(done, seen), run(program, seen), atol=2e-6)


@pytest.mark.parametrize("where", ["push-cubes", "smolvla_tiny", "pi0_tiny"])
def test_only_linears_that_read_patches_or_joined_tokens_change(where: str) -> None:
    found = where if "_" not in where else str(GOLDEN / where / "checkpoint")
    spec = {"vision.num_attention_heads": 3} if where == "pi0_tiny" else {}
    policy, target = read_policy(found, ReadOptions(spec=spec)), targets.get("openvino-bf16")
    paired, _, _ = lower_for(policy, target, {})
    with pytest.MonkeyPatch.context() as m:
        m.setattr("vlac.targets.openvino.pair_weights", lambda program: program)
        plain, _, _ = lower_for(policy, target, {})
    gone = plain.params.keys() - paired.params.keys()
    made = {n.name: n.op for s in plain.stages for n in s.nodes}
    readers = [n for s in plain.stages for n in s.nodes if any("@" + name in n.inputs for name in gone)]
    assert len(readers) == len(gone) > 0
    sources = {made[n.inputs[0]] for n in readers}
    assert "patchify" in sources and sources <= {"patchify", "reshape", "pixel_shuffle"}


def test_other_formats_are_left_alone(golden: Callable[[str], GoldenFolder]) -> None:
    policy = read_policy(str(golden("smolvla_tiny").checkpoint))
    program, _, _ = lower_for(policy, targets.get("openvino-int8"), {})
    assert pair_weights(program) == program
