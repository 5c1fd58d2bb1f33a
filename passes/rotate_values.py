"""rotate-values: values of attention in a rotated basis, folded into the weights on both sides.

Rows of v_proj of each kv head are multiplied by an orthogonal matrix (a Hadamard matrix with seeded signs where there
is one of the head's size), columns of o_proj of every query head that reads them by the same one: the attention's
result comes out as before (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, its value rotation). Nothing runs at run
time, and outliers within a head are spread before values or o_proj are rounded. An expert that reads the VLM's values
gets their rotation: in its own v_proj and o_proj where both attend together, in the input of its v_proj where it
attends across.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlac import calibrate
from vlac.errors import Inapplicable
from vlac.ops import NpArray
from vlac.passes.truncate_layers import pairs_of
from vlac.policy import Policy
from vlac.registry import Pass, passes
from vlac.rotations import hadamard, rotation
from vlac.weights import Weights


def rotated_rows(w: NpArray, r: NpArray) -> NpArray:
    """Each head's rows of a weight [H*d, k] or bias [H*d]: values v become v r."""
    d = len(r)
    parts = w.astype(np.float64).reshape(-1, d, w.shape[1] if w.ndim == 2 else 1)
    return np.asarray(np.einsum("hik,ij->hjk", parts, r).reshape(w.shape), dtype=np.float32)


def rotated_columns(w: NpArray, r: NpArray) -> NpArray:
    """Each head's columns of a weight [n, H*d], which reads v r in place of v."""
    parts = w.astype(np.float64).reshape(len(w), -1, len(r))
    return np.asarray((parts @ r).reshape(w.shape), dtype=np.float32)


def _fold(weights: Weights, makes: str, reads: tuple[str, ...], r: NpArray) -> Weights:
    """What makes the values, with its bias, and all that reads them."""
    for name in (f"{makes}.weight", f"{makes}.bias"):
        if name in weights:
            weights = weights.map(name, lambda w: rotated_rows(w, r))
    for name in (f"{n}.weight" for n in reads):
        if name in weights:  # a tap has no o_proj
            weights = weights.map(name, lambda w: rotated_columns(w, r))
    return weights


def _requires(policy: Policy, part: str, seed: int) -> None:
    there = [p for p in ("vision", "text") if hasattr(policy.spec, p)]
    if part not in (*there, "all") or not there:
        raise Inapplicable(f"part={part!r}; {policy.family} has: {', '.join((*there, 'all'))}")
    if seed < 0:
        raise Inapplicable(f"seed={seed}: 0 or more")
    pairs_of(policy.spec)


def _apply(policy: Policy, part: str, seed: int) -> tuple[Policy, Mapping[str, Any]]:
    spec, weights, layers = policy.spec, policy.weights, 0
    sizes = set()
    if part in ("vision", "all") and hasattr(spec, "vision"):
        d = spec.vision.hidden_size // spec.vision.num_attention_heads
        sizes.add(d)
        for i in range(spec.vision.num_hidden_layers):
            name = f"vision.layers.{i}.self_attn"
            weights = _fold(weights, f"{name}.v_proj", (f"{name}.out_proj",), rotation(d, seed + layers))
            layers += 1
    if part in ("text", "all") and hasattr(spec, "text"):
        d, pairs = spec.text.head_dim, pairs_of(spec)
        sizes.add(d)
        for i in range(spec.text.num_hidden_layers):
            r = rotation(d, seed + layers)
            name = f"text.layers.{i}.self_attn"
            experts = [(f"expert.layers.{j}.self_attn", kind) for j, (at, kind) in enumerate(pairs) if at == i]
            across = tuple(f"{e}.v_proj" for e, kind in experts if kind == "cross")
            weights = _fold(weights, f"{name}.v_proj", (f"{name}.o_proj", *across), r)
            for e, kind in experts:
                own = rotation(d, seed + 1000 + layers) if kind == "cross" else r
                weights = _fold(weights, f"{e}.v_proj", (f"{e}.o_proj",), own)
            layers += 1
    figures = {
        "layers": layers,
        "head_sizes": "+".join(map(str, sorted(sizes))),
        "kind": "Hadamard" if all(hadamard(d) is not None for d in sizes) else "random orthogonal where no Hadamard is",
    }
    return policy.replace(weights=weights), figures


def _ensures(before: Policy, after: Policy, part: str, seed: int) -> None:
    calibrate.draw(after)


ROTATE_VALUES = passes.add(
    Pass(
        name="rotate-values",
        apply=_apply,
        params={
            "part": (str, "all", "vision, text (with the expert that reads it) or all"),
            "seed": (int, 0, "of the signs"),
        },
        requires=_requires,
        ensures=_ensures,
        doc="Values of attention in a rotated basis, folded into the weights.",
    )
)
