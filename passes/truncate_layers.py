"""truncate-layers: fewer layers in the language model, the expert's pairing with them kept right.

mode=drop takes layers out of the VLM together with the expert layers that read their keys and values. mode=kv-tap
leaves of a dropped layer its norm and its k and v projections, fed by the hidden state of the last kept layer, so that
the expert stays whole. Which layers: the first ones, a list, or by measurement on observations: "influence" drops those
that turn the hidden state least (block influence, Men et al. 2024, arXiv 2403.03853), "angular" the run of layers over
which it turns least (Gromov et al. 2024, arXiv 2403.17887; here the mean over all tokens, not the last one). heal=ridge
refits a tap's projections to the keys and values that the whole network would have had; with mode=drop it refits
down_proj of the layer before a gap to the hidden state behind the gap (ReplaceMe: Shopkhoev et al. 2025, arXiv
2505.02819), both in closed form and judged on observations held out. None of this is free: a
checkpoint that was trained with N layers drifts with fewer. Free is only a tap on the last layer, of which nothing but
keys and values is read.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlac import calibrate
from vlac.errors import Inapplicable
from vlac.ops import NpArray
from vlac.policy import Policy
from vlac.registry import Pass, passes
from vlac.weights import LazyTensor, Weights

SELECT = ("first", "list", "influence", "angular")
MODES = ("drop", "kv-tap")
HEAL = ("none", "ridge")
DAMPING = 1e-2
"""Of the ridge, times the mean of the Gram matrix's diagonal."""

Pairs = tuple[tuple[int, str], ...]


# --- what there is ---------------------------------------------------------------------------------------------


def parse_layers(text: str) -> tuple[int, ...]:
    """ "0-3+6" -> (0, 1, 2, 3, 6); Inapplicable shows the form."""
    found: list[int] = []
    for part in text.split("+"):
        m = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not m or len(part) > 12:
            raise Inapplicable(f"layers={text!r} is no list of layers", remedy="write layers=0-3+6")
        found += range(int(m[1]), int(m[2] or m[1]) + 1)
    if sorted(set(found)) != found:
        raise Inapplicable(f"layers={text!r}: each layer once, in order")
    return tuple(found)


def pairs_of(spec: Any) -> Pairs:
    """(VLM layer, kind) for each expert layer; a family that says nothing pairs layer i with layer i."""
    expert = getattr(spec, "expert", None)
    if expert is None:
        return ()
    if hasattr(spec, "pairs"):
        return tuple(spec.pairs)
    if expert.num_hidden_layers != spec.text.num_hidden_layers:
        raise Inapplicable(
            f"an expert of {expert.num_hidden_layers} layers beside {spec.text.num_hidden_layers} VLM layers: "
            "the family does not say which reads which"
        )
    return tuple((i, "") for i in range(expert.num_hidden_layers))


def _requires(
    policy: Policy, keep: int, select: str, layers: str, mode: str, heal: str, samples: int, observations: str
) -> None:
    for key, value, known in (("select", select, SELECT), ("mode", mode, MODES), ("heal", heal, HEAL)):
        if value not in known:
            raise Inapplicable(f"{key}={value!r}; there are: {', '.join(known)}")
    text = getattr(policy.spec, "text", None)
    if text is None:
        raise Inapplicable(f"{policy.family} has no language model in its spec", remedy="leave truncate-layers out")
    n = text.num_hidden_layers
    if bool(layers) != (select == "list"):
        raise Inapplicable("layers= goes with select=list, and select=list needs layers=")
    if layers and keep and keep != len(parse_layers(layers)):
        raise Inapplicable(f"keep={keep}, but layers={layers} names {len(parse_layers(layers))}")
    wanted = len(parse_layers(layers)) if layers else keep
    if not 1 <= wanted < n or (layers and max(parse_layers(layers)) >= n):
        raise Inapplicable(f"keeping {layers or wanted} of {n} layers: 1 to {n - 1} of layers 0..{n - 1} can be kept")
    pairs = pairs_of(policy.spec)
    if mode == "kv-tap" and not (pairs and hasattr(policy.spec, "kv_taps")):
        raise Inapplicable(f"{policy.family} draws no taps for an expert", remedy="mode=drop")
    if heal != "none" and samples < 2:
        raise Inapplicable(f"samples={samples}: healing holds observations out to be judged, at least 2 are needed")


# --- which layers ----------------------------------------------------------------------------------------------


def turns(policy: Policy, given: Sequence[Any]) -> NpArray:
    """Cosine between the hidden state before and after each run of layers: [n, n+1], [i, j] over layers i..j-1.

    Mean over the valid tokens of all observations; entries with j <= i are 1.
    """
    program = calibrate.draw(policy)
    n = policy.spec.text.num_hidden_layers
    names = [f"text.layers.{i}.hidden" for i in range(n)]
    stage = next((s for s in program.stages if {m.name for m in s.nodes} >= set(names[:-1])), None)
    if stage is None:
        raise Inapplicable(f"{policy.family}: no stage holds the hidden states of all layers", remedy="select=first")
    norms = {m.inputs[1]: m.inputs[0] for m in stage.nodes if m.op == "rms_norm"}
    first = norms["@text.layers.0.input_layernorm.weight"]
    states = [first, *(name for name in names if any(m.name == name for m in stage.nodes))]
    total, count = np.zeros((n, n + 1)), 0

    def see(_: int, __: str, values: Mapping[str, NpArray]) -> None:
        nonlocal total, count
        rows = [calibrate.valid_rows(values, s).astype(np.float64) for s in states]
        rows = [r / np.maximum(np.linalg.norm(r, axis=1, keepdims=True), 1e-30) for r in rows]
        count += len(rows[0])
        for i in range(n):
            for j in range(n + 1):
                total[i, j] += len(rows[0]) if j <= i else (rows[i] * rows[j]).sum()

    extra = {"prefix_valid"} & {m.name for m in stage.nodes}
    calibrate.watch(policy, given, {stage.name: {*states, *extra}}, see)
    return np.asarray(total / count)


def choose(select: str, keep: int, cosine: NpArray) -> tuple[int, ...]:
    """The `keep` layers that stay by "influence" or "angular"; `cosine` as `turns` gives it. The last one always stays:
    what leaves the network comes from it."""
    n = len(cosine)
    if select == "influence":
        influence = [1 - cosine[i, i + 1] for i in range(n - 1)]
        dropped = set(np.argsort(influence, kind="stable")[: n - keep].tolist())
    else:
        run = n - keep
        distance = [np.arccos(np.clip(cosine[i, i + run], -1, 1)) / np.pi for i in range(n - run)]
        start = int(np.argmin(distance))
        dropped = set(range(start, start + run))
    return tuple(i for i in range(n) if i not in dropped)


# --- the cut ---------------------------------------------------------------------------------------------------


def renamed(weights: Weights, part: str, kept: Sequence[int]) -> Weights:
    """Layers `{part}.layers.{i}.` of `kept` under their new numbers, the others gone."""
    order = {old: new for new, old in enumerate(kept)}
    result: dict[str, LazyTensor] = {}
    for name, tensor in weights.items():
        m = re.match(rf"{re.escape(part)}\.layers\.(\d+)\.", name)
        if m is None:
            result[name] = tensor
        elif int(m[1]) in order:
            result[f"{part}.layers.{order[int(m[1])]}.{name[m.end() :]}"] = tensor
    return Weights(result)


def dropped_whole(policy: Policy, kept: Sequence[int]) -> Policy:
    """VLM layers outside `kept` go, and with them the expert layers that read them."""
    spec, order = policy.spec, {old: new for new, old in enumerate(kept)}
    pairs = pairs_of(spec)
    changes: dict[str, Any] = {"text": dataclasses.replace(spec.text, num_hidden_layers=len(kept))}
    weights = renamed(policy.weights, "text", kept)
    if pairs:
        mine = [j for j, (i, _) in enumerate(pairs) if i in order]
        if not mine:
            raise Inapplicable(f"no expert layer reads layers {list(kept)}: nothing of the expert would be left")
        changes["expert"] = dataclasses.replace(spec.expert, num_hidden_layers=len(mine))
        if hasattr(spec, "expert_pairs"):
            changes["expert_pairs"] = tuple((order[pairs[j][0]], pairs[j][1]) for j in mine)
        weights = renamed(weights, "expert", mine)
    if hasattr(spec, "kv_taps"):
        changes["kv_taps"] = tuple(order[i] for i in spec.kv_taps if i in order)
    return policy.replace(spec=dataclasses.replace(spec, **changes), weights=weights)


def tapped(policy: Policy, kept: Sequence[int]) -> Policy:
    """Layers outside `kept` keep their norm and their k and v projections."""
    spec = policy.spec
    gone = [i for i in range(spec.text.num_hidden_layers) if i not in kept]
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.", "post_attention_layernorm")
    dead = [n for n in policy.weights if any(n.startswith(f"text.layers.{i}.{p}") for i in gone for p in parts)]
    taps = tuple(sorted({*spec.kv_taps, *gone}))
    return policy.replace(spec=dataclasses.replace(spec, kv_taps=taps), weights=policy.weights.without(*dead))


# --- healing ---------------------------------------------------------------------------------------------------


def ridge(x: NpArray, y: NpArray, start: NpArray) -> NpArray:
    """W [out, in] minimising |x W^T - y|^2 + d |W - start|^2, d = DAMPING times the mean diagonal of x^T x.

    x [rows, in], y [rows, out], all float64. Shrinking towards `start` and not towards zero: where the observations
    say nothing, the checkpoint's own projection stays.
    """
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += DAMPING * np.trace(gram) / len(gram)
    return np.asarray(start + np.linalg.solve(gram, x.T @ (y - x @ start.T)).T)


def heal_taps(policy: Policy, cut: Policy, given: Sequence[Any]) -> tuple[Policy, Mapping[str, Any]]:
    """Taps of `cut` refitted to what `policy` has at these places; a quarter of the observations judges the fit."""
    weights = [
        f"text.layers.{i}.self_attn.{p}_proj.weight"
        for i in cut.spec.kv_taps
        if i not in policy.spec.kv_taps
        for p in "kv"
    ]
    judges = max(1, len(given) // 4)
    reads, wants = _collect(cut, weights, given, 0), _collect(policy, weights, given, 1)
    tensors: dict[str, LazyTensor] = {}
    errors = np.zeros(3)
    for name in weights:
        start = cut.weights[name].load().astype(np.float64)
        x, y = (np.concatenate(v[name][: len(given) - judges]).astype(np.float64) for v in (reads, wants))
        held_x, held_y = (np.concatenate(v[name][len(given) - judges :]).astype(np.float64) for v in (reads, wants))
        healed = ridge(x, y, start)
        errors += [((held_x @ w.T - held_y) ** 2).sum() for w in (start, healed)] + [(held_y**2).sum()]
        tensors[name] = LazyTensor.of(healed.astype(np.float32), f"{name} healed")
    figures = {
        "held_out_observations": judges,
        "held_out_kv_error_before": round(float(errors[0] / errors[2]), 6),
        "held_out_kv_error_after": round(float(errors[1] / errors[2]), 6),
    }
    return cut.replace(weights=cut.weights.with_(**tensors)), figures


def _collect(policy: Policy, weights: Sequence[str], given: Sequence[Any], which: int) -> dict[str, list[NpArray]]:
    """For each weight and observation what its linear reads (which=0) or makes (which=1), valid rows only."""
    program = calibrate.draw(policy)
    at = {w: calibrate.linears(program, w)[0] for w in weights}
    names: dict[str, set[str]] = {}
    for stage, *values in at.values():
        names.setdefault(stage, {"prefix_valid"} & {m.name for m in program.stage(stage).nodes}).add(values[which])
    result: dict[str, list[NpArray]] = {w: [] for w in weights}

    def see(_: int, stage: str, values: Mapping[str, NpArray]) -> None:
        for w, (where, *value) in at.items():
            if where == stage:
                result[w].append(calibrate.valid_rows(values, value[which]))

    calibrate.watch(policy, given, names, see)
    return result


def heal_gaps(
    policy: Policy, cut: Policy, kept: Sequence[int], given: Sequence[Any]
) -> tuple[Policy, Mapping[str, Any]]:
    """down_proj before every gap of `cut` refitted: what it adds leads to the hidden state behind the gap.

    With M what the layer's MLP gives and Y what it is added to, M T + Y should be the hidden state L that `policy` has
    behind the gap: T by ridge towards the identity, and T^T times down_proj is the healed weight.
    """
    judges = max(1, len(given) // 4)
    after_last = () if pairs_of(policy.spec) else (policy.spec.text.num_hidden_layers,)  # no expert reads that far
    gaps = [(new, end - 1) for new, (old, end) in enumerate(itertools.pairwise((*kept, *after_last))) if end > old + 1]
    errors, healed = np.zeros(3), 0
    for new, behind in gaps:
        weight, after = f"text.layers.{new}.mlp.down_proj.weight", f"text.layers.{behind}.hidden"
        program, whole = calibrate.draw(cut), calibrate.draw(policy)
        found = calibrate.linears(program, weight)
        sums = [
            (s, n.inputs[0], n.inputs[1])
            for s, _, made in found
            for n in program.stage(s).nodes
            if n.op == "add" and made == n.inputs[1]
        ]
        places = [s.name for s in whole.stages if any(n.name == after for n in s.nodes)]
        if not sums or not places:
            continue
        (stage, base, made), place = sums[0], places[0]
        mine, theirs = _rows(cut, stage, (base, made), given), _rows(policy, place, (after,), given)
        m, y = (
            [np.concatenate(part).astype(np.float64) for part in (v[:-judges], v[-judges:])]
            for v in ([r[made] for r in mine], [t[after] - r[base] for r, t in zip(mine, theirs, strict=True)])
        )
        start = np.eye(m[0].shape[1])
        turn = ridge(m[0], y[0], start)
        errors += [((m[1] @ t.T - y[1]) ** 2).sum() for t in (start, turn)] + [(y[1] ** 2).sum()]
        w = turn @ cut.weights[weight].load().astype(np.float64)
        cut = cut.replace(
            weights=cut.weights.with_(**{weight: LazyTensor.of(w.astype(np.float32), f"{weight} healed")})
        )
        healed += 1
    if not healed:
        raise Inapplicable("no kept layer stands before a gap whose far side is computed", remedy="heal=none")
    figures = {
        "held_out_observations": judges,
        "healed_gaps": healed,
        "held_out_hidden_error_before": round(float(errors[0] / errors[2]), 6),
        "held_out_hidden_error_after": round(float(errors[1] / errors[2]), 6),
    }
    return cut, figures


def _rows(policy: Policy, stage: str, names: Sequence[str], given: Sequence[Any]) -> list[dict[str, NpArray]]:
    """Valid rows of values of a stage, for each observation."""
    found: list[dict[str, NpArray]] = []
    extra = {"prefix_valid"} & {m.name for m in calibrate.draw(policy).stage(stage).nodes}

    def see(i: int, _: str, values: Mapping[str, NpArray]) -> None:
        if i == len(found):
            found.append({n: np.array(calibrate.valid_rows(values, n)) for n in names})

    calibrate.watch(policy, given, {stage: {*names, *extra}}, see)
    return found


# --- the pass --------------------------------------------------------------------------------------------------


def _apply(
    policy: Policy, keep: int, select: str, layers: str, mode: str, heal: str, samples: int, observations: str
) -> tuple[Policy, Mapping[str, Any]]:
    n = policy.spec.text.num_hidden_layers
    figures: dict[str, Any] = {}
    needs = select in ("influence", "angular") or heal != "none"
    given = calibrate.observations(policy, samples, observations) if needs else ()
    if select in ("first", "list"):
        kept = parse_layers(layers) if layers else tuple(range(keep))
    else:
        cosine = turns(policy, given)
        kept = choose(select, keep, cosine)
        figures["influence"] = " ".join(f"{1 - cosine[i, i + 1]:.4f}" for i in range(n))
    after = dropped_whole(policy, kept) if mode == "drop" else tapped(policy, kept)
    if heal == "ridge":
        after, healed = heal_gaps(policy, after, kept, given) if mode == "drop" else heal_taps(policy, after, given)
        figures |= healed
    figures |= {
        "layers_before": n,
        "layers_after": len(kept),
        "kept": "+".join(map(str, kept)),
        "parameters_before": calibrate.size(policy),
        "parameters_after": calibrate.size(after),
    }
    if pairs_of(policy.spec):
        figures |= {
            "expert_layers_before": policy.spec.expert.num_hidden_layers,
            "expert_layers_after": after.spec.expert.num_hidden_layers,
        }
    return after, figures


def _ensures(before: Policy, after: Policy, mode: str, **_: Any) -> None:
    """The shorter network draws with the weights it has, and an expert left whole reads what it read."""
    calibrate.draw(after)
    if mode == "kv-tap" and pairs_of(before.spec) != pairs_of(after.spec):
        raise Inapplicable("truncate-layers: taps must not change which layers the expert reads")


TRUNCATE_LAYERS = passes.add(
    Pass(
        name="truncate-layers",
        apply=_apply,
        params={
            "keep": (int, 0, "how many VLM layers stay (with select=list: may be left out)"),
            "select": (str, "first", "which stay: " + ", ".join(SELECT)),
            "layers": (str, "", "with select=list: the layers that stay, as 0-3+6"),
            "mode": (str, "drop", "drop: expert layers go along; kv-tap: keys and values of dropped layers stay"),
            "heal": (str, "none", "none, or ridge: refit taps on observations"),
            "samples": (int, 8, "observations, where any are needed"),
            "observations": (str, "", "an .npz file of them; seeded ones without it"),
        },
        requires=_requires,
        ensures=_ensures,
        doc="Fewer layers in the language model.",
    )
)
