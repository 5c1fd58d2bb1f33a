"""SmolVLA (Shukor et al. 2025, arXiv 2506.01844): SmolVLM2 backbone, flow-matching action expert with cross-attention.

Spec, weight names, shapes and drawing. How a LeRobot checkpoint's config becomes this spec is in
`from_lerobot`; the formulas are LeRobot 0.6's inference path in float32.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from vlac import blocks
from vlac.blocks import Shapes
from vlac.dims import Dim, symbol
from vlac.errors import CheckpointError, Unsupported
from vlac.graph import Call, Param, Program, Repeat, Schedule, Stage, StageBuilder, Symbol, check
from vlac.io import IO, Camera, Step
from vlac.policy import Policy, Source
from vlac.readers.safetensors_file import FLOATS
from vlac.readers.smolvlm import KNOWN_VLMS, Backbone, find_backbone
from vlac.readers.tokenizer_file import token_id
from vlac.registry import Family, families
from vlac.spec import DecoderSpec, FlowSpec, VisionSpec, override
from vlac.weights import Weights

if TYPE_CHECKING:
    from vlac.readers.lerobot import LeRobotCheckpoint


@dataclass(frozen=True)
class SmolVLASpec:
    """Dimensions under LeRobot's and Hugging Face's own names.

    `text` counts the kept VLM layers; `expert` has the same heads and head_dim. Layer i of the expert is a self layer
    (joint attention with the prefix) where `is_self_layer(i)`, else it cross-attends to layer i's keys and values.
    `expert_pairs` says it for each expert layer instead, (VLM layer, "self" or "cross"), when passes have taken layers
    out; `kv_taps` are VLM layers of which only the keys and values are left.
    Token ids are those of `<fake_token_around_image>` and `<global-img>`, read only with add_image_special_tokens.
    """

    vision: VisionSpec
    text: DecoderSpec
    expert: DecoderSpec
    scale_factor: int
    chunk_size: int
    max_action_dim: int
    max_state_dim: int
    tokenizer_max_length: int
    attention_mode: str = "cross_attn"
    self_attn_every_n_layers: int = 2
    prefix_length: int = -1
    add_image_special_tokens: bool = False
    fake_image_token_id: int = -1
    global_image_token_id: int = -1
    token_pool: int = 1
    kv_taps: tuple[int, ...] = ()
    expert_pairs: tuple[tuple[int, str], ...] = ()

    @property
    def tokens_per_camera(self) -> int:
        """Image rows of the prefix per camera: what the connector gives, averaged over token_pool x token_pool."""
        return (self.vision.grid // self.scale_factor // self.token_pool) ** 2

    @property
    def expert_every(self) -> int:
        """The expert has a layer at every VLM layer i that this divides."""
        return self.text.num_hidden_layers // self.expert.num_hidden_layers

    def is_self_layer(self, i: int) -> bool:
        if "cross" not in self.attention_mode:
            return True
        return self.self_attn_every_n_layers > 0 and i % self.self_attn_every_n_layers == 0

    @property
    def pairs(self) -> tuple[tuple[int, str], ...]:
        """For each expert layer the VLM layer whose keys and values it reads, and how: "self" or "cross"."""
        read = range(0, self.text.num_hidden_layers, self.expert_every)
        return self.expert_pairs or tuple((i, "self" if self.is_self_layer(i) else "cross") for i in read)


# --- weights ---------------------------------------------------------------------------------------------------

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


def shapes(spec: SmolVLASpec) -> Shapes:
    """Shape of every weight the program reads."""
    text, expert, vision = spec.text, spec.expert, spec.vision
    result = blocks.vit_shapes(vision)
    result["connector.proj.weight"] = (text.hidden_size, vision.hidden_size * spec.scale_factor**2)
    result["text.embed_tokens.weight"] = (text.vocab_size, text.hidden_size)
    for i in range(text.num_hidden_layers):
        of_layer = blocks.kv_tap_shapes if i in spec.kv_taps else blocks.decoder_layer_shapes
        result |= of_layer(text, f"text.layers.{i}")
    memory = text.num_key_value_heads * text.head_dim
    for j, (_, kind) in enumerate(spec.pairs):
        width = None if kind == "self" else memory
        result |= blocks.decoder_layer_shapes(expert, f"expert.layers.{j}", width)
    result["expert.norm.weight"] = (expert.hidden_size,)
    result["state_proj.weight"] = (text.hidden_size, spec.max_state_dim)
    result["state_proj.bias"] = (text.hidden_size,)
    return result | blocks.action_shapes(spec.max_action_dim, expert.hidden_size)


# --- drawing ---------------------------------------------------------------------------------------------------


def build(policy: Policy) -> Program:
    """The program: `vision` per camera, `prefix` once, `flow` once per Euler step.

    Symbols: T prompt tokens, C camera slots that take part. Result: x f32 [chunk_size, max_action_dim].
    """
    spec, flow = policy.spec, policy.flow
    assert isinstance(spec, SmolVLASpec) and flow is not None
    weights = policy.weights.with_(**blocks.flow_tables(flow))
    flow_stage, carry = _flow(spec, flow)
    stages = (_vision(spec), _prefix(spec), flow_stage)
    read = {i[1:] for s in stages for n in s.nodes for i in n.inputs if i.startswith("@")}
    program = Program(
        name=policy.family,
        symbols=(
            Symbol("C", tuple(range(1, len(policy.io.cameras) + 1))),
            Symbol("T", blocks.token_buckets(spec.tokenizer_max_length)),
        ),
        stages=stages,
        params={name: Param(t.shape) for name, t in weights.items() if name in read},
        schedule=Schedule(
            (
                Call("vision", each="camera"),
                Call("prefix"),
                Repeat("flow", len(flow.times), "step", carry),
            ),
            "x_next",
        ),
        weights=Weights({name: t for name, t in weights.items() if name in read}),
    )
    return check(program)


def _vision(spec: SmolVLASpec) -> Stage:
    """One camera's pixels -> its tokens, before any scaling."""
    b = StageBuilder("vision")
    side = spec.vision.image_size
    pixels = b.input("pixels", "f32", spec.vision.num_channels, side, side)
    x = blocks.vit_tower(b, pixels, spec.vision)
    pool = spec.token_pool
    x = blocks.shuffle_connector(b, x, spec.scale_factor, as_="image_tokens" if pool == 1 else "")
    b.output(x if pool == 1 else blocks.mean_tokens(b, x, pool, spec.text.hidden_size, as_="image_tokens"))
    return b.build()


def _images(b: StageBuilder, spec: SmolVLASpec) -> tuple[str, str, Dim]:
    """Image part of the prefix: (embeddings, validity, rows). Special tokens count even where a camera is absent."""
    n, d, cameras = spec.tokens_per_camera, spec.text.hidden_size, symbol("C")
    tokens = b.op("scale", b.input("image_tokens", "f32", cameras * n, d), factor=d**0.5)
    given = b.input("image_valid", "bool", cameras)
    valid = b.op("repeat_each", given, times=n)
    if not spec.add_image_special_tokens:
        return tokens, valid, cameras * n

    def special(token_id: int) -> str:  # not scaled by sqrt(d), unlike the prompt
        ids = b.op("full", shape=(1,), value=float(token_id), dtype="i32")
        return b.op("tile", b.op("embed", ids, "@text.embed_tokens.weight"), rows=cameras)

    fake, start = special(spec.fake_image_token_id), special(spec.global_image_token_id)
    images = b.op("reshape", tokens, shape=(cameras, n * d))
    rows = b.op("concat", fake, start, images, fake, axis=1)
    slot = b.op("reshape", b.input("camera_valid", "bool", cameras), shape=(cameras, 1))
    columns = b.op("concat", slot, slot, b.op("reshape", valid, shape=(cameras, n)), slot, axis=1)
    total = cameras * (n + 3)
    return b.op("reshape", rows, shape=(total, d)), b.op("reshape", columns, shape=(total,)), total


def _prefix(spec: SmolVLASpec) -> Stage:
    """Images, prompt and state through the VLM; leaves each layer's rotated keys and values.

    Padding up to `prefix_length` is not drawn: padded rows are masked, come last and do not advance positions, so
    nothing that is read depends on them.
    """
    b = StageBuilder("prefix")
    text, count = spec.text, symbol("T")
    images, images_valid, image_rows = _images(b, spec)
    tokens = b.input("tokens", "i32", count)
    tokens_valid = b.input("token_valid", "bool", count)
    prompt = b.op("scale", b.op("embed", tokens, "@text.embed_tokens.weight"), factor=text.hidden_size**0.5)
    state = blocks.linear(b, b.input("state", "f32", 1, spec.max_state_dim), "state_proj", bias=True)
    x = b.op("concat", images, prompt, state, axis=0, name="prefix_embeddings")
    one = b.op("full", shape=(1,), value=1.0, dtype="bool")
    valid = b.op("concat", images_valid, tokens_valid, one, axis=0, name="prefix_valid")
    # images and prompt (block 0) do not see the state (block 1); the state sees all
    block = blocks.block_ids(b, (image_rows + count, 0), (1, 1))
    mask = b.op("attention_mask", block, block, valid)
    positions = blocks.positions_of(b, valid)
    b.output(valid, blocks.count_valid(b, valid))
    for i in range(text.num_hidden_layers):
        names = (f"prefix_k.{i}", f"prefix_v.{i}")
        if i in spec.kv_taps:
            k, v = blocks.kv_tap(b, x, text, f"text.layers.{i}", positions, names)
        else:
            x, k, v = blocks.decoder_layer(b, x, text, f"text.layers.{i}", positions, mask, kv_names=names)
        b.output(k, v)
    return b.build()


def _flow(spec: SmolVLASpec, flow: FlowSpec) -> tuple[Stage, tuple[tuple[str, str, str], ...]]:
    """One solver step, x at time times[step] -> x_next, and its carries. Actions are causal in self layers."""
    b = StageBuilder("flow")
    text, expert, n = spec.text, spec.expert, spec.chunk_size
    rows = symbol("C") * (spec.tokens_per_camera + 3 * spec.add_image_special_tokens) + symbol("T") + 1
    kv = text.num_key_value_heads * text.head_dim
    step = b.input("step", "i32", 1)
    x = b.input("x", "f32", n, spec.max_action_dim)
    valid = b.input("prefix_valid", "bool", rows)
    prefix_count = b.input("prefix_count", "i32", 1)
    read = dict.fromkeys(i for i, _ in spec.pairs)
    past = {i: (b.input(f"prefix_k.{i}", "f32", rows, kv), b.input(f"prefix_v.{i}", "f32", rows, kv)) for i in read}
    t = b.op("embed", step, "@flow.times")
    h = blocks.action_time_tokens(b, x, t, n, expert.hidden_size, (flow.min_period, flow.max_period))
    own = b.op("arange", start=0, stop=n)
    causal = b.op("arange", start=1, stop=n + 1)
    prefix_block = blocks.block_ids(b, (rows, 0))
    keys_block = b.op("concat", prefix_block, causal, axis=0)
    keys_valid = b.op("concat", valid, b.op("full", shape=(n,), value=1.0, dtype="bool"), axis=0)
    self_mask = b.op("attention_mask", causal, keys_block, keys_valid, name="self_mask")
    cross_mask = b.op("attention_mask", causal, prefix_block, valid, name="cross_mask")
    behind = b.op("add", own, prefix_count)
    for j, (i, kind) in enumerate(spec.pairs):
        name = f"expert.layers.{j}"
        if kind == "self":
            h, _, _ = blocks.decoder_layer(b, h, expert, name, behind, self_mask, past[i])
        else:
            h = blocks.cross_layer(b, h, expert, name, own, cross_mask, past[i])
    h = blocks.rms_norm(b, h, expert, "expert.norm")
    velocity = blocks.linear(b, h, "action_out_proj", bias=True, as_="velocity")
    carry = blocks.sampler_step(b, x, velocity, step, flow, (n, spec.max_action_dim))
    return b.build(), carry


# --- from LeRobot ----------------------------------------------------------------------------------------------

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


def _refuse_what_is_not_drawn(checkpoint: LeRobotCheckpoint) -> None:
    config = checkpoint.config
    config.refuse("n_obs_steps", 1, why="only one observation per call is implemented")
    config.refuse(
        "adapt_to_pi_aloha", False, why="joint flips and gripper maps of old Aloha models are not implemented"
    )
    config.refuse("use_delta_joint_actions_aloha", False, why="LeRobot does not implement it either")
    rtc = config.raw("rtc_config")
    if isinstance(rtc, dict) and rtc.get("enabled", True):
        checkpoint.warn("config.json: rtc_config: chunks are computed without real-time chunking")


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


def canonical_weights(checkpoint: LeRobotCheckpoint, spec: SmolVLASpec) -> Weights:
    """Canonical name -> tensor, every shape and dtype checked against the spec; data is not read."""
    tensors, where = checkpoint.tensors, checkpoint.folder / "model.safetensors"
    result, used = {}, set()
    for name, shape in shapes(spec).items():
        source = lerobot_name(name)
        used.add(source)
        if source not in tensors:
            raise CheckpointError(
                f"{where}: tensor {source} is missing", remedy="download or copy the checkpoint again"
            )
        tensor = tensors[source]
        on_disk = (shape[0], spec.vision.num_channels, *[spec.vision.patch_size] * 2)
        expected = on_disk if name == "vision.patch_embedding.weight" else shape
        if tensor.shape != expected:
            raise CheckpointError(
                f"{where}: tensor {source} has shape {list(tensor.shape)}, config and sizes give {list(expected)}",
                remedy="config.json belongs to another checkpoint, or sizes need --spec",
            )
        if tensor.dtype.upper() not in FLOATS:
            raise CheckpointError(f"{where}: tensor {source} is {tensor.dtype.upper()}, expected {', '.join(FLOATS)}")
        result[name] = tensor if tensor.shape == shape else tensor.map(lambda w: w.reshape(w.shape[0], -1), shape)
    extra = [n for n in tensors if n not in used and not any(fnmatchcase(n, p) for p in DEAD)]
    if extra:
        checkpoint.problem(
            CheckpointError(f"{where}: {len(extra)} tensors that the network does not have: {', '.join(extra[:6])}")
        )
    return Weights(result)


def _flow_spec(checkpoint: LeRobotCheckpoint) -> FlowSpec:
    config = checkpoint.config
    low, high = config.take("min_period", 4e-3), config.take("max_period", 4.0)
    if not 0 < low <= high:
        raise CheckpointError(f"{config.path}: min_period {low} and max_period {high} of the time embedding")
    return FlowSpec.euler(config.size("num_steps", 10, most=1000), low, high)


def from_lerobot(checkpoint: LeRobotCheckpoint) -> Policy:
    """The Policy of an opened LeRobot checkpoint of type "smolvla"."""
    config = checkpoint.config
    _refuse_what_is_not_drawn(checkpoint)
    config.raw("normalization_mapping"), config.raw("pad_language_to"), config.raw("tokenizer_max_length")
    empty_cameras = config.size("empty_cameras", 0, least=0, most=32)
    cameras = checkpoint.cameras(empty_cameras)
    image_size, resize = _image_size(checkpoint, cameras)
    vision, factor, text, expert = _specs(checkpoint, image_size)
    spec = SmolVLASpec(
        vision=vision,
        text=text,
        expert=expert,
        scale_factor=factor,
        chunk_size=config.size("chunk_size", 50),
        max_action_dim=config.size("max_action_dim", 32),
        max_state_dim=config.size("max_state_dim", 32),
        tokenizer_max_length=checkpoint.text_step().max_length,
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
    io = _io(checkpoint, spec, cameras, resize, empty_cameras)  # features first: their errors are the clearer ones
    return Policy(
        family="smolvla",
        name=checkpoint.name,
        spec=spec,
        weights=canonical_weights(checkpoint, spec),
        io=io,
        source=Source(str(checkpoint.folder)),
        tokenizer=tokenizer,
        flow=_flow_spec(checkpoint),
    )


def _io(
    checkpoint: LeRobotCheckpoint, spec: SmolVLASpec, cameras: tuple[Camera, ...], resize: tuple[Step, ...], empty: int
) -> IO:
    config, state_key, action_key = checkpoint.config, "observation.state", "action"
    state_dim = checkpoint.vector("input_features", state_key, spec.max_state_dim, "max_state_dim")
    action_dim = checkpoint.vector("output_features", action_key, spec.max_action_dim, "max_action_dim")
    n_action_steps = config.size("n_action_steps", spec.chunk_size)
    if n_action_steps > spec.chunk_size:
        raise CheckpointError(f"{config.path}: n_action_steps {n_action_steps} exceeds chunk_size {spec.chunk_size}")
    unread = [n for n, (kind, _) in checkpoint.features("input_features").items() if kind not in ("VISUAL", "STATE")]
    if unread:
        checkpoint.warn(f"config.json: input features that SmolVLA does not read: {', '.join(unread)}")
    take = Step("take", {"size": action_dim})
    return IO(
        cameras=cameras,
        image_steps=(
            *checkpoint.image_normalisation(cameras),
            *resize,
            Step("affine", {"scale": 2.0, "offset": -1.0}),
        ),
        state_key=state_key,
        state_dim=state_dim,
        state_steps=(
            *checkpoint.normalise("normalise", state_key, "STATE", (state_dim,)),
            Step("pad", {"size": spec.max_state_dim}),
        ),
        text_steps=checkpoint.text_steps(),
        action_key=action_key,
        action_dim=action_dim,
        max_action_dim=spec.max_action_dim,
        chunk_size=spec.chunk_size,
        n_action_steps=n_action_steps,
        action_steps=(take, *checkpoint.normalise("unnormalise", action_key, "ACTION", (action_dim,))),
        normalised_action_steps=(take,),
        max_missing_cameras=empty,
        image_size=spec.vision.image_size,
        vocab_size=spec.text.vocab_size,
        units="normalized" if checkpoint.options.no_stats else "robot",
        rename=checkpoint.processors.rename,
    )


FAMILY = families.add(
    Family(
        "smolvla",
        build,
        from_lerobot,
        doc="SmolVLM2 with a flow-matching action expert",
        title="SmolVLA",
        spec=SmolVLASpec,
    )
)
