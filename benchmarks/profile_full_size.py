"""How far every form is from what this machine can do: `vlac bench --profile` of each artifact, one JSON for all.

python benchmarks/profile_full_size.py ARTIFACT[:ENGINE] ... [--runs 7] [--threads 2] [--out FILE.json]

Per stage: milliseconds, GMAC, GMAC/s, the format of most of its work and the GMAC/s of one large product in it on the
same engine, what share of that the stage reaches, and which kinds of ops take its time. Prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlac import machine
from vlac.profile import profile

LEAST = 0.02
"""Share of a chunk below which a stage is left out of the table."""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each stage of each form."""
    head = ["form", "stage", "ms", "GMAC/s", "peak", "of it", "most time in"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---:|---:|---:|---:|---|"]
    for r in rows:
        for s in r["stages"]:
            if s["ms"] >= LEAST * r["chunk_ms"]:
                lines.append("| " + " | ".join(_cells(r, s)) + " |")
    return "\n".join(lines)


def _cells(r: Mapping[str, Any], s: Mapping[str, Any]) -> list[str]:
    peak = ("", "") if s["peak_gmac_s"] is None else (f"{s['peak_gmac_s']:.0f}", f"{100 * s['of_peak']:.0f} %")
    ops = ", ".join(f"{o['kind']} {100 * o['share']:.0f} %" for o in s["ops"][:3])
    name = f"{r['name']} ({r['engine']})"
    return [name, s["stage"], f"{s['ms']:.0f}", f"{s['gmac_s']:.0f}", *peak, ops]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", metavar="ARTIFACT[:ENGINE]")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for given in args.artifacts:
        path, _, engine = given.partition(":")
        before = os.getloadavg()[0]
        found = profile(path, engine=engine or None, threads=args.threads, runs=args.runs)
        name = Path(path).name
        found["info"]["artifact"] = name
        rows.append({"name": name, "load_average": round(before, 1), **found, "artifact": name})
        print(table(rows[-1:]), flush=True)
    if args.out:
        report = {"machine": machine.describe(), "threads": args.threads, "runs": args.runs, "rows": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
