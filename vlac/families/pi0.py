"""pi0 (Black et al. 2024, arXiv 2410.24164): PaliGemma and a flow-matching expert that attends to it in every layer.

Spec, shapes and drawing; formulas are LeRobot 0.6's inference path in float32. How a checkpoint becomes the spec is in
vlac/readers/paligemma.py and lerobot_pi.py, which pi0.5 and pi0-FAST share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlac import blocks, blocks_gemma
from vlac.blocks import Shapes
from vlac.blocks_gemma import Carry, FlowExpertSpec, Past
from vlac.graph import Program, Stage, StageBuilder
from vlac.policy import Policy, Source
from vlac.readers import lerobot_pi, paligemma
from vlac.registry import Family, families
from vlac.spec import FlowSpec, override

if TYPE_CHECKING:
    from vlac.readers.lerobot import LeRobotCheckpoint


@dataclass(frozen=True, kw_only=True)
class Pi0Spec(FlowExpertSpec):
    """Dimensions; the state has max_state_dim numbers, zeros behind the robot's own."""

    max_state_dim: int


def shapes(spec: Pi0Spec) -> Shapes:
    """Shape of every weight the program reads."""
    result = blocks_gemma.paligemma_shapes(spec)
    width = spec.expert.hidden_size
    for i in range(spec.expert.num_hidden_layers):
        result |= blocks.decoder_layer_shapes(spec.expert, f"expert.layers.{i}")
    result["expert.norm.weight"] = (width,)
    result["state_proj.weight"], result["state_proj.bias"] = (width, spec.max_state_dim), (width,)
    return result | blocks.action_shapes(spec.max_action_dim, width)


def build(policy: Policy) -> Program:
    """The program: `vision` per camera, `prefix` once, `flow` once per solver step.

    Symbols: T prompt tokens, C camera slots that take part. Result: x f32 [chunk_size, max_action_dim].
    """
    spec, flow = policy.spec, policy.flow
    assert isinstance(spec, Pi0Spec) and flow is not None
    return blocks.flow_program(policy, flow, blocks_gemma.flow_stages(spec), *_flow(spec, flow))


def _flow(spec: Pi0Spec, flow: FlowSpec) -> tuple[Stage, Carry]:
    """One solver step. The state token sees the prefix and itself; actions see everything, and one another."""
    b = StageBuilder("flow")
    expert, n = spec.expert, spec.chunk_size
    step = b.input("step", "i32", 1)
    x = b.input("x", "f32", n, spec.max_action_dim)
    state = blocks.linear(b, b.input("state", "f32", 1, spec.max_state_dim), "state_proj", bias=True)
    past = Past.of(b, spec)
    t = b.op("embed", step, "@flow.times")
    actions = blocks.action_time_tokens(b, x, t, n, expert.hidden_size, (flow.min_period, flow.max_period))
    h = b.op("concat", state, actions, axis=0)
    positions, mask = past.joined(b, [(1, 1), (n, 2)])
    for i, layer in enumerate(past.layers):
        h, _, _ = blocks.decoder_layer(b, h, expert, f"expert.layers.{i}", positions, mask, layer)
    h = blocks.rms_norm(b, b.op("slice", h, axis=0, start=1, stop=n + 1), expert, "expert.norm")
    velocity = blocks.linear(b, h, "action_out_proj", bias=True, as_="velocity")
    carry = blocks.sampler_step(b, x, velocity, step, flow, (n, spec.max_action_dim))
    return b.build(), carry


# --- from a checkpoint -----------------------------------------------------------------------------------------

RENAMED = {"time_mlp_in.": "action_time_mlp_in.", "time_mlp_out.": "action_time_mlp_out."}
"""Names that early files use."""


def spec_of(shared: paligemma.Common) -> Pi0Spec:
    """Dimensions from what the reader found, --spec applied."""
    source = shared.source
    text = paligemma.text_spec(source)
    spec = Pi0Spec(
        vision=paligemma.vision_spec(source, shared.image_size),
        text=text,
        expert=paligemma.expert_spec(source, text),
        chunk_size=shared.chunk_size,
        max_action_dim=shared.max_action_dim,
        max_state_dim=shared.max_state_dim,
        tokenizer_max_length=shared.tokenizer_max_length,
    )
    return override(spec, source.left_over())


def from_lerobot(checkpoint: LeRobotCheckpoint) -> Policy:
    """The Policy of an opened LeRobot checkpoint of type "pi0"."""
    shared = lerobot_pi.common(checkpoint, RENAMED)
    source = shared.source
    spec = spec_of(shared)
    return Policy(
        family="pi0",
        name=checkpoint.name,
        spec=spec,
        weights=paligemma.take_weights(source, shapes(spec)),
        io=lerobot_pi.io(checkpoint, shared, spec.text.vocab_size, padded_state=True),
        source=Source(str(checkpoint.folder)),
        tokenizer=checkpoint.tokenizer(),
        flow=lerobot_pi.flow_spec(checkpoint),
    )


FAMILY = families.add(
    Family("pi0", build, from_lerobot, doc="PaliGemma with a flow-matching action expert", title="pi0", spec=Pi0Spec)
)
