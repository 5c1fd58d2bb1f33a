"""LeRobot's SmolVLA folders -> Policy: names on disk, and sizes from tensor shapes, config and backbone."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from vlac.errors import CheckpointError, Unsupported
from vlac.families.smolvla import SmolVLASpec, shapes
from vlac.io import Camera, Step
from vlac.policy import Policy, Source
from vlac.readers import lerobot_pi
from vlac.readers.lerobot import LeRobotCheckpoint
from vlac.readers.smolvlm import KNOWN_VLMS, Backbone, find_backbone
from vlac.readers.take import take_weights
from vlac.readers.tokenizer_file import token_id
from vlac.spec import DecoderSpec, VisionSpec, override
from vlac.weights import Weights

HEADS = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")

_PARTS = {
    "vision.patch_embedding.": "vlm.model.vision_model.embeddings.patch_embedding.",
    "vision.position_embedding": "vlm.model.vision_model.embeddings.position_embedding.weight",
    "vision.layers.": "vlm.model.vision_model.encoder.layers.",
    "vision.post_layernorm.": "vlm.model.vision_model.post_layernorm.",
    "connector.proj.": "vlm.model.connector.modality_projection.proj.",
    "text.": "vlm.model.text_model.",
    "expert.": "lm_expert.",
}
"""Canonical prefix -> LeRobot's, under `model.vlm_with_expert.`."""


def lerobot_name(name: str) -> str:
    """LeRobot's name of a canonical weight: "expert.norm.weight" -> "model.vlm_with_expert.lm_expert.norm.weight"."""
    if name.startswith(HEADS):
        return f"model.{name}"
    ours = next(p for p in _PARTS if name.startswith(p))
    return f"model.vlm_with_expert.{_PARTS[ours]}{name[len(ours) :]}"


DEAD = (
    "model.vlm_with_expert.vlm.lm_head.*",
    "model.vlm_with_expert.vlm.model.text_model.norm.*",
    "model.vlm_with_expert.vlm.model.text_model.layers.*",
    "model.vlm_with_expert.lm_expert.embed_tokens.*",
    "model.vlm_with_expert.lm_expert.lm_head.*",
)
"""Tensors that a checkpoint may hold and inference never reads."""


def _backbone(checkpoint: LeRobotCheckpoint) -> Backbone:
    """The VLM that the config names; a guess, with a warning, when only headers are read and nobody knows it."""
    name = checkpoint.config.take("vlm_model_name", next(iter(KNOWN_VLMS)))
    try:
        return find_backbone(checkpoint.folder, name, checkpoint.options.spec)
    except CheckpointError as error:
        checkpoint.problem(error)
    q, kv = (_shape(checkpoint, f"text.layers.0.self_attn.{p}_proj.weight", 2)[0] for p in "qk")
    width = _shape(checkpoint, "vision.position_embedding", 2)[1]
    return Backbone(64 if q % 64 == kv % 64 == 0 else math.gcd(q, kv), width // 64 if width % 64 == 0 else 1)


def _given(checkpoint: LeRobotCheckpoint, field: str, default: int) -> int:
    """A size from --spec, else the default."""
    value = checkpoint.options.spec.get(field, default)
    try:
        return int(value)
    except (TypeError, ValueError):
        raise Unsupported(f"--spec {field}={value!r}: expected a whole number") from None


def _layers(tensors: Weights, name: str) -> int:
    """Number of layers `{name}.{i}.` in the file."""
    found = {m[1] for m in (re.match(rf"{re.escape(name)}\.(\d+)\.", key) for key in tensors) if m}
    return max((int(i) for i in found), default=-1) + 1


def _shape(checkpoint: LeRobotCheckpoint, name: str, rank: int) -> tuple[int, ...]:
    where = f"{checkpoint.folder / 'model.safetensors'}: tensor {lerobot_name(name)}"
    if lerobot_name(name) not in checkpoint.tensors:
        raise CheckpointError(f"{where} is missing", remedy="download or copy the checkpoint again")
    shape = checkpoint.tensors[lerobot_name(name)].shape
    if len(shape) != rank:
        raise CheckpointError(f"{where} has shape {list(shape)}, expected {rank} axes")
    return shape


def _expert_ffn(hidden_size: int) -> int:
    """LeRobot's width of the expert's MLP: 4 * 2/3 of the hidden size, up to a multiple of 256."""
    return 256 * -(-int(4 * int(2 * hidden_size / 3)) // 256)


def _specs(checkpoint: LeRobotCheckpoint, image_size: int) -> tuple[VisionSpec, int, DecoderSpec, DecoderSpec]:
    """(vision, pixel-shuffle factor, text, expert) from tensor shapes, config and backbone."""
    config, tensors = checkpoint.config, checkpoint.tensors
    backbone = _backbone(checkpoint)
    d = _given(checkpoint, "text.head_dim", backbone.head_dim)
    vision_heads = _given(checkpoint, "vision.num_attention_heads", backbone.vision_heads)
    embedding = "text.embed_tokens.weight"
    if lerobot_name(embedding) not in tensors and "model.vlm_with_expert.vlm.lm_head.weight" in tensors:
        head = tensors["model.vlm_with_expert.vlm.lm_head.weight"]  # saved tied: one of the two names is left out
        checkpoint.tensors = tensors = tensors.with_(**{lerobot_name(embedding): head})
    vocab, width = _shape(checkpoint, embedding, 2)
    patch = _shape(checkpoint, "vision.patch_embedding.weight", 4)
    positions, vision_width = _shape(checkpoint, "vision.position_embedding", 2)
    connector = _shape(checkpoint, "connector.proj.weight", 2)[1]
    factor = math.isqrt(connector // vision_width)
    vision = VisionSpec(
        hidden_size=vision_width,
        intermediate_size=_shape(checkpoint, "vision.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=_layers(tensors, "model.vlm_with_expert.vlm.model.vision_model.encoder.layers"),
        num_attention_heads=vision_heads,
        image_size=image_size,
        patch_size=patch[-1],
        num_channels=patch[1],
        layer_norm_eps=backbone.layer_norm_eps,
        hidden_act=backbone.vision_act,
        position_rule="buckets",  # of fractional coordinates, as SmolVLM's embeddings compute their ids
    )
    if (
        vision.grid**2 != positions
        or factor < 1
        or vision.grid % factor
        or vision_heads < 1
        or vision_width % vision_heads
    ):
        raise Unsupported(
            f"{config.path}: images of {image_size}x{image_size} give {vision.grid}x{vision.grid} patches of "
            f"{patch[-1]}; the tower has {positions} positions, width {vision_width}, {vision_heads} heads and a pixel "
            f"shuffle of {factor}",
            remedy="resize_imgs_with_padding must be the VLM's own image size",
        )
    in_file = _layers(tensors, "model.vlm_with_expert.vlm.model.text_model.layers")
    wanted = config.take("num_vlm_layers", 16)
    layers = min(wanted, backbone.layers or wanted) if wanted > 0 else backbone.layers or in_file
    q, kv = (_shape(checkpoint, f"text.layers.0.self_attn.{p}_proj.weight", 2)[0] for p in "qk")
    heads = 0 if "text.head_dim" in checkpoint.options.spec else backbone.heads
    if d < 1 or d % 2 or q % d or kv % d or (q // d) % (kv // d) or heads not in (0, q // d):
        raise CheckpointError(
            f"{config.path}: q and k projections of {q} and {kv} rows do not hold {heads or 'whole'} heads of size {d}",
            remedy="say the right size with --spec text.head_dim=64",
        )
    text = DecoderSpec(
        hidden_size=width,
        intermediate_size=_shape(checkpoint, "text.layers.0.mlp.gate_proj.weight", 2)[0],
        num_hidden_layers=layers,
        num_attention_heads=q // d,
        num_key_value_heads=kv // d,
        head_dim=d,
        vocab_size=vocab,
        rms_norm_eps=backbone.rms_norm_eps,
        rope_theta=10000.0,  # LeRobot's own, whatever the VLM's config says
        hidden_act=backbone.hidden_act,
    )
    expert_width = int(width * config.take("expert_width_multiplier", 0.75))
    if not 0 < expert_width < 2**20:
        raise CheckpointError(f"{config.path}: expert_width_multiplier gives an expert of width {expert_width}")
    expert_layers = config.take("num_expert_layers", -1)
    expert = replace(
        text,
        hidden_size=expert_width,
        intermediate_size=_expert_ffn(expert_width),
        num_hidden_layers=expert_layers if expert_layers > 0 else layers,
        vocab_size=0,
    )
    return vision, factor, text, expert


def _image_size(checkpoint: LeRobotCheckpoint, cameras: tuple[Camera, ...]) -> tuple[int, tuple[Step, ...]]:
    """Side of the square image that the tower sees, and the resize step that makes it (none if cameras have it)."""
    config = checkpoint.config
    target = config.raw("resize_imgs_with_padding", [512, 512])
    if target is None:
        sizes = sorted({c.shape[1:] for c in cameras if not c.optional})
        if len(sizes) != 1 or sizes[0][0] != sizes[0][1]:
            raise Unsupported(
                f"{config.path}: resize_imgs_with_padding is null and the cameras are {sizes}; without resizing all "
                "must be one square size"
            )
        return sizes[0][0], ()
    if not isinstance(target, list) or len(target) != 2 or not all(isinstance(v, int) and v > 0 for v in target):
        raise CheckpointError(
            f"{config.path}: resize_imgs_with_padding is {target!r}, expected [width, height] or null"
        )
    if target[0] != target[1]:
        raise Unsupported(f"{config.path}: resize_imgs_with_padding {target}: the pixel shuffle needs a square")
    step = Step("resize_with_pad", {"width": target[0], "height": target[1], "align": "right-bottom", "value": 0.0})
    return target[0], (step,)


def _check_layers(checkpoint: LeRobotCheckpoint, spec: SmolVLASpec) -> None:
    """Refuses combinations that LeRobot itself cannot run (measured there), and modes nobody knows."""
    path, n, m = checkpoint.config.path, spec.text.num_hidden_layers, spec.expert.num_hidden_layers
    if spec.attention_mode not in ("cross_attn", "self_attn"):
        raise Unsupported(f"{path}: attention_mode {spec.attention_mode!r}; known: cross_attn, self_attn")
    if n % m:
        raise CheckpointError(f"{path}: num_expert_layers = {m} does not divide the {n} layers of the VLM")
    if m < n and any(spec.is_self_layer(i) for i in range(n)):
        raise Unsupported(
            f"{path}: num_expert_layers = {m} for {n} VLM layers with self layers (attention_mode "
            f"{spec.attention_mode}, self_attn_every_n_layers = {spec.self_attn_every_n_layers}); LeRobot cannot run it"
        )
    if spec.expert.hidden_size % 2:
        raise Unsupported(f"{path}: an expert of odd width {spec.expert.hidden_size} has no time embedding")


def read_policy(checkpoint: LeRobotCheckpoint) -> Policy:
    """The Policy of an opened LeRobot checkpoint of type "smolvla"."""
    config = checkpoint.config
    lerobot_pi.refuse_what_is_not_drawn(checkpoint)
    config.raw("normalization_mapping"), config.raw("pad_language_to"), config.raw("tokenizer_max_length")
    empty_cameras = config.size("empty_cameras", 0, least=0, most=32)
    cameras = checkpoint.cameras(empty_cameras)
    image_size, resize = _image_size(checkpoint, cameras)
    vision, factor, text, expert = _specs(checkpoint, image_size)
    shared = lerobot_pi.shared(checkpoint, checkpoint.tensors, cameras, image_size, resize)
    spec = SmolVLASpec(
        vision=vision,
        text=text,
        expert=expert,
        scale_factor=factor,
        chunk_size=shared.chunk_size,
        max_action_dim=shared.max_action_dim,
        max_state_dim=shared.max_state_dim,
        tokenizer_max_length=shared.tokenizer_max_length,
        attention_mode=config.take("attention_mode", "cross_attn"),
        self_attn_every_n_layers=config.take("self_attn_every_n_layers", 2),
        prefix_length=config.take("prefix_length", -1),
        add_image_special_tokens=config.take("add_image_special_tokens", False),
    )
    tokenizer = checkpoint.tokenizer()
    if spec.add_image_special_tokens and tokenizer is not None:
        ids = [token_id(tokenizer, t, str(checkpoint.folder)) for t in ("<fake_token_around_image>", "<global-img>")]
        spec = replace(spec, fake_image_token_id=ids[0], global_image_token_id=ids[1])
    taken = ("text.head_dim", "vision.num_attention_heads")
    spec = override(spec, {k: v for k, v in checkpoint.options.spec.items() if k not in taken})
    _check_layers(checkpoint, spec)
    # features before weights: their errors are the clearer ones
    io = lerobot_pi.io(checkpoint, shared, spec.text.vocab_size, padded_state=True, missing=empty_cameras)
    return Policy(
        family="smolvla",
        name=checkpoint.name,
        spec=spec,
        weights=take_weights(
            shared.source.tensors, shared.source.where, shapes(spec), lerobot_name, DEAD, checkpoint.problem
        ),
        io=io,
        source=Source(str(checkpoint.folder)),
        tokenizer=tokenizer,
        flow=lerobot_pi.flow_spec(checkpoint),
    )
