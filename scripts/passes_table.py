"""Writes the table of docs/passes.md that tells what each pass costs in success, from benchmarks/results.

python scripts/passes_table.py [--check]     --check: exit code 1 if docs/passes.md is not what the JSON says
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def lines(report: dict[str, Any]) -> list[str]:
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
    bad = sum(r.get("latency_verdict") != "VALID" for r in report["rows"] if r["status"] == "done")
    busy = f"Milliseconds of {bad} rows are not to be quoted: `vlac bench` could not call them VALID." if bad else ""
    drift = "Drift: relative L2 in the robot's units on 16 recorded observations, which passes were fitted on as well."
    return [*table, "", made, *([busy] if busy else []), drift]


def filled(text: str) -> str:
    """The document with its table made anew."""
    report = json.loads((ROOT / "benchmarks" / "results" / "pass_success.json").read_text(encoding="utf-8"))
    block = re.compile(r"(<!-- table pass_success -->\n).*?(<!-- end -->)", re.DOTALL)
    text, count = block.subn(lambda m: m[1] + "\n".join(lines(report)) + "\n" + m[2], text)
    assert count == 1, f"docs/passes.md needs one block of markers for pass_success, found {count}"
    return text


def main() -> None:
    path = ROOT / "docs" / "passes.md"
    old = path.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" in sys.argv:
        sys.exit("docs/passes.md: run python scripts/passes_table.py" if new != old else 0)
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
