"""quantize-kv: the keys and values that a sampler's loop reads, in few bits.

TurboQuant's mean-square variant (arXiv 2504.19874): each head of each token is rotated by a Hadamard matrix with seeded
signs, every entry becomes the nearest of the Lloyd-Max levels for random unit vectors, and one float16 scale is kept
(norm-matched for keys, least squares for values). center takes the keys' mean over the prefix off first and stores it
once: softmax does not see it, and outlier channels lose their bias. The inner-product variant (QJL) is not offered: at
equal bits it loses (tests/test_pass_kv.py). What crosses between stages is the packed codes; the loop unpacks them.

It is a format, not a speed-up: in SmolVLA keys and values are 3 MB in float16 beside 0.7 GB of weights. Runs in the
torch, numpy and ggml engines; ONNX targets decline it by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlac import calibrate
from vlac.errors import Inapplicable
from vlac.kv_codes import BITS, words
from vlac.lower import lower
from vlac.policy import Policy
from vlac.registry import Pass, passes
from vlac.rewrites.cache import CacheFormat, Crossing, crossings


def _found(policy: Policy) -> tuple[Crossing, ...]:
    return crossings(lower(calibrate.draw(policy)))[1]


def _requires(policy: Policy, k: int, v: int, center: bool, protect: int, seed: int) -> None:
    for name, bits in (("k", k), ("v", v)):
        if bits not in BITS:
            raise Inapplicable(f"{name}={bits}: {', '.join(map(str, BITS))} bits are known")
    if not 0 <= seed < 2**31 - 10_000:
        raise Inapplicable(f"seed={seed}: 0 or more")
    if policy.kv != "f32":
        raise Inapplicable(f"keys and values are {policy.kv} already", remedy="apply quantize-kv once")
    attentions = {c.at for c in _found(policy)}
    if not attentions:
        raise Inapplicable(f"{policy.family}: no loop reads keys and values that an earlier stage made")
    if protect < 0 or 2 * protect > max(attentions):
        raise Inapplicable(f"protect={protect} of {max(attentions) + 1} attentions on each side leaves none")


def _apply(policy: Policy, k: int, v: int, center: bool, protect: int, seed: int) -> tuple[Policy, Mapping[str, Any]]:
    form = CacheFormat(k, v, center, protect, seed)
    program = calibrate.draw(policy)
    program = program.bind(program.max_symbols())
    found = crossings(lower(program))[1]
    last = max(c.at for c in found)
    values = half = packed = 0
    for c in found:
        rows, width = c.type.shape
        assert isinstance(rows, int) and isinstance(width, int)
        values += rows * width
        half += 2 * rows * width
        if not protect <= c.at <= last - protect:
            packed += 4 * rows * width
            continue
        packed += 4 * rows * width // c.head_dim * words(k if c.kind == "k" else v, c.head_dim)
        packed += 4 * width if c.kind == "k" and center else 0
    figures = {
        "values": values,
        "bytes_f16": half,
        "bytes_packed": packed,
        "of_f16": round(packed / half, 4),
    }
    return policy.replace(kv=str(form)), figures


QUANTIZE_KV = passes.add(
    Pass(
        name="quantize-kv",
        apply=_apply,
        params={
            "k": (int, 4, "bits of keys: " + ", ".join(map(str, BITS))),
            "v": (int, 4, "bits of values"),
            "center": (bool, True, "take the keys' mean over the prefix off first"),
            "protect": (int, 0, "first and last attentions that keep float32"),
            "seed": (int, 0, "of the rotations' signs"),
        },
        requires=_requires,
        doc="Keys and values that a loop reads, as packed codes.",
    )
)
