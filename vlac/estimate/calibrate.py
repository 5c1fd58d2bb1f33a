"""`vlac estimate --calibrate`: a chunk predicted from probes of this machine, beside the chunk measured here.

Predicted: every stage from `vlac.estimate.probe`, the runtime around the engine with an engine that computes nothing,
and what comes before the network (pictures, text), which no count tells and which is timed by itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlac import machine
from vlac.artifact import open_artifact
from vlac.bench_worker import inputs_of
from vlac.errors import InputError, Unsupported
from vlac.estimate import dispatch, probe
from vlac.graph import Program, Repeat
from vlac.registry import Progress, silent
from vlac.runtime.inputs import Prepared, prepare
from vlac.runtime.session import Session, choose_engine, load
from vlac.tables import markdown, number
from vlac.work import StageWork, stage_works

CLOSE = 0.25
"""A prediction within a quarter of what is measured counts as close."""
RUNS = 15


def calibrate(
    path: str | Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    runs: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Predicts and measures a chunk of which everything is new; medians, in milliseconds.

    With one thread both are CPU time, which other work on the machine hardly changes; else both are wall time.

    Returns: predicted_ms, measured_ms, ratio, close (within 25 %), stages: predicted and wall time of each, before and
    around (milliseconds of pictures and text, of the runtime), costs of the machine, clock.
    """
    emulated = machine.emulation()
    if emulated:
        raise Unsupported(f"no latency is reported under emulation: {emulated}")
    count = RUNS if runs is None else runs
    if count < 1:
        raise InputError(f"--runs {count}: at least 1")
    artifact = open_artifact(path)
    name = choose_engine(artifact, engine).name
    now = probe.clock(threads)
    costs = probe.measure(artifact, name, threads, progress)
    progress("measuring chunks", 0, count)
    given = inputs_of(str(path))[0]
    with load(path, engine=name, threads=threads) as session:
        took: list[float] = []
        befores: list[float] = []
        stats: list[dict[str, float]] = []
        for i in range(count + 1):
            began = now()
            session.act(**given, reuse=False)
            took.append(now() - began)
            stats.append({k: float(v) for k, v in session.stats.items() if k.endswith("_ms")})
            # here, because a network leaves caches in which nothing of this is left
            began = now()
            ready = _prepared(session, given)
            befores.append(now() - began)
            progress("measuring chunks", i, count)
        info, chosen = dict(session.info), 0 if session.tokens is None else len(session.tokens)
    before = float(np.median(befores[1:]))
    works = _run_here(stage_works(artifact.program, ready.symbols), artifact.program, chosen)
    stages = {w.name: 1e3 * costs.stage(w) for w in works}
    around = dispatch.seconds(artifact.program, ready.env, ready.symbols, now)
    predicted = sum(stages.values()) + 1e3 * (before + around)
    measured = 1e3 * float(np.median(took[1:]))
    wall = {
        w.name: float(np.median([s[f"{w.name}_ms"] for s in stats[1:]])) for w in works if f"{w.name}_ms" in stats[0]
    }
    return {
        "artifact": str(path),
        "target": artifact.manifest["target"],
        "engine": name,
        "threads": info.get("threads"),
        "machine": machine.describe(),
        "clock": "CPU time of one thread" if threads == 1 else "wall time",
        "gmac": sum(w.runs * sum(p.macs for p in w.pieces) for w in works) / 1e9,
        "predicted_ms": predicted,
        "measured_ms": measured,
        "ratio": predicted / measured,
        "close": abs(predicted / measured - 1) <= CLOSE,
        "stages": {k: {"predicted_ms": v, "measured_wall_ms": wall.get(k)} for k, v in stages.items()},
        "before_ms": 1e3 * before,
        "around_ms": 1e3 * around,
        "runs": count,
        "costs": _figures(costs),
    }


def _run_here(works: list[StageWork], program: Program, chosen: int) -> list[StageWork]:
    """A loop that ends when it chooses to, ran for as many turns as it chose tokens."""
    open_ended = {s.stage for s in program.schedule.steps if isinstance(s, Repeat) and s.until} if chosen else set()
    return [replace(w, runs=min(w.runs, chosen)) if w.name in open_ended else w for w in works]


def _prepared(session: Session, given: dict[str, Any]) -> Prepared:
    asked = {"images": None, "state": None, "task": None, "noise": None, **given}
    return prepare(
        session.io,
        session._tokenizer,
        session.artifact.program,
        tokens=None,
        mask=None,
        seed=None,
        units=session.io.units,
        strict=False,
        **asked,
    )


def _figures(costs: Any) -> dict[str, Any]:
    """What was found out about the machine, in the units that people know."""
    products = {
        form: max(m * width * width / t / 1e9 for width, rows in grid.items() for m, t in rows.items())
        for form, grid in costs.linear.items()
    }
    return {
        "products_gmac_s": products,
        "attention_gmac_s": max((m / t / 1e9 for points in costs.attention.values() for m, t in points), default=None),
        "stream_gb_s": costs.stream_bytes_s / 1e9,
        "call_us": 1e6 * costs.call,
        "port_us": 1e6 * costs.port,
        "node_us": 1e6 * costs.node,
        "node_first_us": [1e6 * t for t in costs.first],
    }


def text(r: dict[str, Any]) -> str:
    """The comparison for people."""
    c = r["costs"]
    products = ", ".join(f"{form} {number(v)}" for form, v in c["products_gmac_s"].items())
    rows = [[name, number(s["predicted_ms"]), number(s["measured_wall_ms"])] for name, s in r["stages"].items()]
    verdict = "within" if r["close"] else "NOT within"
    return "\n".join(
        [
            f"{r['artifact']} ({r['target']}) on {r['engine']}, {r['threads']} threads, {r['machine']['cpu']}",
            f"this machine: products GMAC/s {products}; attention {number(c['attention_gmac_s'])} GMAC/s; "
            f"memory {number(c['stream_gb_s'])} GB/s; a stage {number(c['call_us'])} us, an input or output "
            f"{number(c['port_us'])} us, a node {number(c['node_us'])} us and {number(c['node_first_us'][0])} us the "
            f"first time",
            "",
            *markdown(("stage", "predicted ms", "measured, wall ms"), rows),
            "",
            f"before the network {number(r['before_ms'])} ms (timed by itself), around the engine "
            f"{number(r['around_ms'])} ms",
            f"chunk, {r['clock']}: predicted {number(r['predicted_ms'])} ms, measured {number(r['measured_ms'])} ms: "
            f"{number(r['ratio'])} of it, {verdict} {100 * CLOSE:.0f} %",
        ]
    )
