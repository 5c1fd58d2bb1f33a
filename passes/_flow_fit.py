"""A sampler fitted to what the shipped one does: where it asks the velocity network, and what it makes of the answers.

Step by step, x_(k+1) = a x_k + b v_(k-1) + c v_k with the three numbers that come closest, in least squares over
observations, noises and joints, to where the shipped sampler is at that time; the last step aims at its chunk. Numbers
shrink a little towards Adams-Bashforth's. The grid is searched among finer times: powers of the uniform one, then one
time after another is moved. The network may be asked about the noise as if the shipped sampler's first step were done:
that tells more of where a long first step leads. In the spirit of bespoke solvers (Shaul et al. 2023, arXiv
2310.19075), without gradients: stages before the loop run once per observation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlac import calibrate
from vlac.artifact import Golden
from vlac.errors import Inapplicable
from vlac.goldens import reference_session
from vlac.graph import Repeat, Stage
from vlac.ops import NpArray
from vlac.policy import Policy
from vlac.runtime.inputs import prepared
from vlac.runtime.schedule import execute
from vlac.spec import FlowSpec

Row = tuple[float, float, float, float, float, float]

FINE = 40
"""The grid's times are multiples of 1 / FINE."""

NOISES, MANY = (3, 8), 32
"""Samples of noise for each observation, the observation's own among them: for fewer than MANY observations, and for
more. Few hesitations make most of the error, and few cases hold none; fewer observations are for a quick fit."""

SEARCHED = 80
"""Cases of observation and noise that grids are searched with, or somewhat more."""

POWERS = (0.7, 0.85, 1.0, 1.2, 1.5, 1.9)
"""Grids t = 1 - (1 - k/N)^p reversed: p > 1 is finer near the actions, p < 1 near the noise."""

SHRINK = 1e-4
"""Of the fit towards Adams-Bashforth's numbers, times the mean square of each feature."""


class Field:
    """The velocity network of a policy on observations: `velocity(i, t, x)` for times on the fine grid or shipped.

    The loop is drawn with every time there may be, so that its index chooses one.
    """

    def __init__(self, policy: Policy, given: Sequence[Golden]) -> None:
        assert policy.flow is not None
        shipped = policy.flow
        self.times = tuple(sorted({*(round(k / FINE, 12) for k in range(1, FINE + 1)), *shipped.times}, reverse=True))
        dts = tuple(b - a for a, b in zip(self.times, (*self.times[1:], 0.0), strict=True))
        drawn = policy.replace(
            flow=dataclasses.replace(shipped, times=self.times, dts=dts, solver="euler", recurrence=())
        )
        program = calibrate.draw(drawn)
        (self.step,) = [s for s in program.schedule.steps if isinstance(s, Repeat)]
        stage = program.stage(self.step.stage)
        self.name = _velocity(stage)
        if not self.name:
            raise Inapplicable(f"{policy.family} draws no Euler step x + dt * velocity", remedy="another solver")
        program = program.replace(
            stages=tuple(
                dataclasses.replace(s, outputs=tuple(dict.fromkeys((*s.outputs, self.name))))
                if s.name == stage.name
                else s
                for s in program.stages
            )
        )
        self.session = reference_session(program)
        self.into = next(into for _, into, initial in self.step.carry if initial == "noise")
        self.ready = []
        once = program.replace(
            schedule=dataclasses.replace(
                program.schedule,
                steps=tuple(dataclasses.replace(s, times=1) if s is self.step else s for s in program.schedule.steps),
            )
        )
        for o in given:
            ready = prepared(policy.io, policy.tokenizer, program, o)
            taps: dict[str, NpArray] = {}
            execute(once, self.session, ready.env, ready.symbols, taps=taps)
            values = {**ready.env, **taps}
            own = {self.step.index, *(into for _, into, _ in self.step.carry)}
            self.ready.append(({n: values[n] for n, _ in stage.inputs if n not in own}, ready.symbols))

    def velocity(self, i: int, t: float, x: NpArray) -> NpArray:
        """v(x, t) [N, A], float64, of observation i."""
        env, symbols = self.ready[i]
        at = np.array([self.times.index(t)], dtype=np.int32)
        given = {**env, self.step.index: at, self.into: x.astype(np.float32)}
        return self.session.run(self.step.stage, given, symbols)[self.name].astype(np.float64)

    def close(self) -> None:
        self.session.close()


def _velocity(stage: Stage) -> str:
    """What an Euler step of the drawn stage multiplies by dt; empty where there is none."""
    made = {n.name: n for n in stage.nodes}
    step = made.get("x_next")
    change = made.get(step.inputs[1]) if step is not None and step.op == "add" else None
    return change.inputs[0] if change is not None and change.op == "mul" else ""


@dataclass(frozen=True)
class Paths:
    """Where the shipped sampler is: `x[i]` [S+1, N, A] of case i, at `times` [S+1] falling to 0; its observation is
    `of[i]`."""

    times: tuple[float, ...]
    x: tuple[NpArray, ...]
    of: tuple[int, ...]

    def at(self, t: float) -> list[NpArray]:
        """Between two of its times, on the straight line that the shipped sampler walks there."""
        k = max(i for i, have in enumerate(self.times) if have >= t - 1e-12)
        if k == len(self.times) - 1:
            return [x[-1] for x in self.x]
        part = (self.times[k] - t) / (self.times[k] - self.times[k + 1])
        return [(1 - part) * x[k] + part * x[k + 1] for x in self.x]

    def cases(self, of: Sequence[int]) -> Paths:
        """Those of some observations."""
        return self.some([j for j, i in enumerate(self.of) if i in of])

    def some(self, kept: Sequence[int]) -> Paths:
        return Paths(self.times, tuple(self.x[j] for j in kept), tuple(self.of[j] for j in kept))


def shipped_paths(field: Field, flow: FlowSpec, given: Sequence[Golden], noises: int) -> Paths:
    """The shipped sampler followed for every observation and noise."""
    rng = np.random.default_rng(0)
    found, of = [], []
    for i, o in enumerate(given):
        assert o.noise is not None
        for k in range(noises):
            x = np.asarray(o.noise, np.float64) if k == 0 else rng.standard_normal(np.shape(o.noise))
            found.append(np.stack(follow(field, flow, i, x)))
            of.append(i)
    return Paths((*flow.times[:: _evaluations(flow)], 0.0), tuple(found), tuple(of))


def _evaluations(flow: FlowSpec) -> int:
    return 2 if flow.solver == "midpoint" else 1


def follow(field: Field, flow: FlowSpec, i: int, x: NpArray) -> list[NpArray]:
    """x before every step of a sampler and at its end."""
    memory, walked = x, [x]
    for k, t in enumerate(flow.times):
        v = field.velocity(i, t, x)
        if flow.solver == "euler":
            x = x + flow.dts[k] * v
        else:
            xx, xm, xv, mx, mm, mv = flow.recurrence[k]
            x, memory = xx * x + xm * memory + xv * v, mx * x + mm * memory + mv * v
        if (k + 1) % _evaluations(flow) == 0:
            walked.append(x)
    return walked


def starts(times: Sequence[float]) -> tuple[float, ...]:
    """Times at which steps begin, from those that the network is asked about: the first step begins at 1."""
    return (1.0, *times[1:])


def ab2(times: Sequence[float]) -> list[Row]:
    """Adams-Bashforth's rows on any grid; the memory is the velocity before, at the first step noise with weight 0."""
    dts = [b - a for a, b in itertools.pairwise((*times, 0.0))]
    rows: list[Row] = [(1.0, 0.0, dts[0], 0.0, 0.0, 1.0)]
    for before, h in itertools.pairwise(dts):
        r = h / before
        rows.append((1.0, -h * r / 2, h * (1 + r / 2), 0.0, 0.0, 1.0))
    return rows


def fit_rows(field: Field, paths: Paths, times: Sequence[float], columns: int) -> tuple[list[Row], float]:
    """(rows of the recurrence, relative L2 of their chunk to the shipped one) on the cases of `paths`; `times`: those
    that the network is asked about."""
    xs = [x[0] for x in paths.x]
    before: list[NpArray] = []
    rows: list[Row] = []
    for k, (start, t) in enumerate(zip(ab2(starts(times)), times, strict=True)):
        vs = [field.velocity(i, t, x) for i, x in zip(paths.of, xs, strict=True)]
        want = paths.at(times[k + 1]) if k + 1 < len(times) else [x[-1] for x in paths.x]
        features = [xs, before, vs] if before else [xs, vs]
        x = np.stack([np.concatenate([f[:, :columns].ravel() for f in group]) for group in features], axis=1)
        y = np.concatenate([w[:, :columns].ravel() for w in want])
        prior = np.array([start[0], start[1], start[2]] if before else [start[0], start[2]])
        gram = x.T @ x
        gram[np.diag_indices_from(gram)] *= 1 + SHRINK
        found = prior + np.linalg.solve(gram, x.T @ (y - x @ prior))
        a, b, c = found if before else (found[0], 0.0, found[1])
        rows.append((float(a), float(b), float(c), 0.0, 0.0, 1.0))
        xs = [a * p + c * v + (b * before[j] if before else 0.0) for j, (p, v) in enumerate(zip(xs, vs, strict=True))]
        before = vs
    got = np.concatenate([x[:, :columns].ravel() for x in xs])
    return rows, float(np.linalg.norm(got - y) / np.linalg.norm(y))


def power_grid(steps: int, power: float) -> tuple[float, ...]:
    """1 = t_0 > ... on the fine grid; `steps` different ones."""
    k = np.arange(steps) / steps
    fine = np.rint(FINE * (1 - k) ** power).astype(int)
    for i in range(1, steps):
        fine[i] = min(fine[i], fine[i - 1] - 1)
    for i in range(steps - 1, -1, -1):
        fine[i] = max(fine[i], steps - i)
    return tuple(round(int(f) / FINE, 12) for f in fine)


def search_grid(field: Field, paths: Paths, steps: int, columns: int) -> tuple[float, ...]:
    """The grid with the least error: the best two powers, as they are or ending where the shipped sampler asks last,
    then each time in turn moved as long as it helps."""
    errors: dict[tuple[float, ...], float] = {}

    def error(times: tuple[float, ...]) -> float:
        if times not in errors:
            errors[times] = fit_rows(field, paths, times, columns)[1]
        return errors[times]

    def moved(times: tuple[float, ...], i: int, by: float) -> tuple[float, ...]:
        changed = tuple(round(t + by * (j == i), 12) for j, t in enumerate(times))
        falling = all(a - b > 0.5 / FINE for a, b in itertools.pairwise((*changed, 0.0)))
        return changed if falling else times

    def improved(best: tuple[float, ...]) -> tuple[float, ...]:
        for stride in (3, 2, 1):
            for i in range(1, steps):
                for sign in (1, -1):
                    while error(tried := moved(best, i, sign * stride / FINE)) < error(best):
                        best = tried
        return best

    starts = {power_grid(steps, p) for p in POWERS}
    starts |= {moved(g, steps - 1, paths.times[-2] - g[-1]) for g in starts if steps > 1}
    return min((improved(g) for g in sorted(starts, key=error)[:2]), key=error)


def fit(
    policy: Policy, steps: int, times: tuple[float, ...] | None, given: Sequence[Golden]
) -> tuple[FlowSpec, Mapping[str, Any]]:
    """The fitted sampler, on a given grid or on one that is searched, and its error on held-out observations beside
    Euler's and Adams-Bashforth's with as many evaluations on the uniform grid."""
    flow = policy.flow
    assert flow is not None
    judges = max(1, len(given) // 4)
    fitted, held = range(len(given) - judges), range(len(given) - judges, len(given))
    field, columns = Field(policy, given), policy.io.action_dim
    try:
        paths = shipped_paths(field, flow, given, NOISES[len(given) >= MANY])
        if times is None:
            cases = paths.cases(fitted)
            few = cases.some(range(0, len(cases.of), max(1, len(cases.of) // SEARCHED)))
            found = search_grid(field, few, steps, columns)
            tried = (found, (paths.times[1], *found[1:])) if paths.times[1] > (*found, 0.0)[1] else (found,)
        else:
            tried = (times,)
        fits = {t: fit_rows(field, paths.cases(fitted), t, columns) for t in tried}
        times = min(fits, key=lambda t: fits[t][1])
        rows, error = fits[times]
        dts = tuple(b - a for a, b in itertools.pairwise((*starts(times), 0.0)))
        made = dataclasses.replace(flow, times=times, dts=dts, solver="fitted", recurrence=tuple(rows))
        uniform = power_grid(steps, 1.0) if FINE % steps else tuple(round(1 - k / steps, 12) for k in range(steps))
        plain = dataclasses.replace(
            made, times=uniform, dts=tuple(b - a for a, b in itertools.pairwise((*uniform, 0.0)))
        )
        others = {
            "euler": dataclasses.replace(plain, solver="euler", recurrence=()),
            "ab2": dataclasses.replace(plain, solver="ab2", recurrence=tuple(ab2(uniform))),
            "fitted": made,
        }
        judged = {name: _judge(field, s, paths.cases(held), columns) for name, s in others.items()}
    finally:
        field.close()
    figures = {
        "grid": "+".join(f"{t:g}" for t in starts(times)),
        "asked_first_at": round(times[0], 6),
        "fit_drift": round(error, 6),
        "held_out_observations": judges,
        **{f"held_out_drift_{name}": round(d, 6) for name, d in judged.items()},
    }
    return made, figures


def _judge(field: Field, flow: FlowSpec, paths: Paths, columns: int) -> float:
    """Relative L2 of a sampler's chunks to the shipped one's, over all cases."""
    got = [follow(field, flow, i, x[0])[-1][:, :columns] for i, x in zip(paths.of, paths.x, strict=True)]
    return calibrate.drift(got, [x[-1][:, :columns] for x in paths.x])
