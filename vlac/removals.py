"""What lowering takes away from a program and what it saves: the log that `vlac inspect --program` shows below it.

Counted, not measured: nodes, and multiply-accumulates for one chunk at the largest sizes (vlac.work).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlac.graph import RUNTIME_INPUTS, Call, Program, Repeat
from vlac.lower import REWRITES
from vlac.work import Work, work

Row = Mapping[str, Any]


def removals(program: Program) -> dict[str, Any]:
    """The log of lowering a program as its family draws it, as JSON values.

    rewrites: name, what it does, and for each stage that it changed {"nodes": [before, after], "gmac": [..]}.
    sizes: GMAC of a chunk at every size of each symbol, the others at their largest.
    again: for every runtime input the stages that run when only it is new, and their GMAC; "of" is all.
    """
    rows = []
    before = work(program)
    for rewrite in REWRITES:
        program = rewrite.fn(program)
        after = work(program)
        changed = {name: _change(before.get(name), after.get(name)) for name in {**before, **after}}
        kept = {name: row for name, row in changed.items() if row["nodes"][0] != row["nodes"][1] or _saved(row)}
        what = " ".join((rewrite.fn.__doc__ or "").split("\n\n")[0].split())
        if kept:
            rows.append({"rewrite": rewrite.name, "what": what, "stages": kept})
        before = after
    return {"rewrites": rows, "sizes": sizes(program), "again": again(program)}


def _change(before: Work | None, after: Work | None) -> dict[str, Any]:
    nodes, macs = ([getattr(w, key) if w else 0 for w in (before, after)] for key in ("nodes", "macs"))
    return {"nodes": nodes, "gmac": [m / 1e9 for m in macs]}


def _saved(row: Row) -> float:
    return float(row["gmac"][0] - row["gmac"][1])


def total(of: Mapping[str, Work]) -> float:
    """GMAC of all stages."""
    return sum(w.macs for w in of.values()) / 1e9


def sizes(program: Program) -> dict[str, dict[str, float]]:
    """symbol -> size -> GMAC of a chunk."""
    return {s.name: {str(b): total(work(program, {s.name: b})) for b in s.buckets} for s in program.symbols}


def again(program: Program) -> dict[str, Any]:
    """What runs when one runtime input (of one camera) is new and everything else is as in the call before."""
    of = {name: w.macs for name, w in work(program).items()}
    everything = sum(of.values()) / 1e9
    slots = program.max_symbols().get("C", 1)
    of.update({s.stage: of[s.stage] // slots for s in program.schedule.steps if isinstance(s, Call) and s.each})
    read: list[str] = []
    stages: dict[str, list[str]] = {}
    for name in RUNTIME_INPUTS:
        changed, ran = {name}, []
        for step in program.schedule.steps:
            stage = program.stage(step.stage)
            inputs = {n for n, _ in stage.inputs}
            if isinstance(step, Repeat):
                inputs |= {initial for _, _, initial in step.carry}
            read += [i for i in inputs if i in RUNTIME_INPUTS]
            if inputs & changed:
                ran.append(stage.name)
                changed |= set(stage.outputs)
        stages[name] = ran
    rows = {n: {"stages": s, "gmac": sum(of[i] for i in s) / 1e9} for n, s in stages.items() if n in read}
    return {"of": everything, "inputs": rows}


# --- text --------------------------------------------------------------------------------------------------------


def text(log: Mapping[str, Any]) -> str:
    """The log as lines that begin with "#", which a program's parser passes over."""
    lines = ["exact rewrites (nodes; GMAC for one chunk at the largest sizes)"]
    for row in log["rewrites"]:
        saved = sum(_saved(s) for s in row["stages"].values())
        parts = [_stage_text(name, s) for name, s in row["stages"].items()]
        lines.append(f"  {row['rewrite']}: {', '.join(parts)}" + (f"; saves {_gmac(saved)}" if saved > 0 else ""))
        lines.append(f"      {row['what']}")
    for symbol, found in log["sizes"].items():
        lines.append(f"  GMAC by {symbol}: " + ", ".join(f"{size}: {_gmac(g)}" for size, g in found.items()))
    of = log["again"]["of"]
    for name, row in log["again"]["inputs"].items():
        share, stages = 100 * row["gmac"] / of if of else 0.0, ", ".join(row["stages"])
        lines.append(f"  new {name}: {stages}: {_gmac(row['gmac'])} of {_gmac(of)} GMAC, {share:.0f} %")
    return "".join(f"# {line}\n" for line in lines)


def _stage_text(name: str, row: Row) -> str:
    (n0, n1), (g0, g1) = row["nodes"], row["gmac"]
    nodes = f"{n0} -> {n1} nodes" if n0 != n1 else f"{n0} nodes"
    return f"{name} {nodes}" + (f", {_gmac(g0)} -> {_gmac(g1)} GMAC" if g0 != g1 else "")


def _gmac(value: float) -> str:
    return f"{value:.4g}"
