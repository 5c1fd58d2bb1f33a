"""What `vlac eval` prints without --json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlac.tables import number, pairs, table

Report = Mapping[str, Any]


def success_text(s: Report) -> str:
    """ "46 of 50: 92 % (81..97 %)"."""
    return f"{s['count']} of {s['of']}: {percent(s['rate'])} ({interval_text(s)})"


def interval_text(s: Report) -> str:
    """ "81.2..96.8 %", a 95 % interval."""
    return f"{100 * s['low']:.1f}..{100 * s['high']:.1f} %"


def percent(rate: float) -> str:
    """A success rate with one decimal."""
    return f"{100 * rate:.1f} %"


def eval_text(r: Report) -> str:
    """The report of `vlac.evaluate.evaluate` as text."""
    d = r["delay"]
    first, last = r["seeds"]
    rows: list[tuple[str, Any]] = [
        ("policy", f"{r['target']} on {r['engine']}"),
        ("episodes", f"{r['episodes']}, seeds {first}..{last}, at most {r['max_steps']} steps"),
        ("replay", f"{r['n_action_steps']} actions of a chunk, then anew, at {number(r['control_hz'])} Hz"),
        ("delay", f"{number(d['ms'])} ms = {d['steps']} steps ({d['from']})" if d["ms"] else d["from"]),
    ]
    if r.get("rtc"):
        handed = ", and makes up for what its late rows would have moved" if r.get("displacements") else ""
        rows.append(("chunks", f"each goes on from the one before (real-time chunking){handed}"))
    if r["control"] != "none":
        rows.append(("control", _CONTROL[r["control"]]))
    lines = [f"{r['environment']}: {r['artifact']}", *pairs(rows), ""]
    lines += pairs(_figures(r))
    if len(r["by_goal"]) > 1:
        parts = [
            [g["goal"], f"{g['count']} of {g['of']}", interval_text(g), number(g["mean_steps"])] for g in r["by_goal"]
        ]
        lines += ["", *table(("asked for", "succeeded", "95 % interval", "mean steps"), parts)]
    if "paired" in r:
        lines += ["", *_against(r)]
    for p in r.get("pictures", ()):
        lines += [
            "",
            f"  {p['outcome']}, seed {p['seed']}, {p['task']!r}, {p['steps']} steps:",
            *(f"    {f}" for f in p["files"]),
        ]
    return "\n".join([*lines, "", "not said", *(f"  {text}" for text in r["not_said"])])


_CONTROL = {
    "shuffled": "shuffled: each episode is told the instruction of another one",
    "blank": "blank: the policy sees black pictures",
}


def _figures(r: Report) -> list[tuple[str, Any]]:
    steps = f"mean {number(r['mean_steps'])} steps"
    if r["mean_steps_succeeded"] is not None:
        steps += f", {number(r['mean_steps_succeeded'])} when it succeeds"
    return [
        ("success", f"{success_text(r['success'])}, 95 % Wilson interval"),
        ("length", steps),
        ("jerk", f"{number(r['jerk'])} (rms third difference of the executed actions)"),
        ("inference", f"median {number(r['act_ms_median'])} ms here, {r['inferences']} chunks"),
    ]


def _against(r: Report) -> list[str]:
    o, p = r["against"], r["paired"]
    rows = [
        ("success", success_text(o["success"])),
        (
            "both, only this, only that, neither",
            ", ".join(str(p[k]) for k in ("both", "only_first", "only_second", "neither")),
        ),
        ("difference", f"{difference_text(p)}; McNemar exact p = {number(p['p'])}"),
        ("length, jerk", f"{number(o['mean_steps'])} steps, {number(o['jerk'])}"),
    ]
    return [f"against {o['artifact']} ({o['target']} on {o['engine']}), same seeds, same noise", *pairs(rows)]


def difference_text(p: Report) -> str:
    """ "-1.2 (-3.4..+0.8) points"; of percentages."""
    return f"{100 * p['difference']:+.1f} ({100 * p['low']:+.1f}..{100 * p['high']:+.1f}) points"
