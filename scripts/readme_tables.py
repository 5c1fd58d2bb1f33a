"""Writes the result tables of README.md and docs/ from the JSON in benchmarks/results, between their markers.

python scripts/readme_tables.py [--check]     --check: exit code 1 if a document is not what the JSON says
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first two to the right."""
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def full_size(report: dict[str, Any]) -> list[str]:
    rows = []
    for t in report["targets"]:
        made = [f"{t['artifact_mb']:.0f}", f"{t['compile_s']:.0f}", f"{t['compile_peak_mb'] / 1000:.1f}"]
        for i, run in enumerate(t["runs"]):
            first = [t["target"], run["engine"], *made] if i == 0 else ["", run["engine"], "", "", ""]
            rows.append([*first, f"{run['load_s']:.2f}", f"{run['act_s']:.1f}", f"{run['run_peak_mb']}"])
    head = ["target", "engine", "file MB", "compile s", "compile peak GB", "load s", "chunk s", "run peak MB"]
    return [*table(head, rows), "", _made_by(report), f"Load average while measuring: {_loads(report)}."]


def _loads(report: dict[str, Any]) -> str:
    loads = [t["load_average"] for t in report["targets"]]
    return f"{min(loads):.1f} to {max(loads):.1f} on {report['machine']['cores']} cores"


def precision(report: dict[str, Any]) -> list[str]:
    rows = []
    for r in report["rows"]:
        real, lerobot = r["real"], r["lerobot"]["max_relative"]
        figures = [f"{real['cosine']:.6f}", f"{100 * real['relative_l2']:.2g} %", f"{lerobot:.1e}"]
        rows.append([r["target"], r["engine"], *figures])
    head = ["target", "engine", "cosine to fp32", "relative L2 to fp32", "max error / max, to LeRobot"]
    return [*table(head, rows), "", _made_by(report)]


def smolvla_cpu(report: dict[str, Any]) -> list[str]:
    rows = []
    for r in report["rows"]:
        if "cold" not in r:
            continue  # failed: why stands in the JSON
        cold, shares = r["cold"], r.get("of_cold_wall", {})
        figures = [f"{cold['ratio']['wall_s']:.2f}", f"{sorted(cold['wall_s'])[len(cold['wall_s']) // 2]:.2f}"]
        figures += [f"{shares[k]:.2f}" if k in shares else "" for k in ("camera", "state")]
        drift = f"{r['relative_l2']:.1e}" if r["relative_l2"] else ""
        figures += [drift, f"{r['mb']:.0f}" if r.get("mb") else "", f"{r['load_s']:.1f}", str(r["peak_mb"])]
        rows.append([r["name"], r.get("engine", "") if "target" in r else "", *figures])
    head = ["form", "engine", "time / LeRobot fp32", "chunk s", "one camera new", "state new"]
    head += ["drift", "file MB", "load s", "peak MB"]
    busy = ", ".join(f"{load:.1f}" for load in report["load_average"])
    m, v = report["machine"], report["versions"]
    used = ", ".join(f"{k} {v[k]}" for k in sorted(v))
    what = (
        f"{report['what']}. `{report['command']}`; {m['cpu']} ({', '.join(m['features'])}), {m['cores']} cores; {used}."
    )
    how = "Medians of wall time; one camera new, state new: shares of the same form's chunk before it, all of it new."
    how += f" Drift: relative L2 to LeRobot's chunk. Load averages of the rounds: {busy}."
    for group in report.get("groups", [])[1:]:
        wall = sorted(group["base"]["wall_s"])
        how += f" From {group['rows'][1]} on ratios are to LeRobot beside these forms, {wall[len(wall) // 2]:.2f} s."
    return [*table(head, rows), "", what, how]


def compile_big(report: dict[str, Any]) -> list[str]:
    rows = []
    for r in report["rows"]:
        figures = [f"{r['parameters'] / 1e9:.2f}", f"{r['checkpoint_gb']:.1f}", f"{r['artifact_gb']:.2f}"]
        figures += [f"{r['peak_rss_gb']:.2f}", f"{r['disk_high_water_gb']:.2f}"]
        rows.append([r["family"], r["target"], *figures])
    head = ["family", "target", "parameters 1e9", "checkpoint GB", "artifact GB", "peak memory GB", "peak disk GB"]
    return [*table(head, rows), "", _made_by(report)]


def push_cubes(report: dict[str, Any]) -> list[str]:
    rows = []
    for r in report["rows"]:
        s, d, p = r["success"], r.get("drift"), r.get("paired")
        figures = [f"{r['mb']:.1f}" if "mb" in r else "", f"{100 * d['relative_l2']:.2g} %" if d else ""]
        figures += [f"{100 * s['rate']:.1f} % ({100 * s['low']:.1f}..{100 * s['high']:.1f})"]
        figures += [f"{100 * p['difference']:+.1f} ({100 * p['low']:+.1f}..{100 * p['high']:+.1f})" if p else ""]
        rows.append([r["target"], r["engine"], *figures, f"{p['p']:.2g}" if p else ""])
    head = ["policy", "engine", "MB", "drift", "success (95 %)", "difference to fp32, points (95 %)", "p"]
    base = report["rows"][0]
    controls = ", ".join(
        f"{words} {base['controls'][name]['success']['count']} of {base['controls'][name]['success']['of']}"
        for name, words in (("shuffled", "told another instruction"), ("blank", "shown black pictures"))
    )
    first, last = report["seeds"]
    what = f"Seeds {first} to {last}; controls of fp32: {controls}. Drift: relative L2 on the recorded observations."
    how = "Intervals: Wilson's, and Newcombe's for paired differences; p: McNemar's exact."
    return [*table(head, rows), "", _made_by(report), what, how]


def pass_success(report: dict[str, Any]) -> list[str]:
    """A Markdown table: recipe, success with interval, drift, milliseconds, megabytes; the first row is the base."""
    head = ["recipe", "success", "95 % interval", "drift", "ms", "MB"]
    rows = []
    for row in report["rows"]:
        name = f"`{' '.join(row['passes'])}`" if row["passes"] else "nothing"
        if row["status"] != "done":
            rows.append([name, row["error"], *[""] * 4])
            continue
        s, f = row["success"], row["figures"]
        interval = f"{100 * s['low']:.1f} to {100 * s['high']:.1f} %"
        figures = [f"{f['drift']:.2g}", f"{f['ms']:.1f}", f"{f['mb']:.2f}"]
        rows.append([name, f"{s['count']} of {s['of']}", interval, *figures])
    table = ["| " + " | ".join(r) + " |" for r in (head, ["---", "---", "---", *["---:"] * 3], *rows)]
    m = report["machine"]
    made = f"{report['what']}; `{report['command']}`; {m['cpu']}, {m['cores']} cores."
    made += " Success: the same unseen starts and noise."
    if any(r.get("latency_verdict") == "INTERLEAVED" for r in report["rows"]):
        made += " ms: medians of rounds in which all took turns."
    bad = sum(r.get("latency_verdict") not in ("VALID", "INTERLEAVED") for r in report["rows"] if r["status"] == "done")
    busy = f"Milliseconds of {bad} rows are not to be quoted: `vlac bench` could not call them VALID." if bad else ""
    drift = "Drift: relative L2 in the robot's units on 16 recorded observations, which passes were fitted on as well."
    return [*table, "", made, *([busy] if busy else []), drift]


def flow_steps(report: dict[str, Any]) -> list[str]:
    """Evaluations x solver: drift, and success where it was measured."""
    rows = []
    for r in report["rows"]:
        named = dict(p.split("=") for p in r["recipe"].removeprefix("flow-steps:").split(",") if "=" in p)
        solver = named.get("solver", "the shipped sampler" if r["recipe"] == "nothing" else r["recipe"])
        s = r.get("success")
        rate = f"{s['count']} of {s['of']} ({100 * s['low']:.1f}..{100 * s['high']:.1f} %)" if s else "not measured"
        cells = [f"{d['drift']:.4f}, {d['median']:.4f}" for d in (r["drift"]["starts"], r["drift"]["moments"])]
        rows.append([str(r["evaluations"]), solver, *cells, rate])
    n = report["observations"]
    what = f"push-cubes, the chunk at the beginnings of {n} episodes and at moments of {n} others that no fit saw"
    return [
        *table(
            ["evaluations", "solver", "beginnings: drift, median", "moments: drift, median", "success (95 %)"], rows
        ),
        "",
        f"{what}; `python benchmarks/flow_steps.py --steps 5,2 --episodes 50` also runs each in closed loop.",
    ]


def _made_by(report: dict[str, Any]) -> str:
    m, v = report["machine"], report["versions"]
    used = ", ".join(f"{k} {v[k]}" for k in ("onnxruntime", "openvino", "transcribe-cpp-native", "torch"))
    return f"{report['what']}. `{report['command']}`; {m['cpu']}, {m['cores']} cores; {used}."


TABLES: dict[str, dict[str, Callable[[dict[str, Any]], list[str]]]] = {
    "README.md": {
        "smolvla_cpu": smolvla_cpu,
        "compile_full_size": full_size,
        "compile_big": compile_big,
        "precision": precision,
        "push_cubes": push_cubes,
        "pass_success": pass_success,
    },
    "docs/passes.md": {"flow_steps": flow_steps},
}
"""document -> name of the JSON and of the markers -> what makes the table."""


def filled(document: str) -> str:
    """The document with every table made anew; a table without its JSON stays as it is."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for name, make in TABLES[document].items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        lines = "\n".join(make(json.loads(path.read_text(encoding="utf-8"))))
        block = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = block.subn(lambda m, lines=lines: f"{m[1]}{lines}\n{m[2]}", text)
        assert count == 1, f"{document} needs one block of markers for {name}, found {count}"
    return text


def main() -> None:
    stale = [d for d in TABLES if filled(d) != (ROOT / d).read_text(encoding="utf-8")]
    if "--check" in sys.argv:
        sys.exit(f"{', '.join(stale)}: run python scripts/readme_tables.py" if stale else 0)
    for document in stale:
        (ROOT / document).write_text(filled(document), encoding="utf-8")


if __name__ == "__main__":
    main()
