"""What compiling changed, as two questions that are never mixed.

1. Is the compiler right? The artifact's engine against the torch (or numpy) engine on the SAME program with the
   artifact's own decoded weights: rounding-level agreement, stage by stage.
2. What did the recipe cost? The artifact's chunks against the untouched fp32 checkpoint: same observations, same noise.

The third, whether it matters on a task, is not asked here, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlac import integrity, metrics
from vlac.artifact import TOKENS, Artifact, Golden, open_artifact
from vlac.bench import fingerprint
from vlac.errors import InputError, VlacError
from vlac.graph import Program
from vlac.io import IO
from vlac.layouts import INT4
from vlac.metrics import Joint, Limit
from vlac.observations import load_observations
from vlac.parity_answers import Answers, answers
from vlac.parity_compiler import COMPILER_LIMITS, compiler, same_tokens, stage_rows
from vlac.recorded import Recorded, beside
from vlac.registry import Progress, ReadOptions, silent
from vlac.runtime.inputs import samples
from vlac.runtime.session import choose_engine

if TYPE_CHECKING:
    from vlac.policy import Policy

__all__ = ["COMPILER_LIMITS", "load_observations", "parity"]

NpArray = np.ndarray[Any, Any]
DATASET_FRAMES = 16
"""Frames of a dataset that are asked about when nobody says how many."""
FORMATS = ("f32", "f16", "bf16", "int8", "q8_0", "fp8", "q6_k", "q5_k", "q5_0", "q4_1", "q4_k", "iq4_nl", "q4_0", *INT4)
"""Formats from the finest to the coarsest; the coarsest that holds at least 1 % of the values names an artifact."""

COST_LIMITS: Mapping[str, tuple[str, ...]] = {
    "f32": ("cos>=0.9999999", "max<=2e-5"),
    "f16": ("cos>=0.9999", "max<=2e-2"),
    "bf16": ("cos>=0.999", "max<=5e-2"),
    "int8": ("cos>=0.995",),
    "q8_0": ("cos>=0.995",),
    "fp8": ("cos>=0.95",),
    "q6_k": ("cos>=0.98",),
    "q5_k": ("cos>=0.95",),
    "q5_0": ("cos>=0.95",),
    "q4_1": ("cos>=0.8",),
    "q4_k": ("cos>=0.8",),
    "iq4_nl": ("cos>=0.8",),
    "q4_0": ("cos>=0.8",),
    **dict.fromkeys(INT4, ("cos>=0.8",)),
}
"""Question 2: limits by format when none are given. They catch a broken artifact; they are no claim about success."""


def parity(
    path: str | Path,
    *,
    reference: str | None = None,
    observations: str | Path | Recorded | None = None,
    frames: int | None = None,
    engine: str | None = None,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
    limits: Sequence[str] = (),
    read: ReadOptions | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Asks questions 1 and 2 of an artifact.

    Args:
        path: the artifact.
        reference: the checkpoint it came from, run in fp32; None = answers stored with the observations.
        observations: a dataset, an observations/ folder or an .npz (vlac.recorded); None = with `reference`, the
            observations/ folder beside the artifact or the reference if there is one, else the golden observations.
        frames: how many observations at most; None = DATASET_FRAMES of a dataset, else all.
        engine: which engine runs the artifact; None = the best here. options: for it, beside its own for parity.
        limits: "cos>=0.999", "compiler.max<=1e-4"; they replace the defaults of their question.
        read: how to read `reference` (revision, statistics, spec).

    Returns: the report as JSON values; `ok` says whether every limit held, "not_asked" what was left out.
    Raises: VlacError when a question cannot be put (nothing to compare with, broken file, no engine).
    """
    wanted = [metrics.parse_limit(text) for text in limits]
    artifact = open_artifact(path)
    progress("checking every byte", 0, 0)
    integrity.verify(artifact)
    given, source = observed(artifact, observations, frames, reference, read)
    chosen = choose_engine(artifact, engine)
    name = chosen.name
    grade = grade_of(artifact.program, products_of(artifact, options or {}))
    report: dict[str, Any] = {
        "artifact": str(artifact.path),
        "sha256": fingerprint(artifact)["sha256"],
        "target": artifact.manifest["target"],
        "units": artifact.io.units,
        "grade": grade,
        "engine": name,
        "observations": {"source": source, "count": len(given)},
        "not_asked": ["3. Does it matter? Success on a task in closed loop, with paired seeds."],
    }
    session = chosen.open(artifact, threads=threads, options={**chosen.parity_options, **(options or {})})
    try:
        report["engine_info"] = dict(session.info)
        mine = answers(artifact.program, session, artifact.io, artifact.tokenizer, given, progress, f"{name} engine")
    finally:
        session.close()
    report["repeats"] = mine.repeats
    what = " ".join((name, *(str(v) for v in (options or {}).values())))  # "torch cuda bf16" may be judged by torch
    report["compiler"] = compiler(artifact, what, given, mine, wanted, grade, threads, progress, report["not_asked"])
    report["cost"] = _cost(artifact, reference, read, given, source, mine, wanted, grade, progress, report["not_asked"])
    asked: list[dict[str, Any]] = [report[q] for q in ("compiler", "cost") if report[q] is not None]
    report["ok"] = bool(asked) and all(q["ok"] for q in asked)
    return report


def products_of(artifact: Artifact, options: Mapping[str, Any]) -> str | None:
    """The format that an engine with these options, or the artifact's graphs, round what they multiply to."""
    asked = options.get("dtype") or artifact.manifest.get("tensorrt", {}).get("half")
    return str(asked) if asked else None


def grade_of(program: Program, products: str | None = None) -> str:
    """The coarsest format that holds at least 1 % of the parameters' values, or that the engine rounds `products` to;
    it chooses the default limits."""
    counts: dict[str, int] = {}
    for p in program.params.values():
        counts[p.format] = counts.get(p.format, 0) + math.prod(p.shape)
    total = sum(counts.values())
    kept = [f for f in counts if f in FORMATS and counts[f] * 100 >= total]
    if any(n.op in ("pack_codes", "round_int8") for s in program.stages for n in s.nodes):
        kept.append("int8")  # rounding in the middle of the network: one code more or less is no error
    if any(n.op == "round_fp8" for s in program.stages for n in s.nodes):
        kept.append("fp8")  # likewise, and a code is up to an eighth of its value
    if products in FORMATS:
        kept.append(str(products))
    return max(kept, key=FORMATS.index, default="f32")


def observed(
    artifact: Artifact,
    where: str | Path | Recorded | None,
    frames: int | None,
    reference: str | None,
    read: ReadOptions | None,
) -> tuple[tuple[Golden, ...], str]:
    """The observations to ask about, and where they come from; arguments as those of `parity`."""
    if where is None and reference is not None:
        from vlac.checkpoint import recorded_beside

        where = beside(artifact.path) or recorded_beside(reference, read.revision if read else None)
    if where is not None:
        recorded = where if isinstance(where, Recorded) else Recorded(Path(where))
        count = frames or (DATASET_FRAMES if recorded.is_dataset else None)
        return recorded.take(artifact.io, count), recorded.describe()
    goldens = artifact.goldens()[:frames]
    if not goldens:
        raise InputError(
            f"{artifact.path} carries no golden observations",
            remedy="give --observations FILE.npz, and --reference CKPT unless the file holds reference chunks",
        )
    kind = artifact.manifest.get("golden", "")
    return goldens, f"the artifact's golden observations{f' ({kind})' if kind else ''}; no data was given"


# --- question 2 ------------------------------------------------------------------------------------------------


def _cost(
    artifact: Artifact,
    reference: str | None,
    read: ReadOptions | None,
    given: Sequence[Golden],
    source: str,
    mine: Answers,
    wanted: Sequence[Limit],
    grade: str,
    progress: Progress,
    not_asked: list[str],
) -> dict[str, Any] | None:
    # a recipe of passes is lossy on purpose: without limits of the caller's it is judged as the coarsest format is
    changed = any(h.get("name") != "quantize-weights" for h in artifact.manifest.get("history", ()))
    defaults = COST_LIMITS[FORMATS[-1] if changed else grade]
    limits = [x for x in wanted if x.question == "cost"] or [metrics.parse_limit(t) for t in defaults]
    floor: Mapping[str, float] | None
    if reference is not None:
        chunks, taps, floor = run_reference(reference, read, artifact, given, progress)
        origin = f"{reference}, fp32, run now"
        floor_from = "two noise seeds of the reference, run now"
    else:
        if any(g.chunk.size == 0 for g in given):
            if source.startswith("dataset ") and not any(x.question == "cost" for x in wanted):
                not_asked.append("2. What did the recipe cost? A dataset holds no reference chunks; give --reference.")
                return None
            raise InputError(
                f"the observations ({source}) hold no reference chunks",
                remedy="give --reference CKPT, or a file with obs{i}/chunk",
            )
        chunks, taps = [g.chunk for g in given], [dict(g.taps) for g in given]
        origin = "fp32 chunks stored with the observations"
        floor = artifact.manifest.get("noise_floor")
        floor_from = "two noise seeds of the reference, stored at compile time"
    joints = joints_of(artifact.io)
    figures = metrics.compare(np.stack(mine.chunks), np.stack(chunks), joints, artifact.io.n_action_steps)
    verdicts = metrics.judge(limits, metrics.figures(figures))
    stage_limits = [x for x in limits if x.metric in metrics.COMPILER_METRICS]
    rows = stage_rows(artifact.program, mine.taps, taps, stage_limits)
    over = next((r["stage"] for r in rows if not r["ok"]), None)
    if floor is None:
        not_asked.append("How far do two noise seeds of the reference lie apart? Give --reference CKPT.")
    return {
        "question": "2. What did the recipe cost? Artifact against the untouched fp32 checkpoint, same inputs.",
        "reference": origin,
        "limits": verdicts,
        **figures,
        "tokens": same_tokens(mine.tokens, [t.get(TOKENS) for t in taps]),
        "noise_floor": {**floor, "source": floor_from} if floor else None,
        "drift_over_noise": figures["relative_l2"] / floor["relative_l2"] if floor and floor["relative_l2"] else None,
        "stages": rows,
        "first_stage_over": over,
        "ok": all(v["ok"] for v in verdicts),
    }


def run_reference(
    checkpoint: str, read: ReadOptions | None, artifact: Artifact, given: Sequence[Golden], progress: Progress
) -> tuple[list[NpArray], list[dict[str, NpArray]], dict[str, float] | None]:
    """The checkpoint as its family draws it, in fp32: chunks, taps, and the noise floor on the first observation (None
    for a policy that samples nothing)."""
    from vlac.api import draw
    from vlac.checkpoint import read_policy
    from vlac.goldens import reference_session

    progress("reading the reference", 0, 0)
    options = read or ReadOptions(no_stats=artifact.io.units != "robot")
    policy = read_policy(checkpoint, options)
    _same_task(policy, artifact)
    program = draw(policy)
    # an artifact of fixed size pads prompt and cameras: padded alike, stage values can be compared row by row
    open_symbols = {s.name for s in artifact.program.symbols}
    program = program.bind({k: v for k, v in program.max_symbols().items() if k not in open_symbols})
    session = reference_session(program)
    try:
        what = "fp32 reference"
        theirs = answers(program, session, policy.io, policy.tokenizer, given, progress, what)
        taps = [t if i is None else {**t, TOKENS: i} for t, i in zip(theirs.taps, theirs.tokens, strict=True)]
        rng = np.random.Generator(np.random.PCG64([7, 7]))
        noise = np.asarray(rng.standard_normal(given[0].noise.shape), dtype=np.float32)
        other = [Golden(given[0].images, given[0].state, given[0].task, noise, noise, noise)]
        asked = other if samples(program) else []
        moved = answers(program, session, policy.io, policy.tokenizer, asked, progress, "its noise floor").chunks
    finally:
        session.close()
    if not moved:
        return theirs.chunks, taps, None
    still, other_seed = theirs.chunks[0], moved[0]
    floor = {"cosine": metrics.cosine(other_seed, still), "relative_l2": metrics.relative_l2(other_seed, still)}
    return theirs.chunks, taps, floor


def _same_task(policy: Policy, artifact: Artifact) -> None:
    mine, theirs = artifact.io, policy.io
    for what in ("chunk_size", "action_dim", "max_action_dim", "units"):
        if getattr(mine, what) != getattr(theirs, what):
            raise VlacError(
                f"the reference has {what} {getattr(theirs, what)}, the artifact {getattr(mine, what)}",
                remedy="give the checkpoint that the artifact was compiled from",
            )


def joints_of(io: IO) -> list[Joint]:
    """Names and ranges of the actions, ranges as the statistics tell them, in the units of the chunk."""
    names = list(io.action_names) or [f"action {i}" for i in range(io.action_dim)]
    names = (names + [f"action {i}" for i in range(len(names), io.action_dim)])[: io.action_dim]
    for step in io.action_steps:
        p = step.params
        for low, high in (("min", "max"), ("q01", "q99"), ("q10", "q90")):
            if low in p and high in p:
                return _joints(names, np.asarray(p[low], float), np.asarray(p[high], float), f"{low}..{high}")
        if "mean" in p and "std" in p:
            mean, std = np.asarray(p["mean"], float), np.asarray(p["std"], float)
            return _joints(names, mean - 2 * std, mean + 2 * std, "mean +- 2 std")
    return [Joint(name) for name in names]


def _joints(names: Sequence[str], low: NpArray, high: NpArray, source: str) -> list[Joint]:
    if low.size != len(names):
        return [Joint(name) for name in names]
    return [Joint(n, float(a), float(b), source) for n, a, b in zip(names, low.ravel(), high.ravel(), strict=True)]
