"""Where a chunk's time goes: per stage and per kind of op, and how far each stage is from what this machine can do.

The yardstick is one product of matrices, 1024 x 768 by 768 x 3072, in the format that most of a stage's work is in, on
the same engine with the same threads: nothing the engine does can be much faster. Looking costs time itself, so stage
times come from a session that is not looked at.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlac import machine
from vlac.artifact import Artifact, Sidecars, open_artifact
from vlac.bench_worker import inputs_of
from vlac.engines.base import EngineSession, get_engine
from vlac.errors import InputError, VlacError
from vlac.graph import Call, Param, Program, Schedule, StageBuilder
from vlac.registry import Progress, silent
from vlac.runtime.inputs import prepare
from vlac.runtime.session import Session, choose_engine, load
from vlac.weights import LazyTensor, Weights
from vlac.work import work

ROWS, WIDTH, OUT = 1024, 768, 3072
PROBE_S = 0.4
"""How long the yardstick is measured."""


def profile(
    path: str | Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    runs: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Times of stages (medians of `runs` chunks, default 5, of which everything is new) and of kinds of ops.

    Returns: engine, info, machine, runs, chunk_ms, preprocess_ms, and "stages": for each stage name, ms, gmac (of this
    chunk), gmac_s, format (that of most of its work), peak_gmac_s and of_peak (None where the yardstick has no form),
    and ops: {kind, ms, share}, slowest first, empty where the engine does not tell.
    """
    machine.refuse_emulated()
    count = 5 if runs is None else runs
    if count < 1:
        raise InputError(f"runs={count}: at least 1")
    artifact = open_artifact(path)
    name = choose_engine(artifact, engine).name
    given = inputs_of(str(path))[0]
    progress("timing stages", 0, 3)
    with load(path, engine=name, threads=threads) as session:
        times = [_times(session, given) for _ in range(count + 1)][1:]
        info = dict(session.info)
    progress("looking inside", 1, 3)
    with load(path, engine=name, threads=threads, options={"profile": True}) as session:
        for _ in range(2):
            _times(session, given)
        assert session._engine is not None
        inside = session._engine.op_times()
    median = {k: float(np.median([t[k] for t in times])) for k in times[0]}
    progress("measuring what the machine can do", 2, 3)
    peaks: dict[str, float | None] = {}
    stages = []
    # padding of the prompt is not computed, so it is no work
    done = work(artifact.program, prepare(artifact.io, artifact.tokenizer, artifact.program, **given).symbols)
    for stage in dict.fromkeys(s.stage for s in artifact.program.schedule.steps):
        ms = median.get(f"{stage}_ms")
        if ms is None:
            continue
        form = main_format(artifact.program, stage)
        if form not in peaks:
            peaks[form] = peak(artifact, name, form, threads)
        stages.append(_row(stage, ms, done[stage].macs / 1e9, form, peaks[form], inside.get(stage, {})))
    return {
        "artifact": str(path),
        "target": artifact.manifest["target"],
        "engine": name,
        "threads": info.get("threads"),
        "info": info,
        "machine": machine.describe(),
        "runs": count,
        "chunk_ms": median["total_ms"],
        "preprocess_ms": median["preprocess_ms"],
        "stages": stages,
    }


def _times(session: Session, given: Mapping[str, Any]) -> dict[str, float]:
    session.act(**given, reuse=False)
    return {k: float(v) for k, v in session.stats.items() if k.endswith("_ms")}


def _row(stage: str, ms: float, gmac: float, form: str, best: float | None, ops: Mapping[str, float]) -> dict[str, Any]:
    rate, total = 1e3 * gmac / ms if ms else 0.0, sum(ops.values()) or 1.0
    return {
        "stage": stage,
        "ms": ms,
        "gmac": gmac,
        "gmac_s": rate,
        "format": form,
        "peak_gmac_s": best,
        "of_peak": rate / best if best else None,
        "ops": [{"kind": k, "ms": v / 2, "share": v / total} for k, v in sorted(ops.items(), key=lambda o: -o[1])],
    }


def main_format(program: Program, stage: str) -> str:
    """The format of the weights that most of a stage's multiply-accumulates read; f32 where it has no linears."""
    spent: dict[str, int] = {}
    for n in program.stage(stage).nodes:
        if n.op == "linear" and n.inputs[1].startswith("@"):
            param = program.params[n.inputs[1][1:]]
            spent[param.format] = spent.get(param.format, 0) + int(np.prod(param.shape))
    return max(spent, key=lambda f: spent[f], default="f32")


# --- the yardstick -----------------------------------------------------------------------------------------------


def peak(artifact: Artifact, engine: str, form: str, threads: int | None) -> float | None:
    """GMAC/s of one large product in this format on this engine; None where the target cannot write it down."""
    try:
        with tempfile.TemporaryDirectory(prefix="vlac-peak-") as folder:
            probe = _probe(artifact, form, Path(folder))
            session = get_engine(engine).open(probe, threads=threads)
            try:
                return _rate(session)
            finally:
                session.close()
    except VlacError:
        return None


def _rate(session: EngineSession) -> float:
    x = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    best, until = np.inf, time.perf_counter() + PROBE_S
    while time.perf_counter() < until:
        began = time.perf_counter()
        session.run("product", {"state": x}, {})
        best = min(best, time.perf_counter() - began)
    return ROWS * WIDTH * OUT / best / 1e9


def emitted(artifact: Artifact, program: Program, folder: Path) -> Artifact:
    """An artifact of the same target that holds another program, in an empty folder."""
    from vlac.registry import targets

    target = targets.get(str(artifact.manifest["target"]))
    kept = ("format_version", "engines", "target", "family", "parameters")
    manifest = {k: artifact.manifest[k] for k in kept if k in artifact.manifest}
    io = json.loads(artifact.io.to_json())
    target.emit(program, Sidecars(str(program), json.dumps(io), manifest, None, None), folder, {}, silent)
    return open_artifact(folder)


def _probe(artifact: Artifact, form: str, folder: Path) -> Artifact:
    """An artifact of the same target that holds one linear in this format."""
    b = StageBuilder("product")
    b.output(b.op("linear", b.input("state", "f32", ROWS, WIDTH), "@w", name="y"))
    values = np.random.default_rng(1).standard_normal((OUT, WIDTH)).astype(np.float32)
    weights = Weights({"w": LazyTensor.of(values, "w")})
    schedule = Schedule((Call("product"),), "y")
    program = Program("product", (), (b.build(),), {"w": Param((OUT, WIDTH), form)}, schedule, weights)
    return emitted(artifact, program, folder)


# --- for people --------------------------------------------------------------------------------------------------

_SHOWN = 6


def text(r: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"{r['artifact']} ({r['target']}) on {r['engine']}, {r['threads']} threads, {r['machine']['cpu']}: "
        f"{r['chunk_ms']:.1f} ms a chunk, of which {r['preprocess_ms']:.1f} ms before the network",
        "",
        "| stage | ms | GMAC | GMAC/s | format | one product, GMAC/s | of it |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in r["stages"]:
        best = ("", "") if s["peak_gmac_s"] is None else (f"{s['peak_gmac_s']:.0f}", f"{100 * s['of_peak']:.0f} %")
        cells = [s["stage"], f"{s['ms']:.1f}", f"{s['gmac']:.2f}", f"{s['gmac_s']:.1f}", s["format"], *best]
        lines.append("| " + " | ".join(cells) + " |")
    for s in r["stages"]:
        if s["ops"]:
            shown = [f"{o['kind']} {100 * o['share']:.0f} %" for o in s["ops"][:_SHOWN]]
            lines.append(f"\n{s['stage']}: {', '.join(shown)}")
    return "\n".join(lines)
