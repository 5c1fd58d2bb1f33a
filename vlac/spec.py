"""Dimensions of networks, as frozen dataclasses under the field's own names (Hugging Face config keys).

A family composes these into its own spec; passes find parts by these field names (`spec.vision`, `spec.text`,
`spec.expert`). `override` applies `--spec text.head_dim=64`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from vlac.errors import CheckpointError, Unsupported


@dataclass(frozen=True)
class VisionSpec:
    """A ViT tower on square images.

    position_rule says how a smaller grid of patches finds its rows in the table of positions: "table" (one row per
    patch of the trained grid; a smaller one is resampled) or "buckets" (row floor(i * trained / grid), Idefics3).
    merges: (layer, runs) says that before this layer rows are merged, to runs of (rows, patches each stands for).
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int = 3
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    position_rule: str = "table"
    merges: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = ()

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class EncoderSpec:
    """Pre-norm layers with LayerNorm and biases, on rows of any kind: what a ViT's layers are, without its picture."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"


@dataclass(frozen=True)
class DecoderSpec:
    """A Llama- or Gemma-like decoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int = 0
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    hidden_act: str = "silu"


@dataclass(frozen=True)
class FlowSpec:
    """A flow-matching sampler: x starts as noise and the network is evaluated at times[0] (1, or earlier
    where a fitted first step asks ahead), times[1], ...

    solver "euler": x <- x + dts[i] v. Any other name: turn i is row i of `recurrence`, (xx, xm, xv, mx, mm, mv), on x
    and a memory m that starts as the noise, too: x <- xx x + xm m + xv v and m <- mx x + mm m + mv v, both from the
    values before; `dts` then only tells the grid.
    """

    times: tuple[float, ...]
    dts: tuple[float, ...]
    min_period: float = 4e-3
    max_period: float = 4.0
    solver: str = "euler"
    recurrence: tuple[tuple[float, float, float, float, float, float], ...] = ()

    @staticmethod
    def euler(num_steps: int, min_period: float = 4e-3, max_period: float = 4.0) -> FlowSpec:
        """Uniform steps from t=1 towards 0: t_i = 1 - i/num_steps, never evaluating t=0."""
        dt = -1.0 / num_steps
        return FlowSpec(tuple(1.0 + i * dt for i in range(num_steps)), (dt,) * num_steps, min_period, max_period)


T = TypeVar("T")


def from_dims(cls: type[T], dims: Mapping[str, Any], prefix: str = "") -> T:
    """A nested dataclass from dotted dimensions ("vision.hidden_size"); CheckpointError names one that is missing."""
    values: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, kind = prefix + f.name, hints[f.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            values[f.name] = from_dims(kind, dims, f"{name}.")
        elif name in dims:
            values[f.name] = kind(dims[name])
        elif f.default is dataclasses.MISSING:
            raise CheckpointError(f"the file does not tell {name}")
    return cls(**values)


SHORT = {
    "heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "num_kv_heads": "num_key_value_heads",
    "layers": "num_hidden_layers",
    "depth": "num_hidden_layers",
    "width": "hidden_size",
    "mlp_dim": "intermediate_size",
}
"""Short and openpi's names of fields of VisionSpec and DecoderSpec, for --spec."""


def full_name(dotted: str) -> str:
    """ "vision.heads" -> "vision.num_attention_heads"; other names as they are."""
    part, _, last = dotted.rpartition(".")
    return (
        f"{part}.{SHORT[last]}"
        if part in ("vision", "text", "expert", "language", "mixer", "dit") and last in SHORT
        else dotted
    )


def override(spec: T, changes: Mapping[str, Any]) -> T:
    """`spec` (nested dataclasses) with dotted fields replaced; Unsupported names an unknown field and those known."""
    for dotted, value in changes.items():
        spec = _override(spec, dotted.split("."), value, dotted)
    return spec


def _override(spec: Any, path: list[str], value: Any, dotted: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(spec)} if dataclasses.is_dataclass(spec) else {}
    head, rest = path[0], path[1:]
    if head not in fields:
        raise Unsupported(
            f"--spec {dotted}: no field {head!r}; there are {', '.join(fields) or 'none'}",
            remedy="name a field shown by `vlac inspect`",
        )
    old = getattr(spec, head)
    if rest:
        return dataclasses.replace(spec, **{head: _override(old, rest, value, dotted)})
    if dataclasses.is_dataclass(old):
        raise Unsupported(f"--spec {dotted}: names a group of fields, not one field")
    try:
        new = type(old)(value) if not isinstance(old, bool) else str(value).lower() in ("1", "true")
    except (TypeError, ValueError):
        raise Unsupported(f"--spec {dotted}={value!r}: expected {type(old).__name__}") from None
    return dataclasses.replace(spec, **{head: new})
