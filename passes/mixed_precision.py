"""mixed-precision: two storage formats, the finer one where the action chunk notices, until a drift budget holds.

Every linear of the lowered program is stored in the coarse format alone, and the chunk's drift is measured on
observations with fixed noise: its sensitivity. Linears are then promoted in the order of squared sensitivity per byte
that promotion costs (errors of linears add up in squares; HAWQ's rule with the chunk itself in place of a Hessian), and
the smallest number of promotions whose joint drift, measured again, is within the budget is found by bisection. The
result is a plain table of names and formats in the policy's precision plan: the manifest's census shows it, and it can
be written down as quantize-weights steps of a recipe. Names are those of the lowered program, so passes that change the
network come first. Costs one run of the stages behind a linear for each linear and observation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from vlac.registry import Pass, passes
from vlac.runtime.inputs import Prepared
from vlac.runtime.session import execute, prepare

USABLE = ("int4", "q4_0", "q5_0", "int8", "q8_0", "bf16", "f16", "f32")


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
            ready = prepare(
                policy.io,
                policy.tokenizer,
                program,
                images=dict(o.images),
                state=o.state,
                task=o.task if policy.io.text_steps else None,
                noise=o.noise if policy.flow is not None else None,
            )
            taps: dict[str, NpArray] = {}
            chunk = execute(program, session, ready.env, ready.symbols, taps=taps)
            seen.append((ready, taps, chunk))
        session.close()
        return Bench(program, tuple(seen))

    def drift(self, formats: Mapping[str, str]) -> float:
        """Relative L2 of the chunk when these weights are stored so; stages before the first of them do not run."""
        if not formats:
            return 0.0
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
        return calibrate.drift(chunks, [chunk for _, _, chunk in self.seen])


def fewest(count: int, holds: Callable[[int], bool]) -> int:
    """The smallest n in 0..count with holds(n), by bisection; `count` itself is taken to hold."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def plan_of(order: Sequence[str], promoted: int, low: str, high: str) -> dict[str, str]:
    """The first `promoted` names in `high`, the others in `low`."""
    return {name: high if i < promoted else low for i, name in enumerate(order)}


def nbytes(params: Mapping[str, Param], formats: Mapping[str, str]) -> int:
    """Bytes of these weights in these formats, rows padded to whole blocks."""
    total = 0
    for name, fmt in formats.items():
        n, k = params[name].shape
        total += FORMATS[fmt].nbytes((n, k + -k % FORMATS[fmt].block))
    return total


# --- the pass ----------------------------------------------------------------------------------------------------


def _requires(policy: Policy, budget: float, low: str, high: str, samples: int, observations: str) -> None:
    for key, value in (("low", low), ("high", high)):
        if value not in USABLE:
            raise Inapplicable(f"{key}={value!r}; there are: {', '.join(USABLE)}")
    if not FORMATS[low].bits < FORMATS[high].bits:
        raise Inapplicable(
            f"low={low} has {FORMATS[low].bits} bits a value, high={high} {FORMATS[high].bits}: high must be finer"
        )
    if not (budget > 0 and math.isfinite(budget)):
        raise Inapplicable(f"budget={budget}: a relative L2 distance above 0, such as 0.02")
    if policy.rotations:
        raise Inapplicable("the policy's weights are to be stored rotated already", remedy="mixed-precision first")


def _apply(
    policy: Policy, budget: float, low: str, high: str, samples: int, observations: str
) -> tuple[Policy, Mapping[str, Any]]:
    bench = Bench.of(policy, samples, observations)
    params = bench.program.params
    names = [n for n, kind in roles(bench.program).items() if kind == "linear"]
    finest = bench.drift(plan_of(names, len(names), low, high))
    if finest > budget:
        raise Inapplicable(
            f"budget={budget}: with all {len(names)} linears in {high} the chunk drifts by {finest:.3g}",
            remedy="a larger budget, or a finer high=",
        )
    alone = {n: bench.drift({n: low}) for n in names}
    price = {n: nbytes(params, {n: high}) - nbytes(params, {n: low}) for n in names}
    order = sorted(names, key=lambda n: -(alone[n] ** 2) / price[n])
    measured: dict[int, float] = {len(order): finest}

    def holds(promoted: int) -> bool:
        measured[promoted] = bench.drift(plan_of(order, promoted, low, high))
        return measured[promoted] <= budget

    promoted = fewest(len(order), holds)
    formats = plan_of(order, promoted, low, high)
    uniform = {fmt: nbytes(params, dict.fromkeys(names, fmt)) for fmt in (low, high)}
    figures = {
        "linears": len(names),
        "promoted": promoted,
        "drift": round(measured[promoted], 6),
        f"drift_all_{low}": round(bench.drift(plan_of(order, 0, low, high)), 6),
        f"drift_all_{high}": round(finest, 6),
        "bytes": nbytes(params, formats),
        f"bytes_all_{low}": uniform[low],
        f"bytes_all_{high}": uniform[high],
        "most_sensitive": order[0],
    }
    return policy.replace(precision=(*policy.precision, *formats.items())), figures


MIXED_PRECISION = passes.add(
    Pass(
        name="mixed-precision",
        apply=_apply,
        params={
            "budget": (float, None, "relative L2 drift of the chunk that the linears' formats may cause"),
            "low": (str, "q4_0", "format of linears that do not matter: " + ", ".join(USABLE)),
            "high": (str, "q8_0", "format of those that do"),
            "samples": (int, 4, "observations to measure on"),
            "observations": (str, "", "an .npz file of them; seeded ones without it"),
        },
        requires=_requires,
        doc="A finer format for the linears that the chunk notices, within a drift budget.",
    )
)
