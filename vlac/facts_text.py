"""`vlac inspect` and the closing lines of `vlac compile`, as text for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlac.tables import many, number, pairs, size, table

Facts = Mapping[str, Any]


def text(f: Facts) -> str:
    """The facts of `vlac.facts.inspect`, section by section; warnings come first because they matter most."""
    sections = [_head(f), _warnings(f), _inputs(f), _statistics(f), _parts(f)]
    if f["kind"] == "artifact":
        sections += [_census(f["census"]), _history(f), _files(f)]
    sections += [_dimensions(f), _ignored(f)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _head(f: Facts) -> list[str]:
    rows: list[tuple[str, Any]] = [("family", f["family"]), ("name", f["name"]), ("parameters", _parameters(f))]
    if "dialect" in f:
        d = f["dialect"]
        rows.append(("file of", f"{d['engine']} (dialect {d['dialect']}, architecture {d['architecture']}), checked"))
        rows += [("note", note) for note in d["notes"]]
    if f["kind"] == "artifact":
        source = f["source"]
        rows += [
            ("target", f"{f['target']} ({f['container']}), engines: {', '.join(f['engines'])}"),
            ("made from", f"{source.get('checkpoint', '?')} by {f['written_by']}"),
            ("golden answers", f"{f['goldens']['count']} observations ({f['goldens']['kind']})"),
            ("stages", ", ".join(f"{k} {v} nodes" for k, v in f["stages"].items())),
        ]
        if f["noise_floor"]:
            floor = f["noise_floor"]
            rows.append(
                ("sampler noise", f"relative L2 {number(floor['relative_l2'])} between two seeds of the reference")
            )
    elif f["revision"]:
        rows.append(("revision", f["revision"]))
    flow = f["flow"]
    rows.append(("chunk", f"{f['chunk_size']} steps, {f['n_action_steps']} executed, units: {f['units']}"))
    if flow:
        rows.append(("flow", f"{flow['steps']} {flow['solver']} steps"))
    return [f"{f['kind']} {f['path']}", *pairs(rows)]


def _parameters(f: Facts) -> str:
    read = sum(p["parameters"] for p in f["parts"].values())
    dead = f["parameters"] - read
    return many(f["parameters"]) + (
        f", {many(dead)} of them take no part" if f["kind"] == "checkpoint" and dead else ""
    )


def _warnings(f: Facts) -> list[str]:
    return [f"warning: {w}" for w in f["warnings"]]


def _inputs(f: Facts) -> list[str]:
    cameras = [
        [c["name"], c["key"], "x".join(map(str, c["shape"])), "may be absent" if c["optional"] else ""]
        for c in f["cameras"]
    ]
    lines = [f"cameras, in order ({f['max_missing_cameras']} may be absent)"]
    lines += table(("name", "feature", "C,H,W", ""), cameras)
    names = f["action"]["names"]
    rows: list[tuple[str, Any]] = [
        ("pixels", " -> ".join(f["image"]["steps"])),
        ("state", f"{f['state']['key']} [{f['state']['dim']}]"),
        ("action", f"{f['action']['key']} [{f['action']['dim']}]" + (f": {', '.join(names)}" if names else "")),
    ]
    t = f["tokenizer"]
    if t:
        rows += [("tokenizer", f"{t['kind']}, {t['vocabulary']} tokens"), ("prompt", " -> ".join(t["steps"]))]
    if f["rename"]:
        rows.append(("renamed", ", ".join(f"{a} -> {b}" for a, b in f["rename"].items())))
    return [*lines, *pairs(rows)]


def _statistics(f: Facts) -> list[str]:
    rows = []
    for key, s in f["statistics"].items():
        if s is None:
            rows.append([key, "none", "values pass unchanged", "", "", ""])
            continue
        covers = f"{s['covers']} of {s['dim']} dims"
        still = f"dims {', '.join(map(str, s['constant']))} never moved" if s["constant"] else ""
        rows.append([key, s["mode"], covers, _few(s["low"]), _few(s["high"]), still])
    return ["statistics", *table(("feature", "mode", "covers", "low", "high", ""), rows)]


def _few(values: list[float], most: int = 7) -> str:
    shown = " ".join(number(v) for v in values[:most])
    return f"[{shown}{' ...' if len(values) > most else ''}]"


def _parts(f: Facts) -> list[str]:
    rows = [
        [part, many(p["parameters"]), ", ".join(f"{many(n)} {d}" for d, n in p["dtypes"].items())]
        for part, p in f["parts"].items()
    ]
    return ["parameters", *table(("part", "count", "stored as"), rows)]


def _census(c: Facts) -> list[str]:
    rows = [[name, many(v["values"]), size(v["bytes"])] for name, v in c["formats"].items()]
    lines = [f"formats, {size(c['bytes'])} of weights", *table(("format", "values", "size"), rows)]
    return lines + [
        f"  promoted: {name} asked {p['requested']}, became {p['realised']}" for name, p in c["promoted"].items()
    ]


def _history(f: Facts) -> list[str]:
    if not f["history"]:
        return []
    rows = []
    for step in f["history"]:
        given = ",".join(f"{k}={v}" for k, v in step["params"].items())
        rows.append((f"{step['name']}:{given}", ", ".join(f"{k} {number(v)}" for k, v in step["figures"].items())))
    return ["passes", *pairs(rows)]


def _files(f: Facts) -> list[str]:
    return ["files", *pairs([(name, size(entry["size"])) for name, entry in f["files"].items()])]


def _dimensions(f: Facts) -> list[str]:
    rows: list[tuple[str, Any]] = []
    for key, value in f["dimensions"].items():
        if isinstance(value, Mapping):
            rows.append((key, ", ".join(f"{k} {v}" for k, v in value.items())))
    flat = {k: v for k, v in f["dimensions"].items() if not isinstance(v, Mapping)}
    if flat:
        rows.append(("other", ", ".join(f"{k} {v}" for k, v in flat.items())))
    return ["dimensions", *pairs(rows)] if rows else []


def _ignored(f: Facts) -> list[str]:
    keys = f["ignored_config_keys"]
    if not keys:
        return []
    return [
        "config keys that do not act on inference",
        *textwrap.wrap(", ".join(keys), 110, initial_indent="  ", subsequent_indent="  "),
    ]


def compiled_text(path: Path | None, manifest: Facts) -> str:
    """What `vlac compile` says at the end: where the artifact is, what became of the weights, what to do next."""
    census = manifest["census"]
    lines = [f"wrote {path}" if path is not None else "dry run: nothing was written"]
    lines += pairs([("target", manifest["target"]), ("engines", ", ".join(manifest["engines"]))])
    promoted = {n: r for n, r in census["tensors"].items() if r["requested"] != r["realised"]}
    lines += _census({**census, "promoted": promoted})
    for step in manifest["history"]:
        lines.append(f"  pass {step['name']}: " + ", ".join(f"{k} {number(v)}" for k, v in step["figures"].items()))
    lines += [f"warning: {w}" for w in manifest["warnings"]]
    if path is not None:
        lines += ["next", f"  vlac parity {path}", f"  vlac bench {path}"]
    return "\n".join(lines)
