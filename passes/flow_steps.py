"""flow-steps: how often the flow sampler asks the network, at which times, and what it makes of the answers.

The velocity network is unchanged and is called at other times: fewer evaluations are proportionally faster in the flow
stage and follow the learned flow more coarsely. Solvers: "euler"; "midpoint" (two evaluations a step); "ab2", the
two-step Adams-Bashforth rule with a first Euler step, x += h ((1 + r/2) v_k - r/2 v_(k-1)), r the ratio of steps;
"fitted": a grid and three numbers for every step that follow the shipped sampler most closely on observations
(passes/_flow_fit.py), in the spirit of bespoke solvers (Shaul et al. 2023, arXiv 2310.19075). The measure of all is the
shipped sampler's chunk, not the exact solution of the flow.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from vlac import calibrate
from vlac.errors import Inapplicable
from vlac.passes._flow_fit import FINE, Row, ab2, fit
from vlac.policy import Policy
from vlac.registry import Pass, passes
from vlac.spec import FlowSpec

SOLVERS = ("euler", "midpoint", "ab2", "fitted")
GRIDS = ("uniform", "cosine")
AUTO = "auto"
REFUSED = {
    "heun": "its last evaluation is at t = 0, where the velocity is badly conditioned",
    "rk4": "its last evaluation is at t = 0, where the velocity is badly conditioned",
    "distilled": "it needs training",
}


def grid_times(grid: str, steps: int) -> tuple[float, ...]:
    """Times 1 = t_0 > t_1 > ... > 0 at which steps begin: "uniform", "cosine" (1 - cos: fine near the noise), or the
    times themselves, "1+0.7+0.3"."""
    if grid == "uniform":
        return tuple(1.0 - i / steps for i in range(steps))
    if grid == "cosine":
        return tuple(math.cos(math.pi / 2 * i / steps) for i in range(steps))
    try:
        times = tuple(float(t) for t in grid.split("+"))
    except ValueError:
        times = ()
    falling = all(a > b > 0 for a, b in itertools.pairwise(times))
    if len(times) != steps or times[0] != 1.0 or not falling:
        raise Inapplicable(
            f"grid={grid!r} is neither {' nor '.join(GRIDS)} nor {steps} falling times from 1 to above 0",
            remedy="write grid=1+0.7+0.3",
        )
    return times


def _enough(policy: Policy) -> int:
    """Observations to fit on in about two minutes."""
    return 64 if calibrate.size(policy) <= 20_000_000 else 16


def _step_count(solver: str, steps: int) -> int:
    return steps // 2 if solver == "midpoint" else steps


def _requires(policy: Policy, steps: int, solver: str, grid: str, samples: int, observations: str) -> None:
    if policy.flow is None:
        raise Inapplicable(f"{policy.family} has no flow sampler", remedy="leave flow-steps out")
    if solver in REFUSED:
        raise Inapplicable(f"solver={solver} is not offered: {REFUSED[solver]}", remedy=", ".join(SOLVERS))
    if solver not in SOLVERS:
        raise Inapplicable(f"solver={solver!r}; there are: {', '.join(SOLVERS)}")
    if not 1 <= steps <= 1000:
        raise Inapplicable(f"steps={steps}: 1 to 1000, at least 1 is needed (now {len(policy.flow.times)})")
    if solver == "midpoint" and steps % 2:
        raise Inapplicable(f"steps={steps}: midpoint takes two evaluations a step, so an even number")
    if solver == "fitted" and policy.flow.solver == "fitted":
        raise Inapplicable("the sampler is already a fit; fit to the shipped one", remedy="apply flow-steps once")
    if solver == "fitted" and samples < 2 and samples:
        raise Inapplicable(f"samples={samples}: a fit is judged on observations held out, at least 2 are needed")
    if solver == "fitted" and steps > FINE // 2:
        raise Inapplicable(f"steps={steps}: a fit takes 1 to {FINE // 2}", remedy="solver=ab2")
    if grid != AUTO:
        grid_times(grid, _step_count(solver, steps))
    if (
        grid != AUTO
        and solver == "fitted"
        and any(abs(FINE * t - round(FINE * t)) > 1e-9 for t in grid_times(grid, steps))
    ):
        raise Inapplicable(f"grid={grid}: a fit takes multiples of 1/{FINE}", remedy="leave grid out: it is searched")


# --- solvers as recurrences (vlac.spec.FlowSpec) -----------------------------------------------------------------


def sampler(old: FlowSpec, times: tuple[float, ...], solver: str) -> FlowSpec:
    """The solver on steps that begin at `times`, the last one ending at 0; "fitted" comes from `fit`."""
    dts = tuple(b - a for a, b in zip(times, (*times[1:], 0.0), strict=True))
    euler = dataclasses.replace(old, times=times, dts=dts, solver="euler", recurrence=())
    if solver == "ab2":
        return dataclasses.replace(euler, solver="ab2", recurrence=tuple(ab2(times)))
    if solver == "midpoint":
        rows: list[Row] = []
        all_times: list[float] = []
        for t, h in zip(times, dts, strict=True):  # the memory is where the step began
            all_times += [t, t + h / 2]
            rows += [(0.0, 1.0, h / 2, 0.0, 1.0, 0.0), (0.0, 1.0, h, 0.0, 1.0, h)]
        halves = tuple(h / 2 for h in dts for _ in range(2))
        return dataclasses.replace(euler, times=tuple(all_times), dts=halves, solver="midpoint", recurrence=tuple(rows))
    return euler


# --- the pass --------------------------------------------------------------------------------------------------


def _apply(
    policy: Policy, steps: int, solver: str, grid: str, samples: int, observations: str
) -> tuple[Policy, Mapping[str, Any]]:
    assert policy.flow is not None
    figures: dict[str, Any] = {"steps_before": len(policy.flow.times), "steps_after": steps}
    if solver == "fitted":
        times = None if grid == AUTO else tuple(round(t, 12) for t in grid_times(grid, steps))
        given = calibrate.observations(policy, samples or _enough(policy), observations)
        flow, fitted = fit(policy, steps, times, given)
        return policy.replace(flow=flow), {**figures, **fitted}
    if grid in (AUTO, "uniform") and solver == "euler":
        flow = FlowSpec.euler(steps, policy.flow.min_period, policy.flow.max_period)
    else:
        chosen = grid_times("uniform" if grid == AUTO else grid, _step_count(solver, steps))
        flow = sampler(policy.flow, chosen, solver)
    return policy.replace(flow=flow), figures


def _ensures(before: Policy, after: Policy, steps: int, solver: str, **_: Any) -> None:
    """So many evaluations, from t=1 to t=0; and the family draws the solver, not Euler's in its place."""
    assert after.flow is not None
    if len(after.flow.times) != steps or abs(1.0 + sum(after.flow.dts)) > 1e-9:
        raise Inapplicable(f"flow-steps: {steps} steps do not lead from t=1 to t=0")
    if solver != "euler" and "flow.recurrence" not in calibrate.draw(after).params:
        raise Inapplicable(f"{after.family} draws Euler steps only", remedy="solver=euler")


FLOW_STEPS = passes.add(
    Pass(
        name="flow-steps",
        apply=_apply,
        params={
            "steps": (int, None, "evaluations of the network, 1 or more"),
            "solver": (str, "euler", ", ".join(SOLVERS)),
            "grid": (
                str,
                AUTO,
                "times at which steps begin: uniform, cosine, 1+0.7+0.3; auto: uniform, or what a fit finds",
            ),
            "samples": (int, 0, "with solver=fitted: observations to fit on; 0: 64, of a large policy 16"),
            "observations": (str, "", "an .npz file of them; seeded ones without it"),
        },
        requires=_requires,
        ensures=_ensures,
        doc="Fewer or other evaluations in the flow sampler.",
    )
)
