"""What each pass of a recipe does: the recipe whole, with each pass left out in turn, and without any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlac import integrity
from vlac.artifact import Artifact, open_artifact, write_goldens
from vlac.errors import InputError
from vlac.registry import Progress, silent
from vlac.sweep.point import Build, Measure, Point, Row, run_group, scratch
from vlac.tables import likeness, number, table


def recipe_of(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The passes of an artifact in the form of --pass, every parameter spelled out."""
    return tuple(
        f"{h['name']}:" + ",".join(f"{k}={_text(v)}" for k, v in h["params"].items()) if h["params"] else str(h["name"])
        for h in manifest.get("history", ())
    )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def ablate(
    path: str | Path,
    reference: str | None,
    *,
    observations: str | Path | None = None,
    engine: str | None = None,
    threads: int | None = None,
    runs: int = 10,
    read: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compiles the checkpoint anew with the artifact's target and variants of its recipe, and measures each.

    Args:
        path: an artifact; its manifest tells the recipe. reference: the checkpoint it came from.
        observations: an .npz; None = the artifact's golden observations. runs: chunks to time; 0 = no latency.
        read: how to read the checkpoint, as keywords of `vlac.compile`.

    Returns: {"artifact", "target", "rows"}: rows as a sweep's, each with "removed": "" for the whole recipe, a pass, or
        "all of them". Raises InputError when there is no checkpoint, no pass or no observation.
    """
    artifact = open_artifact(path)
    integrity.verify(artifact)
    passes = recipe_of(artifact.manifest)
    if not reference:
        raise InputError("--ablate compiles anew", remedy="give --reference CKPT, the checkpoint it was compiled from")
    if not passes:
        raise InputError(f"{artifact.path}: no pass was applied, so there is none to leave out")
    variants = [("", passes)]
    if len(passes) > 1:
        variants += [(p, (*passes[:i], *passes[i + 1 :])) for i, p in enumerate(passes)]
    variants.append(("all of them" if len(passes) > 1 else passes[0], ()))
    target, options = artifact.manifest["target"], artifact.manifest.get("options", {})
    rows: list[Row] = []
    with scratch(None) as folder:
        file, count = _observations(artifact, observations, folder)
        measure = Measure(runs=runs, observations=str(file), goldens=count)
        for i, (removed, recipe) in enumerate(variants):
            progress(f"measuring variants of {len(passes)} passes", i, len(variants))
            point = Point(Build(reference, target, recipe, dict(read or {}), dict(options)), engine, threads)
            place = folder / f"variant{i}"
            made: list[Row] = []
            run_group([point], [str(i)], measure, made.append, place)
            rows += [{**row, "removed": removed} for row in made]
    return {"artifact": str(artifact.path), "target": target, "rows": rows}


def _observations(artifact: Artifact, given: str | Path | None, folder: Path) -> tuple[Path, int]:
    from vlac.observations import load_observations

    if given is not None:
        return Path(given), len(load_observations(Path(given), artifact.io))
    goldens = artifact.goldens()
    if not goldens:
        raise InputError(f"{artifact.path} carries no golden observations", remedy="give --observations FILE.npz")
    file = folder / "observations.npz"
    file.write_bytes(write_goldens(tuple(replace(g, taps={}) for g in goldens)))
    return file, len(goldens)


def ablation_text(report: Mapping[str, Any]) -> str:
    """The rows as a table: what the artifact is without each pass, and the difference that the pass makes."""
    rows: Sequence[Row] = report["rows"]
    whole = rows[0]["figures"]
    cells = []
    for r in rows:
        f = r["figures"]
        if r["status"] != "done":
            cells.append([_name(r), "-", "-", "-", "-", f"refused: {r['error']['message']}"])
            continue
        gives = [
            f"{k} {_signed(whole[key], f[key])}"
            for k, key in (("drift", "drift"), ("ms", "ms"), ("MB", "mb"))
            if r["removed"] and whole and whole.get(key) is not None and f[key] is not None
        ]
        figures = [number(f["drift"]), likeness(f["cosine"]), number(f["ms"]), number(f["mb"])]
        cells.append([_name(r), *figures, ", ".join(gives)])
    lines = [f"ablation of {report['artifact']} ({report['target']})"]
    lines += table(["without", "drift", "cosine", "ms", "MB", "what it adds to the rest"], cells)
    return "\n".join(lines)


def _name(row: Row) -> str:
    return str(row["removed"]) or "(the whole recipe)"


def _signed(whole: float, without: float) -> str:
    difference = whole - without
    return ("+" if difference >= 0 else "") + number(difference, 2)
