"""TinyVLA's trainer output -> Policy: `best_model.pt` or `checkpoint_epoch_N.pt`, and `config.json` if it is there.

Three layouts are told apart by tensor names. Every size is read from the tensors, only head counts are not: they come
from config.json, else from the original's defaults (3 and 4), else from --spec. The tokenizer is that of
distilbert-base-uncased, which no checkpoint holds: --tokenizer, or a folder `tokenizer`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from vlac.errors import CheckpointError, Unsupported
from vlac.families.tinyvla import TinyVLASpec, shapes
from vlac.io import IO, Camera, Step
from vlac.policy import Policy, Source
from vlac.readers.lerobot import Config
from vlac.readers.prismatic_weights import open_side_file
from vlac.readers.safetensors_file import FLOATS, read_json
from vlac.readers.tokenizer_file import given_tokenizer, read_tokenizer
from vlac.registry import Reader, ReadOptions, readers
from vlac.spec import EncoderSpec, VisionSpec, override
from vlac.weights import Array, LazyTensor, Weights

Pairs = Iterator[tuple[str, LazyTensor]]

LONGEST = 32
"""Tokens that the original cuts an instruction to, whatever max_seq_len is."""

DEAD = ("text_decoder.",)
"""v3's text decoder, which the action does not need."""

TIED = ("text_decoder.token_embed.weight", "text_decoder.head.weight")
"""v3 names one embedding three times."""

STATED = ("image_size", "patch_size", "vision_embed_dim", "vision_layers", "lang_embed_dim", "lang_layers",
          "action_dim", "max_seq_len")  # fmt: skip


def weights_file(folder: Path) -> Path | None:
    """best_model.pt, else the checkpoint of the last epoch."""
    if (folder / "best_model.pt").is_file():
        return folder / "best_model.pt"
    found = ((re.fullmatch(r"checkpoint_epoch_(\d{1,9})\.pt", p.name), p) for p in folder.glob("*.pt"))
    epochs = {int(m[1]): p for m, p in found if m}
    return epochs[max(epochs)] if epochs else None


# --- dimensions ------------------------------------------------------------------------------------------------


def _shape(tensors: Weights, name: str, rank: int) -> tuple[int, ...]:
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{tensors[name].source}: shape {list(shape)}, expected {rank} axes")
    return shape


def _depth(tensors: Weights, name: str) -> int:
    found = {int(m[1]) for n in tensors if (m := re.match(rf"{name}\.blocks\.(\d+)\.", n))}
    if found != set(range(len(found))) or not found:
        raise CheckpointError(f"{name}.blocks: layers {sorted(found)}, expected 0, 1, ...")
    return len(found)


def _spec(tensors: Weights, model: Config, options: ReadOptions) -> TinyVLASpec:
    pooled = "vision_encoder.pos_embed" in tensors
    if not pooled and "fusion_attention.in_proj_weight" not in tensors:
        raise CheckpointError(
            f"{model.path.parent}: neither vision_encoder.pos_embed nor fusion_attention: no layout of TinyVLA"
        )
    width, channels, patch, _ = _shape(tensors, "vision_encoder.patch_embed.weight", 4)
    vocab, d = _shape(tensors, "language_model.token_embed.weight", 2)
    positions = _shape(tensors, "language_model.pos_embed", 3)[1]
    head = "action_head.3" if pooled else "action_head"
    image = _image_size(tensors, model, patch) if pooled else model.size("image_size", 64, most=8192)
    spec = TinyVLASpec(
        vision=VisionSpec(
            hidden_size=width,
            intermediate_size=_shape(tensors, "vision_encoder.blocks.0.mlp.0.weight", 2)[0],
            num_hidden_layers=_depth(tensors, "vision_encoder"),
            num_attention_heads=model.size("vision_heads", 3),
            image_size=image,
            patch_size=patch,
            num_channels=channels,
            layer_norm_eps=1e-5,
            hidden_act="gelu",
        ),
        language=EncoderSpec(
            hidden_size=d,
            intermediate_size=_shape(tensors, "language_model.blocks.0.mlp.0.weight", 2)[0],
            num_hidden_layers=_depth(tensors, "language_model"),
            num_attention_heads=model.size("lang_heads", 4),
        ),
        vocab_size=vocab,
        max_seq_len=positions,
        tokenizer_max_length=min(LONGEST, positions),
        action_dim=_shape(tensors, f"{head}.weight", 2)[0],
        pooled=pooled,
        head_hidden=_shape(tensors, f"{head}.weight", 2)[1] if pooled else 0,
    )
    _agree(spec, model)
    spec = override(spec, options.spec)
    for part, who in ((spec.vision, "vision"), (spec.language, "language")):
        if part.num_attention_heads < 1 or part.hidden_size % part.num_attention_heads:
            raise CheckpointError(
                f"{model.path.parent}: {part.num_attention_heads} {who} heads for width {part.hidden_size}",
                remedy=f"say how many there are: --spec {who}.num_attention_heads=4",
            )
    if spec.vision.image_size % patch or (not pooled and width % 4):
        raise CheckpointError(f"{model.path}: image_size {spec.vision.image_size}, patch {patch}, width {width}")
    return spec


def _image_size(tensors: Weights, model: Config, patch: int) -> int:
    """v1's positions tell it."""
    rows = _shape(tensors, "vision_encoder.pos_embed", 3)[1] - 1
    if math.isqrt(rows) ** 2 != rows:
        raise CheckpointError(f"{model.path.parent}: vision_encoder.pos_embed has {rows} patches, which is no square")
    return math.isqrt(rows) * patch


def _agree(spec: TinyVLASpec, model: Config) -> None:
    """config.json must say what the tensors say."""
    found = dict(
        zip(
            STATED,
            (
                spec.vision.image_size, spec.vision.patch_size, spec.vision.hidden_size, spec.vision.num_hidden_layers,
                spec.language.hidden_size, spec.language.num_hidden_layers, spec.action_dim, spec.max_seq_len,
            ),
            strict=True,
        )
    )  # fmt: skip
    wrong = [f"{k} is {model.raw(k)}, tensors say {v}" for k, v in found.items() if model.raw(k, v) != v]
    if wrong:
        raise CheckpointError(f"{model.path}: {'; '.join(wrong)}", remedy="config.json belongs to another checkpoint")


# --- weights ---------------------------------------------------------------------------------------------------


def _both(tensors: Weights, theirs: str, ours: str) -> Pairs:
    for part in ("weight", "bias"):
        yield f"{ours}.{part}", tensors[f"{theirs}.{part}"]


def _attention(tensors: Weights, theirs: str, ours: str, width: int) -> Pairs:
    """nn.MultiheadAttention: q, k and v are thirds of in_proj."""
    for part in ("weight", "bias"):
        joined = tensors[f"{theirs}.in_proj_{part}"]
        if joined.shape[0] != 3 * width:
            raise CheckpointError(f"{joined.source}: {list(joined.shape)}, expected {3 * width} rows: q, k, v")
        for i, name in enumerate("qkv"):
            rows = slice(i * width, (i + 1) * width)
            yield f"{ours}.{name}_proj.{part}", joined.map(lambda w, r=rows: w[r], (width, *joined.shape[1:]))  # type: ignore[misc]
    yield from _both(tensors, f"{theirs}.out_proj", f"{ours}.out_proj")


def _encoder(tensors: Weights, theirs: str, ours: str, spec: VisionSpec | EncoderSpec) -> Pairs:
    for i in range(spec.num_hidden_layers):
        block, layer = f"{theirs}.blocks.{i}", f"{ours}.layers.{i}"
        for n in (1, 2):
            yield from _both(tensors, f"{block}.norm{n}", f"{layer}.layer_norm{n}")
        yield from _attention(tensors, f"{block}.attn", f"{layer}.self_attn", spec.hidden_size)
        yield from _both(tensors, f"{block}.mlp.0", f"{layer}.mlp.fc1")
        yield from _both(tensors, f"{block}.mlp.3", f"{layer}.mlp.fc2")


def _rows(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Rows of a [1, n, d] tensor as [stop - start, d]."""
    return tensor.map(lambda w: w[0, start:stop], (stop - start, tensor.shape[-1]))


def sincos_positions(grid: int, width: int) -> Array:
    """[grid*grid, width], row-major: sin(y f), cos(y f), sin(x f), cos(x f) with f_k = 10000^(-k/c), c = width/4."""
    frequency = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    y, x = (np.repeat(np.arange(grid), grid)[:, None] * frequency, np.tile(np.arange(grid), grid)[:, None] * frequency)
    table: Array = np.concatenate([np.sin(y), np.cos(y), np.sin(x), np.cos(x)], axis=1).astype(np.float32)
    return table


def _vision(tensors: Weights, spec: TinyVLASpec) -> Pairs:
    v, name = spec.vision, "vision_encoder"
    patch = tensors[f"{name}.patch_embed.weight"]
    flat = (v.hidden_size, v.num_channels * v.patch_size**2)
    yield "vision.patch_embedding.weight", patch.map(lambda w: w.reshape(flat), flat)
    yield "vision.patch_embedding.bias", tensors[f"{name}.patch_embed.bias"]
    place = tensors[f"{name}.pos_embed" if spec.pooled else f"{name}.pos_embed_cls"]
    token = tensors[f"{name}.cls_token"]
    yield "vision.class_embedding", token.map(lambda w: w[0] + place.load()[0, :1], (1, v.hidden_size))
    yield (
        "vision.position_embedding",
        _rows(place, 1, place.shape[1])
        if spec.pooled
        else LazyTensor.of(sincos_positions(v.grid, v.hidden_size), "sin-cos positions"),
    )
    yield from _encoder(tensors, name, "vision", v)
    yield from _both(tensors, f"{name}.norm", "vision.post_layernorm")


def _network(tensors: Weights, spec: TinyVLASpec) -> Pairs:
    yield from _vision(tensors, spec)
    yield "text.embed_tokens.weight", tensors["language_model.token_embed.weight"]
    yield "text.position_embedding", _rows(tensors["language_model.pos_embed"], 0, spec.max_seq_len)
    yield from _encoder(tensors, "language_model", "text", spec.language)
    yield from _both(tensors, "language_model.norm", "text.norm")
    names = (
        {"vision_proj.0": "connector.fc1", "vision_proj.2": "connector.fc2", "action_head.0": "head.fc1",
         "action_head.3": "head.fc2"}
        if spec.pooled
        else {"vision_proj": "connector.proj", "vision_norm": "connector.norm", "fusion_output_norm": "fusion.norm",
              "action_head": "head.fc1"}
    )  # fmt: skip
    for theirs, ours in names.items():
        yield from _both(tensors, theirs, ours)
    if not spec.pooled:
        yield from _attention(tensors, "fusion_attention", "fusion", spec.language.hidden_size)


class _Noted(Weights):
    """Weights that remember which names were asked for."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        super().__init__(tensors)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> LazyTensor:
        self.asked.add(name)
        return super().__getitem__(name)


def canonical_weights(tensors: Weights, spec: TinyVLASpec) -> Weights:
    """Canonical name -> tensor; shapes and dtypes checked, nothing read. CheckpointError names what does not fit."""
    noted = _Noted(tensors)
    found = dict(_network(noted, spec))
    for name, shape in shapes(spec).items():
        tensor = found[name]
        if tensor.shape != shape or tensor.dtype.upper() not in FLOATS:
            raise CheckpointError(
                f"{tensor.source}: {tensor.dtype.upper()} {list(tensor.shape)} where the network has {list(shape)}"
            )
    extra = [n for n in tensors if n not in noted.asked and not n.startswith(DEAD)]
    if extra:
        raise CheckpointError(f"{len(extra)} tensors that the network does not have: {', '.join(extra[:6])}")
    return Weights({name: found[name] for name in shapes(spec)})


# --- the policy ------------------------------------------------------------------------------------------------


def _io(spec: TinyVLASpec) -> IO:
    side = spec.vision.image_size
    tokenise = {"max_length": spec.tokenizer_max_length, "padding": "longest", "add_special_tokens": True}
    return IO(
        cameras=(Camera("observation.images.image", (3, side, side)),),
        image_steps=(),
        state_key="",
        state_dim=0,
        state_steps=(),
        text_steps=(Step("tokenise", {**tokenise, "truncation": spec.max_seq_len >= LONGEST}),),
        action_key="action",
        action_dim=spec.action_dim,
        max_action_dim=spec.action_dim,
        chunk_size=1,
        n_action_steps=1,
        action_steps=(),
        normalised_action_steps=(),
        image_size=side,
        vocab_size=spec.vocab_size,
    )


def _tokenizer(folder: Path, options: ReadOptions, warnings: list[str]) -> bytes | None:
    if options.tokenizer is not None:
        return given_tokenizer(options.tokenizer)
    for path in (folder / "tokenizer" / "tokenizer.json", folder / "tokenizer.json"):
        if path.is_file():
            return read_tokenizer(path)
    error = CheckpointError(
        f"{folder}: no tokenizer", remedy="give that of distilbert-base-uncased: --tokenizer FOLDER"
    )
    if not options.headers_only:
        raise error
    warnings.append(str(error))
    return None


def read(path: Path, options: ReadOptions) -> Policy:
    """The Policy of a folder or of a .pt file. Raises CheckpointError and Unsupported as in vlac.errors."""
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    table = read_json(config) if config.is_file() else {}
    if not isinstance(table, dict):
        raise CheckpointError(f"{config}: not an object")
    if "llava_pythia" in str(table.get("model_type", "")):
        raise Unsupported(
            f"{folder}: model_type {table['model_type']!r}: the TinyVLA of arXiv 2409.12514 (LLaVA-Pythia with a "
            "diffusion head) is another model than the toy of the same name that vlac compiles"
        )
    file = path if path.is_file() else weights_file(folder)
    if file is None:
        raise CheckpointError(f"{folder}: neither best_model.pt nor checkpoint_epoch_N.pt")
    tensors = open_side_file(file, "model_state_dict")
    model = Config(config, Config(config, table).table("model"))
    spec = _spec(tensors, model, options)
    warnings: list[str] = []
    return Policy(
        family="tinyvla",
        name=folder.resolve().name,
        spec=spec,
        weights=canonical_weights(tensors, spec),
        io=_io(spec),
        source=Source(str(path)),
        tokenizer=_tokenizer(folder, options, warnings),
        warnings=tuple(warnings),
        ignored=("text_decoder",) if any(n.startswith(DEAD) for n in tensors) else (),
        parameters=sum(math.prod(t.shape) for n, t in tensors.items() if n not in TIED),
    )


def detect(path: Path) -> bool:
    """A trainer's .pt file or a folder that holds one, or a folder of the other model of this name."""
    if path.is_file():
        return path.suffix == ".pt"
    if weights_file(path) is not None and not (path / "model.safetensors").exists():
        return True
    config = path / "config.json"
    table = read_json(config) if config.is_file() else None
    return isinstance(table, dict) and "llava_pythia" in str(table.get("model_type", ""))


READER = readers.add(Reader("tinyvla", detect, read, doc="TinyVLA's best_model.pt"))
