"""What LeRobot's folders of flow policies and pi0-FAST say alike: images, sampler, normalisation, relative actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlac.errors import CheckpointError, Unsupported
from vlac.io import IO, Camera, Step
from vlac.readers import paligemma
from vlac.readers.paligemma import Common
from vlac.spec import FlowSpec
from vlac.weights import Weights

if TYPE_CHECKING:
    from vlac.readers.lerobot import LeRobotCheckpoint

STATE, ACTION = "observation.state", "action"


def refuse_what_is_not_drawn(checkpoint: LeRobotCheckpoint) -> None:
    """Unsupported for config keys that would change what is computed, of SmolVLA too."""
    config = checkpoint.config
    config.refuse("n_obs_steps", 1, why="only one observation per call is implemented")
    config.refuse(
        "adapt_to_pi_aloha", False, why="joint flips and gripper maps of old Aloha models are not implemented"
    )
    config.refuse("use_delta_joint_actions_aloha", False, why="LeRobot does not implement it either")
    rtc = config.raw("rtc_config")
    if isinstance(rtc, dict) and rtc.get("enabled", True):
        checkpoint.warn("config.json: rtc_config: chunks are computed without real-time chunking")


def chunk(checkpoint: LeRobotCheckpoint) -> tuple[int, int]:
    """(rows of a chunk, rows of it that a robot executes)."""
    config = checkpoint.config
    chunk_size = config.size("chunk_size", 50)
    n_action_steps = config.size("n_action_steps", chunk_size)
    if n_action_steps > chunk_size:
        raise CheckpointError(f"{config.path}: n_action_steps {n_action_steps} exceeds chunk_size {chunk_size}")
    return chunk_size, n_action_steps


def common(checkpoint: LeRobotCheckpoint, renamed: Mapping[str, str] = {}) -> Common:
    """Reads the config; Unsupported and CheckpointError name the key."""
    config = checkpoint.config
    refuse_what_is_not_drawn(checkpoint)
    for key in ("paligemma_variant", "action_expert_variant", "dtype", "normalization_mapping", "tokenizer_max_length",
                "proj_width", "attention_implementation"):  # fmt: skip
        config.raw(key)  # tensors and processors say the same, and are what acts
    cameras = checkpoint.cameras(config.size("empty_cameras", 0, least=0, most=32))
    return shared(checkpoint, paligemma.plain_names(checkpoint.tensors, renamed), cameras, *_resize(checkpoint))


def shared(
    checkpoint: LeRobotCheckpoint,
    tensors: Weights,
    cameras: tuple[Camera, ...],
    image_size: int,
    resize: tuple[Step, ...],
) -> Common:
    """What every flow policy of LeRobot says alike, from its config and processors."""
    config = checkpoint.config
    chunk_size, n_action_steps = chunk(checkpoint)
    where = checkpoint.folder / "model.safetensors"
    return Common(
        source=paligemma.Source(tensors, where, checkpoint.options.spec, checkpoint.problem),
        cameras=cameras,
        image_size=image_size,
        image_steps=(*checkpoint.image_normalisation(cameras), *resize, Step("affine", {"scale": 2.0, "offset": -1.0})),
        chunk_size=chunk_size,
        n_action_steps=n_action_steps,
        max_action_dim=config.size("max_action_dim", 32),
        max_state_dim=config.size("max_state_dim", 32),
        tokenizer_max_length=checkpoint.text_step().max_length,
    )


def _resize(checkpoint: LeRobotCheckpoint) -> tuple[int, tuple[Step, ...]]:
    """Side of the square image, and the resize steps: centred padding; left and above before October 2025."""
    config = checkpoint.config
    older = config.raw("resize_imgs_with_padding")
    key = "image_resolution" if older is None else "resize_imgs_with_padding"
    size = config.raw("image_resolution", [224, 224]) if older is None else older
    if not isinstance(size, list) or len(size) != 2 or not all(type(v) is int and 0 < v < 2**14 for v in size):
        raise CheckpointError(f"{config.path}: {key} is {size!r}, expected two sizes")
    if size[0] != size[1]:
        raise Unsupported(f"{config.path}: {key} {size}: the tower sees squares")
    if older is not None:
        checkpoint.warn(f"config.json: {key}: an early pi0 policy; its padding is left and above, not checked further")
    align = "center" if older is None else "right-bottom"
    fit = Step("resize_with_pad", {"width": size[0], "height": size[0], "align": align, "value": 0.0})
    return size[0], (fit, Step("clamp", {"low": 0.0, "high": 1.0})) if older is None else (fit,)


def flow_spec(checkpoint: LeRobotCheckpoint) -> FlowSpec:
    """The Euler sampler."""
    config = checkpoint.config
    low, high = config.take("min_period", 4e-3), config.take("max_period", 4.0)
    if not 0 < low <= high:
        raise CheckpointError(f"{config.path}: min_period {low} and max_period {high} of the time embedding")
    steps = config.size("num_steps", 10, most=1000)  # its name before October 2025
    return FlowSpec.euler(config.size("num_inference_steps", steps, most=1000), low, high)


def io(
    checkpoint: LeRobotCheckpoint,
    shared: Common,
    vocab_size: int,
    *,
    padded_state: bool,
    decode: tuple[Step, ...] | None = None,
    rows: int | None = None,
    missing: int | None = None,
) -> IO:
    """Inputs and outputs.

    padded_state: the network reads the state, padded to max_state_dim; otherwise only the prompt does.
    decode: steps from what the program gives to a normalised chunk [rows, action_dim]; None takes the first columns.
    missing: how many cameras may be absent; None: all but one.
    """
    config, limit = checkpoint.config, shared.max_state_dim
    state_dim = checkpoint.vector("input_features", STATE, limit, "max_state_dim")
    action_dim = checkpoint.vector("output_features", ACTION, shared.max_action_dim, "max_action_dim")
    unread = [n for n, (kind, _) in checkpoint.features("input_features").items() if kind not in ("VISUAL", "STATE")]
    if unread:
        checkpoint.warn(f"config.json: input features that this policy does not read: {', '.join(unread)}")
    pad = (Step("pad", {"size": limit}),) if padded_state else ()
    first = decode if decode is not None else (Step("take", {"size": action_dim}),)
    normalise = checkpoint.normalise("normalise", STATE, "STATE", (state_dim,))
    unnormalise = checkpoint.normalise("unnormalise", ACTION, "ACTION", (action_dim,))
    names = config.raw("action_feature_names")
    return IO(
        cameras=shared.cameras,
        image_steps=shared.image_steps,
        state_key=STATE,
        state_dim=state_dim,
        state_steps=(*normalise, *pad),
        text_steps=checkpoint.text_steps(),
        action_key=ACTION,
        action_dim=action_dim,
        max_action_dim=shared.max_action_dim,
        chunk_size=shared.chunk_size if rows is None else rows,
        n_action_steps=shared.n_action_steps,
        action_steps=(*first, *unnormalise, *_relative(checkpoint, action_dim, state_dim)),
        normalised_action_steps=first,
        max_missing_cameras=len(shared.cameras) - 1 if missing is None else missing,
        image_size=shared.image_size,
        vocab_size=vocab_size,
        units="normalized" if checkpoint.options.no_stats else "robot",
        rename=checkpoint.processors.rename,
        action_names=tuple(names) if isinstance(names, list) and len(names) == action_dim else (),
    )


def _relative(checkpoint: LeRobotCheckpoint, action_dim: int, state_dim: int) -> tuple[Step, ...]:
    """add_state for actions that were trained relative to the state; nothing otherwise."""
    config, relative = checkpoint.config, checkpoint.processors.relative
    config.raw("relative_exclude_joints")
    wanted = config.take("use_relative_actions", False)
    if wanted != (relative is not None):
        checkpoint.problem(
            CheckpointError(
                f"{config.path}: use_relative_actions is {wanted}, the processors say {relative is not None}",
                remedy="save the processors again with the policy",
            )
        )
    if relative is None:
        return ()
    if state_dim < action_dim:
        raise CheckpointError(f"{config.path}: relative actions of {action_dim} joints, but a state of {state_dim}")
    return (Step("add_state", {"columns": list(relative.columns(action_dim))}),)
