"""quantize-weights: a storage format for the weights whose names match a pattern, over the target's own plan.

bits= and group= name a grid that each target holds in a format of its own; format= names the format. method=rtn rounds
nothing here: the format joins the policy's precision plan (the last match wins), lands on the lowered program, and the
target rounds. Patterns are therefore over the lowered program's names (`vlac inspect --program`), where q, k, v and
gate, up are fused; a pattern that acts on nothing is refused there, with the names there are.

The other methods round here, layer after layer (vlac.propagate), with what each reads on observations over all steps of
a sampler: "clip" searches scales, "hqq" zero points, "awq" eases weights through norms first, "gptq" feeds errors back
into columns still to come, then revises codes and scales (vlac.rounding has the sources). rotate= turns inputs by
Hadamard matrices (QuIP#, arXiv 2402.04396; QuaRot, 2404.00456), which the artifact then does at run time, too. Stored
values are exactly those found here. A pattern then has to match the family's own names as well (expert.*).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from vlac import calibrate
from vlac.artifact import Golden
from vlac.errors import Inapplicable
from vlac.formats import FORMATS, GRIDS
from vlac.graph import Program
from vlac.layerwise import METHODS, How, round_layer
from vlac.lower import lower, roles
from vlac.magnitudes import Magnitudes
from vlac.ops import NpArray
from vlac.passes._stored import products, stored_linears
from vlac.passes._tune import refuse, tuned
from vlac.passes.smooth_norms import Smoothable, moved, smoothable
from vlac.policy import Policy
from vlac.propagate import Seen, propagate
from vlac.registry import Pass, passes, telling
from vlac.rewrites.corrections import ROUNDINGS, attention_operands, bias_name, is_operand
from vlac.rewrites.rotate import FULL, rotate_inputs
from vlac.rounding import awq_factors, smooth_factors
from vlac.weights import LazyTensor

ROTATIONS = {"none": 0, "hadamard": FULL, "block16": 16, "block32": 32, "0": 0, "16": 16, "32": 32}
GROUPS = {"16": 16, "32": 32, "64": 64, "128": 128, "channel": 0}
CAREFUL = {
    "q4_0": (4, 32),
    "int4": (4, 32),
    "int4g16": (4, 16),
    "int4g64": (4, 64),
    "int4g128": (4, 128),
    "q8_0": (8, 32),
    "int8": (8, 0),
    **{f"w{b}{f'g{g}' if g else 'row'}": (b, g) for b in (4, 8) for g in GROUPS.values()},
}
"""Formats whose codes can be chosen here -> bits and group."""
WEIGHTED = ("q4_0", "q4_1", "q5_0", "iq4_nl", "q4_k", "q5_k", "q6_k")
"""Formats that ggml packs by importance."""


TOWERING = 64.0
"""Times a typical channel's root mean square: where a value is beyond it, one scale for all would leave the others a
code or two, and rows get scales of their own. Gaussian inputs stay below 6, channels that a norm lifts by 25 do not."""


@dataclass(frozen=True)
class Ask:
    """The pass's parameters, checked: `format` is "" where only bits and group were given, `how` is how to round."""

    format: str
    match: str
    how: How
    rotate: int
    importance: bool
    act: str
    attend: bool
    smooth: float
    bias_correct: bool
    follow: bool
    samples: int
    observations: str
    tune: int

    @property
    def careful(self) -> bool:
        return self.how.method != "rtn" or bool(self.rotate) or self.bias_correct


def _enough(policy: Policy) -> int:
    """Observations that a machine gets through in minutes."""
    size = calibrate.size(policy)
    return 64 if size <= 20_000_000 else 24 if size <= 200_000_000 else 12


def _one_of(name: str, value: str, legal: Any) -> None:
    if value not in legal:
        raise Inapplicable(f"{name}={value!r}; there are: {', '.join(legal)}")


def _ask(policy: Policy, **p: Any) -> Ask:
    """The parameters as one value; Inapplicable names one that is illegal, with the legal ones."""
    _one_of("method", p["method"], METHODS)
    _one_of("rotate", p["rotate"], ("none", "hadamard", "block16", "block32", *("0", "16", "32")))
    _one_of("group", p["group"], GROUPS)
    _one_of("act", p["act"], ("none", *ROUNDINGS))
    _one_of("weighted", p["weighted"], ("auto", "none", "imatrix"))
    if p["bits"] not in (0, 4, 8):
        raise Inapplicable(f"bits={p['bits']}; there are: 4, 8", remedy="format= for others: " + ", ".join(FORMATS))
    if bool(p["bits"]) == bool(p["format"]):
        raise Inapplicable("give either bits= (4, 8) with group=, or format=: " + ", ".join(FORMATS))
    if not p["match"]:
        raise Inapplicable("match= is empty", remedy="leave it out for all weights, or give a pattern: match=expert.*")
    if not 0 <= p["smooth"] < 1:
        raise Inapplicable(f"smooth={p['smooth']}: 0 (none) up to 1, such as 0.5")
    group, method = GROUPS[p["group"]], p["method"]
    fmt = p["format"] or ("q4_1" if method == "hqq" else f"w{p['bits']}{f'g{group}' if group else 'row'}")
    if fmt not in FORMATS and fmt not in GRIDS:
        raise Inapplicable(f"no storage format {fmt!r}; there are: {', '.join(FORMATS)}")
    if method == "hqq" and (fmt != "q4_1" or p["bits"] == 8 or (p["bits"] and group != 32)):
        raise Inapplicable("method=hqq chooses zero points, which format=q4_1 (4 bits, groups of 32) holds")
    rotate = ROTATIONS[p["rotate"]]
    if rotate and method == "hqq":
        raise Inapplicable("rotate= with method=hqq", remedy="method=gptq or clip")
    careful = method != "rtn" or bool(rotate)
    if careful and fmt not in CAREFUL and method != "hqq":
        raise Inapplicable(
            f"method={method}, rotate={p['rotate']} with format={fmt}: rounding with care is for {', '.join(CAREFUL)}",
            remedy="bits=4 or 8, or method=rtn with weighted=imatrix for other formats",
        )
    weighted = p["weighted"] == "imatrix" or (p["weighted"] == "auto" and method != "rtn")
    if p["weighted"] == "imatrix" and method == "rtn" and fmt not in WEIGHTED:
        raise Inapplicable(
            f"weighted=imatrix with format={fmt}, method=rtn: ggml weights errors in {', '.join(WEIGHTED)}",
            remedy="method=clip or gptq for grids of 4 and 8 bits",
        )
    _check_tune(p, method, rotate)
    bits, size = CAREFUL.get(fmt, (4, 32))
    how = How(method, bits, size, rotate, weighted, 0.5 if p["follow"] else 0.0)
    importance = p["weighted"] == "imatrix" and method == "rtn"
    if p["attend"] and p["act"] != "int8-tensor":
        raise Inapplicable("attend=true rounds queries and keys on fixed scales", remedy="give act=int8-tensor as well")
    names = ("act", "attend", "smooth", "bias_correct", "follow", "samples", "observations", "tune")
    rest = tuple(p[name] for name in names)
    return Ask(fmt, p["match"], how, rotate, importance, *rest)


def _check_tune(p: Mapping[str, Any], method: str, rotate: int) -> None:
    if p["tune"] < 0:
        raise Inapplicable(f"tune={p['tune']}: steps of gradient descent, such as 1000, or 0 for none")
    if p["tune"] and (method not in ("clip", "awq", "gptq") or rotate or p["act"] != "none"):
        raise Inapplicable(
            f"tune= with method={method}, rotate={p['rotate']}, act={p['act']}: it moves scales of codes that were "
            "found here, in the plain basis, for inputs as they are",
            remedy="method=gptq,tune=... without rotate= and act=",
        )


def _requires(policy: Policy, **params: Any) -> None:
    ask = _ask(policy, **params)
    if ask.tune:
        refuse(policy, None)
    if (ask.careful or ask.smooth) and not _targets(calibrate.draw(policy), ask.match):
        raise Inapplicable(
            f"match={ask.match!r} matches no linear as {policy.family} names them",
            remedy="with a method, use a pattern that holds before and after fusing, such as expert.*",
        )


def _targets(program: Program, match: str) -> list[str]:
    """Names of the linears that a pattern matches, heads excepted."""
    kinds = roles(program)
    return [n for n, kind in kinds.items() if kind == "linear" and fnmatchcase(n, match)]


# --- difficulty moved into norms ---------------------------------------------------------------------------------


def _eased(policy: Policy, ask: Ask, given: tuple[Golden, ...]) -> tuple[Policy, int]:
    """Channels of norms that linears read scaled, and the linears' columns the other way: exact, easier to round."""
    norms = {value: n for n in smoothable(calibrate.draw(policy)) for value in n.readers}
    wanted = set(_targets(calibrate.draw(policy), ask.match)) & set(norms)
    found: dict[Smoothable, NpArray] = {}

    def look(name: str, seen: Seen) -> Mapping[str, NpArray]:
        norm = norms[name]
        if norm not in found:
            weight = np.concatenate([policy.weights[w].load() for w in norm.readers], axis=0)
            if ask.smooth:
                found[norm] = smooth_factors(seen.largest, weight, ask.smooth)
            else:
                gram = seen.gram[0] if len(seen.gram) == 1 else None
                found[norm] = awq_factors(weight, seen.sizes, ask.how.group, ask.how.bits, gram)
        return {}

    propagate(policy, given, wanted, look, follow=False)
    weights = policy.weights
    for norm, factors in found.items():
        weights = moved(weights, norm, factors)
    return policy.replace(weights=weights), len(found)


# --- rounding ----------------------------------------------------------------------------------------------------


def _rounded(policy: Policy, ask: Ask, given: tuple[Golden, ...]) -> tuple[Policy, dict[str, Any]]:
    """The policy with every matching linear's weight on its grid, and biases that make up for the mean error."""
    program = calibrate.draw(policy)
    names = stored_linears(policy, ask.match)
    joined = products(policy, names)
    names = [n for n in names if n not in {p.outer for p in joined.values()}]
    biased = {
        n.inputs[1][1:]: n.inputs[2][1:]
        for s in program.stages
        for n in s.nodes
        if len(n.inputs) == 3 and n.op == "linear"
    }
    if ask.bias_correct:
        more = {n: LazyTensor.of(np.zeros(policy.weights[n].shape[0]), bias_name(n)) for n in names if n not in biased}
        policy = policy.replace(biases={**policy.biases, **more})
    errors, plain, fewest = 0.0, 0.0, []

    def choose(name: str, seen: Seen) -> Mapping[str, NpArray]:
        nonlocal errors, plain
        product = joined.get(name)
        weight = product.weight if product else policy.weights[name].load()
        found, wanted = round_layer(weight, seen, ask.how)
        errors += _layer_error(wanted, found, seen)
        plain += _layer_error(weight, round_layer(weight, seen, replace(ask.how, method="rtn", rotate=0))[0], seen)
        fewest.append(seen.rows / (weight.shape[1] // len(seen.gram)))
        result = {name: product.inner(found) if product else found}
        if ask.bias_correct:
            bias = biased.get(name, bias_name(name))
            old = policy.biases[name].load() if name not in biased else policy.weights[bias].load()
            missing = weight.astype(np.float64) @ seen.means[0] - found.astype(np.float64) @ seen.means[1]
            result[bias] = (old + (product.inner(missing) if product else missing)).astype(np.float32)
        return result

    changed = propagate(policy, given, names, choose, follow=ask.follow, progress=telling())
    own = {bias_name(n): n for n in policy.biases}
    weights = {n: LazyTensor.of(v, f"{n} by {ask.how.method}") for n, v in changed.items() if n not in own}
    biases = {own[n]: LazyTensor.of(v, n) for n, v in changed.items() if n in own}
    figures = {
        "linears": len(names),
        "mean_layer_error_rtn": round(plain / len(names), 7),
        "mean_layer_error": round(errors / len(names), 7),
        "rows_per_input_fewest": round(min(fewest), 2),
    }
    if ask.how.method == "rtn" and not ask.rotate:  # only biases were asked for; the target rounds the weights itself
        weights = {n: t for n, t in weights.items() if n not in names}
    after = policy.replace(weights=policy.weights.with_(**weights), biases={**policy.biases, **biases})
    if ask.tune:
        grids = dict.fromkeys(names, (ask.how.bits, ask.how.group))
        after, moved_by = tuned(policy, after, given, grids, joined, ask.match, ask.tune)
        figures |= moved_by
    return after, figures


def _layer_error(weight: NpArray, other: NpArray, seen: Seen) -> float:
    """|y (W - W')^T|^2 over |y W^T|^2 on the observations."""
    parts = [m.astype(np.float64).reshape(len(weight), len(seen.gram), -1) for m in (weight - other, weight)]
    missed, size = (sum(float(((p[:, i] @ g) * p[:, i]).sum()) for i, g in enumerate(seen.gram)) for p in parts)
    return missed / max(size, 1e-300)


# --- what the lowered network reads ------------------------------------------------------------------------------


def _lowered_reads(policy: Policy, ask: Ask, given: tuple[Golden, ...]) -> dict[str, Magnitudes]:
    """For each weight of the lowered program that matches, and each operand of attention asked for: what it meets."""
    program = rotate_inputs(lower(calibrate.draw(policy)), policy.rotations)
    kinds = roles(program)
    reads: dict[tuple[str, str], list[str]] = {}
    for s in program.stages:
        for n in s.nodes:
            weight = n.inputs[1][1:] if n.op == "linear" else ""
            if kinds.get(weight) == "linear" and fnmatchcase(weight, ask.match) and not weight.startswith("rotation."):
                reads.setdefault((s.name, n.inputs[0]), []).append(weight)
            elif ask.attend:
                for name, value in attention_operands(s.name, n).items():
                    reads.setdefault((s.name, value), []).append(name)
    names: dict[str, set[str]] = {}
    for stage, value in reads:
        names.setdefault(stage, set()).add(value)
    met: dict[str, Magnitudes] = {}

    def see(_: int, stage: str, values: Mapping[str, NpArray]) -> None:
        for (where, value), users in reads.items():
            if where == stage:
                for user in users:
                    met.setdefault(user, Magnitudes(values[value].shape[1])).add(values[value])

    calibrate.watch(policy, given, names, see, program=program)
    return met


def _fixed(reads: Mapping[str, Magnitudes]) -> tuple[tuple[tuple[str, str, float], ...], dict[str, Any]]:
    """What is rounded on one fixed scale; by row where values tower: operands of attention then stay float."""
    towering = {w for w, m in reads.items() if m.largest > TOWERING * np.sqrt(np.median(m.squares / max(m.rows, 1)))}
    fixed = tuple((w, "int8-tensor", m.limit()) for w, m in reads.items() if w not in towering and m.largest > 0)
    operands = {w for w in towering if is_operand(w)}
    by_row = tuple((w, "int8-token", reads[w].largest) for w in sorted(towering - operands))
    figures = {"activations_fixed": len(fixed), "activations_by_row": sorted(towering - operands)}
    return (*fixed, *by_row), figures | ({"attention_left_float": sorted(operands)} if operands else {})


# --- the pass ----------------------------------------------------------------------------------------------------


def _apply(policy: Policy, **params: Any) -> tuple[Policy, Mapping[str, Any]]:
    ask = _ask(policy, **params)
    known = FORMATS.get(ask.format)
    bits = known.bits if known else ask.how.bits + 16 / (ask.how.group or 128)
    figures: dict[str, Any] = {"bits_per_value": round(bits, 4)}
    measure = ask.importance or ask.act == "int8-tensor"
    given: tuple[Golden, ...] = ()
    if ask.careful or ask.smooth or measure:
        given = calibrate.observations(policy, ask.samples or _enough(policy), ask.observations)
    if ask.smooth or ask.how.method == "awq":
        policy, figures["norms_eased"] = _eased(policy, ask, given)
    if ask.careful:
        policy, found = _rounded(policy, ask, given)
        figures |= found
    rotations = (*policy.rotations, (ask.match, ask.rotate)) if ask.rotate or policy.rotations else ()
    policy = policy.replace(precision=(*policy.precision, (ask.match, ask.format)), rotations=rotations)
    reads = _lowered_reads(policy, ask, given) if measure else {}
    if ask.importance:
        importance = {w: (m.squares / max(m.rows, 1)).astype(np.float32) for w, m in reads.items() if not is_operand(w)}
        policy = policy.replace(importance={**policy.importance, **importance})
        figures["weighted"] = len(importance)
    if ask.act == "int8-tensor":
        fixed, found = _fixed(reads)
        policy = policy.replace(activations=(*policy.activations, *fixed))
        figures |= found
    elif ask.act != "none" or policy.activations:
        policy = policy.replace(activations=(*policy.activations, (ask.match, ask.act, 0.0)))
    return policy, figures


QUANTIZE_WEIGHTS = passes.add(
    Pass(
        name="quantize-weights",
        apply=_apply,
        params={
            "format": (str, "", "storage format, instead of bits: " + ", ".join(FORMATS)),
            "bits": (int, 0, "4 or 8: each target holds them in a format of its own"),
            "group": (str, "32", "inputs that share a scale: " + ", ".join(GROUPS)),
            "match": (str, "*", "shell-style pattern over the lowered program's weight names"),
            "method": (str, "rtn", "rtn (by the target), " + ", ".join(METHODS[1:])),
            "rotate": (str, "none", "none, hadamard, block16 or block32: inputs turned, at run time as well"),
            "weighted": (
                str,
                "auto",
                "imatrix: errors count by the inputs' mean squares; auto: with every method but rtn",
            ),
            "act": (str, "none", "inputs of these linears rounded: none, " + ", ".join(ROUNDINGS)),
            "attend": (bool, False, "with act=int8-tensor: queries and keys of attention without a mask, too"),
            "smooth": (float, 0.0, "SmoothQuant's alpha: outlier channels of norms move into the weights; 0: not"),
            "bias_correct": (bool, False, "biases make up for the mean error"),
            "follow": (bool, True, "layers are rounded for what they read after the layers before"),
            "tune": (int, 0, "steps of gradient descent on scales, biases and norms, against the unchanged policy"),
            "samples": (int, 0, "observations, where any are needed; 0: 64, for large models fewer"),
            "observations": (str, "", "a dataset, a folder or an .npz file of them; the policy's own without it"),
        },
        requires=_requires,
        doc="A storage format for the weights that match a pattern.",
    )
)
