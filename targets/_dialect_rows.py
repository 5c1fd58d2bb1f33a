"""Rows that several dialects share: a vision tower, a decoder, linears with bias, under a dialect's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vlac.gguf_dialects import Dims, Row

Names = Mapping[str, str]
"""vlac's name inside a layer ("self_attn.q_proj") -> the dialect's ("attn_q")."""

When = Callable[[Dims, int], bool]


def both(file: str, ours: str, shape: tuple[int | str, ...], kind: str = "linear", layers: str = "") -> list[Row]:
    """A weight with its bias."""
    bias = Row(f"{file}.bias", f"{ours}.bias", shape[:1], "vector", layers)
    return [Row(f"{file}.weight", f"{ours}.weight", shape, kind, layers), bias]


def tower(patch: str, position: str, block: str, post: str, names: Names) -> list[Row]:
    """A vision tower; `block` is a layer's prefix with {i}."""
    d, f, n = "vision.hidden_size", "vision.intermediate_size", "vision.num_hidden_layers"
    shapes = {"mlp.fc1": (f, d), "mlp.fc2": (d, f)}
    kernel = (d, 3, "vision.patch_size", "vision.patch_size")
    rows = [
        *both(patch, "vision.patch_embedding", kernel, "conv"),
        Row(position, "vision.position_embedding", ("patches", d), "position"),
    ]
    for ours, file in names.items():
        norm = ours.startswith("layer_norm")
        shape = (d,) if norm else shapes.get(ours, (d, d))
        rows += both(f"{block}.{file}", f"vision.layers.{{i}}.{ours}", shape, "vector" if norm else "linear", n)
    return [*rows, *both(post, "vision.post_layernorm", (d,), "vector")]


def decoder(
    part: str,
    block: str,
    names: Names,
    memory: tuple[tuple[str, When | None], ...] = (),
    norms: bool = True,
    norm_add: float = 0.0,
) -> list[Row]:
    """Layers of `part` ("text", "expert"). `names` hold a weight's whole name after the prefix.

    `memory`: (width that k and v read, which layers), where it is not the hidden size in all of them. `norm_add`: -1
    for files that keep Gemma's norms as they were trained, without the one that vlac adds when it reads them.
    """
    d, f, n = (f"{part}.{x}" for x in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    q, kv = f"{part}.q", f"{part}.kv"
    shapes: dict[str, tuple[str, str]] = {
        "self_attn.q_proj": (q, d),
        "self_attn.o_proj": (d, q),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    rows = []
    for ours, file in names.items():
        a, b = f"{block}.{file}", f"{part}.layers.{{i}}.{ours}.weight"
        if ours.endswith("layernorm"):
            rows += [Row(a, b, (d,), "vector", n, add=norm_add)] if norms else []
        elif ours in shapes:
            rows.append(Row(a, b, shapes[ours], layers=n))
        else:
            rows += [Row(a, b, (kv, width), layers=n, when=when) for width, when in memory or ((d, None),)]
    return rows


def is_self(dims: Dims, i: int) -> bool:
    """Whether layer i of SmolVLA's expert attends to the actions as well."""
    return i % int(dims["self_attn_every_n_layers"]) == 0


def is_cross(dims: Dims, i: int) -> bool:
    """Whether layer i of SmolVLA's expert only reads the language model's keys and values."""
    return not is_self(dims, i)


CROSS_MEMORY: tuple[tuple[str, When | None], ...] = (("expert.hidden_size", is_self), ("text.kv", is_cross))
"""What SmolVLA's expert projects to keys and values: its own hidden state, or the language model's cache."""
