"""GGUF targets: one self-contained file with weights, program, io, tokenizer, manifest and golden observations.

Each row of `_RECIPES` is a target: which format linears and embedding tables get, and how the file calls itself.
Tensors are streamed: one is in memory at a time. Names follow llama.cpp's manner by the table `_RENAMES`, and the
program inside the file uses those names; the file is named by the GGUF naming convention.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import vlac
from vlac.artifact import Sidecars
from vlac.errors import Unsupported
from vlac.formats import FORMATS, encode, get_format
from vlac.gguf import (
    DEFAULT_ALIGNMENT,
    GOLDEN,
    IO_KEY,
    MANIFEST,
    MANIFEST_CRC,
    MAX_DIMS,
    MAX_NAME,
    PROGRAM,
    TOKENIZER,
    GgufWriter,
    Value,
    crc32,
)
from vlac.graph import Program, Stage
from vlac.policy import match_format
from vlac.registry import Progress, Target, targets
from vlac.rewrites.strides import pad_hidden_units
from vlac.targets._dialect_emit import dialects_of
from vlac.targets._engines import engines_for

ENGINES = ("ggml", "torch")

# --- which format a tensor gets ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a target stores linears in, general.file_type for it, the label in the file name, and (pattern, format) of
    linears that are stored finer, the last match wins."""

    linear: str
    file_type: int
    label: str
    doc: str
    finer: tuple[tuple[str, str], ...] = ()


# What a rounding costs was measured per linear on SmolVLA (relative L2 of a chunk, all else float32): in bfloat16 the
# patches 2.3e-3, the first layer of the vision tower 2.5e-3, its output projections 2.5e-3 (as much as both matrices of
# its MLPs), the connector 1.5e-3, the text model's attention 3.4e-3, each later vision layer 0.5e-3 to 1.5e-3.
_PATCHES = (("vision.patch_embedding.*", "f16"),)
_FIRST = (*_PATCHES, ("vision.layers.0.*", "f16"), ("connector.*", "f16"))
_JOINING = (("vision.*.out_proj.*", "f16"),)

# bfloat16: 0.0066 becomes 0.0039, for a twentieth of the products at 0.6 of the speed; with what Q8_0 holds finer as
# well 0.0036, for a seventh of them.
_FINER_BF16 = (
    *_PATCHES,
    ("vision.layers.0.self_attn.*", "f16"),
    ("connector.*", "f16"),
    ("text.*.self_attn.*", "f16"),
)

# Of Q8_0's drift (SmolVLA: 0.016) the vision tower carries most, for its rounding passes through everything behind it,
# and bfloat16 is faster there as well where the CPU has it (1.5 of Q8_0); float16 costs no time where there are few
# rows or layers. 96 MB of SmolVLA's 520, drift 0.009.
_FINER_Q8 = (("vision.*", "bf16"), *_FIRST, *_JOINING)

# Fewer bits: where they cost most in vision stays at 16. What runs in every step of the loop meets too few rows for
# Q6_K's kernel (50: 0.8 of Q5_K's speed); with 5.5 bits there the drift of SmolVLA is still below what it was.
_FINER_Q5 = (*_PATCHES, ("vision.layers.0.*", "bf16"))
_FINER_Q6 = (*_FINER_Q5, ("vision.*.out_proj.*", "bf16"), ("expert.*", "q5_k"))


_RECIPES = {
    "gguf-f32": Recipe("f32", 0, "F32", "float32 throughout: the reference on ggml"),
    "gguf-f16": Recipe(
        "f16", 1, "F16", "linears and embeddings float16; activations of a linear are rounded to float16"
    ),
    "gguf-bf16": Recipe(
        "bf16", 32, "BF16", "bfloat16, float16 where it matters; fast where the CPU has AVX512_BF16", _FINER_BF16
    ),
    "gguf-q8": Recipe("q8_0", 7, "Q8_0", "8.5 bits a weight (Q8_0), 16 in the vision tower", _FINER_Q8),
    "gguf-q6": Recipe(
        "q6_k", 18, "Q6_K", "6.6 bits a weight (Q6_K), 5.5 in the loop, 16 where it matters in vision", _FINER_Q6
    ),
    "gguf-q5": Recipe("q5_k", 16, "Q5_K_S", "5.5 bits a weight (Q5_K), 16 where it matters in vision", _FINER_Q5),
    "gguf-q4": Recipe("q4_k", 14, "Q4_K_S", "4.5 bits a weight (Q4_K), Q8_0 where rows do not suit", _PATCHES),
}

_MAX_WASTE = 1 / 15
"""Share of zero columns a linear may get to suit 256-blocks: 960 -> 1024 and 720 -> 768 pay, 320 -> 512 does not."""


def _plan(linear: str, finer: tuple[tuple[str, str], ...] = ()) -> Callable[[str, tuple[int, ...], str], str]:
    def suited(fmt: str, row: int) -> str:
        """The format, or Q8_0 where its blocks would waste too much."""
        block = get_format(fmt).block
        padded = -(-row // block) * block
        return fmt if block <= 32 or padded - row <= row * _MAX_WASTE else "q8_0"

    def plan(name: str, shape: tuple[int, ...], role: str) -> str:
        """Format asked for by role: heads and everything small stay f32, linears may be padded, tables may not."""
        row = shape[-1] if shape else 1
        if role not in ("linear", "embed") or linear == "f32":
            return "f32"
        if role == "linear":
            return suited(match_format(name, finer, linear), row)
        return next((f for f in (linear, "q8_0", "f16") if row % get_format(f).block == 0), "f16")

    return plan


def _lower(program: Program, options: Mapping[str, Any]) -> Program:
    from vlac.lower import pad_to_blocks
    from vlac.rewrites.corrections import without_rounding

    return pad_to_blocks(pad_hidden_units(without_rounding(program, _ROUNDS_ITSELF), _FLOATS, _PRODUCT))


_FLOATS, _PRODUCT = ("f32", "f16", "bf16"), 32
"""Formats without blocks, and how many columns their kernels multiply at once."""
_ROUNDS_ITSELF = ("q8_0", "q5_0", "q4_1", "q4_0", "iq4_nl")
"""Formats with which ggml's kernels multiply integers: they round what they multiply in blocks of 32 themselves."""

CONTAINERS = {
    **dict.fromkeys(("w4g32", "w4g64", "w4g128", "w4row"), "q4_0"),
    **dict.fromkeys(("w8g32", "w8g64", "w8g128", "w8row"), "q8_0"),
}
"""Blocks of 32 hold wider groups as well, the scale repeated."""


# --- names -------------------------------------------------------------------------------------------------------

_RENAMES = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"^vision\.layers\.(\d+)\.", r"v.blk.\1."),
        (r"^text\.layers\.(\d+)\.", r"blk.\1."),
        (r"^expert\.layers\.(\d+)\.", r"a.blk.\1."),
        (r"^vision\.patch_embedding\.", "v.patch_embd."),
        (r"^vision\.position_embedding$", "v.position_embd.weight"),
        (r"^vision\.post_layernorm\.", "v.post_ln."),
        (r"^connector\.proj\.", "mm.proj."),
        (r"^text\.embed_tokens\.", "token_embd."),
        (r"^text\.norm\.", "output_norm."),
        (r"^expert\.norm\.", "a.output_norm."),
        (r"\bself_attn\.([qkv]+)_proj\b", r"attn_\1"),
        (r"\bself_attn\.out_proj\b", "attn_out"),
        (r"\bself_attn\.o_proj\b", "attn_output"),
        (r"\bmlp\.(gate|up|down|gate_up)_proj\b", r"ffn_\1"),
        (r"\bmlp\.fc1\b", "ffn_up"),
        (r"\bmlp\.fc2\b", "ffn_down"),
        (r"\blayer_norm([12])\b", r"ln\1"),
        (r"\binput_layernorm\b", "attn_norm"),
        (r"\bpost_attention_layernorm\b", "ffn_norm"),
    )
)


def tensor_name(name: str) -> str:
    """The name of a parameter in the file: llama.cpp's manner where a rule knows it, shortened to 63 bytes."""
    for pattern, to in _RENAMES:
        name = pattern.sub(to, name)
    if len(name) > MAX_NAME:
        name = f"{name[: MAX_NAME - 9]}.{zlib.crc32(name.encode()):08x}"
    return name


def _rename(program: Program) -> tuple[Program, dict[str, str]]:
    """The program under the file's names, and file name -> program name. Unsupported when two clash."""
    names = {name: tensor_name(name) for name in program.params}
    taken: dict[str, str] = {GOLDEN: ""}
    for old, new in names.items():
        if new in taken:
            raise Unsupported(f"parameters {taken[new]!r} and {old!r} would both be called {new!r} in a GGUF file")
        taken[new] = old

    def rename(stage: Stage) -> Stage:
        nodes = tuple(
            dataclasses.replace(n, inputs=tuple(f"@{names[i[1:]]}" if i.startswith("@") else i for i in n.inputs))
            for n in stage.nodes
        )
        return dataclasses.replace(stage, nodes=nodes)

    params = {names[old]: param for old, param in program.params.items()}
    renamed = program.replace(stages=tuple(rename(s) for s in program.stages), params=params)
    return renamed, {new: old for new, old in taken.items() if old}


def size_label(parameters: int) -> str:
    """Parameter count as GGUF file names write it: 450_046_176 -> "450M", 3_300_000_000 -> "3.3B"."""
    for unit, letter in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "K")):
        if parameters >= unit:
            value = parameters / unit
            return f"{value:.1f}".removesuffix(".0") + letter if value < 10 else f"{value:.0f}{letter}"
    return str(parameters)


def _parts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """basename, size_label, finetune and name of a model, from its manifest."""
    family = str(manifest["family"])
    base = str(manifest.get("display_name") or family).strip().replace(" ", "-").replace("/", "-")
    name = str(manifest.get("name") or base)
    # "smolvla_base" of family "smolvla" is the fine-tune "base"
    finetune = re.sub(rf"^{re.escape(family)}[-_. ]*", "", name, flags=re.IGNORECASE)
    finetune = re.sub(r"[^\w.]+", "-", finetune).strip("-.")
    return {
        "name": name,
        "basename": base,
        "size_label": size_label(int(manifest.get("parameters", 0))),
        "finetune": finetune,
    }


def file_name(manifest: Mapping[str, Any], label: str) -> str:
    """BaseName-SizeLabel-FineTune-ENCODING.gguf (the GGUF naming convention); an empty part is left out."""
    p = _parts(manifest)
    return "-".join(x for x in (p["basename"], p["size_label"], p["finetune"], label) if x) + ".gguf"


# --- writing -----------------------------------------------------------------------------------------------------


def _metadata(recipe: Recipe, program: str, sidecars: Sidecars, manifest: Mapping[str, Any]) -> dict[str, Value]:
    parts = _parts(manifest)
    text = json.dumps(manifest, sort_keys=True, indent=1)
    kv: dict[str, Value] = {
        "general.architecture": Value("string", str(manifest["family"])),
        "general.type": Value("string", "model"),
        **{f"general.{key}": Value("string", value) for key, value in parts.items() if value},
        "general.quantized_by": Value("string", f"vlac {vlac.__version__}"),
        "general.file_type": Value("u32", recipe.file_type),
        "general.quantization_version": Value("u32", 2),
        "general.alignment": Value("u32", DEFAULT_ALIGNMENT),
    }
    if manifest.get("license"):
        kv["general.license"] = Value("string", str(manifest["license"]))
    kv[MANIFEST] = Value("string", text)
    kv[MANIFEST_CRC] = Value("u32", zlib.crc32(text.encode()))
    kv[PROGRAM] = Value("string", program)
    kv[IO_KEY] = Value("string", sidecars.io)
    if sidecars.tokenizer is not None:
        kv[TOKENIZER] = Value("string", sidecars.tokenizer.decode("utf-8"))
    return kv


def _storable(program: Program) -> None:
    for name, param in program.params.items():
        form = get_format(param.format)
        if form.ggml_type is None or not 1 <= len(param.shape) <= MAX_DIMS or param.shape[-1] % form.block:
            raise Unsupported(
                f"tensor {name}: {param.format}{list(param.shape)} cannot be stored in GGUF",
                remedy=f"choose one of {', '.join(f.name for f in FORMATS.values() if f.ggml_type is not None)}, "
                "with rows that are multiples of its block",
            )


def _emit(
    recipe: Recipe, program: Program, sidecars: Sidecars, folder: Path, options: Mapping[str, Any], progress: Progress
) -> None:
    _storable(program)
    renamed, names = _rename(program)
    text = str(renamed)
    crcs = dict.fromkeys(names, "0" * 8)
    if sidecars.golden is not None:
        crcs[GOLDEN] = "0" * 8
    crcs.update({PROGRAM: crc32(text.encode()), IO_KEY: crc32(sidecars.io.encode())})
    if sidecars.tokenizer is not None:
        crcs[TOKENIZER] = crc32(sidecars.tokenizer)
    engines = engines_for(program, sidecars.manifest.get("engines", ENGINES))
    manifest = {"files": {}, **sidecars.manifest, **engines, "crc32": crcs, "tensor_names": names}
    rows = [(name, p.format, p.shape) for name, p in renamed.params.items()]
    if sidecars.golden is not None:
        rows.append((GOLDEN, "i8", (len(sidecars.golden),)))
    path = folder / file_name(manifest, recipe.label)
    with path.open("w+b") as out:
        writer = GgufWriter(out, _metadata(recipe, text, sidecars, manifest), rows)
        for done, (name, param) in enumerate(renamed.params.items()):
            progress("writing weights", done, len(rows))
            tensor = program.weights[names[name]]
            crcs[name] = writer.stream(name, (encode(param.format, rows, tensor.importance) for rows in tensor.rows()))
        if sidecars.golden is not None:
            crcs[GOLDEN] = writer.write(GOLDEN, np.frombuffer(sidecars.golden, dtype=np.uint8))
        writer.rewrite(_metadata(recipe, text, sidecars, manifest))
    progress("writing weights", len(rows), len(rows))


def _target(name: str, recipe: Recipe) -> Target:
    def emit(
        program: Program, sidecars: Sidecars, folder: Path, options: Mapping[str, Any], progress: Progress
    ) -> None:
        _emit(recipe, program, sidecars, folder, options, progress)

    def naming(manifest: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
        return file_name(manifest, recipe.label), _parts(manifest)

    plan = _plan(recipe.linear, recipe.finer)
    dialects = dialects_of(_plan(recipe.linear), recipe.file_type, naming)
    own = ("smooth-norms",) if get_format(recipe.linear).block > 1 else ()  # ggml rounds activations with those to int8
    return Target(
        name,
        plan,
        _lower,
        emit,
        engines=ENGINES,
        doc=recipe.doc,
        passes=own,
        dialects=dialects,
        containers=CONTAINERS,
    )


for _name, _recipe in _RECIPES.items():
    targets.add(_target(_name, _recipe))
