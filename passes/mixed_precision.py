"""mixed-precision: each linear and embedding in the format that the action chunk needs, within a budget.

Every one is stored in each format of a ladder alone, and the drift of the chunk is measured, the noise being the same.
Starting from the coarsest, the step up that saves the most squared drift per byte is taken again and again (errors of
linears add up in squares; HAWQ's rule, arXiv 1911.03852, with the chunk itself in place of a Hessian). Observations
weigh alike in that: each one's drift is divided by what every format as a whole does to it. A policy close to a
decision turns any rounding into much drift, and one such chunk would choose the formats for all others. Of the plans on
that way the smallest whose joint drift, measured again, is within budget=rel_l2<=X is found by bisection; size<=Y takes
the last plan that is not larger; both together must both hold. The result is a table of names and formats (write=FILE)
that can be read, edited and passed back (table=FILE). Names are those of the lowered network, so passes that change it
come first. Measurements are kept beside the table as they are made: a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from vlac import calibrate
from vlac.errors import Inapplicable
from vlac.formats import FORMATS, decode, encode
from vlac.goldens import reference_session
from vlac.graph import Param, Program, Schedule
from vlac.layouts import quantize_int4_blocks, quantize_int8_rows
from vlac.lower import lower, roles
from vlac.ops import NpArray
from vlac.policy import Policy
from vlac.registry import Pass, passes, telling
from vlac.runtime.inputs import Prepared, prepared
from vlac.runtime.session import execute

LADDERS = (("q4_0", "q5_0", "q8_0", "f16", "f32"), ("int4", "int8", "f16", "f32"), ("bf16", "f32"))
"""Formats of one container, coarsest first."""
USABLE = tuple(dict.fromkeys(f for rungs in LADDERS for f in rungs))


def stored(weight: NpArray, format: str) -> NpArray:
    """What a weight [n, k] is after it has been stored in a format, float32; rows are padded to whole blocks."""
    n, k = weight.shape
    block = FORMATS[format].block
    w = np.pad(weight, ((0, 0), (0, -k % block))).astype(np.float32)
    if format == "int8":
        q, scale = quantize_int8_rows(w)
        return np.asarray(q * scale[:, None], dtype=np.float32)
    if format == "int4":
        q, scale = quantize_int4_blocks(w)
        return np.asarray(q.reshape(n, -1, block) * scale[..., None], dtype=np.float32).reshape(n, -1)[:, :k]
    return decode(format, encode(format, w), w.shape)[:, :k]


@dataclass(frozen=True)
class Bench:
    """The lowered program with what it made of each observation: inputs, all values between stages, the chunk."""

    program: Program
    seen: tuple[tuple[Prepared, Mapping[str, NpArray], NpArray], ...]

    @staticmethod
    def of(policy: Policy, samples: int, path: str) -> Bench:
        program, seen = lower(calibrate.draw(policy)), []
        session = reference_session(program)
        for o in calibrate.observations(policy, samples, path):
            ready = prepared(policy.io, policy.tokenizer, program, o)
            taps: dict[str, NpArray] = {}
            chunk = execute(program, session, ready.env, ready.symbols, taps=taps)
            seen.append((ready, taps, chunk))
        session.close()
        return Bench(program, tuple(seen))

    def drifts(self, formats: Mapping[str, str]) -> tuple[float, ...]:
        """For each observation the square of the chunk's change when these weights are stored so, over the mean square
        of a chunk: the root of their mean is the relative L2. Stages before the first of these weights do not run."""
        changed = {
            name: self.program.weights[name].map(lambda w, f=fmt: stored(w, f))  # type: ignore[misc]
            for name, fmt in formats.items()
        }
        steps = self.program.schedule.steps
        reads = [
            any(i[1:] in changed for n in self.program.stage(s.stage).nodes for i in n.inputs if i.startswith("@"))
            for s in steps
        ]
        tail = self.program.replace(
            weights=self.program.weights.with_(**changed),
            schedule=Schedule(steps[reads.index(True) :], self.program.schedule.result),
        )
        session = reference_session(tail)
        chunks = [execute(tail, session, {**taps, **ready.env}, ready.symbols) for ready, taps, _ in self.seen]
        session.close()
        told = [chunk.astype(np.float64) for _, _, chunk in self.seen]
        size = np.mean([np.square(t).sum() for t in told])
        return tuple(float(np.square(c - t).sum() / size) for c, t in zip(chunks, told, strict=True))


def fewest(count: int, holds: Callable[[int], bool]) -> int:
    """The smallest n in 0..count with holds(n), by bisection; `count` itself is taken to hold."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def nbytes(params: Mapping[str, Param], formats: Mapping[str, str]) -> int:
    """Bytes of these weights in these formats, rows padded to whole blocks."""
    total = 0
    for name, fmt in formats.items():
        n, k = params[name].shape
        total += FORMATS[fmt].nbytes((n, k + -k % FORMATS[fmt].block))
    return total


# --- the way up --------------------------------------------------------------------------------------------------


def ladder_of(low: str, high: str) -> tuple[str, ...]:
    """The formats of low's container (ggml's blocks, or ONNX's) from `low` to `high`, coarsest first."""
    found = next(rungs for rungs in LADDERS if low in rungs)
    return found[found.index(low) : found.index(high) + 1]


def steps_up(
    alone: Mapping[tuple[str, str], float], price: Callable[[str, str], int], names: Sequence[str], rungs: Sequence[str]
) -> list[tuple[str, str]]:
    """(name, next format) in the order in which steps are taken, from all coarsest to all finest.

    alone: drift by (name, format). Of a weight's finer formats the one that saves the most squared drift per byte is
    next, those between are passed over; drift that does not fall with a finer format counts as no saving.
    """
    at = dict.fromkeys(names, 0)
    order: list[tuple[str, str]] = []
    while True:
        best: tuple[float, str, int] | None = None
        for name in names:
            now = alone[name, rungs[at[name]]] ** 2
            for i in range(at[name] + 1, len(rungs)):
                cost = price(name, rungs[i]) - price(name, rungs[at[name]])
                worth = max(now - alone[name, rungs[i]] ** 2, 0.0) / max(cost, 1)
                if best is None or worth > best[0]:
                    best = (worth, name, i)
        if best is None:
            return order
        _, name, i = best
        at[name] = i
        order.append((name, rungs[i]))


def plan_at(order: Sequence[tuple[str, str]], names: Sequence[str], low: str, count: int) -> dict[str, str]:
    """Formats after the first `count` steps."""
    return {**dict.fromkeys(names, low), **dict(order[:count])}


# --- tables ------------------------------------------------------------------------------------------------------


def table_text(plan: Mapping[str, str], params: Mapping[str, Param], alone: Mapping[tuple[str, str], float]) -> str:
    """The plan as text: name, format, bytes, drift of this weight alone in this format. Edit the second column."""
    width = max(len(n) for n in plan)
    lines = [f"# {'weight'.ljust(width - 2)}  format  bytes  drift alone"]
    for name, fmt in plan.items():
        drift = f"{alone[name, fmt]:.6f}" if (name, fmt) in alone else "-"
        lines.append(f"{name.ljust(width)}  {fmt.ljust(6)}  {nbytes(params, {name: fmt})}  {drift}")
    return "\n".join(lines) + "\n"


def read_table(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Names and formats of a table; Inapplicable names the line that is wrong, and weights that are missing."""
    if not path.is_file():
        raise Inapplicable(f"table={path} is no file", remedy="write=FILE writes one")
    plan: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) < 2 or words[1] not in FORMATS:
            raise Inapplicable(f"{path}, line {number}: {line!r:.80}: expected a name and one of {', '.join(FORMATS)}")
        if words[0] not in names:
            near = get_close_matches(words[0], names, 1)
            raise Inapplicable(
                f"{path}, line {number}: no weight {words[0]!r} in the lowered network",
                remedy=f"the nearest: {near[0]}" if near else "`vlac inspect --program` shows the names",
            )
        plan[words[0]] = words[1]
    if missing := [n for n in names if n not in plan]:
        raise Inapplicable(f"{path} leaves out {len(missing)} weights, the first: {missing[0]}")
    return plan


class Kept:
    """Drifts measured before, in a file of JSON lines under a key of what they were measured on."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.known: dict[str, tuple[float, ...]] = {}
        if path is not None and path.is_file():
            text = path.read_text(encoding="utf-8")
            if not text.endswith("\n"):  # the last line of a killed run
                path.write_text(text + "\n", encoding="utf-8")
            for line in text.splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    if entry["key"] == key:
                        self.known[entry["plan"]] = tuple(map(float, entry["squares"]))

    def drifts(self, bench: Bench, formats: Mapping[str, str]) -> tuple[float, ...]:
        """As `bench.drifts`, from the file where it knows the answer."""
        plan = ",".join(f"{n}={f}" for n, f in sorted(formats.items()))
        plan = plan if len(formats) == 1 else hashlib.sha256(plan.encode()).hexdigest()
        if plan not in self.known:
            self.known[plan] = bench.drifts(formats)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": self.key, "plan": plan, "squares": self.known[plan]}) + "\n")
        return self.known[plan]


def scales(uniform: Sequence[Sequence[float]]) -> NpArray:
    """How sensitive each observation is: its squared drift over the mean of all, geometric mean over plans.

    uniform: `Bench.drifts` of some plans; those that change nothing say nothing.
    """
    told = np.array([d for d in uniform if min(d) > 0], np.float64)
    if not told.size:
        return np.ones(len(uniform[0]))
    return np.asarray(np.exp(np.log(told / told.mean(1, keepdims=True)).mean(0)))


@dataclass(frozen=True)
class Scored:
    """What a plan does to the chunk: `drift`, relative L2 over all observations, and `score`, the same with every
    observation's square divided by how sensitive it is."""

    bench: Bench
    kept: Kept
    scales: NpArray

    def drift(self, formats: Mapping[str, str]) -> float:
        return math.sqrt(np.mean(self.kept.drifts(self.bench, formats)))

    def score(self, formats: Mapping[str, str]) -> float:
        return math.sqrt(np.mean(self.kept.drifts(self.bench, formats) / self.scales))


# --- the pass ----------------------------------------------------------------------------------------------------


def limit_of(text: str) -> float:
    """ "rel_l2<=0.02", "<=0.02" or "0.02" -> 0.02; inf for ""."""
    bare = text.removeprefix("rel_l2").removeprefix("<=").strip()
    try:
        value = float(bare) if text else math.inf
    except ValueError:
        value = math.nan
    if not value > 0:
        raise Inapplicable(f"budget={text!r}: write rel_l2<=X with X above 0, such as rel_l2<=0.02")
    return value


def size_of(text: str) -> float:
    """ "<=300MB", "300MB", "0.3GB", "500kB" -> bytes; inf for ""."""
    m = re.fullmatch(r"(?:<=)?\s*([0-9.]+)\s*(B|kB|KB|MB|GB)?", text)
    if text and (m is None or not m[1].strip(".") or m[1].count(".") > 1 or float(m[1]) <= 0):
        raise Inapplicable(f"size={text!r}: write a number with B, kB, MB or GB, such as size<=300MB")
    return float(m[1]) * {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, None: 1}[m[2]] if m else math.inf


def _requires(policy: Policy, **p: Any) -> None:
    for key, value in (("low", p["low"]), ("high", p["high"])):
        if value not in USABLE:
            raise Inapplicable(f"{key}={value!r}; there are: {', '.join(USABLE)}")
    rungs = next(r for r in LADDERS if p["low"] in r)
    if p["high"] not in rungs or rungs.index(p["low"]) >= rungs.index(p["high"]):
        raise Inapplicable(
            f"low={p['low']} has {FORMATS[p['low']].bits} bits a value, high={p['high']} {FORMATS[p['high']].bits}: "
            f"high must be finer, of the same container: {', '.join(rungs)}"
        )
    if not (p["budget"] or p["size"] or p["table"]):
        raise Inapplicable("give budget=rel_l2<=X, size<=Y (whole weights), both, or table=FILE")
    limit_of(p["budget"]), size_of(p["size"])
    if policy.rotations:
        raise Inapplicable("the policy's weights are to be stored rotated already", remedy="mixed-precision first")


def _enough(policy: Policy) -> int:
    """Observations: of fewer, single chunks would choose the formats for all others."""
    return 32 if calibrate.size(policy) <= 20_000_000 else 8


def _items(program: Program) -> list[str]:
    """Linears and embedding tables."""
    return [n for n, kind in roles(program).items() if kind in ("linear", "embed")]


def _apply(policy: Policy, **p: Any) -> tuple[Policy, Mapping[str, Any]]:
    if p["table"]:
        program = lower(calibrate.draw(policy))
        plan = read_table(Path(p["table"]), _items(program))
        figures: dict[str, Any] = {"weights": len(plan), "bytes": _whole(program, plan)}
        return policy.replace(precision=(*policy.precision, *plan.items())), figures
    bench = Bench.of(policy, p["samples"] or _enough(policy), p["observations"])
    names, rungs = _items(bench.program), ladder_of(p["low"], p["high"])
    path = Path(p["write"]) if p["write"] else None
    kept = Kept(path and path.with_name(f"{path.name}.measured"), _key(policy, bench, p))
    uniform = {f: dict.fromkeys(names, f) for f in rungs}
    single = {(n, f): {n: f} for f in rungs for n in names}
    told = telling()
    for i, plan in enumerate(plans := (*uniform.values(), *single.values())):
        told("drift of every weight in every format", i, len(plans))
        kept.drifts(bench, plan)
    measured = Scored(bench, kept, scales([kept.drifts(bench, plan) for plan in uniform.values()]))
    alone = {pair: measured.score(plan) for pair, plan in single.items()}
    order = steps_up(alone, lambda n, f: nbytes(bench.program.params, {n: f}), names, rungs)
    limit, most = limit_of(p["budget"]), size_of(p["size"])
    plan = _chosen(measured, order, names, rungs, limit, most)
    starts = [plan, *(u for u in uniform.values() if _whole(bench.program, u) <= most)]
    if p["budget"]:  # joint drift need not fall with every step: a uniform format may hold the budget with fewer bytes
        plan = min((s for s in starts if measured.drift(s) <= limit), key=lambda s: _whole(bench.program, s))
    else:
        least = min(measured.drift(s) for s in starts)
        plan = min((s for s in starts if measured.drift(s) <= least), key=measured.score)
        plan = _exchanged(measured, plan, alone, rungs, most)
    figures = {
        "weights": len(names),
        "drift": round(measured.drift(plan), 6),
        "bytes": _whole(bench.program, plan),
        **{f"drift_all_{f}": round(measured.drift(u), 6) for f, u in uniform.items()},
        **{f"bytes_all_{f}": _whole(bench.program, u) for f, u in uniform.items()},
        **_where(plan, bench.program),
    }
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table_text(plan, bench.program.params, alone), encoding="utf-8")
    return policy.replace(precision=(*policy.precision, *plan.items())), figures


def _chosen(
    measured: Scored,
    order: Sequence[tuple[str, str]],
    names: Sequence[str],
    rungs: Sequence[str],
    limit: float,
    most: float,
) -> dict[str, str]:
    """The plan on the way up. Inapplicable with the numbers where none keeps the budget."""

    def at(count: int) -> dict[str, str]:
        return plan_at(order, names, rungs[0], count)

    sizes = [_whole(measured.bench.program, at(i)) for i in range(len(order) + 1)]
    fits = [i for i, size in enumerate(sizes) if size <= most]
    if not fits:
        raise Inapplicable(f"size: with all {len(names)} weights in {rungs[0]} they take {sizes[0] / 1e6:.3f} MB")
    if limit == math.inf:
        return at(fits[-1])
    finest = measured.drift(at(len(order)))
    if finest > limit:
        raise Inapplicable(
            f"budget={limit:g}: with all {len(names)} weights in {rungs[-1]} the chunk drifts by {finest:.3g}",
            remedy="a larger budget, or a finer high=",
        )
    count = fewest(len(order), lambda n: measured.drift(at(n)) <= limit)
    if count not in fits:
        raise Inapplicable(
            f"a drift of {limit:g} takes {sizes[count] / 1e6:.3f} MB, within the size it is "
            f"{measured.drift(at(fits[-1])):.3g}",
            remedy="a larger size or a larger budget",
        )
    return at(count)


EXCHANGES = 12
"""Tries at giving one weight's bytes to another, each measured jointly, where the size is what is fixed."""


def _exchanged(
    measured: Scored,
    plan: dict[str, str],
    alone: Mapping[tuple[str, str], float],
    rungs: Sequence[str],
    most: float,
) -> dict[str, str]:
    """The plan with weights a step finer that gain most for their bytes and others a step coarser that lose least, as
    long as the joint drift falls and its score does: what is measured alone does not tell everything."""
    program, params = measured.bench.program, measured.bench.program.params

    def rate(name: str, to: str) -> float:
        change = abs(alone[name, plan[name]] ** 2 - alone[name, to] ** 2)
        return change / max(1, abs(nbytes(params, {name: to}) - nbytes(params, {name: plan[name]})))

    refused: set[str] = set()
    for _ in range(EXCHANGES):
        up = {n: rungs[rungs.index(f) + 1] for n, f in plan.items() if f != rungs[-1] and n not in refused}
        down = {n: rungs[rungs.index(f) - 1] for n, f in plan.items() if f != rungs[0]}
        if not up:
            break
        first = max(up, key=lambda n: rate(n, up[n]))
        trial = {**plan, first: up[first]}
        for name in sorted(down.keys() - {first}, key=lambda n: rate(n, down[n])):
            if _whole(program, trial) <= most:
                break
            trial[name] = down[name]
        if (
            _whole(program, trial) <= most
            and measured.score(trial) < measured.score(plan)
            and measured.drift(trial) <= measured.drift(plan)
        ):
            plan = trial
        else:
            refused.add(first)
    return plan


def _whole(program: Program, plan: Mapping[str, str]) -> int:
    """Bytes of all weights: those of the plan, and the rest in float32."""
    rest = sum(4 * math.prod(param.shape) for name, param in program.params.items() if name not in plan)
    return nbytes(program.params, plan) + rest


def _where(plan: Mapping[str, str], program: Program) -> dict[str, float]:
    """Mean bits a value by the part of the network (the name's first word): who deserves them."""
    bits: dict[str, float] = {}
    values: dict[str, int] = {}
    for name, fmt in plan.items():
        part, count = name.split(".")[0], math.prod(program.params[name].shape)
        bits[part] = bits.get(part, 0.0) + FORMATS[fmt].bits * count
        values[part] = values.get(part, 0) + count
    return {f"bits_{part}": round(total / values[part], 2) for part, total in bits.items()}


def _key(policy: Policy, bench: Bench, p: Mapping[str, Any]) -> str:
    """Of everything that a drift depends on: program, checkpoint, passes before, observations."""
    digest = hashlib.sha256(str(bench.program).encode())
    digest.update(json.dumps([dict(policy.source.files), [vars(h) for h in policy.history]], default=str).encode())
    for ready, _, chunk in bench.seen:
        digest.update(chunk.tobytes() + b"".join(v.tobytes() for v in ready.env.values()))
    return digest.hexdigest()[:32]


MIXED_PRECISION = passes.add(
    Pass(
        name="mixed-precision",
        apply=_apply,
        params={
            "budget": (str, "", "rel_l2<=X: relative L2 drift of the chunk that these formats may cause"),
            "size": (str, "", "<=300MB: bytes of all weights, what is neither linear nor embedding in float32"),
            "low": (str, "q4_0", "coarsest format: " + ", ".join(USABLE)),
            "high": (str, "f16", "finest format"),
            "table": (str, "", "a table to take formats from instead of measuring"),
            "write": (str, "", "where to write the table; measurements are kept beside it"),
            "samples": (int, 0, "observations to measure on; 0: 32, of a large policy 8"),
            "observations": (str, "", "a dataset, a folder or an .npz file of them; the policy's own without it"),
        },
        requires=_requires,
        doc="Each weight in the format that the chunk needs, within a budget of drift, size or both.",
    )
)
