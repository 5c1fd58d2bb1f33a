"""merge-in-tower: matrices that average and put back, exact where rows are equal, and the same in every engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GoldenFolder
from hypothesis import given
from hypothesis import strategies as st
from test_pi0 import HEADS

import vlac
from vlac import calibrate
from vlac.api import apply_passes, lower_for
from vlac.checkpoint import read_policy
from vlac.engines.base import get_engine
from vlac.errors import Inapplicable
from vlac.parity import parity
from vlac.passes.merge_in_tower import layers_of, matching, matrix, runs_of
from vlac.policy import Policy
from vlac.registry import ReadOptions, targets
from vlac.work import macs

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tiny(golden: Callable[[str], GoldenFolder]) -> Policy:
    return read_policy(str(golden("smolvla_tiny").checkpoint))


@given(n=st.integers(4, 40), share=st.floats(0.05, 0.5), seed=st.integers(0, 999))
def test_merging_averages_and_loses_no_row(n: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    similar, checker, sizes = rng.standard_normal((n, n)), np.arange(n) % 2 == 1, rng.integers(1, 5, n)
    merged = min(int(share * n), int(checker.sum()))
    to = matching(similar, merged, checker)
    assert (to != np.arange(n)).sum() == merged and checker[to != np.arange(n)].all()
    m, total, new = matrix(to, sizes)
    assert m.shape == (n - merged, n) and total.sum() == sizes.sum() and (np.diff(total) >= 0).all()
    np.testing.assert_allclose(m.sum(axis=1), 1)
    np.testing.assert_allclose(m[:, :][new, np.arange(n)] * total[new], sizes)
    np.testing.assert_allclose(m @ np.eye(n - merged)[new], np.eye(n - merged), atol=1e-12)
    assert sum(count for count, _ in runs_of(total)) == n - merged


def test_equal_rows_merge_exactly(tiny: Policy) -> None:
    """One colour and no positions: every row is the same, so that no merge changes anything."""
    name = "vision.position_embedding"
    flat = tiny.replace(weights=tiny.weights.map(name, lambda w: np.repeat(w[:1], len(w), axis=0)))
    observations = [
        dataclasses.replace(o, images={k: np.full_like(v, 90) for k, v in o.images.items()})
        for o in calibrate.observations(tiny, 2)
    ]
    after = apply_passes(flat, ["merge-in-tower:merge=0.4,samples=1"])
    got, want = (calibrate.watch(p, observations, {}, lambda *_: None) for p in (after, flat))
    assert calibrate.drift(got, want) < 1e-5


def test_less_work_in_the_tower_and_no_change_of_shape(tiny: Policy) -> None:
    after = apply_passes(tiny, ["merge-in-tower:at=1,merge=0.5,samples=2"])
    work = []
    for p in (tiny, after):
        program, _, _ = lower_for(p, targets.get("gguf-q8"), {})
        stage = program.stage("vision")
        from vlac.graph import infer_stage

        types = infer_stage(stage, program.params)
        work.append(macs(stage.nodes, {**types, **{f"@{n}": _type(q.shape) for n, q in program.params.items()}}, {}))
        assert [n for n in program.params if "merge" in n and program.params[n].format != "f32"] == []
    assert work[1] < 0.85 * work[0]
    assert (
        after.history[0].figures["rows_after"] == "32" and after.spec.tokens_per_camera == tiny.spec.tokens_per_camera
    )


def _type(shape: tuple[int, ...]) -> object:
    from vlac.ops import Type

    return Type("f32", shape)


def test_alike_rows_are_found(tiny: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without positions and with pictures that are of one colour on the left, the rows there go first, at no cost."""
    name = "vision.position_embedding"
    flat = tiny.replace(weights=tiny.weights.map(name, lambda w: np.repeat(w[:1], len(w), axis=0)))
    observations = calibrate.observations(tiny, 2)
    for o in observations:
        for picture in o.images.values():
            picture[:, : picture.shape[1] // 2] = 60
    monkeypatch.setattr(calibrate, "observations", lambda *_: observations)
    want = calibrate.watch(flat, observations, {}, lambda *_: None)

    def drift() -> float:
        after = apply_passes(flat, ["merge-in-tower:merge=0.17"])
        return calibrate.drift(calibrate.watch(after, observations, {}, lambda *_: None), want)

    ours = drift()
    noise = np.random.default_rng(0).standard_normal((64, 64))
    monkeypatch.setattr("vlac.passes.merge_in_tower.alike", lambda *_: noise)
    assert ours < 0.1 * drift()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "ggml"])
def test_engines_agree(golden: Callable[[str], GoldenFolder], tmp_path: Path, engine: str) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(why)
    checkpoint, target = golden("smolvla_tiny").checkpoint, "gguf-f32" if engine == "ggml" else "onnx-fp32"
    recipe = ["merge-in-tower:samples=1", "reduce-visual-tokens"]
    vlac.compile(checkpoint, target=target, out=tmp_path / "o", passes=recipe, goldens=1)
    assert parity(tmp_path / "o", engine=engine)["compiler"]["chunk"]["relative_l2"] < 2e-5


def test_where_there_is_no_shuffle(golden: Callable[[str], GoldenFolder]) -> None:
    policy = read_policy(str(golden("pi0_tiny").checkpoint), ReadOptions(spec=HEADS))
    after = apply_passes(policy, ["merge-in-tower:samples=1"])
    assert calibrate.watch(after, calibrate.observations(policy, 1), {}, lambda *_: None)


def test_layers() -> None:
    assert layers_of("", 12) == (4, 8) and layers_of("", 2) == (1,) and layers_of("1+3", 4) == (1, 3)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ("merge=0", "above 0"),
        ("merge=0.6", "at most 0.5"),
        ("at=0", "layers of 1 to 1"),
        ("at=1+1", "layers of 1 to 1"),
        ("at=x", "as 4"),
        ("merge=0.001", "64 patches is none"),
    ],
)
def test_refusals(tiny: Policy, params: str, says: str) -> None:
    with pytest.raises(Inapplicable, match=says):
        apply_passes(tiny, [f"merge-in-tower:{params}"])
    with pytest.raises(Inapplicable, match="merged in the tower already"):
        apply_passes(tiny, ["merge-in-tower:samples=1", "merge-in-tower"])
