"""pi0-FAST (Pertsch et al. 2025, arXiv 2501.09747): PaliGemma that writes its actions as FAST tokens, one at a time.

Images, prompt (with the state in it) and a second <bos> see one another; then tokens are decoded greedily until "|".
Formulas are LeRobot 0.6's inference path in float32, with its key/value cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlac import blocks, blocks_decode, blocks_gemma
from vlac.blocks import Shapes
from vlac.blocks_gemma import PaliGemmaSpec
from vlac.errors import CheckpointError
from vlac.graph import Call, Program, Stage, StageBuilder
from vlac.io import Step
from vlac.policy import Policy, Source
from vlac.readers import lerobot_pi, paligemma
from vlac.readers.fast_tokenizer import read_fast_tokenizer
from vlac.readers.tokenizer_file import token_id
from vlac.registry import Family, families
from vlac.runtime.prompt import reads_state
from vlac.runtime.tokenizer import load_tokenizer
from vlac.spec import override

if TYPE_CHECKING:
    from vlac.readers.lerobot import LeRobotCheckpoint


@dataclass(frozen=True, kw_only=True)
class Pi0FastSpec(PaliGemmaSpec):
    """Dimensions. stop_token_id -1: all max_decoding_steps tokens are decoded."""

    max_decoding_steps: int
    bos_token_id: int
    stop_token_id: int = -1


def shapes(spec: Pi0FastSpec) -> Shapes:
    """Shape of every weight the program reads."""
    result = blocks_gemma.paligemma_shapes(spec)
    result["text.norm.weight"] = (spec.text.hidden_size,)
    result["text.lm_head.weight"] = (spec.text.vocab_size, spec.text.hidden_size)
    return result


def build(policy: Policy) -> Program:
    """The program: `vision` per camera, `prefix` once, `decode` once per token.

    Symbols: T prompt tokens, C camera slots that take part. Result: action_tokens i32 [max_decoding_steps], zeros
    behind the stop token.
    """
    spec = policy.spec
    assert isinstance(spec, Pi0FastSpec)
    stop = (spec.stop_token_id,) if spec.stop_token_id >= 0 else ()
    loop = blocks_decode.decoding_loop(spec.max_decoding_steps, spec.text.num_hidden_layers, stop)
    stages = (blocks_gemma.vision_stage(spec), _prefix(spec), _decode(spec))
    steps = (Call("vision", each="camera"), Call("prefix"), loop)
    return blocks.program_of(policy, stages, steps, "action_tokens")


def _prefix(spec: Pi0FastSpec) -> Stage:
    """Images, prompt and <bos>, all seeing all: each layer's keys and values, and what decoding starts from.

    The first turn reads <bos> again, so its row counts here for the others but no longer for the turns.
    """
    b = StageBuilder("prefix")
    text, rows = spec.text, spec.prefix_rows + 1
    bos = b.op("full", shape=(1,), value=float(spec.bos_token_id), dtype="i32", name="start_token")
    given = b.op("full", shape=(1,), value=1.0, dtype="bool")
    x, valid = blocks_gemma.image_and_prompt(b, spec, ((blocks_gemma.scaled_embedding(b, bos, text), given),))
    positions, filled = blocks_gemma.places(b, valid, rows, spec)
    blocks_gemma.prefix_layers(b, x, valid, rows, spec, positions)
    before = b.op("slice", valid, axis=0, start=0, stop=rows - 1)
    gone = b.op("full", shape=(1,), value=0.0, dtype="bool")
    start = b.op("sub", filled, b.op("full", shape=(1,), value=1.0, dtype="i32"), name="start")
    b.output(bos, start, b.op("concat", before, gone, axis=0, name="prompt_valid"))
    b.output(blocks_decode.empty_cache(b, spec.max_decoding_steps, text))
    return b.build()


def _decode(spec: Pi0FastSpec) -> Stage:
    """One token -> the next."""
    b = StageBuilder("decode")
    text = spec.text
    turn = b.input("turn", "i32", 1)
    x = blocks_gemma.scaled_embedding(b, b.input("token", "i32", 1), text)
    rows = spec.prefix_rows + 1
    counts = spec.key_counts(rows)
    x = blocks_decode.decoder_turn(b, x, turn, spec.max_decoding_steps, rows, text, "text", counts)
    logits = blocks.linear(b, blocks.rms_norm(b, x, text, "text.norm"), "text.lm_head", as_="logits")
    b.output(b.op("argmax", logits, name="next_token"), logits)
    return b.build()


# --- from LeRobot ----------------------------------------------------------------------------------------------


def from_lerobot(checkpoint: LeRobotCheckpoint) -> Policy:
    """The Policy of an opened LeRobot checkpoint of type "pi0_fast"."""
    config = checkpoint.config
    config.refuse("temperature", 0, 0.0, why="only greedy decoding is implemented")
    for key in ("max_action_tokens", "text_tokenizer_name"):
        config.raw(key)  # training; the processors name the tokenizer
    if not reads_state(checkpoint.text_steps()):
        raise CheckpointError(
            f"{checkpoint.folder}: no pi0_fast_prepare_state_tokenizer_processor_step, so the state would be lost",
            remedy="save the processors again with the policy",
        )
    shared = lerobot_pi.common(checkpoint)
    source, tokenizer = shared.source, checkpoint.tokenizer()
    stops = config.take("use_kv_cache", True)  # LeRobot decodes to the end without it
    ids = [token_id(tokenizer, t, str(checkpoint.folder)) for t in ("<bos>", "|")] if tokenizer else [0, -1]
    spec = Pi0FastSpec(
        vision=paligemma.vision_spec(source, shared.image_size),
        text=paligemma.text_spec(source),
        max_decoding_steps=config.size("max_decoding_steps", 256),
        tokenizer_max_length=shared.tokenizer_max_length,
        bos_token_id=ids[0],
        stop_token_id=ids[1] if stops else -1,
    )
    spec = override(spec, source.left_over())
    decode = _fast_decode(checkpoint, tokenizer, shared.n_action_steps) if tokenizer else ()
    return Policy(
        family="pi0_fast",
        name=checkpoint.name,
        spec=spec,
        weights=paligemma.take_weights(source, shapes(spec)),
        io=lerobot_pi.io(
            checkpoint, shared, spec.text.vocab_size, padded_state=False, decode=decode, rows=shared.n_action_steps
        ),
        source=Source(str(checkpoint.folder)),
        tokenizer=tokenizer,
    )


def _fast_decode(checkpoint: LeRobotCheckpoint, tokenizer: bytes, rows: int) -> tuple[Step, ...]:
    """The step from generated ids to actions; every id that it looks for is found here, once."""
    config, where = checkpoint.config, str(checkpoint.folder)
    name = config.take("action_tokenizer_name", "lerobot/fast-action-tokenizer")
    fast = read_fast_tokenizer(lambda file: checkpoint.companion(name, file, "the action tokenizer"))
    text = load_tokenizer(tokenizer)
    begins = ("Action", ":") if config.take("validate_action_token_prefix", True) else ()
    params = {
        "pieces": list(fast.pieces),
        "first": text.get_vocab_size(with_added_tokens=False) - 1 - config.size("fast_skip_tokens", 128, least=0),
        "stop": token_id(tokenizer, "|", where),
        "remove": text.encode("Action: ", add_special_tokens=False).ids,
        "begin": [token_id(tokenizer, t, where) for t in begins],
        "min_token": fast.min_token,
        "scale": fast.scale,
        "rows": rows,
        "columns": checkpoint.vector("output_features", lerobot_pi.ACTION, 65536, "any"),
    }
    return (Step("fast_decode", params),)


FAMILY = families.add(
    Family(
        "pi0_fast",
        build,
        from_lerobot,
        doc="PaliGemma that decodes FAST action tokens",
        title="pi0-FAST",
        spec=Pi0FastSpec,
    )
)
