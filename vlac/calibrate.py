"""Watching a policy at work: values inside its program on observations, for passes that calibrate.

The fp32 reference runs the program as the family draws it, so weights keep their canonical names; every turn of a
sampler is seen. Observations are seeded ones that fit the policy, or those of a file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlac.artifact import Golden
from vlac.engines.base import EngineSession, NpArray, Values
from vlac.errors import Inapplicable, VlacError
from vlac.goldens import reference_session, synthetic
from vlac.graph import Program, check
from vlac.policy import Policy
from vlac.recorded import Recorded
from vlac.registry import families
from vlac.rewrites.corrections import add_biases
from vlac.runtime.inputs import prepared
from vlac.runtime.session import execute

See = Callable[[int, str, Mapping[str, NpArray]], None]
"""see(observation, stage, values): called after every run of a stage in which something is watched."""

SEED = 1000
"""Of calibration's own observations; golden answers are made from seed 0."""


def draw(policy: Policy) -> Program:
    """The program as the family draws it, checked, with weights that agree in shape."""
    program = check(add_biases(families.get(policy.family).build(policy), policy.biases))
    for name, param in program.params.items():
        if program.weights[name].shape != param.shape:
            raise VlacError(
                f"tensor {name} ({program.weights[name].source}) has shape {list(program.weights[name].shape)}, "
                f"the network needs {list(param.shape)}",
                remedy="config and weights are of different models, or give --spec; see `vlac inspect`",
            )
    return program


def observations(policy: Policy, samples: int, path: str = "") -> tuple[Golden, ...]:
    """`samples` observations of a dataset, an observations/ folder or an .npz (vlac/recorded.py).

    Without `path`: of what the policy was given to calibrate on or has beside its checkpoint, else seeded ones.
    """
    if samples < 1:
        raise Inapplicable(f"samples={samples}: at least 1 observation is needed to calibrate")
    recorded = Recorded(Path(path)) if path else policy.recorded
    return synthetic(policy.io, samples, seed=SEED) if recorded is None else recorded.take(policy.io, samples)


class _Watched(EngineSession):
    """Runs a program with more outputs and shows them; the schedule sees only the outputs that it knows."""

    engine = "reference"

    def __init__(self, inner: EngineSession, program: Program, names: Mapping[str, set[str]], see: See) -> None:
        self.inner, self.program, self.names, self.see = inner, program, names, see
        self.info: dict[str, Any] = {}
        self.observation = 0

    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        out = self.inner.run(stage, inputs, symbols)
        if wanted := self.names.get(stage):
            values = {**inputs, **out}
            self.see(self.observation, stage, {n: values[n] for n in wanted})
        return {n: out[n] for n in self.program.stage(stage).outputs}


def watch(
    policy: Policy,
    given: Sequence[Golden],
    names: Mapping[str, Iterable[str]],
    see: See,
    program: Program | None = None,
) -> tuple[NpArray, ...]:
    """The normalised chunk [N, A] of each observation; `names` says which values of which stages `see` is shown.

    program: a rewritten one; None: as the family draws it.
    """
    program = draw(policy) if program is None else program
    wanted = {stage: set(values) for stage, values in names.items()}
    stages = []
    for s in program.stages:
        known = {*s.outputs, *(n for n, _ in s.inputs)}
        more = tuple(sorted(wanted.get(s.name, set()) - known))
        stages.append(dataclasses.replace(s, outputs=(*s.outputs, *more)))
    session = _Watched(reference_session(program.replace(stages=tuple(stages))), program, wanted, see)
    chunks = []
    try:
        for session.observation, obs in enumerate(given):
            ready = prepared(policy.io, policy.tokenizer, program, obs)
            chunks.append(execute(program, session, ready.env, ready.symbols, taps={}))
    finally:
        session.inner.close()
    return tuple(chunks)


def linears(program: Program, weight: str) -> list[tuple[str, str, str]]:
    """(stage, value read, value made) of every linear with this weight."""
    return [
        (s.name, n.inputs[0], n.name)
        for s in program.stages
        for n in s.nodes
        if n.op == "linear" and n.inputs[1] == f"@{weight}"
    ]


def valid_rows(values: Mapping[str, NpArray], name: str) -> NpArray:
    """Rows of a watched value that mean something: those that `prefix_valid` marks, where it is watched and fits."""
    value, valid = values[name], values.get("prefix_valid")
    return value[valid] if valid is not None and len(valid) == len(value) else value


def size(policy: Policy) -> int:
    """Numbers held by the policy's weights."""
    return sum(int(np.prod(t.shape)) for t in policy.weights.values())


def drift(chunks: Sequence[NpArray], reference: Sequence[NpArray]) -> float:
    """Relative L2 distance of chunks to the reference's, all observations together."""
    a, b = (np.concatenate([c.ravel() for c in cs]).astype(np.float64) for cs in (chunks, reference))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
