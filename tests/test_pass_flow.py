"""flow-steps: solvers as recurrences, their orders on a known flow, and a fit that beats Euler on unseen data."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import GoldenFolder
from hypothesis import given
from hypothesis import strategies as st

import vlac
from vlac import calibrate
from vlac.api import apply_passes, draw
from vlac.checkpoint import read_policy
from vlac.engines.base import get_engine
from vlac.errors import Inapplicable
from vlac.graph import Repeat
from vlac.passes import _flow_fit
from vlac.passes._flow_fit import power_grid
from vlac.passes.flow_steps import grid_times, sampler
from vlac.policy import Policy
from vlac.spec import FlowSpec

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def tiny(golden: Callable[[str], GoldenFolder]) -> Policy:
    return read_policy(str(golden("smolvla_tiny").checkpoint))


def follow(flow: FlowSpec, x: float) -> float:
    """x' = x + sin(5 t) followed from t = 1 to 0 by a FlowSpec, in float64."""
    memory = x
    for i, t in enumerate(flow.times):
        v = x + math.sin(5 * t)
        if flow.solver == "euler":
            x += flow.dts[i] * v
        else:
            xx, xm, xv, mx, mm, mv = flow.recurrence[i]
            x, memory = xx * x + xm * memory + xv * v, mx * x + mm * memory + mv * v
    return x


def exact(x: float) -> float:
    """The solution at t = 0: x = C e^t - (sin 5t + 5 cos 5t) / 26."""
    c = (x + (math.sin(5) + 5 * math.cos(5)) / 26) / math.e
    return c - 5 / 26


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2), ("midpoint", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    errors = []
    for n in (40, 80, 160):
        flow = sampler(FlowSpec.euler(10), grid_times("uniform", n), solver)
        errors.append(abs(follow(flow, 0.3) - exact(0.3)))
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(rate - order) < 0.15 for rate in rates), rates


@pytest.mark.parametrize("solver", ["ab2", "midpoint"])
def test_solvers_follow_uneven_grids(solver: str) -> None:
    for n in (80, 160):
        flow = sampler(FlowSpec.euler(10), grid_times("cosine", n), solver)
        assert abs(follow(flow, 0.3) - exact(0.3)) < 40 / n**2


def test_a_fit_with_as_many_evaluations_is_the_shipped_sampler(tiny: Policy) -> None:
    """On its own grid nothing is left to fit: x + h v at every step, to the little that shrinking moves it."""
    after = apply_passes(tiny, ["flow-steps:steps=10,solver=fitted,grid=uniform,samples=2"])
    assert after.flow is not None and after.history[0].figures["held_out_drift_fitted"] < 1e-3
    for k, (xx, xm, xv, *_) in enumerate(after.flow.recurrence):
        # the memory is all but the velocity itself: only their sum is determined
        assert abs(xx - 1) < 1e-3 and abs(xm + xv - after.flow.dts[k]) < 1e-3


@given(steps=st.integers(1, 20), power=st.floats(0.3, 4))
def test_grids_that_a_fit_starts_from_fall(steps: int, power: float) -> None:
    grid = power_grid(steps, power)
    assert len(grid) == steps and grid[0] == 1.0
    assert all(a > b > 0 for a, b in itertools.pairwise(grid))


def test_a_fit_is_kept_in_the_artifact(golden: Callable[[str], GoldenFolder], tmp_path: Path) -> None:
    checkpoint, recipe = golden("smolvla_tiny").checkpoint, ["flow-steps:steps=3,solver=fitted,samples=4"]
    made = vlac.compile(checkpoint, target="gguf-f32", out=tmp_path / "o", passes=recipe, goldens=1)
    figures = made.manifest["history"][0]["figures"]
    assert len(figures["grid"].split("+")) == 3 and figures["held_out_drift_fitted"] < figures["held_out_drift_euler"]
    artifact = vlac.load(tmp_path / "o", engine="torch").artifact
    assert any(n.startswith("flow.") and artifact.tensors[n].shape[0] == 3 for n in artifact.tensors)


def test_the_drawn_recurrence_is_the_spec(tiny: Policy) -> None:
    """One solver step of the program with a velocity that is known: the network's own, read from the stage."""
    for recipe in ("steps=4,solver=ab2", "steps=4,solver=midpoint", "steps=3,solver=fitted,samples=4"):
        policy = apply_passes(tiny, [f"flow-steps:{recipe}"])
        assert policy.flow is not None
        seen: list[dict[str, np.ndarray]] = []  # type: ignore[type-arg]
        watched = {"flow": ["x", "memory", "velocity", "x_next"]}
        (chunk,) = calibrate.watch(
            policy, calibrate.observations(policy, 1), watched, lambda _, __, v, s=seen: s.append(dict(v))
        )
        assert len(seen) == len(policy.flow.times)
        for values, (xx, xm, xv, *_) in zip(seen, policy.flow.recurrence, strict=True):
            want = xx * values["x"] + xm * values["memory"] + xv * values["velocity"]
            np.testing.assert_allclose(values["x_next"], want, atol=1e-5)
        np.testing.assert_array_equal(chunk, seen[-1]["x_next"])


def test_the_first_question_may_be_asked_ahead(tiny: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is shown at a time below 1: steps still lead from 1 to 0, and the program does what was fitted."""
    monkeypatch.setattr(_flow_fit, "search_grid", lambda *_: (0.95, 0.5, 0.2))
    after = apply_passes(tiny, ["flow-steps:steps=3,solver=fitted,samples=4"])
    flow, figures = after.flow, after.history[0].figures
    assert flow is not None and flow.times[0] in (0.95, 0.9) and flow.dts == pytest.approx((-0.5, -0.3, -0.2))
    assert figures["asked_first_at"] == flow.times[0] and figures["grid"] == "1+0.5+0.2"
    given = calibrate.observations(after, 2)
    field = _flow_fit.Field(tiny, given)
    want = [_flow_fit.follow(field, flow, i, np.asarray(o.noise, float))[-1] for i, o in enumerate(given)]
    field.close()
    assert calibrate.drift(calibrate.watch(after, given, {}, lambda *_: None), want) < 1e-5


def test_the_fit_is_better_than_euler_on_held_out_observations(tiny: Policy) -> None:
    figures = apply_passes(tiny, ["flow-steps:steps=2,solver=fitted,samples=12"]).history[0].figures
    assert figures["held_out_drift_fitted"] < 0.9 * figures["held_out_drift_euler"]
    assert figures["held_out_drift_fitted"] < 0.9 * figures["held_out_drift_ab2"]


@pytest.mark.parametrize("engine", ["torch", "onnxruntime", "openvino", "ggml"])
def test_two_carried_values_reach_every_engine(
    golden: Callable[[str], GoldenFolder], tmp_path: Path, engine: str, tiny: Policy
) -> None:
    if why := get_engine(engine).missing():
        pytest.skip(why)
    folder, recipe = golden("smolvla_tiny"), ["flow-steps:steps=4,solver=midpoint"]
    target = "gguf-f32" if engine in ("ggml", "torch") else "onnx-fp32"
    vlac.compile(folder.checkpoint, target=target, out=tmp_path / "out", passes=recipe, goldens=1)
    session = vlac.load(tmp_path / "out", engine=engine)
    policy = apply_passes(tiny, recipe)
    (step,) = [s for s in draw(policy).schedule.steps if isinstance(s, Repeat)]
    assert len(step.carry) == 2 and step.times == 4
    obs = calibrate.observations(policy, 1)
    (want,) = calibrate.watch(policy, obs, {}, lambda *_: None)
    got = session.act(images=dict(obs[0].images), state=obs[0].state, task=obs[0].task, noise=obs[0].noise)
    from vlac.runtime.actions import apply_action_steps

    expected = apply_action_steps(policy.io.action_steps, want)
    assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()


def test_grids() -> None:
    assert grid_times("uniform", 4) == (1.0, 0.75, 0.5, 0.25)
    assert grid_times("1+0.6+0.3", 3) == (1.0, 0.6, 0.3)
    assert grid_times("cosine", 2) == pytest.approx((1.0, math.sqrt(0.5)))


def test_a_family_that_draws_euler_only_refuses_others(tiny: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlac import registry

    family = registry.families.get("smolvla")

    def build(policy: Policy) -> object:
        assert policy.flow is not None
        return family.build(policy.replace(flow=dataclasses.replace(policy.flow, solver="euler")))

    monkeypatch.setitem(registry.families._entries, "smolvla", dataclasses.replace(family, build=build))
    with pytest.raises(Inapplicable, match="draws Euler steps only"):
        apply_passes(tiny, ["flow-steps:steps=4,solver=ab2"])


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ("steps=4,solver=heun", "badly conditioned"),
        ("steps=4,solver=dopri", "euler, midpoint, ab2, fitted"),
        ("steps=3,solver=midpoint", "even number"),
        ("steps=3,grid=1+0.5", "3 falling times"),
        ("steps=2,grid=0.5+1", "2 falling times"),
        ("steps=2,grid=1+0", "2 falling times"),
        ("steps=4,solver=fitted,samples=1", "at least 2"),
        ("steps=30,solver=fitted", "1 to 20"),
        ("steps=2,solver=fitted,grid=1+0.333", "multiples of 1/40"),
    ],
)
def test_refusals(tiny: Policy, params: str, says: str) -> None:
    with pytest.raises(Inapplicable, match=says):
        apply_passes(tiny, [f"flow-steps:{params}"])
