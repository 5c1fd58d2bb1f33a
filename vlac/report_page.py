"""The report of several artifacts as one HTML file: nothing is fetched, nothing is executed, it reads on a phone.

`render` turns `report_data.Entry`s into the page; the template is vlac/templates/report.html.j2, its pictures are drawn
by `report_figures`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlac import __version__
from vlac.errors import VlacError
from vlac.eval_text import difference_text, interval_text, percent
from vlac.report_data import Entry
from vlac.report_figures import Axis, Point, heat_map, plane
from vlac.tables import likeness, number, share, size, table

View = dict[str, Any]
COLOURS = 8
"""Colours of the page's palette; more artifacts than that share them, their names stand beside everywhere."""


def render(entries: Sequence[Entry], made: str, command: str) -> str:
    """The page as text. made: when; command: how it was made.

    Raises VlacError without jinja2.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError:
        raise VlacError("the report needs jinja2", remedy="pip install 'vlac-compiler[report]'") from None
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # what report_figures drew; every text in it is escaped there
    view = {
        "made": made,
        "command": command,
        "vlac": __version__,
        "machines": sorted({_machine(e.bench) for e in entries if e.bench}),
        "rows": [_row(e, i) for i, e in enumerate(entries)],
        "planes": planes(entries),
        "stages": _stages(entries),
        "heat": _heat(entries),
        "loops": [_loop(e) for e in entries if e.eval],
        "census": _census(entries),
        "history": [_history(e) for e in entries],
        "unproved": unproved(entries),
        "origins": [_origin(e) for e in entries],
    }
    return environment.get_template("report.html.j2").render(view)


def summary_text(entries: Sequence[Entry]) -> str:
    """The page's first table for a terminal."""
    columns = ("artifact", "size", "chunk ms", "drift", "cosine", "success", "95 % interval", "against", "p")
    rows = []
    for e in entries:
        r = _row(e, 0)
        rows.append(
            [e.label, *(r[k] for k in ("size", "latency", "drift", "cosine", "success", "interval", "paired", "p"))]
        )
    return "\n".join(table(columns, rows))


# --- parts -----------------------------------------------------------------------------------------------------


def _drift(e: Entry) -> float | None:
    cost = e.parity["cost"] if e.parity else None
    return None if cost is None else float(cost["relative_l2"])


def _latency(e: Entry) -> float | None:
    return None if e.bench is None else float(e.bench["stages"]["chunk"]["p50"])


def _row(e: Entry, index: int) -> View:
    cost = e.parity["cost"] if e.parity else None
    paired = e.eval.get("paired") if e.eval else None
    latency = _latency(e)
    return {
        "label": e.label,
        "colour": index % COLOURS,
        "target": e.manifest["target"],
        "engine": (e.bench or e.parity or {}).get("engine", "-"),
        "size": size(e.bytes),
        "latency": number(latency),
        "p99": number(e.bench["stages"]["chunk"]["p99"]) if e.bench else "-",
        "control": f"{number(e.bench['rate']['control_hz'])} Hz" if e.bench else "-",
        "memory": size(e.bench["memory"]["peak_rss_bytes"]) if e.bench else "-",
        "drift": share(_drift(e)),
        "cosine": likeness(cost["cosine"]) if cost else "-",
        "parity": None if e.parity is None else bool(e.parity["ok"]),
        "success": percent(e.eval["success"]["rate"]) if e.eval else "-",
        "of": f"{e.eval['success']['count']} of {e.eval['success']['of']}" if e.eval else "",
        "interval": interval_text(e.eval["success"]) if e.eval else "-",
        "paired": difference_text(paired) if paired else "-",
        "p": number(paired["p"]) if paired else "-",
        "against": Path(e.eval["against"]["artifact"]).name if paired and e.eval else "",
    }


def _machine(bench: Mapping[str, Any] | None) -> str:
    assert bench is not None
    m = bench["machine"]
    return f"{m['cpu']}, {m['cores']} cores, {size(m['memory_bytes'])} RAM, {m['system']}"


def planes(entries: Sequence[Entry]) -> list[View]:
    """Success (or drift) over latency, and drift over size: each a picture with what it shows."""
    ms = Axis("ms per chunk (p50)", number, less=True)
    mb = Axis("file size", size, less=True)
    rate = Axis("success", lambda v: f"{100 * v:.0f} %", less=False, bounds=(_floor(entries), 1.0))
    drift = Axis("drift: relative L2 to fp32", lambda v: f"{100 * v:.3g} %", less=True, log=True)
    heaviest = max(e.bytes for e in entries)
    found = []

    def points(x: Any, y: Any, intervals: bool) -> list[Point]:
        result = []
        for i, e in enumerate(entries):
            a, b = x(e), y(e)
            if a is None or b is None:
                continue
            s = e.eval["success"] if intervals and e.eval else {}
            weight = e.bytes / heaviest
            result.append(Point(e.label, a, b, weight, i % COLOURS, s.get("low"), s.get("high")))
        return result

    def success(e: Entry) -> float | None:
        return None if e.eval is None else float(e.eval["success"]["rate"])

    def far(e: Entry) -> float | None:
        """Drift; below 1e-9 nothing is told apart on a logarithmic axis."""
        found = _drift(e)
        return None if found is None else max(found, 1e-9)

    told = any(e.eval for e in entries)
    for name, title, x, y, px, py in (
        ("success", "Success over latency", ms, rate, _latency, success),
        ("speed", "Drift over latency", ms, drift, _latency, far),
        ("size", "Drift over size", mb, drift, lambda e: float(e.bytes), far),
    ):
        if name == "speed" and told:
            continue
        shown = points(px, py, name == "success")
        if shown:
            found.append({"title": title, "svg": plane(shown, x, y, name, title), "intervals": name == "success"})
    return found


def _floor(entries: Sequence[Entry]) -> float:
    """Where the axis of success begins: a round number below every interval, so that they can be told apart."""
    lowest = min((e.eval["success"]["low"] for e in entries if e.eval), default=0.0)
    return 0.0 if lowest < 0.4 else math.floor(10 * lowest - 0.2) / 10


def _bars(rows: Sequence[tuple[str, str, Mapping[str, float], Mapping[str, str]]]) -> View:
    """Stacked bars of one scale: (label, total as text, part -> value, part -> value as text)."""
    names = list(dict.fromkeys(name for _, _, parts, _ in rows for name in parts))
    longest = max((sum(parts.values()) for _, _, parts, _ in rows), default=0) or 1.0
    colour = {name: i % COLOURS for i, name in enumerate(names)}
    bars = []
    for label, total, parts, texts in rows:
        pieces = [
            {"name": n, "text": texts[n], "width": round(100 * v / longest, 3), "colour": colour[n]}
            for n, v in parts.items()
            if v > 0
        ]
        bars.append({"label": label, "total": total, "parts": pieces})
    return {"legend": [{"name": n, "colour": c} for n, c in colour.items()], "bars": bars}


def _stages(entries: Sequence[Entry]) -> View | None:
    rows = []
    for e in entries:
        if e.bench is None:
            continue
        p50 = {k: float(s["p50"]) for k, s in e.bench["stages"].items() if k != "chunk"}
        total = number(e.bench["stages"]["chunk"]["p50"])
        rows.append((e.label, f"{total} ms", p50, {k: f"{number(v)} ms" for k, v in p50.items()}))
    return _bars(rows) if rows else None


def _heat(entries: Sequence[Entry]) -> list[View]:
    maps = []
    for i, e in enumerate(entries):
        cost = e.parity["cost"] if e.parity else None
        if cost is None or "map" not in cost:
            continue
        joints = [j["joint"] for j in cost["joints"]]
        executed = cost["horizon"]["executed_steps"]
        title = f"Drift of {e.label} by joint and step"
        figures = [
            [j["joint"], *(number(j[k]) for k in ("max_abs", "mean_abs", "bias", "range")), share(j["share_of_range"])]
            for j in cost["joints"]
        ]
        floor = cost["noise_floor"]
        maps.append(
            {
                "label": e.label,
                "svg": heat_map(cost["map"]["values"], joints, executed, f"heat{i}", title),
                "executed": executed,
                "steps": len(cost["map"]["values"]),
                "joints": figures,
                "drift": share(cost["relative_l2"]),
                "noise": share(floor["relative_l2"]) if floor else None,
            }
        )
    return maps


def _loop(e: Entry) -> View:
    r = e.eval
    assert r is not None
    d = r["delay"]
    goals = [[g["goal"], f"{g['count']} of {g['of']}", interval_text(g), number(g["mean_steps"])] for g in r["by_goal"]]
    controls = [
        [c["control"], f"{c['success']['count']} of {c['success']['of']}", interval_text(c["success"])]
        for c in e.controls
    ]
    return {
        "label": e.label,
        "environment": r["environment"],
        "seeds": f"{r['seeds'][0]}..{r['seeds'][1]}",
        "replay": f"{r['n_action_steps']} actions of each chunk, {number(r['control_hz'])} Hz",
        "delay": f"{number(d['ms'])} ms ({d['from']})" if d["ms"] else d["from"],
        "steps": number(r["mean_steps"]),
        "jerk": number(r["jerk"]),
        "goals": goals,
        "controls": controls,
        "pictures": [{**p, "data": data} for p in r.get("pictures", ()) if (data := _png(p["files"])) is not None],
    }


def _png(files: Sequence[str]) -> str | None:
    """The strip as a data: URI; None when the file has gone."""
    for file in map(Path, files):
        if file.suffix == ".png" and file.is_file():
            return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    return None


def _census(entries: Sequence[Entry]) -> View:
    rows, tables = [], []
    for e in entries:
        c = e.manifest["census"]
        parts = {f: float(v["bytes"]) for f, v in c["formats"].items()}
        rows.append((e.label, size(c["bytes"]), parts, {f: size(v) for f, v in parts.items()}))
        lines: dict[tuple[str, str], list[int]] = {}
        for t in c["tensors"].values():
            line = lines.setdefault((t["role"], t["realised"]), [0, 0, 0])
            line[0] += 1
            line[1] += t["bytes"]
            line[2] += t["requested"] != t["realised"]
        tables.append(
            {
                "label": e.label,
                "rows": [
                    [role, fmt, n, size(b), changed or "-"] for (role, fmt), (n, b, changed) in sorted(lines.items())
                ],
            }
        )
    return {**_bars(rows), "tables": tables}


def _history(e: Entry) -> View:
    steps = []
    for h in e.manifest["history"]:
        params = ", ".join(f"{k}={v}" for k, v in h["params"].items())
        figures = [(k, number(v)) for k, v in h["figures"].items() if isinstance(v, (int, float, str))]
        steps.append({"name": h["name"], "params": params, "figures": figures})
    return {"label": e.label, "steps": steps, "warnings": e.manifest["warnings"]}


def _origin(e: Entry) -> View:
    source = e.manifest["source"]
    facts = [
        ("checkpoint", source["checkpoint"] + (f" at {source['revision']}" if source["revision"] else "")),
        ("family", e.manifest.get("display_name", e.manifest["family"])),
        ("compiled by", f"vlac {e.manifest['vlac']}"),
        ("sha256", e.sha256),
    ]
    if e.bench:
        facts.append(("versions", ", ".join(f"{k} {v}" for k, v in e.bench["versions"].items())))
        facts.append(("timing", f"{e.bench['runs']} chunks; {e.bench['verdict']}"))
    return {"label": e.label, "facts": facts, "remarks": [*(e.bench["remarks"] if e.bench else ()), *e.remarks]}


def unproved(entries: Sequence[Entry]) -> list[str]:
    """What a reader must not take from the page."""
    lines = []
    unasked = [e.label for e in entries if e.eval is None]
    if unasked:
        lines.append(f"Whether the drift matters on a task: success was not measured for {', '.join(unasked)}.")
    if len(unasked) < len(entries):
        lines.append("Success in a simulator is not success on a robot, and its interval covers other starts only.")
    for e in entries:
        p = e.eval.get("paired") if e.eval else None
        if p and p["p"] > 0.05:
            lines.append(
                f"That {e.label} is as good as its reference: no difference was found (p = {number(p['p'])}), and one "
                f"between {100 * p['low']:+.1f} and {100 * p['high']:+.1f} percentage points would fit these episodes."
            )
    seen = {e.parity["observations"]["source"]: e.parity["observations"]["count"] for e in entries if e.parity}
    lines += [
        f"Drift anywhere but on the {n} observations it was measured on ({source})." for source, n in seen.items()
    ]
    if any(e.bench for e in entries):
        lines.append("Latency on another machine, or beside other work: the times are of the machine named above.")
    bad = [e.label for e in entries if e.bench and e.bench["verdict"] != "VALID"]
    if bad:
        lines.append(f"That the times may be quoted: {', '.join(bad)} did not pass every check, see the remarks below.")
    lines += [text for e in entries if e.parity for text in e.parity["not_asked"] if not text.startswith("3.")]
    return list(dict.fromkeys(lines))
