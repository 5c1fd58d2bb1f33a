"""Writes a policy as a GGUF file in another engine's layout: its own tensors under that engine's names, nothing fused.

`fit` finds out whether the layout can say what the policy is, and in which format each tensor will lie; `emit` streams
the file. Program-independent: the tables (vlac.gguf_dialects) speak of the policy's canonical weights. vlac's io,
manifest, tokenizer and golden answers ride along under keys of its own, which the engines do not read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import vlac
from vlac.artifact import Sidecars
from vlac.errors import ArtifactError, Unsupported
from vlac.formats import encode, get_format
from vlac.gguf import (
    DEFAULT_ALIGNMENT,
    GOLDEN,
    IO_KEY,
    MANIFEST,
    MANIFEST_CRC,
    TOKENIZER,
    GgufWriter,
    Value,
)
from vlac.gguf_dialects import Dim, Layout, Row, dialects, key_checksum, layout_of, relations, sizes, tensor_checksum
from vlac.graph import Program
from vlac.registry import Dialect, Progress
from vlac.weights import LazyTensor, Weights

if TYPE_CHECKING:
    from vlac.policy import Policy

Plan = Callable[[str, tuple[int, ...], str], str]
Naming = Callable[[Mapping[str, Any]], tuple[str, Mapping[str, str]]]
"""manifest -> (file name, general.* texts)."""


# --- what a policy is, in the tables' words ---------------------------------------------------------------------


def policy_dims(policy: Policy) -> dict[str, Dim]:
    """Dimension -> value: the spec's fields dotted, flow.*, io.*."""
    dims: dict[str, Dim] = {k: v for k, v in _leaves(policy.spec, "") if isinstance(v, (bool, int, float, str))}
    io, flow = policy.io, policy.flow
    dims |= {"io.state_dim": io.state_dim, "io.action_dim": io.action_dim, "io.cameras": len(io.cameras)}
    dims |= {"io.n_action_steps": io.n_action_steps}
    if flow is not None:
        dims |= {"flow.num_steps": len(flow.times)}
        dims |= {"flow.min_period": flow.min_period, "flow.max_period": flow.max_period}
    dims |= {"io.max_state_dim": max(32, io.state_dim), "io.adarms": True}
    if "vision.image_size" in dims:
        factor = int(dims.get("scale_factor", 1))
        dims["io.image_tokens"] = (int(dims["vision.image_size"]) // int(dims["vision.patch_size"]) // factor) ** 2
    return dims


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(value):
        inner = getattr(value, f.name)
        if dataclasses.is_dataclass(inner):
            yield from _leaves(inner, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, inner


def _defaults(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(value):
        inner = getattr(value, f.name)
        if dataclasses.is_dataclass(inner):
            yield from _defaults(inner, f"{prefix}{f.name}.")
        elif f.default is not dataclasses.MISSING:
            yield prefix + f.name, f.default


def _equal(a: object, b: object) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        return isinstance(a, (int, float)) and isinstance(b, (int, float)) and math.isclose(a, b, rel_tol=1e-6)
    return a == b


def refusals(policy: Policy, layout: Layout, dims: Mapping[str, Dim]) -> list[str]:
    """Why an engine cannot run this policy, in words with numbers; empty when it can."""
    found = [
        f"{name} is {dims[name]!r}, the engine has {value!r}"
        for name, value in layout.fixed.items()
        if name in dims and not _equal(dims[name], value)
    ]
    found += [
        f"{name} is {dims[name]}, the engine has at most {most}"
        for name, most in layout.at_most.items()
        if name in dims and int(dims[name]) > most
    ]
    found += [
        f"{name} is {dims[name]!r} and {other} is {dims[other]!r}; the engine has one value for both"
        for name, other in layout.same.items()
        if not _equal(dims[name], dims[other])
    ]
    for key in layout.keys:
        value = dims.get(key.field)
        if isinstance(value, (int, float)) and not key.low <= value <= key.high:
            found.append(f"{key.field} is {value}, the engine takes {key.low:g} to {key.high:g} ({key.name})")
    found += [] if found else relations(layout, dims)
    found += [] if found else layout.hazards(dims)[0]
    return found + _flow_refusals(policy) + _unspoken(policy, layout)


def _flow_refusals(policy: Policy) -> list[str]:
    flow = policy.flow
    if flow is None:
        return []
    uniform = type(flow).euler(len(flow.times), flow.min_period, flow.max_period)
    if flow.solver != "euler" or flow.times != uniform.times or flow.dts != uniform.dts:
        return [f"the flow's time grid ({flow.solver}, {len(flow.times)} steps) is not uniform Euler from 1 to 0"]
    return []


def _unspoken(policy: Policy, layout: Layout) -> list[str]:
    """Fields of the spec that the layout has no word for, unless they are at their default; formats of the cache."""
    told = {k.field for k in layout.keys} | {*layout.fixed, *layout.at_most, *layout.same}
    told |= {part for row in layout.rows for part in row.shape if isinstance(part, str)}
    defaults = dict(_defaults(policy.spec, ""))
    found = [
        f"{name} is {value!r}, which its files cannot say"
        for name, value in _leaves(policy.spec, "")
        if name not in told and not (name in defaults and _equal(defaults[name], value))
    ]
    if policy.rotations:
        found.append("weights in a rotated basis: the engine rotates no activations")
    if policy.biases:
        found.append("biases that the architecture does not have (bias_correct)")
    if policy.activations:
        found.append("activations rounded to 8 bits: the engine decides that itself")
    if policy.kv != "f32":
        found.append(f"a key/value cache in {policy.kv}: the engine keeps its own")
    return found


# --- statistics, for engines that apply them ----------------------------------------------------------------------


_NEUTRAL = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
"""What leaves values as they are, for statistics that a mode does not read."""

_KNOWN_STEPS = ("normalise", "pad", "take", "unnormalise")


def statistics(policy: Policy, layout: Layout) -> tuple[dict[str, LazyTensor], dict[str, Dim], list[str]]:
    """(io.state.mean, ... as tensors, io.norm_eps and io.norm_mode, refusals). Neutral where a feature has none."""
    if not layout.statistics:
        return {}, {}, []
    tensors: dict[str, LazyTensor] = {}
    dims: dict[str, Dim] = {"io.norm_eps": 1e-8, "io.norm_mode": "mean_std"}
    wrong: list[str] = []
    for part, steps, size in (
        ("state", policy.io.state_steps, policy.io.state_dim),
        ("action", policy.io.action_steps, policy.io.action_dim),
    ):
        wrong += [
            f"the {part} goes through {s.step!r}, which the engine does not"
            for s in steps
            if s.step not in _KNOWN_STEPS
        ]
        step = next((s for s in steps if s.step.endswith("normalise")), None)
        params: Mapping[str, Any] = {} if step is None else step.params
        mode = params.get("mode", layout.statistics[0])
        if mode not in layout.statistics:
            wrong.append(f"the {part} is normalised by {mode}, the engine knows {' and '.join(layout.statistics)}")
            continue
        if part == "action" and mode == "QUANTILES":
            dims["io.norm_mode"] = "quantiles"
        dims["io.norm_eps"] = float(params.get("eps", 1e-8))
        for name, value in _NEUTRAL.items():
            values = params.get(name, [value] * size)
            tensors[f"io.{part}.{name}"] = LazyTensor.of(values, f"statistics of the {part}")
    return tensors, dims, wrong


# --- formats ------------------------------------------------------------------------------------------------------

_COARSER = ("q8_0", "f16", "bf16", "f32")
"""What a tensor gets when the wanted format does not suit its rows or its place, in this order."""


def _suits(fmt: str, row: Row, layout: Layout, width: int) -> bool:
    return fmt in layout.formats[row.kind] and width % get_format(fmt).block == 0


def _choose(wanted: str, row: Row, layout: Layout, width: int) -> str:
    """The wanted format where it suits, else the next wider one that does; "f32" is never made smaller than asked."""
    later = _COARSER[_COARSER.index(wanted) :] if wanted in _COARSER else _COARSER
    for fmt in (wanted, *later, *reversed(_COARSER)):
        if _suits(fmt, row, layout, width):
            return fmt
    raise Unsupported(f"tensor {row.ours}: {layout.engine} takes {', '.join(layout.formats[row.kind])}, none suits")


def _file_shape(row: Row, known: Mapping[str, Dim], have: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file; a dimension that only tensors tell is the tensor's own."""
    shape = [known.get(p, -1) if isinstance(p, str) else p for p in row.shape]
    if -1 in shape and len(shape) == len(have):
        shape = [h if s == -1 else s for s, h in zip(shape, have, strict=True)]
    return tuple(int(s) for s in shape)


def _stored_rows(
    policy: Policy, layout: Layout
) -> tuple[list[tuple[str, str, Row, tuple[int, ...], LazyTensor]], dict[str, Dim]]:
    """(name in the file, vlac's name, row, shape in the file, tensor) of everything to write, and the dimensions.

    Raises Unsupported with every reason why the layout cannot hold this policy.
    """
    dims = policy_dims(policy)
    extra, more, wrong = statistics(policy, layout)
    dims |= more
    dims["io.architecture"] = layout.architecture
    if "text.hidden_size" in dims and "expert.hidden_size" in dims:
        dims["io.expert_width_multiplier"] = float(dims["expert.hidden_size"]) / float(dims["text.hidden_size"])
    wrong = refusals(policy, layout, dims) + wrong
    if wrong:
        raise Unsupported(
            f"{layout.engine} cannot run this {policy.family}:\n  " + "\n  ".join(wrong),
            remedy="compile without --dialect; vlac's own engines run it",
        )
    weights = Weights({**policy.weights, **extra})
    known, rows, used = sizes(layout, dims), [], set()
    for name, ours, row in layout.tensors(dims):
        if ours not in weights and row.fill is not None:
            shape = _file_shape(row, known, ())
            rows.append((name, ours, row, shape, LazyTensor.of(np.full(shape, row.fill), "not read at inference")))
            continue
        tensor = weights[ours]
        used.add(ours)
        shape = _file_shape(row, known, tensor.shape)
        if math.prod(shape) != math.prod(tensor.shape):
            raise Unsupported(
                f"tensor {ours} has shape {list(tensor.shape)}, {layout.engine} wants {list(shape)} ({name})"
            )
        rows.append((name, ours, row, shape, tensor))
    left = [name for name in policy.weights if name not in used]
    if left:
        raise Unsupported(
            f"{layout.engine} has no place for {len(left)} tensors: {', '.join(left[:6])}",
            remedy="a pass made it a network that this engine does not know; leave the pass or --dialect out",
        )
    return rows, dims


def fit(dialect: str, plan: Plan, policy: Policy, program: Program) -> tuple[Program, dict[str, str]]:
    """The drawn program with each parameter's format in the file, and the formats asked for.

    Without an order from a pass, the layout's own choice counts as what was asked for: rows of 720 values can hold no
    blocks in these files, which know no padding. Patterns of `quantize-weights` match the policy's own names here.
    """
    from vlac.lower import assign_formats

    layout = layout_of(dialect, policy.family)
    ordered = assign_formats(program, plan, policy.precision).params
    planned = assign_formats(program, plan).params
    params, requested = dict(program.params), {}
    stored = _stored_rows(policy, layout)[0]
    most, pattern, finer = layout.small
    coarser = any(get_format(p.format).bits < 8 for p in planned.values())
    small = not coarser and sum(math.prod(shape) for _, _, _, shape, _ in stored) < most
    for _, ours, row, shape, _ in stored:
        if ours not in params:
            continue
        wanted = ordered[ours].format
        if small and wanted == planned[ours].format == "q8_0" and fnmatchcase(ours, pattern):
            params[ours] = dataclasses.replace(params[ours], format=_choose(finer, row, layout, shape[-1]))
            requested[ours] = params[ours].format
            continue
        realised = _choose(wanted, row, layout, shape[-1])
        params[ours] = dataclasses.replace(params[ours], format=realised)
        requested[ours] = wanted if wanted != planned[ours].format else realised
    return program.replace(params=params), requested


# --- writing ------------------------------------------------------------------------------------------------------


def _values(layout: Layout, dims: Mapping[str, Dim]) -> dict[str, Value]:
    result = {}
    for key in layout.keys:
        if key.field in dims:
            value = dims[key.field]
            if key.kind == "f32":
                value = float(np.float32(value))  # as it will be read: it goes into the checksum
            result[key.name] = Value(key.kind, value)
    return result


def _metadata(
    layout: Layout, values: Mapping[str, Value], texts: Mapping[str, str], file_type: int, sidecars: Sidecars
) -> dict[str, Value]:
    """Every key but the manifest's."""
    kv: dict[str, Value] = {
        "general.architecture": Value("string", layout.architecture),
        "general.type": Value("string", "model"),
        **{f"general.{key}": Value("string", value) for key, value in texts.items() if value},
        "general.quantized_by": Value("string", f"vlac {vlac.__version__}"),
        "general.file_type": Value("u32", file_type),
        "general.quantization_version": Value("u32", 2),
        "general.alignment": Value("u32", DEFAULT_ALIGNMENT),
        **values,
        IO_KEY: Value("string", sidecars.io),
    }
    if sidecars.tokenizer is not None:
        kv[TOKENIZER] = Value("string", sidecars.tokenizer.decode("utf-8"))
    return kv


def _with_manifest(kv: Mapping[str, Value], manifest: Mapping[str, Any]) -> dict[str, Value]:
    text = json.dumps(manifest, sort_keys=True, indent=1)
    own = {MANIFEST: Value("string", text), MANIFEST_CRC: Value("u32", zlib.crc32(text.encode()))}
    return {**own, **kv}  # first: a tokenizer may be 30 MB, and whoever looks for the manifest reads only so far


def emit(
    dialect: str,
    file_type: int,
    naming: Naming,
    policy: Policy,
    program: Program,
    sidecars: Sidecars,
    folder: Path,
    progress: Progress,
) -> None:
    """Streams the file into `folder`; `program` holds the formats that `fit` chose."""
    layout = layout_of(dialect, policy.family)
    stored, dims = _stored_rows(policy, layout)
    rows: list[tuple[str, str, tuple[int, ...]]] = []
    for name, ours, row, shape, _ in stored:
        small = "f32" if "f32" in layout.formats[row.kind] else layout.formats[row.kind][-1]
        rows.append((name, program.params[ours].format if ours in program.params else small, shape))
    crcs = {name: "0" * 8 for name, _, _ in rows}
    if sidecars.golden is not None:
        rows.append((GOLDEN, "i8", (len(sidecars.golden),)))
        crcs[GOLDEN] = tensor_checksum("i8", (len(sidecars.golden),), sidecars.golden)
    notes = [*layout.notes, *layout.hazards(dims)[1]]
    manifest = {**sidecars.manifest, "files": {}, "dialect": dialect, "notes": notes, "crc32": crcs}
    name, texts = naming(manifest)
    kv = _metadata(layout, _values(layout, dims), texts, file_type, sidecars)
    crcs["keys"] = key_checksum(kv)
    path = folder / name
    try:
        with path.open("w+b") as out:
            writer = GgufWriter(out, _with_manifest(kv, manifest), rows)
            for done, ((file, fmt, _), (_, _, row, shape, tensor)) in enumerate(zip(rows, stored, strict=False)):
                progress(file, done, len(rows))
                values = tensor.load().reshape(shape)
                data = encode(fmt, values + np.float32(row.add) if row.add else values)
                crcs[file] = tensor_checksum(fmt, shape, data)
                writer.write(file, data)
            if sidecars.golden is not None:
                writer.write(GOLDEN, np.frombuffer(sidecars.golden, dtype=np.uint8))
            writer.rewrite(_with_manifest(kv, manifest))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}", remedy="free disk space") from None
    progress("done", len(rows), len(rows))


def dialects_of(plan: Plan, file_type: int, naming: Naming) -> dict[str, Dialect]:
    """The dialects of a GGUF target with this plan of formats."""

    def make(name: str) -> Dialect:
        def fits(policy: Policy, program: Program) -> tuple[Program, dict[str, str]]:
            return fit(name, plan, policy, program)

        def emits(policy: Policy, program: Program, sidecars: Sidecars, folder: Path, progress: Progress) -> None:
            emit(name, file_type, naming, policy, program, sidecars, folder, progress)

        return Dialect(name, fits, emits)

    return {name: make(name) for name in dialects()}
