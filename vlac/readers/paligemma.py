"""Policies on PaliGemma as they lie on disk: names of every generation, sizes from tensor shapes, weights checked.

Shared by pi0, pi0.5 and pi0-FAST, from LeRobot's folders and openpi's. Sizes are read from shapes; what shapes do not
tell is stated here: every published Gemma variant has one key/value head (so head_dim is the height of k_proj), and the
SigLIP so400m tower (width 1152) has 16 heads. --spec text.num_key_value_heads, text.head_dim and
vision.num_attention_heads say otherwise; nothing else may contradict the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlac.errors import CheckpointError, Unsupported, VlacError
from vlac.io import Camera, Step
from vlac.readers import take
from vlac.spec import DecoderSpec, VisionSpec
from vlac.weights import LazyTensor, Weights

TOKENIZER = "google/paligemma-3b-pt-224"
VISION_HEADS = {1152: 16}
"""Width of a SigLIP tower -> its heads."""

_MODEL = "paligemma_with_expert.paligemma.model."
_PARTS = {
    "vision.patch_embedding.": f"{_MODEL}vision_tower.vision_model.embeddings.patch_embedding.",
    "vision.position_embedding": f"{_MODEL}vision_tower.vision_model.embeddings.position_embedding.weight",
    "vision.layers.": f"{_MODEL}vision_tower.vision_model.encoder.layers.",
    "vision.post_layernorm.": f"{_MODEL}vision_tower.vision_model.post_layernorm.",
    "connector.proj.": f"{_MODEL}multi_modal_projector.linear.",
    "text.lm_head.": "paligemma_with_expert.paligemma.lm_head.",
    "text.": f"{_MODEL}language_model.",
    "expert.": "paligemma_with_expert.gemma_expert.model.",
}
"""Canonical prefix -> the name on disk since October 2025, without the leading `model.` that LeRobot writes."""

EMBEDDING, HEAD = "text.embed_tokens.weight", "text.lm_head.weight"
_ONE_PLUS = re.compile(r"(text|expert)\.(layers\.\d+\.(input|post_attention)_layernorm|norm)\.weight")
_OLDER = (
    (re.compile(r"(\.paligemma)\.(vision_tower|multi_modal_projector)\."), r"\1.model.\2."),
    (re.compile(r"(\.paligemma)\.language_model\.model\."), r"\1.model.language_model."),
    (re.compile(r"(\.paligemma)\.language_model\.lm_head\."), r"\1.lm_head."),
)
"""Names written before transformers 4.52 rearranged PaliGemma."""

UNREAD = (
    "paligemma_with_expert.paligemma.lm_head.*",
    f"{_MODEL}language_model.embed_tokens.*",
    f"{_MODEL}language_model.norm.*",
    "paligemma_with_expert.gemma_expert.lm_head.*",
    "paligemma_with_expert.gemma_expert.model.embed_tokens.*",
)
"""Tensors that a checkpoint may hold though its policy never reads them."""


@dataclass(frozen=True)
class Source:
    """Tensors with plain names, the file they came from (for errors), --spec, and what to do with a problem."""

    tensors: Weights
    where: Path
    given: Mapping[str, Any]
    problem: Callable[[VlacError], None]

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Shape of a canonical weight; CheckpointError when it is missing or has another rank."""
        source = disk_name(name)
        if source not in self.tensors:
            raise CheckpointError(f"{self.where}: tensor {source} is missing", remedy="the checkpoint is incomplete")
        shape = self.tensors[source].shape
        if len(shape) != rank:
            raise CheckpointError(f"{self.where}: tensor {source} has shape {list(shape)}, expected {rank} axes")
        return shape

    def layers(self, name: str) -> int:
        """Number of layers `{name}.layers.{i}`."""
        head = re.escape(disk_name(f"{name}.layers."))
        found = [int(m[1]) for m in (re.match(rf"{head}(\d+)\.", key) for key in self.tensors) if m]
        return max(found, default=-1) + 1

    def size(self, field: str, default: int) -> int:
        """A size from --spec, else the default."""
        value = self.given.get(field, default)
        try:
            return int(value)
        except (TypeError, ValueError):
            raise Unsupported(f"--spec {field}={value!r}: expected a whole number") from None

    def left_over(self) -> dict[str, Any]:
        """--spec fields that no other size is derived from."""
        return {k: v for k, v in self.given.items() if k not in TAKEN}


@dataclass(frozen=True)
class Common:
    """What every family of this kind takes from a checkpoint besides its tensors."""

    source: Source
    cameras: tuple[Camera, ...]
    image_size: int
    image_steps: tuple[Step, ...]
    chunk_size: int
    n_action_steps: int
    max_action_dim: int
    max_state_dim: int
    tokenizer_max_length: int


TAKEN = ("text.head_dim", "text.num_key_value_heads", "vision.num_attention_heads")
"""--spec fields that other sizes are derived from."""


def disk_name(name: str) -> str:
    """The plain name on disk of a canonical weight; heads such as state_proj have the same."""
    ours = next((p for p in _PARTS if name.startswith(p)), None)
    return name if ours is None else f"{_PARTS[ours]}{name[len(ours) :]}"


def plain_names(tensors: Weights, renamed: Mapping[str, str] = {}) -> Weights:
    """Every generation's names as the present ones without `model.`; a tied embedding is there under both its names.

    renamed: beginnings of head names that a family takes for others ("time_mlp_in." -> "action_time_mlp_in.").
    """
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("model.")
        for pattern, replacement in _OLDER:
            plain = pattern.sub(replacement, plain)
        for old, new in renamed.items():
            plain = new + plain[len(old) :] if plain.startswith(old) else plain
        if plain in result:
            raise CheckpointError(f"{tensor.source or name}: a second tensor for {plain}")
        result[plain] = tensor
    embedding, head = disk_name(EMBEDDING), disk_name(HEAD)
    for one, other in ((embedding, head), (head, embedding)):
        if one in result:
            result.setdefault(other, result[one])
    return Weights(result)


# --- sizes -----------------------------------------------------------------------------------------------------


def vision_spec(source: Source, image_size: int) -> VisionSpec:
    """The tower that sees images of image_size x image_size. Raises Unsupported when it has another grid."""
    positions, width = source.shape("vision.position_embedding", 2)
    patch = source.shape("vision.patch_embedding.weight", 4)
    heads = source.size("vision.num_attention_heads", VISION_HEADS.get(width, 0))
    if heads < 1:
        source.problem(
            CheckpointError(
                f"{source.where}: a vision tower of width {width} is not known, and tensors do not tell its heads",
                remedy="say them, for example --spec vision.num_attention_heads=16",
            )
        )
        heads = 1
    spec = VisionSpec(
        hidden_size=width,
        intermediate_size=source.shape("vision.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=source.layers("vision"),
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch[-1],
        num_channels=patch[1],
    )
    if spec.grid**2 != positions or width % heads:
        raise Unsupported(
            f"{source.where}: images of {image_size}x{image_size} give {spec.grid}x{spec.grid} patches of {patch[-1]}; "
            f"the tower has {positions} positions, width {width} and {heads} heads",
            remedy="image_resolution must be the tower's own image size",
        )
    return spec


def text_spec(source: Source) -> DecoderSpec:
    """PaliGemma's decoder."""
    q, kv = (source.shape(f"text.layers.0.self_attn.{p}_proj.weight", 2)[0] for p in "qk")
    kv_heads = source.size("text.num_key_value_heads", 1)
    if "text.head_dim" in source.given:
        kv_heads = kv // max(1, source.size("text.head_dim", 0))
    d = kv // kv_heads if kv_heads > 0 else 0
    if d < 2 or d % 2 or kv % d or q % d or (q // d) % kv_heads or d != source.size("text.head_dim", d):
        raise CheckpointError(
            f"{source.where}: q and k projections of {q} and {kv} rows do not hold heads of size "
            f"{source.size('text.head_dim', d)} with {kv_heads} key/value heads",
            remedy="say the right sizes with --spec text.head_dim=256 or --spec text.num_key_value_heads=1",
        )
    vocab, width = source.shape(EMBEDDING, 2)
    return DecoderSpec(
        hidden_size=width,
        intermediate_size=source.shape("text.layers.0.mlp.gate_proj.weight", 2)[0],
        num_hidden_layers=source.layers("text"),
        num_attention_heads=q // d,
        num_key_value_heads=kv_heads,
        head_dim=d,
        vocab_size=vocab,
        rms_norm_eps=1e-6,
        hidden_act="gelu_pytorch_tanh",
    )


def expert_spec(source: Source, text: DecoderSpec) -> DecoderSpec:
    """The action expert: PaliGemma's layers and heads at another width."""
    layers = source.layers("expert")
    if layers != text.num_hidden_layers:
        raise CheckpointError(f"{source.where}: {layers} expert layers beside {text.num_hidden_layers} of PaliGemma")
    ffn, width = source.shape("expert.layers.0.mlp.gate_proj.weight", 2)
    if width % 2:
        raise Unsupported(f"{source.where}: an expert of odd width {width} has no time embedding")
    return replace(text, hidden_size=width, intermediate_size=ffn, vocab_size=0)


# --- weights ---------------------------------------------------------------------------------------------------


def take_weights(source: Source, shapes: Mapping[str, tuple[int, ...]], unread: tuple[str, ...] = ()) -> Weights:
    """Canonical name -> tensor, shape and dtype checked, Gemma's norms as 1 + w; tensor data is not read.

    unread: patterns of plain names that may be there besides.
    """
    taken = take.take_weights(source.tensors, source.where, shapes, disk_name, (*UNREAD, *unread), source.problem)
    return Weights({n: t.map(lambda w: w + 1) if _ONE_PLUS.fullmatch(n) else t for n, t in taken.items()})
