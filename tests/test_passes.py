"""The built-in passes: what they change, what they report, what they refuse; and that a recipe reaches the artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GoldenFolder

import vlac
from vlac.api import apply_passes
from vlac.checkpoint import read_policy
from vlac.errors import Inapplicable, Unsupported, VlacError
from vlac.policy import Policy

Golden = Callable[[str], GoldenFolder]


@pytest.fixture(scope="module")
def policy(golden: Golden) -> Policy:
    return read_policy(str(golden("smolvla_tiny").checkpoint))


def test_flow_steps_changes_the_time_grid_only(policy: Policy) -> None:
    after = apply_passes(policy, ["flow-steps:steps=4"])
    assert after.flow is not None and policy.flow is not None
    assert after.flow.times == (1.0, 0.75, 0.5, 0.25)
    assert after.flow.dts == (-0.25,) * 4
    assert (after.flow.min_period, after.flow.max_period) == (policy.flow.min_period, policy.flow.max_period)
    (applied,) = after.history
    assert applied.name == "flow-steps" and applied.params["steps"] == 4
    assert (applied.figures["steps_before"], applied.figures["steps_after"]) == (10, 4)
    assert after.replace(flow=policy.flow, history=()) == policy


def test_quantize_weights_joins_the_plan_in_order(policy: Policy) -> None:
    after = apply_passes(policy, ["quantize-weights:format=q8_0", "quantize-weights:format=f16,match=vision.*"])
    assert after.precision == (("*", "q8_0"), ("vision.*", "f16"))
    assert [a.figures["bits_per_value"] for a in after.history] == [8.5, 16.0]


@pytest.mark.parametrize(
    ("recipe", "error", "says"),
    [
        ("flow-steps:steps=0", Inapplicable, "at least 1"),
        ("flow-steps", VlacError, "needs steps="),
        ("flow-steps:steps=few", VlacError, "is not int"),
        ("flow-steps:steps=4,order=2", VlacError, "no parameter 'order'"),
        ("quantize-weights:format=q3", Inapplicable, "q8_0"),
        ("quantize-weights:match=*", Inapplicable, "either bits="),
        ("quantize-weights:format=q8_0,match=", Inapplicable, "match= is empty"),
        ("make-better", Unsupported, "flow-steps"),
    ],
)
def test_refusals_name_what_there_is(policy: Policy, recipe: str, error: type[VlacError], says: str) -> None:
    with pytest.raises(error) as raised:
        apply_passes(policy, [recipe])
    assert says in str(raised.value)


def test_flow_steps_needs_a_flow(policy: Policy) -> None:
    with pytest.raises(Inapplicable, match="has no flow sampler"):
        apply_passes(policy.replace(flow=None), ["flow-steps:steps=4"])


def test_a_recipe_reaches_the_artifact(golden: Golden, tmp_path: Path) -> None:
    """Half the weights of the expert in f16, four Euler steps: the artifact's program, census and history say so, and
    its chunk differs from the original's by what four steps cost."""
    tiny = golden("smolvla_tiny")
    recipe = ["flow-steps:steps=4", "quantize-weights:format=f16,match=expert.*"]
    made = vlac.compile(tiny.checkpoint, target="gguf-f32", out=tmp_path / "out", passes=recipe)
    assert [h["name"] for h in made.manifest["history"]] == ["flow-steps", "quantize-weights"]
    rows = made.manifest["census"]["tensors"]
    formats = {
        role: {r["realised"] for n, r in rows.items() if n.startswith("expert.") and r["role"] == role}
        for role in ("linear", "other")
    }
    assert formats == {"linear": {"f16"}, "other": {"f32"}}
    assert {r["realised"] for n, r in rows.items() if n.startswith(("vision.", "text."))} == {"f32"}
    policy = vlac.load(tmp_path / "out", engine="torch")
    assert policy.artifact.program.schedule.steps[-1].times == 4
    chunk, full = policy.act(**tiny.observation(0)), tiny.chunk(0)
    assert 1e-3 < np.linalg.norm(chunk - full) / np.linalg.norm(full) < 0.5


def test_a_pattern_that_acts_on_nothing_is_refused(golden: Golden, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"nothing\.\*"):
        vlac.compile(
            golden("smolvla_tiny").checkpoint,
            target="gguf-f32",
            out=tmp_path / "out",
            passes=["quantize-weights:format=f16,match=nothing.*"],
        )
    assert not (tmp_path / "out").exists()
