"""One artifact on several engines and devices, one table: each row against the same float32 reference.

The reference is the torch engine in float32 on the CPU (numpy where torch is not installed) on the program with the
artifact's own decoded weights: question 1 of vlac/parity.py. TF32 is off. What the recipe cost stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlac import integrity, metrics
from vlac.artifact import Artifact, Golden, open_artifact
from vlac.bench import fingerprint
from vlac.engines.base import get_engine
from vlac.errors import EngineError, InputError
from vlac.metrics import Limit
from vlac.parity import grade_of, joints_of, observed, products_of, run_reference
from vlac.parity_answers import Answers, NpArray, answers
from vlac.parity_compiler import Judge, judge, judge_engine, judged
from vlac.recorded import Recorded
from vlac.registry import Progress, ReadOptions, silent
from vlac.runtime.session import ANY_ARTIFACT, choose_engine
from vlac.tables import number, pairs, table

DTYPES = ("f32", "f64", "bf16", "f16", "int8")


@dataclass(frozen=True)
class Place:
    """Where an artifact is run: "onnxruntime", "torch:cuda", "torch:cuda:1:bf16"."""

    text: str
    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Place:
        """ENGINE[:DEVICE][:DTYPE]; devices and types are the torch engine's; InputError for others."""
        engine, *parts = text.split(":")
        options: dict[str, Any] = {}
        while parts:
            part = parts.pop(0)
            if part in ("cpu", "cuda") and "device" not in options:
                indexed = part == "cuda" and parts and parts[0].isdigit()
                options["device"] = f"{part}:{parts.pop(0)}" if indexed else part
            elif part in DTYPES and "dtype" not in options:
                options["dtype"] = part
            else:
                raise InputError(
                    f"--on {text!r}: {part!r} is no device and no type",
                    remedy=f"ENGINE[:cpu|:cuda|:cuda:N][:{'|:'.join(DTYPES)}], such as torch:cuda:bf16 or onnxruntime",
                )
        if options and engine != "torch":
            raise InputError(f"--on {text!r}: devices and types are for the torch engine", remedy=f"--on {engine}")
        return Place(text, engine, options)


def compare(
    path: str | Path,
    on: Sequence[str],
    *,
    reference: str | None = None,
    observations: str | Path | Recorded | None = None,
    frames: int | None = None,
    threads: int | None = None,
    limits: Sequence[str] = (),
    read: ReadOptions | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """A report with one row for each of `on` (see Place); the other arguments are those of `vlac.parity.parity`.

    A row that cannot be run here has "not_available": why, and "ok": None. `ok` of the report: every row that ran
    holds its limits.
    Raises: InputError for an `on` that means nothing, EngineError when an engine cannot open this artifact anywhere, or
    when no row ran.
    """
    places = [Place.parse(text) for text in on]
    if len({p.text for p in places}) < len(places):
        raise InputError("--on: the same place twice", remedy="name each once")
    wanted = [metrics.parse_limit(text) for text in limits]
    artifact = open_artifact(path)
    for p in places:
        if p.engine not in (*artifact.engines, *artifact.host_engines, *ANY_ARTIFACT):
            choose_engine(artifact, p.engine)  # says what there is
    progress("checking every byte", 0, 0)
    integrity.verify(artifact)
    given, source = observed(artifact, observations, frames, reference, read)
    run = _Run(artifact, given, wanted, threads, progress, _told(artifact, reference, read, given, progress))
    rows = [run.row(p) for p in places]
    ran = [r for r in rows if r["ok"] is not None]
    if not ran:
        why = "\n  ".join(f"{r['on']}: {r['not_available']}" for r in rows)
        raise EngineError(f"none of these can run {artifact.path} here:\n  {why}", remedy="see `vlac doctor`")
    return {
        "artifact": str(artifact.path),
        "sha256": fingerprint(artifact)["sha256"],
        "target": artifact.manifest["target"],
        "units": artifact.io.units,
        "observations": {"source": source, "count": len(given)},
        "reference": run.reference,
        "rows": rows,
        "ok": all(r["ok"] for r in ran),
    }


def _told(
    artifact: Artifact, reference: str | None, read: ReadOptions | None, given: Sequence[Golden], progress: Progress
) -> list[NpArray] | None:
    """The untouched checkpoint's chunks; None where nobody knows them."""
    if reference is not None:
        return run_reference(reference, read, artifact, given, progress)[0]
    return None if any(g.chunk.size == 0 for g in given) else [g.chunk for g in given]


@dataclass
class _Run:
    """What all rows share; the reference runs once, and again for a policy that picks tokens, whose ids it follows."""

    artifact: Artifact
    given: Sequence[Golden]
    wanted: Sequence[Limit]
    threads: int | None
    progress: Progress
    told: list[NpArray] | None
    _judge: Judge | None = None

    @property
    def reference(self) -> str:
        """What the rows are held against."""
        name = judge_engine(self.artifact, "")[0]
        return f"{name}, float32 on the CPU, the artifact's own weights" if name else "none"

    def row(self, place: Place) -> dict[str, Any]:
        """One place's figures, or why there are none."""
        head = {"on": place.text, "engine": place.engine, **place.options}
        engine = get_engine(place.engine)
        if why := engine.missing():
            return {**head, "ok": None, "not_available": why}
        a = self.artifact
        try:
            options = {**engine.parity_options, **place.options}
            session = engine.open(a, threads=self.threads, options=options)
        except EngineError as error:
            return {**head, "ok": None, "not_available": error.message}
        try:
            info = dict(session.info)
            mine = answers(a.program, session, a.io, a.tokenizer, self.given, self.progress, place.text)
        finally:
            session.close()
        grade = grade_of(a.program, products_of(a, place.options))
        cost = self._cost(mine)
        compiler = self._compiler(mine, grade)
        held = [v["ok"] for v in (cost or {}).get("limits", [])]
        if compiler is not None:
            held.append(compiler["ok"])
        return {
            **head,
            "engine_info": info,
            "tf32": bool(info.get("tf32", False)),
            "grade": grade,
            "repeats": mine.repeats,
            "compiler": compiler,
            "cost": cost,
            "ok": all(held),
        }

    def _compiler(self, mine: Answers, grade: str) -> dict[str, Any] | None:
        name, why = judge_engine(self.artifact, "")
        if not name:
            if any(x.question == "compiler" for x in self.wanted):
                raise EngineError(f"question 1 cannot be asked: {why}", remedy='pip install "vlac-compiler[compile]"')
            return None
        follows = any(t is not None for t in mine.tokens)
        by = self._judge
        if by is None or follows:
            follow = mine.tokens if follows else ()
            by = self._judge = judge(self.artifact, name, self.given, self.threads, self.progress, follow)
        return judged(self.artifact, mine, by, self.wanted, grade)

    def _cost(self, mine: Answers) -> dict[str, Any] | None:
        if self.told is None:
            return None
        io = self.artifact.io
        figures = metrics.compare(np.stack(mine.chunks), np.stack(self.told), joints_of(io), io.n_action_steps)
        limits = [x for x in self.wanted if x.question == "cost"]
        return {**figures, "limits": metrics.judge(limits, metrics.figures(figures))}


def compare_text(r: Mapping[str, Any]) -> str:
    """The report of `compare` for people."""
    seen = r["observations"]
    about = [
        ("target", r["target"]),
        ("reference", r["reference"]),
        ("observations", f"{seen['count']}, {seen['source']}"),
        ("TF32", "on" if any(row.get("tf32") for row in r["rows"]) else "off"),
    ]
    columns = ("on", "max|d|/max", "rel L2", "worst stage", "its rel L2", "judged as", "to checkpoint, rel L2", "")
    lines = [f"parity of {r['artifact']}", *pairs(about), "", *table(columns, [_cells(row) for row in r["rows"]])]
    absent = [f"  {row['on']}: not available: {row['not_available']}" for row in r["rows"] if row["ok"] is None]
    return "\n".join([*lines, *absent, "", "ok" if r["ok"] else "NOT OK"])


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row["ok"] is None:
        return [row["on"], *["-"] * 6, "not available"]
    q, cost = row["compiler"], row["cost"]
    if q is None:
        figures = ["-"] * 4
    else:
        worst = max(q["stages"], key=lambda s: float(s["relative_l2"]), default=None)
        of = [worst["stage"], number(worst["relative_l2"])] if worst else ["-", "-"]
        figures = [number(q["chunk"]["max_relative"]), number(q["chunk"]["relative_l2"]), *of]
    paid = "-" if cost is None else number(cost["relative_l2"])
    return [row["on"], *figures, row["grade"], paid, "ok" if row["ok"] else "over the limit"]
