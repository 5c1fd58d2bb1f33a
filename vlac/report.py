"""Reports as text for people: what `vlac parity`, `vlac bench`, `vlac run` and `vlac list` print without --json."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlac.board import text as board_text
from vlac.tables import as_json, likeness, markdown, number, pairs, share, size, table

Report = Mapping[str, Any]


def verdict(ok: bool) -> str:
    """PASS or FAIL."""
    return "PASS" if ok else "FAIL"


# --- parity ----------------------------------------------------------------------------------------------------


def parity_text(r: Report) -> str:
    """The report of `vlac.parity.parity` as text, questions apart, the verdict last."""
    seen = r["observations"]
    own = r["repeats"]
    lines = [
        f"parity of {r['artifact']}",
        *pairs(
            [
                ("target", f"{r['target']} (judged as {r['grade']})"),
                ("engine", f"{r['engine']}; {_steady(own)}"),
                ("observations", f"{seen['count']}, {seen['source']}"),
                ("units", r["units"]),
            ]
        ),
        "",
    ]
    if r["compiler"] is not None:
        lines += [*_compiler_text(r["compiler"]), ""]
    if r["cost"] is not None:
        lines += [*_cost_text(r["cost"], r["units"]), ""]
    lines += ["not asked", *(f"  {text}" for text in r["not_asked"]), "", verdict(r["ok"])]
    return "\n".join(lines)


def _steady(own: Report) -> str:
    equal = "bit-equal" if own["bit_equal"] else f"NOT bit-equal, max|d|/max {number(own['max_relative'])}"
    return f"{own['calls']} calls on one input: {equal}; stage by stage: max|d|/max {number(own['stepwise'])}"


def _compiler_text(q: Report) -> list[str]:
    rows = [_stage(s) for s in q["stages"]]
    c = q["chunk"]
    rows.append(["chunk", "", "", number(c["max_relative"]), number(c["relative_l2"]), likeness(c["cosine"]), ""])
    return [
        q["question"],
        f"  reference: {q['reference']}; {_steady(q['reference_repeats'])}",
        *table(_STAGE_COLUMNS, rows),
        *([] if q["staged"] else ["  the artifact is one graph: its stages cannot be looked at one by one"]),
        *_tokens(q, "picked alike, each after the same ids"),
        *_spread(q),
        *_limits(q),
    ]


def _spread(q: Report) -> list[str]:
    """Where the reference, on fixed grids or with packed keys, moves further than the usual limit."""
    if "reference_spread" not in q:
        return []
    far = number(q["reference_spread"])
    by = f" by 2^{round(math.log2(q['weights_moved']))}" if "weights_moved" in q else ""  # older reports do not say
    return [f"  no closer can be asked: the reference moves by rel L2 {far} when its weights move{by}"]


_STAGE_COLUMNS = ("stage", "values", "worst value", "max|d|/max", "rel L2", "cosine", "")


def _stage(s: Report) -> list[str]:
    return [
        s["stage"],
        str(s["values"]),
        s["value"],
        number(s["max_relative"]),
        number(s["relative_l2"]),
        likeness(s["cosine"]),
        "" if s["ok"] else "over the limit",
    ]


def _tokens(q: Report, what: str) -> list[str]:
    """Of a policy that generates ids: how many are equal."""
    return [f"  tokens: {q['tokens']['equal']} of {q['tokens']['of']} {what}"] if q.get("tokens") else []


def _limits(q: Report) -> list[str]:
    lines = []
    for v in q["limits"]:
        figure = likeness(v["figure"]) if "cosine" in v["limit"] else number(v["figure"])
        lines.append(f"  limit {v['limit']}: {figure} {verdict(v['ok'])}")
    if q["first_stage_over"]:
        lines.append(f"  first stage over the limit: {q['first_stage_over']}")
    return lines


def _cost_text(q: Report, units: str) -> list[str]:
    worst, floor, horizon = q["worst_sample"], q["noise_floor"], q["horizon"]
    rows: list[tuple[str, Any]] = [
        ("cosine", likeness(q["cosine"])),
        ("relative L2", number(q["relative_l2"])),
        ("max|d| / max", number(q["max_relative"])),
        ("max|d|", f"{number(q['max_abs'])} ({units} units)"),
        (
            "worst sample",
            f"observation {worst['observation']}: cosine {likeness(worst['cosine'])}, "
            f"relative L2 {number(worst['relative_l2'])}",
        ),
        (
            "horizon",
            f"executed {horizon['executed_steps']} steps: {number(horizon['executed'])}"
            + (f", tail never executed: {number(horizon['tail'])}" if horizon["tail"] is not None else "")
            + f" ({horizon['unit']})",
        ),
        ("per step", " ".join(number(v, 2) for v in _thin(horizon["per_step"]))),
        ("gripper", _gripper(q["gripper"])),
    ]
    if q["jerk"]:
        rows.append(("jerk", f"{number(q['jerk']['artifact'])} against {number(q['jerk']['reference'])}"))
    if floor:
        rows.append(
            (
                "sampler noise",
                f"two seeds of the reference: cosine {likeness(floor['cosine'])}, relative L2 "
                f"{number(floor['relative_l2'])}; the drift is {share(q['drift_over_noise'])} of it",
            )
        )
    joints = [
        [j["joint"], *(number(j[k]) for k in ("max_abs", "mean_abs", "bias", "range")), share(j["share_of_range"])]
        for j in q["joints"]
    ]
    columns = ("joint", "max|d|", "mean|d|", "bias", "range", "max / range")
    lines = [q["question"], f"  reference: {q['reference']}", *pairs(rows), *table(columns, joints)]
    source = next((j["range_from"] for j in q["joints"] if j["range_from"]), "")
    if source:
        lines.append(f"  range: {source} of the training statistics")
    if q["stages"]:
        lines += table(_STAGE_COLUMNS, [_stage(s) for s in q["stages"]])
    return lines + _tokens(q, "are the reference's, place by place") + _limits(q)


def _thin(values: Sequence[float], most: int = 10) -> list[float]:
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _gripper(g: Report) -> str:
    return f"{g['flips']} of {g['steps']} steps flip at {number(g['threshold'])} ({g['joint']}, {g['found']})"


# --- bench -----------------------------------------------------------------------------------------------------

_PHASES = ("p50", "p90", "p95", "p99", "max")


def bench_text(r: Report, form: str) -> str:
    """The report of `vlac.bench.bench` as "md", "json", "csv" or "jsonl"."""
    if form == "json":
        return as_json(r)
    if form == "jsonl":
        return "\n".join(json.dumps(json.loads(as_json(row))) for row in _bench_rows(r))
    if form == "csv":
        return _csv(_bench_rows(r))
    return bench_markdown(r)


def _bench_rows(r: Report) -> list[dict[str, Any]]:
    common = {
        "artifact": r["artifact"]["name"],
        "sha256": r["artifact"]["sha256"],
        "target": r["artifact"]["target"],
        "engine": r["engine"],
        "threads": r["threads"],
        "cpu": r["machine"]["cpu"],
        "vlac": r["versions"]["vlac"],
    }
    rows = []
    for phase, s in r["stages"].items():
        rows.append(
            {**common, "phase": phase, "runs": r["runs"], **{f"{k}_ms": s[k] for k in (*_PHASES, "mean", "sd")}}
        )
    return rows


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


_REUSE = {"one_camera_new": "one camera new", "state_new": "only the state new", "ten_actions": "ten actions"}


def _reuse_line(r: Report) -> list[str]:
    """Chunks for which the runtime could reuse what it knew, beside one of which everything is new."""
    cold = r["stages"]["chunk"]["p50"]
    rows = [f"{_REUSE[k]} {number(s['p50'], 4)} ms ({s['p50'] / cold:.2f})" for k, s in r.get("reuse", {}).items()]
    return [f"chunk at p50: everything new {number(cold, 4)} ms, " + ", ".join(rows)] if rows else []


def bench_markdown(r: Report) -> str:
    """A block to paste: machine, table per phase, rates, memory, board, verdict."""
    a, m = r["artifact"], r["machine"]
    rows = [
        [a["name"], size(a["bytes"]), r["engine"], number(r["threads"]), phase]
        + [number(s[k], 4) for k in ("p50", "p90", "p95", "p99", "max")]
        + [f"{number(s['mean'], 4)} ± {number(s['sd'], 2)}", r["runs"]]
        for phase, s in r["stages"].items()
    ]
    columns = ("model", "size", "engine", "threads", "phase", "p50 ms", "p90", "p95", "p99", "max", "mean", "n")
    load = r["load"]
    lines = [
        f"{m['cpu']}, {m['cores']} cores, {size(m['memory_bytes'])} RAM | {m['system']}"
        + (f" | governor {m['governor']}" if m["governor"] else "")
        + (f" | {m['board']}" if m["board"] else ""),
        " | ".join(f"{k} {v}" for k, v in r["versions"].items()),
        "",
        *markdown(columns, rows),
        "",
        f"cold load {number(load['load_ms'])} ms ({load['page_cache']}), imports {number(load['import_ms'])} ms, "
        f"first inference {number(load['first_ms'])} ms, "
        f"process start to first chunk {number(load['to_first_chunk_ms'])} ms",
        *_reuse_line(r),
        f"chunks {number(r['rate']['chunk_hz'])} Hz at p50; {r['rate']['n_action_steps']} actions each sustain "
        f"{number(r['rate']['control_hz'])} Hz control ({number(r['rate']['control_hz_p99'])} Hz at p99)",
        *board_text.lines(r),
        f"sha256 {a['sha256']}",
        f"{r['verdict']}" + "".join(f"\n  {text}" for text in r["remarks"]),
    ]
    return "\n".join(lines)


# --- run, list -------------------------------------------------------------------------------------------------


def chunk_text(answer: Report, most: int = 8) -> str:
    """The first rows of a chunk, and how long each part took."""
    chunk, stats = answer["chunk"], answer["stats"]
    rows = [[i, *(f"{v:.4f}" for v in row)] for i, row in enumerate(chunk[:most])]
    lines = [
        f"chunk of {len(chunk)} steps in {answer['units']} units, {answer['engine']} engine",
        *table(("step", *answer["actions"]), rows),
    ]
    if len(chunk) > most:
        lines.append(f"  ... {len(chunk) - most} more")
    times = [f"{k.removesuffix('_ms')} {number(v)} ms" for k, v in stats.items() if k.endswith("_ms")]
    lines += ["  ".join(times)] if times else []
    lines += [f"warning: {text}" for text in answer["warnings"]]
    return "\n".join(lines)


def list_text(r: Report) -> str:
    """Families, readers, passes, targets and engines with what each is for."""
    lines: list[str] = []
    for kind, rows in r.items():
        lines.append(kind)
        lines += pairs([(row["name"], row["doc"]) for row in rows]) or ["  none"]
        lines.append("")
    return "\n".join(lines).rstrip()
