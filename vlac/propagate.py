"""Layer after layer through a policy, as it is and with the weights changed so far: what each linear reads in both.

Rounding a weight well depends on what its layer will read once the layers before it are rounded. `propagate` runs the
drawn program in pieces, cut before every linear that is to change, for all observations side by side; a sampler's turns
count as observations of their own, each from the state that the unchanged policy reached (so that errors of the
sampler's own steps are not learnt). Every weight is asked for once, in the order of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlac import calibrate
from vlac.artifact import Golden
from vlac.engines.base import EngineSession, NpArray, gathered
from vlac.goldens import reference_session
from vlac.graph import Call, Node, Program, Repeat, Stage, infer_stage
from vlac.policy import Policy
from vlac.registry import Progress, silent
from vlac.runtime.inputs import prepared
from vlac.weights import LazyTensor


@dataclass(frozen=True)
class Seen:
    """What linears read, summed over rows: with weights unchanged x, with the weights changed so far y, float64.

    gram [c, k/c, k/c]: y^T y, and shift: (x - y)^T y, both of c runs of columns apart, c above 1 for inputs wider than
    WIDEST; means [2, k] of x and y; squares [k] of y; sizes [k] of |y|; largest [k] of |y|; rows: how many.
    """

    gram: NpArray
    shift: NpArray
    means: NpArray
    squares: NpArray
    sizes: NpArray
    largest: NpArray
    rows: int


WIDEST = 4096
"""Columns whose Gram matrix is kept in one piece."""

Choose = Callable[[str, Seen], Mapping[str, NpArray]]
"""choose(weight name, what it reads) -> new values of parameters: the weight's, and its linear's bias if it moves."""


def propagate(
    policy: Policy,
    given: Sequence[Golden],
    weights: Iterable[str],
    choose: Choose,
    *,
    follow: bool = True,
    progress: Progress = silent,
) -> dict[str, NpArray]:
    """Every one of `weights` chosen anew, in the order in which the network reads them; the values by name.

    follow: True shows what layers read after the weights chosen before; False shows the unchanged policy (x = y).
    """
    program = calibrate.draw(policy)
    walk = _Walk(program, frozenset(weights), choose, follow, progress)
    states = []
    for obs in given:
        ready = prepared(policy.io, policy.tokenizer, program, obs)
        states.append(_State(dict(ready.env), dict(ready.env), ready.symbols))
    try:
        for step in program.schedule.steps:
            walk.step(step, states)
    finally:
        walk.close()
    return walk.changed


@dataclass
class _State:
    """One observation: values between stages with the policy's weights and with the chosen ones."""

    plain: dict[str, NpArray]
    other: dict[str, NpArray]
    symbols: Mapping[str, int]


@dataclass
class _Run:
    """One run of a stage in both: inputs and whatever of its values is still to be read."""

    plain: dict[str, NpArray]
    other: dict[str, NpArray]
    symbols: Mapping[str, int]


class _Walk:
    """Runs stages piece by piece on two engines and asks for weights on the way."""

    def __init__(
        self, program: Program, targets: frozenset[str], choose: Choose, follow: bool, progress: Progress
    ) -> None:
        self.program = program
        self.targets, self.choose, self.follow, self.progress = targets, choose, follow, progress
        self.changed: dict[str, NpArray] = {}
        self.pieces = {s.name: tuple(pieces(program, s, targets)) for s in program.stages}
        cut = replace(program, stages=(*program.stages, *(p for parts in self.pieces.values() for p in parts)))
        self.plain = reference_session(cut)
        self.other: EngineSession = reference_session(
            cut.replace(weights=program.weights.with_(**{n: self._later(n) for n in self._changeable()}))
        )

    def close(self) -> None:
        self.plain.close()
        self.other.close()

    def _changeable(self) -> set[str]:
        nodes = [
            n for s in self.program.stages for n in s.nodes if n.op == "linear" and n.inputs[1][1:] in self.targets
        ]
        return {i[1:] for n in nodes for i in n.inputs[1:]}

    def _later(self, name: str) -> LazyTensor:
        """The weight as it is chosen by the time a piece is first run."""
        old = self.program.weights[name]

        def read() -> NpArray:
            return self.changed[name] if name in self.changed else old.load()

        return LazyTensor(old.shape, read, old.dtype, old.source)

    # steps of the schedule

    def step(self, step: Call | Repeat, states: Sequence[_State]) -> None:
        stage = self.program.stage(step.stage)
        if isinstance(step, Repeat):
            self._repeat(step, stage, states)
        elif step.each:
            self._each(stage, states)
        else:
            runs = [_Run(_inputs(stage, s.plain), _inputs(stage, s.other), s.symbols) for s in states]
            self._run(stage, runs)
            for s, r in zip(states, runs, strict=True):
                s.plain.update(r.plain)
                s.other.update(r.other)

    def _each(self, stage: Stage, states: Sequence[_State]) -> None:
        slots = [[int(i) for i in np.flatnonzero(s.plain["image_valid"])] for s in states]
        runs = []
        for s, used in zip(states, slots, strict=True):
            for slot in used:
                one = _inputs(stage, {**s.plain, "pixels": s.plain["pixels"][slot]})
                runs.append(_Run(one, dict(one), s.symbols))
        self._run(stage, runs)
        left = iter(runs)
        for s, used in zip(states, slots, strict=True):
            found = {slot: next(left) for slot in used}
            for values, which in ((s.plain, "plain"), (s.other, "other")):
                made = {slot: getattr(r, which) for slot, r in found.items()}
                first = made[used[0]]
                for name in stage.outputs:
                    rows = [
                        made[i][name] if i in made else np.zeros_like(first[name])
                        for i in range(len(s.plain["pixels"]))
                    ]
                    values[name] = np.concatenate(rows, axis=0)

    def _repeat(self, step: Repeat, stage: Stage, states: Sequence[_State]) -> None:
        """Turns run with the policy's weights; each then counts as an observation for the others, from there."""
        runs: list[_Run] = []
        ends: list[dict[str, NpArray]] = []
        for s in states:
            carried = {into: s.plain[initial] for _, into, initial in step.carry}
            turns: list[dict[str, NpArray]] = []
            out: dict[str, NpArray] = {}
            for i in range(step.times):
                own = {**carried, step.index: np.array([i], dtype=np.int32)}
                plain = _inputs(stage, {**s.plain, **own})
                runs.append(_Run(plain, _inputs(stage, {**s.other, **own}), s.symbols))
                out = self.plain.run(stage.name, plain, s.symbols)
                turns.append({name: out[name] for name, _ in step.collect})
                carried = {into: out[name] for name, into, _ in step.carry}
                if step.until and int(out[step.until][0]) in step.stop:
                    break
            ends.append({**out, **gathered(step, turns)})
        self._run(stage, runs)
        for s, end in zip(states, ends, strict=True):
            s.plain.update(end)
            s.other.update(end)

    # one stage

    def _run(self, stage: Stage, runs: Sequence[_Run]) -> None:
        """All runs through the pieces of a stage, side by side; afterwards they hold its outputs."""
        parts = self.pieces[stage.name]
        for at, part in enumerate(parts):
            self._choose(part, runs)
            needed = {n for later in parts[at + 1 :] for n, _ in later.inputs} | set(stage.outputs)
            for r in runs:
                r.plain = self._after(self.plain, part, r.plain, r.symbols, needed)
                r.other = self._after(self.other, part, r.other, r.symbols, needed) if self.follow else r.plain
        for r in runs:
            r.plain = {n: r.plain[n] for n in stage.outputs}
            r.other = {n: r.other[n] for n in stage.outputs}

    @staticmethod
    def _after(
        session: EngineSession, part: Stage, values: dict[str, NpArray], symbols: Mapping[str, int], needed: set[str]
    ) -> dict[str, NpArray]:
        out = session.run(part.name, {n: values[n] for n, _ in part.inputs}, symbols)
        return {n: v for n, v in {**values, **out}.items() if n in needed}

    def _choose(self, part: Stage, runs: Sequence[_Run]) -> None:
        linears = [n for n in part.nodes if n.op == "linear" and n.inputs[1][1:] in self.targets - self.changed.keys()]
        if not linears:
            return
        seen = _summed(linears[0].inputs[0], runs)
        for n in linears:
            name = n.inputs[1][1:]
            if name not in self.changed:
                self.progress("rounding weights", len(self.changed.keys() & self.targets), len(self.targets))
                self.changed.update(self.choose(name, seen))


def _inputs(stage: Stage, values: Mapping[str, NpArray]) -> dict[str, NpArray]:
    return {n: values[n] for n, _ in stage.inputs}


def runs_of_columns(k: int) -> int:
    """How many equal runs of at most WIDEST columns a width is cut into; whole runs of 128 where the width has them."""
    count = -(-k // WIDEST)
    while k % count or (k % 128 == 0 and (k // count) % 128):
        count += 1
    return count


def _summed(value: str, runs: Sequence[_Run]) -> Seen:
    k = runs[0].other[value].shape[1]
    c = runs_of_columns(k)
    gram, shift = np.zeros((c, k // c, k // c)), np.zeros((c, k // c, k // c))
    means, squares, sizes, largest, rows = np.zeros((2, k)), np.zeros(k), np.zeros(k), np.zeros(k), 0
    for r in runs:
        x, y = (calibrate.valid_rows(v, value).astype(np.float64) for v in (r.plain, r.other))
        parts = y.reshape(len(y), c, -1).transpose(1, 0, 2)
        gram += parts.transpose(0, 2, 1) @ parts
        if r.plain is not r.other:
            shift += (x - y).reshape(len(y), c, -1).transpose(1, 2, 0) @ parts
        means += (x.sum(axis=0), y.sum(axis=0))
        size = np.abs(y)
        squares, sizes, largest = (
            squares + (y * y).sum(axis=0),
            sizes + size.sum(axis=0),
            np.maximum(largest, size.max(axis=0)),
        )
        rows += len(y)
    return Seen(gram, shift, means / rows, squares / rows, sizes / rows, largest, rows)


def pieces(program: Program, stage: Stage, targets: frozenset[str]) -> Iterator[Stage]:
    """The stage cut before every first use of a value by linears with weights in `targets`: stages of their own, named
    "stage#0", ..., that hand on what later ones read."""
    groups: list[list[Node]] = [[]]
    read = ""
    for n in stage.nodes:
        if n.op == "linear" and n.inputs[1][1:] in targets and n.inputs[0] != read:
            groups.append([])
            read = n.inputs[0]
        groups[-1].append(n)
    types = infer_stage(stage, program.params)
    made: set[str] = {n for n, _ in stage.inputs}
    for i, nodes in enumerate(groups):
        own = {n.name for n in nodes}
        inputs = sorted({x for n in nodes for x in n.inputs if not x.startswith("@")} - own)
        later = {x for g in groups[i + 1 :] for n in g for x in n.inputs} | set(stage.outputs)
        # a mask of valid rows is looked at beside what linears read
        outputs = tuple(n.name for n in nodes if n.name in later or n.name == "prefix_valid")
        made |= own
        assert set(inputs) <= made
        yield Stage(f"{stage.name}#{i}", tuple((x, types[x]) for x in inputs), tuple(nodes), outputs)
