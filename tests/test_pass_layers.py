"""truncate-layers: which weights stay, how the expert stays paired, what is exact, what healing gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checkpoint_files import GOLDEN
from conftest import GoldenFolder
from test_openvla import OFT_SPEC

from vlac import calibrate
from vlac.api import apply_passes, lower_for
from vlac.checkpoint import read_policy
from vlac.engines.base import NpArray
from vlac.errors import Inapplicable
from vlac.passes.truncate_layers import choose, parse_layers, ridge
from vlac.policy import Policy
from vlac.registry import ReadOptions, targets

pytest.importorskip("torch")


@pytest.fixture(scope="module", params=("smolvla_tiny", "smolvla_letterbox"))
def policy(request: pytest.FixtureRequest, golden: Callable[[str], GoldenFolder]) -> Policy:
    return read_policy(str(golden(request.param).checkpoint))


@pytest.fixture(scope="module")
def tiny(golden: Callable[[str], GoldenFolder]) -> Policy:
    return read_policy(str(golden("smolvla_tiny").checkpoint))


def chunks(policy: Policy, count: int = 3) -> tuple[NpArray, ...]:
    return calibrate.watch(policy, calibrate.observations(policy, count), {}, lambda *_: None)


def test_a_tap_on_the_last_layer_is_exact(policy: Policy) -> None:
    """Of the last VLM layer only keys and values are read, so that nothing but dead weights goes."""
    n = policy.spec.text.num_hidden_layers
    after = apply_passes(policy, [f"truncate-layers:keep={n - 1},mode=kv-tap"])
    assert calibrate.size(after) < calibrate.size(policy)
    for a, b in zip(chunks(after), chunks(policy), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dropping_layers_takes_their_expert_layers_along(tiny: Policy) -> None:
    after = apply_passes(tiny, ["truncate-layers:select=list,layers=0+2-3"])
    assert (after.spec.text.num_hidden_layers, after.spec.expert.num_hidden_layers) == (3, 3)
    assert tiny.spec.pairs == ((0, "self"), (1, "cross"), (2, "self"), (3, "cross"))
    assert after.spec.pairs == ((0, "self"), (1, "self"), (2, "cross"))  # kinds move with their layers
    for new, old in ((0, 0), (1, 2), (2, 3)):
        for part, name in (("text", "mlp.up_proj"), ("expert", "self_attn.k_proj")):
            weights = (p.weights[f"{part}.layers.{i}.{name}.weight"].load() for p, i in ((after, new), (tiny, old)))
            np.testing.assert_array_equal(*weights)
    (applied,) = after.history
    assert (applied.figures["kept"], applied.figures["layers_before"]) == ("0+2+3", 4)
    assert applied.figures["expert_layers_after"] == 3


def test_a_whole_expert_reads_the_taps(tiny: Policy) -> None:
    after = apply_passes(tiny, ["truncate-layers:keep=2,mode=kv-tap"])
    assert after.spec.kv_taps == (2, 3) and after.spec.pairs == tiny.spec.pairs
    gone = set(tiny.weights) - set(after.weights)
    assert {n.split(".")[2] for n in gone} == {"2", "3"} and not any(".k_proj" in n or ".v_proj" in n for n in gone)
    drift = calibrate.drift(chunks(after), chunks(tiny))
    whole = calibrate.drift(chunks(apply_passes(tiny, ["truncate-layers:keep=2"])), chunks(tiny))
    assert 0.01 < drift < 0.5 * whole  # measured 0.20 against 0.53


def test_healing_brings_taps_closer_on_observations_it_has_not_seen(tiny: Policy) -> None:
    after = apply_passes(tiny, ["truncate-layers:keep=2,mode=kv-tap,heal=ridge,samples=16"])
    figures = after.history[0].figures
    assert figures["held_out_observations"] == 4
    assert figures["held_out_kv_error_after"] < 0.7 * figures["held_out_kv_error_before"]
    plain = apply_passes(tiny, ["truncate-layers:keep=2,mode=kv-tap"])
    assert calibrate.drift(chunks(after), chunks(tiny)) < 0.8 * calibrate.drift(chunks(plain), chunks(tiny))


def test_ridge_is_the_minimum_of_what_it_says() -> None:
    rng = np.random.default_rng(0)
    x, y, start = rng.standard_normal((40, 6)), rng.standard_normal((40, 3)), rng.standard_normal((3, 6))
    w = ridge(x, y, start)
    damping = 1e-2 * np.trace(x.T @ x) / 6

    def cost(w: NpArray) -> float:
        return float(((x @ w.T - y) ** 2).sum() + damping * ((w - start) ** 2).sum())

    assert all(cost(w + 1e-3 * rng.standard_normal(w.shape)) > cost(w) for _ in range(20))


def test_measured_selection(tiny: Policy) -> None:
    cosine = np.array([[1, 0.9, 0.8, 0.5], [1, 1, 0.99, 0.6], [1, 1, 1, 0.7]])
    assert choose("influence", 2, cosine) == (0, 2)
    assert choose("angular", 1, cosine) == (2,)  # 0..1 turn 0.8, 1..2 turn 0.6
    after = apply_passes(tiny, ["truncate-layers:keep=3,select=influence,samples=2"])
    kept = parse_layers(after.history[0].figures["kept"])
    assert len(kept) == 3 and 3 in kept
    assert len(after.history[0].figures["influence"].split()) == 4


def test_truncated_policies_lower(tiny: Policy) -> None:
    for mode in ("drop", "kv-tap"):
        after = apply_passes(tiny, [f"truncate-layers:keep=2,mode={mode}"])
        program, _, _ = lower_for(after, targets.get("gguf-q8"), {})
        assert not any("text.layers.2.mlp" in name for name in program.params)


@pytest.mark.parametrize(
    ("name", "options", "recipe"),
    [
        ("smolvla_tiny", {}, "select=list,layers=0-1+3"),
        ("groot_n17_tiny", {}, "keep=3"),
        ("openvla_oft_tiny", {"unnorm_key": "bridge_orig", "spec": OFT_SPEC}, "keep=1"),
    ],
)
def test_a_gap_is_healed_in_the_layer_before(name: str, options: dict[str, Any], recipe: str) -> None:
    """The hidden state behind the gap comes closer on observations that were held out, and so does the chunk."""
    policy = read_policy(str(GOLDEN / name / "checkpoint"), ReadOptions(**options))
    given = calibrate.observations(policy, 2)
    want = calibrate.watch(policy, given, {}, lambda *_: None)
    drifts = []
    for heal in ("none", "ridge"):
        after = apply_passes(policy, [f"truncate-layers:{recipe},heal={heal}"])
        drifts.append(calibrate.drift(calibrate.watch(after, given, {}, lambda *_: None), want))
    figures = after.history[0].figures
    assert figures["held_out_hidden_error_after"] < 0.85 * figures["held_out_hidden_error_before"]
    assert drifts[1] < drifts[0]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ("keep=4", "keeping 4 of 4 layers: 1 to 3"),
        ("keep=0", "keeping 0 of 4"),
        ("select=list,layers=0-4", "of layers 0..3"),
        ("select=list,layers=2+1", "each layer once, in order"),
        ("select=list,layers=a", "is no list of layers"),
        ("select=list", "needs layers="),
        ("layers=0-1", "goes with select=list"),
        ("keep=2,select=best", "first, list, influence, angular"),
        ("keep=2,mode=skip", "drop, kv-tap"),
        ("keep=2,heal=ridge", "no kept layer stands before a gap"),
        ("keep=2,heal=lora", "none, ridge"),
        ("keep=2,mode=kv-tap,heal=ridge,samples=1", "at least 2"),
        ("keep=2,select=angular,samples=0", "at least 1 observation"),
    ],
)
def test_refusals(tiny: Policy, params: str, says: str) -> None:
    with pytest.raises(Inapplicable, match=says.replace("(", r"\(")):
        apply_passes(tiny, [f"truncate-layers:{params}"])
