"""quantize-kv: the keys and values that a sampler's loop reads, in few bits.

TurboQuant's mean-square variant (arXiv 2504.19874): each head of each token is rotated by a Hadamard matrix with seeded
signs, and every entry becomes the nearest of the Lloyd-Max levels for random unit vectors. One scale is kept
(norm-matched for keys, least squares for values), and with form=groups a factor of four bits for each quarter of 64
entries, in a place that would be empty: half the error at the same bytes. form=head is the paper's. form=inner is its
inner-product variant (QJL): at equal bits it loses (tests/test_kv_toy.py). center takes the keys' mean over the prefix
off first and stores it once: softmax does not see it, and outlier channels lose their bias. The rotation of the values
is folded into the weights where the family's spec tells who reads them. What the producing stage hands over is the
packed codes; the loop unpacks each where it is read.

It is a format, not a speed-up: in SmolVLA keys and values are 3 MB in float16 beside 0.7 GB of weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlac import calibrate
from vlac.errors import Inapplicable
from vlac.graph import Program, Repeat
from vlac.kv_codes import BITS, FORMS, words
from vlac.lower import lower
from vlac.passes.rotate_values import ROTATE_VALUES
from vlac.policy import Policy
from vlac.registry import Pass, passes
from vlac.rewrites.cache import CacheFormat, Crossing, crossings

V_PROJ = re.compile(r"@(text|expert)\..*self_attn\.v_proj\.weight")


def _found(policy: Policy) -> tuple[Crossing, ...]:
    return crossings(lower(calibrate.draw(policy)))[1]


def _foldable(program: Program) -> bool:
    """Whether all that the loop attends to as values comes from v_proj of layers whose rotation rotate-values folds."""
    step = next(s for s in reversed(program.schedule.steps) if isinstance(s, Repeat))
    inside = {n.name: n for n in program.stage(step.stage).nodes}
    outside = {n.name: n for s in program.stages if s.name != step.stage for n in s.nodes}

    def known(value: str) -> bool:
        n = inside.get(value) or outside.get(value)
        if n is None:
            return any(value == into for _, into, _ in step.carry)
        if n.op in ("concat", "write_rows"):
            return all(known(i) for i in n.inputs[:2])
        return (
            n.op == "linear" and re.fullmatch(r"@(text|expert)\..*self_attn\.v_proj\.weight", n.inputs[1]) is not None
        )

    return all(known(n.inputs[2]) for n in inside.values() if n.op == "attention")


def _requires(policy: Policy, k: int, v: int, center: bool, protect: int, seed: int, form: str) -> None:
    if form not in FORMS:
        raise Inapplicable(f"form={form!r}; there are: {', '.join(FORMS)}")
    known = [b for b in BITS if form != "inner" or b - 1 in BITS]
    for name, bits in (("k", k), ("v", v)):
        if bits not in known:
            raise Inapplicable(f"{name}={bits}: {', '.join(map(str, known))} bits are known with form={form}")
    if not 0 <= seed < 2**31 - 10_000:
        raise Inapplicable(f"seed={seed}: 0 or more")
    if policy.kv != "f32":
        raise Inapplicable(f"keys and values are {policy.kv} already", remedy="apply quantize-kv once")
    attentions = {c.at for c in _found(policy)}
    if not attentions:
        raise Inapplicable(f"{policy.family}: no loop reads keys and values that an earlier stage made")
    if protect < 0 or 2 * protect > max(attentions):
        raise Inapplicable(f"protect={protect} of {max(attentions) + 1} attentions on each side leaves none")


def _apply(
    policy: Policy, k: int, v: int, center: bool, protect: int, seed: int, form: str
) -> tuple[Policy, Mapping[str, Any]]:
    folded = _foldable(calibrate.draw(policy))
    if folded:
        policy = ROTATE_VALUES.apply(policy, part="text", seed=seed)[0]
    cache = CacheFormat(k, v, center, protect, seed, form, folded)
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
        packed += 4 * rows * width // c.head_dim * words(k if c.kind == "k" else v, c.head_dim, form)
        packed += 4 * width if c.kind == "k" and center else 0
    figures = {
        "values": values,
        "bytes_f16": half,
        "bytes_packed": packed,
        "of_f16": round(packed / half, 4),
    }
    return policy.replace(kv=str(cache)), figures


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
            "form": (str, "groups", "groups: a factor for each group of entries; head: none; inner: TurboQuant's QJL"),
        },
        requires=_requires,
        doc="Keys and values that a loop reads, as packed codes.",
    )
)
