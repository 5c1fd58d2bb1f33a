"""flow-steps: how many Euler steps the flow sampler takes.

The velocity network is unchanged and is called at other times: fewer steps are proportionally faster in the flow
stage and follow the learned flow more coarsely. What that costs is a question for `vlac parity --reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlac.errors import Inapplicable
from vlac.policy import Policy
from vlac.registry import Pass, passes
from vlac.spec import FlowSpec


def _requires(policy: Policy, steps: int) -> None:
    if policy.flow is None:
        raise Inapplicable(f"{policy.family} has no flow sampler", remedy="leave flow-steps out")
    if steps < 1:
        raise Inapplicable(f"steps={steps}: at least 1 is needed (the checkpoint takes {len(policy.flow.times)})")


def _apply(policy: Policy, steps: int) -> tuple[Policy, Mapping[str, Any]]:
    assert policy.flow is not None
    old = policy.flow
    flow = FlowSpec.euler(steps, old.min_period, old.max_period)
    return policy.replace(flow=flow), {"steps_before": len(old.times), "steps_after": steps}


def _ensures(before: Policy, after: Policy, steps: int) -> None:
    assert after.flow is not None
    if len(after.flow.times) != steps or abs(1.0 + sum(after.flow.dts)) > 1e-9:
        raise Inapplicable(f"flow-steps: {steps} steps do not lead from t=1 to t=0")


FLOW_STEPS = passes.add(
    Pass(
        name="flow-steps",
        apply=_apply,
        params={"steps": (int, None, "number of Euler steps, 1 or more")},
        requires=_requires,
        ensures=_ensures,
        doc="Another number of Euler steps in the flow sampler.",
    )
)
