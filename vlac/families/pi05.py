"""pi0.5 (Physical Intelligence 2025, arXiv 2504.16054): pi0 whose expert is told the time by adaRMS norms.

The state is read from the prompt; there is no state token. Formulas are LeRobot 0.6's inference path in float32. The
modulations depend on nothing but the step: lowering turns them into tables with one row per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlac import blocks, blocks_gemma
from vlac.blocks import Shapes
from vlac.blocks_gemma import Carry, FlowExpertSpec, Past
from vlac.errors import CheckpointError
from vlac.graph import Program, Stage, StageBuilder
from vlac.policy import Policy, Source
from vlac.readers import lerobot_pi, paligemma
from vlac.registry import Family, families
from vlac.runtime.prompt import reads_state
from vlac.spec import FlowSpec, override

if TYPE_CHECKING:
    from vlac.readers.lerobot import LeRobotCheckpoint


@dataclass(frozen=True, kw_only=True)
class Pi05Spec(FlowExpertSpec):
    """Dimensions."""


def shapes(spec: Pi05Spec) -> Shapes:
    """Shape of every weight the program reads."""
    expert, width = spec.expert, spec.expert.hidden_size
    result = blocks_gemma.paligemma_shapes(spec)
    for i in range(expert.num_hidden_layers):
        result |= blocks_gemma.ada_layer_shapes(expert, f"expert.layers.{i}")
    result |= blocks_gemma.ada_norm_shapes(expert, "expert.norm")
    for name, (rows, columns) in {
        "action_in_proj": (width, spec.max_action_dim),
        "action_out_proj": (spec.max_action_dim, width),
        "time_mlp_in": (width, width),
        "time_mlp_out": (width, width),
    }.items():
        result[f"{name}.weight"], result[f"{name}.bias"] = (rows, columns), (rows,)
    return result


def build(policy: Policy) -> Program:
    """The program: `vision` per camera, `prefix` once, `flow` once per solver step.

    Symbols: T prompt tokens, C camera slots that take part. Result: x f32 [chunk_size, max_action_dim].
    """
    spec, flow = policy.spec, policy.flow
    assert isinstance(spec, Pi05Spec) and flow is not None
    return blocks.flow_program(policy, flow, blocks_gemma.flow_stages(spec), *_flow(spec, flow))


def _condition(b: StageBuilder, step: str, width: int, flow: FlowSpec) -> str:
    """What every adaRMS norm reads: the time of this step through an MLP. [1, width]"""
    t = b.op("embed", step, "@flow.times")
    time = b.op("time_embedding", t, dim=width, min_period=flow.min_period, max_period=flow.max_period)
    hidden = b.op("silu", blocks.linear(b, time, "time_mlp_in", bias=True))
    return b.op("silu", blocks.linear(b, hidden, "time_mlp_out", bias=True), name="condition")


def _flow(spec: Pi05Spec, flow: FlowSpec) -> tuple[Stage, Carry]:
    """One solver step. Actions see the prefix and one another."""
    b = StageBuilder("flow")
    expert, n = spec.expert, spec.chunk_size
    step = b.input("step", "i32", 1)
    x = b.input("x", "f32", n, spec.max_action_dim)
    past = Past.of(b, spec)
    condition = _condition(b, step, expert.hidden_size, flow)
    h = blocks.linear(b, x, "action_in_proj", bias=True, as_="action_tokens")
    positions, mask = past.joined(b, [(n, 1)])
    for i, layer in enumerate(past.layers):
        h = blocks_gemma.ada_layer(b, h, condition, expert, f"expert.layers.{i}", positions, mask, layer)
    h, _ = blocks_gemma.ada_rms_norm(b, h, condition, expert, "expert.norm")
    velocity = blocks.linear(b, h, "action_out_proj", bias=True, as_="velocity")
    carry = blocks.sampler_step(b, x, velocity, step, flow, (n, spec.max_action_dim))
    return b.build(), carry


# --- from a checkpoint -----------------------------------------------------------------------------------------

RENAMED = {"action_time_mlp_in.": "time_mlp_in.", "action_time_mlp_out.": "time_mlp_out."}
UNREAD = ("state_proj.*",)
"""Names that early files use, and what they hold besides."""


def spec_of(shared: paligemma.Common) -> Pi05Spec:
    """Dimensions from what the reader found, --spec applied."""
    source = shared.source
    text = paligemma.text_spec(source)
    spec = Pi05Spec(
        vision=paligemma.vision_spec(source, shared.image_size),
        text=text,
        expert=paligemma.expert_spec(source, text),
        chunk_size=shared.chunk_size,
        max_action_dim=shared.max_action_dim,
        tokenizer_max_length=shared.tokenizer_max_length,
    )
    return override(spec, source.left_over())


def from_lerobot(checkpoint: LeRobotCheckpoint) -> Policy:
    """The Policy of an opened LeRobot checkpoint of type "pi05"."""
    shared = lerobot_pi.common(checkpoint, RENAMED)
    source = shared.source
    if not reads_state(checkpoint.text_steps()):
        raise CheckpointError(
            f"{checkpoint.folder}: no pi05_prepare_state_tokenizer_processor_step, so the state would be lost",
            remedy="save the processors again with the policy",
        )
    spec = spec_of(shared)
    return Policy(
        family="pi05",
        name=checkpoint.name,
        spec=spec,
        weights=paligemma.take_weights(source, shapes(spec), UNREAD),
        io=lerobot_pi.io(checkpoint, shared, spec.text.vocab_size, padded_state=False),
        source=Source(str(checkpoint.folder)),
        tokenizer=checkpoint.tokenizer(),
        flow=lerobot_pi.flow_spec(checkpoint),
    )


FAMILY = families.add(
    Family(
        "pi05",
        build,
        from_lerobot,
        doc="pi0 with adaRMS norms and the state in the prompt",
        title="pi0.5",
        spec=Pi05Spec,
    )
)
