"""GR00T N1.7 (NVIDIA 2025, arXiv 2503.14734): Qwen3-VL's first layers, and a DiT that samples a chunk by flow matching.

One embodiment is compiled: the projectors of the others are not in the artifact. The original's clock runs from 0
(noise) to 1, this one's from 1 to 0 as everywhere in vlac; velocities change their sign with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vlac import blocks, blocks_groot
from vlac.blocks import Shapes, linear
from vlac.blocks_groot import DiTSpec, QwenVisionSpec, linear_shapes, norm_shapes
from vlac.dims import Dim, symbol
from vlac.graph import Call, Param, Program, Repeat, Schedule, Stage, StageBuilder, Symbol, check
from vlac.policy import Policy
from vlac.registry import Family, families
from vlac.spec import DecoderSpec, EncoderSpec, FlowSpec
from vlac.weights import Array, LazyTensor, Weights


@dataclass(frozen=True)
class GrootSpec:
    """Dimensions. `text` are the VLM's kept layers, `mixer` the layers between them and the DiT.

    The prompt is `prompt_start` tokens, then for each camera an opening token, its picture's rows, a closing token;
    then up to `text_tokens` more. chunk_size rows are sampled, of which the policy may keep fewer.
    """

    vision: QwenVisionSpec
    text: DecoderSpec
    mixer: EncoderSpec
    dit: DiTSpec
    cameras: int
    prompt_start: int
    text_tokens: int
    chunk_size: int
    max_state_dim: int
    max_action_dim: int
    time_buckets: int

    @property
    def pictures_end(self) -> int:
        """Rows of the prompt up to the last picture's closing token."""
        return self.prompt_start + self.cameras * (self.vision.rows + 2)

    @property
    def max_tokens(self) -> int:
        """Rows of the longest prompt."""
        return self.pictures_end + self.text_tokens


def shapes(spec: GrootSpec) -> Shapes:
    """Shape of every weight the program reads, but the sampler's tables."""
    d, width, hidden = spec.text.hidden_size, spec.dit.hidden_size, spec.dit.output_size
    result = blocks_groot.vision_shapes(spec.vision, d)
    result["text.embed_tokens.weight"] = (spec.text.vocab_size, d)
    for part in ("cos", "sin"):
        result[f"text.rotation.{part}"] = (spec.max_tokens, spec.text.head_dim // 2)
    for i in range(spec.text.num_hidden_layers):
        result |= blocks_groot.text_layer_shapes(spec.text, f"text.layers.{i}")
    result |= norm_shapes("mixer.norm", d) | blocks.vit_layers_shapes(spec.mixer, "mixer")
    result |= linear_shapes("state_encoder.fc1", hidden, spec.max_state_dim)
    result |= linear_shapes("state_encoder.fc2", width, hidden)
    result |= linear_shapes("action_encoder.fc1", width, spec.max_action_dim)
    result |= linear_shapes("action_encoder.fc2", width, 2 * width) | linear_shapes("action_encoder.fc3", width, width)
    result["action_encoder.position_embedding"] = (spec.chunk_size, width)
    result |= blocks_groot.dit_shapes(spec.dit, "dit")
    result |= linear_shapes("action_decoder.fc1", hidden, hidden)
    return result | linear_shapes("action_decoder.fc2", spec.max_action_dim, hidden)


def build(policy: Policy) -> Program:
    """`vision` per camera, `prefix` once, `flow` once per Euler step. Symbol T: rows of the prompt, with its pictures.

    Result: x f32 [chunk_size, max_action_dim].
    """
    spec, flow = policy.spec, policy.flow
    assert isinstance(spec, GrootSpec) and flow is not None
    stage, carries = _flow(spec, flow)
    known, tables = shapes(spec), flow_tables(spec, flow)
    steps = (Call("vision", each="camera"), Call("prefix"), Repeat("flow", len(flow.times), "step", carries))
    buckets = tuple(spec.pictures_end + n for n in blocks.token_buckets(spec.text_tokens))
    return check(
        Program(
            name=policy.family,
            symbols=(Symbol("T", buckets),),
            stages=(_vision(spec), _prefix(spec), stage),
            params={name: Param(shape) for name, shape in (known | {n: t.shape for n, t in tables.items()}).items()},
            schedule=Schedule(steps, "x_next"),
            weights=Weights({name: policy.weights[name] for name in known} | tables),
        )
    )


def _vision(spec: GrootSpec) -> Stage:
    b = StageBuilder("vision")
    side = spec.vision.image_size
    pixels = b.input("pixels", "f32", spec.vision.num_channels, side, side)
    b.output(*blocks_groot.vision_tower(b, pixels, spec.vision))
    return b.build()


# --- the language model ----------------------------------------------------------------------------------------


def _among_pictures(b: StageBuilder, spec: GrootSpec, others: list[str], pictures: str, name: str = "") -> str:
    """Rows of the prompt in order: others[0] is before the first picture, others[i] behind picture i - 1."""
    n = spec.vision.rows
    parts = [others[0]]
    for i, rest in enumerate(others[1:]):
        own = b.op("slice", pictures, axis=0, start=i * n, stop=(i + 1) * n) if spec.cameras > 1 else pictures
        parts += [own, rest]
    return b.op("concat", *parts, axis=0, name=name)


def _prefix(spec: GrootSpec) -> Stage:
    """Pictures and prompt through the kept layers and the mixer -> `vl` [T, width], and who of it is what."""
    b = StageBuilder("prefix")
    d, count, n = spec.text.hidden_size, symbol("T"), spec.vision.rows
    tokens, valid = b.input("tokens", "i32", count), b.input("token_valid", "bool", count)
    names = ["image_tokens", *(f"deepstack.{j}" for j in range(len(spec.vision.deepstack)))]
    features = [b.input(name, "f32", spec.cameras * n, d) for name in names]
    first = spec.prompt_start + 1
    starts = [first + i * (n + 2) for i in range(spec.cameras)]
    gaps: list[tuple[int, Dim]] = [(0, first), *((s + n, s + n + 2) for s in starts[:-1]), (starts[-1] + n, count)]
    words = [
        b.op("embed", b.op("slice", tokens, axis=0, start=i, stop=j), "@text.embed_tokens.weight") for i, j in gaps
    ]
    x = _among_pictures(b, spec, words, features[0], "prompt_embeddings")
    nothing = [b.op("full", shape=(j - i, d), value=0.0, dtype="f32") for i, j in gaps]
    order = b.op("arange", start=0, stop=count)
    mask = b.op("attention_mask", order, order, valid)
    for i in range(spec.text.num_hidden_layers):
        x = blocks_groot.text_layer(b, x, spec.text, f"text.layers.{i}", count, mask)
        # what comes after the last kept layer is never added: the original takes the layer's own output
        if i < len(features) - 1 and i < spec.text.num_hidden_layers - 1:
            x = b.op("add", x, _among_pictures(b, spec, nothing, features[i + 1]))
    block = blocks.block_ids(b, (count, 0))
    x = b.op("layer_norm", x, "@mixer.norm.weight", "@mixer.norm.bias", eps=1e-5)
    x = blocks.vit_layers(b, x, spec.mixer, "mixer", b.op("attention_mask", block, block, valid))
    b.output(b.op("scale", x, factor=1.0, name="vl"), *_kinds(b, valid, gaps, n))
    return b.build()


def _kinds(b: StageBuilder, valid: str, gaps: list[tuple[int, Dim]], n: int) -> tuple[str, str]:
    """(`is_word`, `is_picture`) bool [T]; padding is neither."""
    words: list[str] = []
    pictures: list[str] = []
    for k, (i, j) in enumerate(gaps):
        if k:
            words.append(b.op("full", shape=(n,), value=0.0, dtype="bool"))
            pictures.append(b.op("full", shape=(n,), value=1.0, dtype="bool"))
        words.append(b.op("slice", valid, axis=0, start=i, stop=j))
        pictures.append(b.op("full", shape=(j - i,), value=0.0, dtype="bool"))
    return b.op("concat", *words, axis=0, name="is_word"), b.op("concat", *pictures, axis=0, name="is_picture")


# --- the sampler -----------------------------------------------------------------------------------------------


def flow_tables(spec: GrootSpec, flow: FlowSpec) -> dict[str, LazyTensor]:
    """Per step: sinusoids of the time for the DiT (cosines first) and for the action tokens; the solver's numbers.

    In float32 where the original computes in float32: an angle reaches hundreds of radians, so its rounding shows.
    """
    buckets = np.array([[int((1.0 - t) * spec.time_buckets + 1e-6)] for t in flow.times], dtype=np.float32)
    width = spec.dit.hidden_size
    codes = buckets * _decay(width // 2, width // 2)
    angles = buckets * _decay(spec.dit.time_size // 2, spec.dit.time_size // 2 - 1)
    tables = {k: v for k, v in blocks.flow_tables(flow).items() if k != "flow.times"}
    tables["flow.action_times"] = LazyTensor.of(np.concatenate([np.sin(codes), np.cos(codes)], axis=1), "sinusoids")
    tables["flow.dit_times"] = LazyTensor.of(np.concatenate([np.cos(angles), np.sin(angles)], axis=1), "sinusoids")
    return tables


def _decay(count: int, divisor: int) -> Array:
    """10000^(-k / divisor), k = 0 .. count - 1."""
    exponent = -np.arange(count, dtype=np.float32) * np.float32(math.log(10000.0)) / np.float32(divisor)
    return np.asarray(np.exp(exponent), dtype=np.float32)


def _mlp(b: StageBuilder, x: str, name: str) -> str:
    return linear(b, b.op("relu", linear(b, x, f"{name}.fc1", bias=True)), f"{name}.fc2", bias=True)


def _flow(spec: GrootSpec, flow: FlowSpec) -> tuple[Stage, tuple[tuple[str, str, str], ...]]:
    """One evaluation of the velocity and one step of the solver."""
    b = StageBuilder("flow")
    n, count = spec.chunk_size, symbol("T")
    step, x = b.input("step", "i32", 1), b.input("x", "f32", n, spec.max_action_dim)
    state = _mlp(b, b.input("state", "f32", 1, spec.max_state_dim), "state_encoder")
    memory = b.input("vl", "f32", count, spec.text.hidden_size)
    kinds = (b.input("is_word", "bool", count), b.input("is_picture", "bool", count))
    time = b.op("tile", b.op("embed", step, "@flow.action_times"), rows=n)
    h = b.op("concat", linear(b, x, "action_encoder.fc1", bias=True), time, axis=1)
    h = linear(b, b.op("silu", linear(b, h, "action_encoder.fc2", bias=True)), "action_encoder.fc3", bias=True)
    h = b.op("concat", state, b.op("add", h, "@action_encoder.position_embedding"), axis=0)
    rows, keys = blocks.block_ids(b, (n + 1, 0)), blocks.block_ids(b, (count, 0))
    words, pictures = (b.op("attention_mask", rows, keys, kind) for kind in kinds)
    h = blocks_groot.dit(b, h, b.op("embed", step, "@flow.dit_times"), memory, (words, pictures), spec.dit, "dit")
    h = b.op("slice", h, axis=0, start=1, stop=n + 1)
    velocity = b.op("scale", _mlp(b, h, "action_decoder"), factor=-1.0)
    carries = blocks.sampler_step(b, x, velocity, step, flow, (n, spec.max_action_dim))
    return b.build(), carries


FAMILY = families.add(
    Family("groot", build, doc="Qwen3-VL layers and a DiT flow head, one embodiment", title="GR00T N1.7")
)
