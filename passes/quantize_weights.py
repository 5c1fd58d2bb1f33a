"""quantize-weights: a storage format for the weights whose names match a pattern, over the target's own plan.

method=rtn rounds nothing here: the format joins the policy's precision plan (the last match wins), it lands on the
lowered program, the target stores it, and the census in the manifest says what each tensor became. Patterns are
therefore over the lowered program's names (`vlac inspect --program`), where q, k, v and gate, up are fused; a pattern
that acts on nothing is refused there, with the names there are.

The other methods round the 4-bit formats (q4_0, int4: groups of 32) here, with what the layers read on observations
over all steps of a sampler: "clip" searches each group's scale so that the error weighted by the inputs' mean squares
is smallest; "gptq" keeps these scales and feeds each column's error back into the columns still to come (Frantar et al.
2022, arXiv 2210.17323). rotate=32 (or 16) first turns every block of that many inputs by a Hadamard matrix (QuIP#,
arXiv 2402.04396), which the artifact then does at run time, too. Stored values are exactly those found here. A pattern
then has to match the family's own names as well, such as expert.* does.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from vlac import calibrate
from vlac.errors import Inapplicable
from vlac.formats import FORMATS
from vlac.graph import Program
from vlac.lower import roles
from vlac.ops import NpArray
from vlac.policy import Policy
from vlac.registry import Pass, passes
from vlac.rewrites.rotate import block_of, rotated
from vlac.rounding import gptq, round_to_scales, search_scales
from vlac.weights import LazyTensor

METHODS = ("rtn", "clip", "gptq")
CAREFUL = ("q4_0", "int4")
SIGNS = {"q4_0": (1.0, -1.0), "int4": (1.0,)}
GROUP = 32
WIDEST = 8192
"""Inputs above which a layer's Gram matrix is not kept: gptq falls back to clip there, and the figures count it."""
AT_ONCE = 1 << 27
"""Numbers of Gram matrices held at a time; beyond it the observations are run again for the next layers."""

Read = tuple[str, str]
"""Stage and value that a linear reads."""


def _requires(
    policy: Policy, format: str, match: str, method: str, rotate: int, samples: int, observations: str
) -> None:
    if format not in FORMATS:
        raise Inapplicable(f"no storage format {format!r}; there are: {', '.join(FORMATS)}")
    if not match:
        raise Inapplicable("match= is empty", remedy="leave it out for all weights, or give a pattern: match=expert.*")
    if method not in METHODS:
        raise Inapplicable(f"method={method!r}; there are: {', '.join(METHODS)}")
    if rotate not in (0, 16, 32):
        raise Inapplicable(f"rotate={rotate}; there are: 0 (none), 16, 32")
    if method == "rtn" and not rotate:
        return
    if format not in CAREFUL:
        raise Inapplicable(
            f"method={method}, rotate={rotate} with format={format}: rounding with care is for {', '.join(CAREFUL)}",
            remedy="method=rtn for other formats",
        )
    if not _targets(calibrate.draw(policy), match):
        raise Inapplicable(
            f"match={match!r} matches no linear as {policy.family} names them",
            remedy="with a method, use a pattern that holds before and after fusing, such as expert.*",
        )


def _targets(program: Program, match: str) -> list[str]:
    """Names of the linears that a pattern matches, heads excepted."""
    kinds = roles(program)
    return [n for n, kind in kinds.items() if kind == "linear" and fnmatchcase(n, match)]


# --- what layers read --------------------------------------------------------------------------------------------


def grams(policy: Policy, reads: Mapping[Read, int], given: Any) -> dict[Read, tuple[NpArray, int]]:
    """For each value that layers read, (x^T x [k, k] or for wide ones its diagonal [k], rows), float64, all steps."""
    result: dict[Read, tuple[NpArray, int]] = {}
    pending = list(reads)
    while pending:
        batch: list[Read] = []
        room = AT_ONCE
        while pending and (not batch or reads[pending[0]] ** 2 <= room or reads[pending[0]] > WIDEST):
            batch.append(pending.pop(0))
            room -= reads[batch[-1]] ** 2 if reads[batch[-1]] <= WIDEST else 0
        result |= _grams_of(policy, batch, given)
    return result


def _grams_of(policy: Policy, batch: list[Read], given: Any) -> dict[Read, tuple[NpArray, int]]:
    result: dict[Read, tuple[NpArray, int]] = {}
    names: dict[str, set[str]] = {}
    for stage, value in batch:
        names.setdefault(stage, set()).add(value)
    for s in calibrate.draw(policy).stages:
        if s.name in names and any(n.name == "prefix_valid" for n in s.nodes):
            names[s.name].add("prefix_valid")

    def see(_: int, stage: str, values: Mapping[str, NpArray]) -> None:
        for key in (k for k in batch if k[0] == stage):
            x = calibrate.valid_rows(values, key[1]).astype(np.float64)
            gram = x.T @ x if x.shape[1] <= WIDEST else (x * x).sum(axis=0)
            old = result.get(key, (0.0, 0))
            result[key] = (old[0] + gram, old[1] + len(x))

    calibrate.watch(policy, given, names, see)
    return result


# --- rounding one weight -----------------------------------------------------------------------------------------


def rounded(weight: NpArray, gram: NpArray, rows: int, method: str, block: int, format: str) -> NpArray:
    """The weight [n, k] on the grid that will be stored, in the plain basis, float32.

    `gram` [k, k], or its diagonal [k]; `block`: size of the rotation's blocks, 1 for none. int4 has positive scales.
    """
    signs = SIGNS[format]
    w = rotated(weight, block) if block > 1 else weight.astype(np.float64)
    if gram.ndim == 2 and block > 1:
        gram = rotated(rotated(gram, block).T, block)
    if method == "rtn":
        found = round_to_scales(w, _rtn_scales(w, format), GROUP)
    else:
        # a rotated diagonal says little: every input of a block gets the block's mean
        diagonal = gram.diagonal() if gram.ndim == 2 else np.repeat(gram.reshape(-1, block).mean(axis=1), block)
        scales = search_scales(w, GROUP, diagonal / max(rows, 1), signs)
        if method == "gptq" and gram.ndim == 2:
            found = gptq(w, gram, scales, GROUP, damping(rows, len(gram)))
        else:
            found = round_to_scales(w, scales, GROUP)
    return rotated(found, block, back=True).astype(np.float32) if block > 1 else found


def damping(rows: int, inputs: int) -> float:
    """More for fewer rows: with two rows per input 0.1 is better than 0.01, with many the other way round."""
    return 0.01 if rows >= 8 * inputs else 0.05 if rows >= 2 * inputs else 0.1


def _rtn_scales(w: NpArray, format: str) -> NpArray:
    """q4_0: the value of largest magnitude becomes code -8; int4: code 7 or -7."""
    pad = -w.shape[1] % GROUP
    blocks = np.pad(w, ((0, 0), (0, pad))).reshape(len(w), -1, GROUP)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    scales = (peak / -8 if format == "q4_0" else np.abs(peak) / 7).astype(np.float16).astype(np.float64)
    return np.asarray(np.where(scales == 0, 6e-8, scales))


def _output_error(weight: NpArray, other: NpArray, gram: NpArray) -> tuple[float, float]:
    """|x (W - W')^T|^2 and |x W^T|^2 over the observations; wide layers count inputs as independent."""
    d, w = (weight - other).astype(np.float64), weight.astype(np.float64)
    if gram.ndim == 1:
        return float(((d * d) @ gram).sum()), float(((w * w) @ gram).sum())
    return float(((d @ gram) * d).sum()), float(((w @ gram) * w).sum())


# --- the pass ----------------------------------------------------------------------------------------------------


def _apply(
    policy: Policy, format: str, match: str, method: str, rotate: int, samples: int, observations: str
) -> tuple[Policy, Mapping[str, Any]]:
    figures: dict[str, Any] = {"bits_per_value": round(FORMATS[format].bits, 4)}
    after = policy.replace(precision=(*policy.precision, (match, format)))
    if method == "rtn" and not rotate:
        return after, figures
    program = calibrate.draw(policy)
    read = {name: calibrate.linears(program, name)[0][:2] for name in _targets(program, match)}
    widths = {key: policy.weights[name].shape[1] for name, key in read.items()}
    known = grams(policy, widths, calibrate.observations(policy, samples, observations))
    tensors: dict[str, LazyTensor] = {}
    errors, plain, total, fallen = 0.0, 0.0, 0.0, 0
    for name, key in read.items():
        weight, (gram, rows) = policy.weights[name].load(), known[key]
        found = rounded(weight, gram, rows, method, block_of(weight.shape[1], rotate) if rotate else 1, format)
        error, size = _output_error(weight, found, gram)
        errors, total = errors + error / max(size, 1e-300), total + 1
        plain += _output_error(weight, rounded(weight, gram, rows, "rtn", 1, format), gram)[0] / max(size, 1e-300)
        fallen += method == "gptq" and gram.ndim == 1
        tensors[name] = LazyTensor.of(found, f"{name} by {method}")
    figures |= {
        "linears": len(tensors),
        "mean_layer_error_rtn": round(plain / total, 7),
        "mean_layer_error": round(errors / total, 7),
        "rows_fewest": min(rows for _, rows in known.values()),
    }
    if fallen:
        figures["too_wide_for_gptq"] = fallen
    rotations = (*policy.rotations, (match, rotate)) if rotate or policy.rotations else ()
    return after.replace(weights=policy.weights.with_(**tensors), rotations=rotations), figures


QUANTIZE_WEIGHTS = passes.add(
    Pass(
        name="quantize-weights",
        apply=_apply,
        params={
            "format": (str, None, "storage format: " + ", ".join(FORMATS)),
            "match": (str, "*", "shell-style pattern over the lowered program's weight names"),
            "method": (str, "rtn", "rtn, clip (scales searched) or gptq (errors fed back); " + ", ".join(CAREFUL)),
            "rotate": (int, 0, "0, 16 or 32: inputs turned in blocks of this size, at run time as well"),
            "samples": (int, 8, "observations, where any are needed"),
            "observations": (str, "", "an .npz file of them; seeded ones without it"),
        },
        requires=_requires,
        doc="A storage format for the weights that match a pattern.",
    )
)
