"""What the machine at hand costs, measured with small stages of the artifact's own target on its own engine.

Linears of several sizes and numbers of rows in every format that the program uses; attention of several sizes; each
kind of other op once small and once large; stages with many inputs and outputs; a block of a transformer, whose nodes
are each of another kind than the last; a stage with next to nothing. `vlac.estimate.costs` reads between the sizes.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlac.artifact import Artifact
from vlac.engines.base import EngineSession, Values, get_engine
from vlac.estimate import stages as probes_of
from vlac.estimate.costs import Costs
from vlac.estimate.stages import LARGE, PORTS, Probes
from vlac.graph import Call, Program, Schedule, Stage
from vlac.profile import emitted
from vlac.registry import Progress, silent
from vlac.runtime.inputs import bind
from vlac.weights import Weights
from vlac.work import StageWork, stage_works

LEAST_S, LEAST_RUNS, ROUNDS, COLD = 0.06, 3, 7, 4
"""How long and often a stage is measured among others of its own; how often, and how many runs, after other stages."""


Clock = Callable[[], float]


def clock(threads: int | None) -> Clock:
    """Seconds of CPU for one thread, which other work does not lengthen; else of the wall clock."""
    return time.process_time if threads == 1 else time.perf_counter


def measure(artifact: Artifact, engine: str, threads: int | None, progress: Progress = silent) -> Costs:
    """Costs of this machine for this artifact's target, formats and kinds of op.

    Raises: VlacError where the target or the engine cannot do a probe that the estimate rests on.
    """
    nodes = [n for s in artifact.program.stages for n in s.nodes]
    probes = Probes(smallest=min(artifact.program.symbols, key=lambda s: s.max, default=None))
    forms = probes_of.formats(artifact.program)
    main = max(forms, key=lambda f: forms[f])
    linears = {form: probes_of.linears(probes, form) for form in forms}
    typical = probes_of.typical_attentions(artifact.program)
    attentions = {n: probes_of.attentions(probes, *template) for n, template in typical.items()}
    others = probes_of.others(probes, nodes)
    probes.stage("nothing", lambda b: b.op("add", b.input("state", "f32", 1, 8), b.input("noise", "f32", 1, 8)))
    probes_of.ports(probes)
    rope = next((n for n in nodes if n.op == "rope"), None)
    symbols = artifact.program.max_symbols()
    rows, earlier = probes_of.dims(artifact.program)
    probes.stages.append(probes_of.block(probes, main, typical.get(max(typical, default=0)), rope, rows, earlier))
    seconds, works = _seconds(artifact, engine, threads, probes, symbols, progress)
    costs = Costs(call=seconds["nothing"][0], stream_bytes_s=stream(clock(threads)))

    def each(name: str, count: int) -> float:
        return max(1e-9, (seconds[name][0] - costs.call) / count)

    for name, (kind, size, count) in others.items():
        old, one = costs.op.get(kind), each(name, count)
        costs.op[kind] = (one, size, one, size + 1) if old is None else (*old[:2], one, size)
    plain = PORTS * costs.op["add"][0]
    costs.port = max(0.0, (each("many_outputs", 1) + each("many_inputs", 1) - 2 * plain) / (2 * PORTS))
    if "slice" in costs.op:
        small, a, large, b = costs.op["slice"]
        add = costs.op["add"]
        costs.op["slice"] = (max(1e-9, small - add[0]), a, max(1e-9, large - add[2]), b)
    for form, made in linears.items():
        for name, (width, rows, count) in made.items():
            costs.linear.setdefault(form, {}).setdefault(width, {})[rows] = each(name, count)
    for operands, sizes in attentions.items():
        costs.attention[operands] = sorted((m, each(name, 2)) for name, m in sizes.items())
    (hot, cold), block = seconds["block"], next(w for w in works if w.name == "block")
    hot = min(hot, *cold[1:])
    costs.node = max(0.0, (hot - costs.once(block)) / len(block.pieces))
    costs.first = tuple(max(0.0, (t - hot) / len(block.pieces)) for t in cold)
    return costs


def _seconds(
    artifact: Artifact,
    engine: str,
    threads: int | None,
    probes: Probes,
    symbols: Mapping[str, int],
    progress: Progress,
) -> tuple[dict[str, tuple[float, list[float]]], list[StageWork]]:
    """Stage -> (seconds of a run among others of its own, of the first runs after other stages); and their work."""
    now = clock(threads)
    schedule = Schedule(tuple(Call(s.name) for s in probes.stages), probes.stages[-1].outputs[0])
    program = Program(
        "probe", artifact.program.symbols, tuple(probes.stages), probes.params, schedule, Weights(probes.weights)
    )
    with tempfile.TemporaryDirectory(prefix="vlac-probe-") as folder:
        progress("writing probes", 0, len(probes.stages))
        session = get_engine(engine).open(emitted(artifact, program, Path(folder)), threads=threads)
        try:
            given: dict[str, Any] = {}
            hot: dict[str, float] = {}
            for i, stage in enumerate(probes.stages):
                progress("measuring this machine", i, len(probes.stages))
                inputs = _inputs(stage, given, symbols)
                given.update(session.run(stage.name, inputs, symbols))
                hot[stage.name] = _typical(session, stage.name, inputs, symbols, now)
            # few stages in turn, as in a program: engines keep a limited number of them ready
            turns = [s for s in probes.stages if s.name in ("block", "many_inputs", "index_64", f"add_{LARGE[0]}")]
            cold: list[list[float]] = []
            for _ in range(ROUNDS):
                for stage in turns:
                    inputs = _inputs(stage, given, symbols)
                    runs = [_once(session, stage.name, inputs, symbols, now) for _ in range(COLD)]
                    cold += [runs] if stage.name == "block" else []
            late = [float(v) for v in np.median(np.array(cold), axis=0)]
            return {k: (hot[k], late) for k in hot}, stage_works(program, symbols)
        finally:
            session.close()


def _inputs(stage: Stage, given: Mapping[str, Any], symbols: Mapping[str, int]) -> dict[str, Any]:
    """Inputs of a probe: what an earlier one gave, else numbers."""
    rng, made = np.random.default_rng(0), {}
    for name, t in stage.inputs:
        shape = tuple(bind(d, symbols) for d in t.shape)
        if name in given:
            made[name] = given[name]
        elif t.dtype == "f32":
            made[name] = rng.standard_normal(shape).astype(np.float32)
        else:
            made[name] = np.ones(shape, dtype=np.bool_) if t.dtype == "bool" else np.arange(shape[0], dtype=np.int32)
    return made


def _typical(session: EngineSession, stage: str, inputs: Values, symbols: Mapping[str, int], now: Clock) -> float:
    took: list[float] = []
    until = time.perf_counter() + LEAST_S
    while len(took) < LEAST_RUNS or time.perf_counter() < until:
        took.append(_once(session, stage, inputs, symbols, now))
    return float(np.median(took))


def _once(session: EngineSession, stage: str, inputs: Values, symbols: Mapping[str, int], now: Clock) -> float:
    began = now()
    session.run(stage, inputs, symbols)
    return now() - began


def stream(now: Clock = time.perf_counter, size: int = 1 << 27) -> float:
    """Bytes of memory that this process reads in a second, alone."""
    values = np.ones(size // 8)
    best = math.inf
    for _ in range(4):
        began = now()
        values.sum()
        best = min(best, now() - began)
    return size / best
