"""What compiling changed, as two questions that are never mixed.

1. Is the compiler right? The artifact's engine against the torch (or numpy) engine on the SAME program with the
   artifact's own decoded weights: rounding-level agreement, stage by stage.
2. What did the recipe cost? The artifact's chunks against the untouched fp32 checkpoint: same observations, same noise.

The third, whether it matters on a task, is not asked here, and the report says so.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlac import integrity, metrics
from vlac.artifact import TOKENS, Artifact, Golden, open_artifact
from vlac.bench import fingerprint
from vlac.engines.base import EngineSession
from vlac.errors import EngineError, InputError, VlacError
from vlac.graph import Call, Program, Repeat
from vlac.io import IO
from vlac.layouts import INT4
from vlac.metrics import Joint, Limit
from vlac.observations import load_observations
from vlac.recorded import Recorded, beside
from vlac.registry import Progress, ReadOptions, silent
from vlac.runtime.actions import apply_action_steps
from vlac.runtime.inputs import prepared, samples
from vlac.runtime.schedule import generated
from vlac.runtime.session import choose_engine, execute

if TYPE_CHECKING:
    from vlac.policy import Policy

__all__ = ["load_observations", "parity"]

NpArray = np.ndarray[Any, Any]
DATASET_FRAMES = 16
"""Frames of a dataset that are asked about when nobody says how many."""
CALLS = 3
"""How often an engine answers the first observation, to be compared with itself."""
NUMPY_LIMIT = 20_000_000
"""Parameters above which the numpy engine is too slow to serve as the reference of question 1."""

FORMATS = ("f32", "f16", "bf16", "int8", "q8_0", "fp8", "q6_k", "q5_k", "q5_0", "q4_1", "q4_k", "iq4_nl", "q4_0", *INT4)
"""Formats from the finest to the coarsest; the coarsest that holds at least 1 % of the values names an artifact."""

COMPILER_LIMITS: Mapping[str, str] = {
    "f32": "compiler.max<=5e-5",
    "f16": "compiler.rel_l2<=3e-3",
    "bf16": "compiler.rel_l2<=2e-2",
    "int8": "compiler.rel_l2<=6e-2",
    "q8_0": "compiler.rel_l2<=6e-2",
    "fp8": "compiler.rel_l2<=2e-1",
    "q6_k": "compiler.rel_l2<=6e-2",
    "q5_k": "compiler.rel_l2<=6e-2",
    "q5_0": "compiler.rel_l2<=6e-2",
    "q4_1": "compiler.rel_l2<=6e-2",
    "q4_k": "compiler.rel_l2<=6e-2",
    "iq4_nl": "compiler.rel_l2<=6e-2",
    "q4_0": "compiler.rel_l2<=6e-2",
    **dict.fromkeys(INT4, "compiler.rel_l2<=6e-2"),
}
"""Question 1, for every stage value and the chunk, by format. The weights are equal on both sides; what is left is
summation order and, below f32, the rounding of ACTIVATIONS inside the engine's kernels (to f16, bf16, or 8 bits).
Measured worst over stages, networks of 4 to 16 layers: f32 2.3e-6 (max), f16 1.2e-3, bf16 6.5e-3, 8 bit 3.3e-2."""

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


@dataclass(frozen=True)
class Answers:
    """What one engine said: per observation the normalised chunk, the chunk in the policy's units and stage values;
    `repeats` compares the engine with itself on the first observation: call by call, and whole loops (a robot's way)
    with stages run one by one (`stepwise`, max|d|/max)."""

    normalised: list[NpArray]
    chunks: list[NpArray]
    taps: list[dict[str, NpArray]]
    repeats: dict[str, Any]
    tokens: list[NpArray | None]
    """ids that were generated, None for a policy that generates none"""


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
    given, source = _observations(artifact, observations, frames, reference, read)
    chosen = choose_engine(artifact, engine)
    name = chosen.name
    grade = grade_of(artifact.program, (options or {}).get("dtype"))
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
        mine = _answers(artifact.program, session, artifact.io, artifact.tokenizer, given, progress, f"{name} engine")
    finally:
        session.close()
    report["repeats"] = mine.repeats
    what = " ".join((name, *(str(v) for v in (options or {}).values())))  # "torch cuda bf16" may be judged by torch
    report["compiler"] = _compiler(artifact, what, given, mine, wanted, grade, threads, progress, report["not_asked"])
    report["cost"] = _cost(artifact, reference, read, given, source, mine, wanted, grade, progress, report["not_asked"])
    asked: list[dict[str, Any]] = [report[q] for q in ("compiler", "cost") if report[q] is not None]
    report["ok"] = bool(asked) and all(q["ok"] for q in asked)
    return report


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


def _observations(
    artifact: Artifact,
    where: str | Path | Recorded | None,
    frames: int | None,
    reference: str | None,
    read: ReadOptions | None,
) -> tuple[tuple[Golden, ...], str]:
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


def _answers(
    program: Program,
    session: EngineSession,
    io: IO,
    tokenizer: bytes | None,
    given: Sequence[Golden],
    progress: Progress,
    what: str,
    follow: Sequence[NpArray | None] = (),
) -> Answers:
    """`follow`: the ids that another engine generated, for each observation (see `execute`)."""
    total = 2 * len(given) + CALLS - 1
    result = Answers([], [], [], {}, [])
    done = 0
    for i, obs in enumerate(given):
        ready = prepared(io, tokenizer, program, obs)
        # the chunk comes from the way a robot takes (whole loops); stage values from a run of their own, step by step
        chunks = []
        for _ in range(1 if i else CALLS):
            progress(what, done, total)
            chunks.append(execute(program, session, ready.env, ready.symbols))
            done += 1
        progress(what, done, total)
        taps: dict[str, NpArray] = {}
        leader = follow[i] if follow else None
        stepwise = execute(program, session, ready.env, ready.symbols, taps=taps, follow=leader)
        done += 1
        if i == 0:
            result.repeats.update(
                calls=CALLS,
                bit_equal=all(np.array_equal(x, chunks[0]) for x in chunks[1:]),
                max_relative=max(metrics.max_relative(x, chunks[0]) for x in chunks[1:]),
                stepwise=metrics.max_relative(stepwise, chunks[0]),
            )
        chunk = chunks[0] if leader is None else stepwise
        result.normalised.append(apply_action_steps(io.normalised_action_steps, chunk, ready.state))
        result.chunks.append(apply_action_steps(io.action_steps, chunk, ready.state))
        result.taps.append({k: np.array(v) for k, v in taps.items()})
        result.tokens.append(generated(program, taps))
    progress(what, total, total)
    return result


# --- question 1 ------------------------------------------------------------------------------------------------


def _compiler(
    artifact: Artifact,
    engine: str,
    given: Sequence[Golden],
    mine: Answers,
    wanted: Sequence[Limit],
    grade: str,
    threads: int | None,
    progress: Progress,
    not_asked: list[str],
) -> dict[str, Any] | None:
    name, why = _judge_engine(artifact, engine)
    if not name:
        if any(x.question == "compiler" for x in wanted):
            raise EngineError(f"question 1 cannot be asked: {why}", remedy='pip install "vlac-compiler[compile]"')
        not_asked.append(f"1. Is the compiler right? {why}")
        return None
    default = metrics.parse_limit(COMPILER_LIMITS[grade])
    limits = [x for x in wanted if x.question == "compiler"] or [default]
    session = _judge_session(artifact, name, threads)
    try:
        what = f"{name} engine, same weights"
        theirs = _answers(
            artifact.program, session, artifact.io, artifact.tokenizer, given, progress, what, mine.tokens
        )
    finally:
        session.close()
    rows = _stage_rows(artifact.program, mine.taps, theirs.taps, limits)
    chunk = metrics.summary(np.stack(mine.normalised), np.stack(theirs.normalised))
    tokens = _same_tokens(mine.tokens, theirs.tokens)
    # ids are picked from values that the stages' rows judge: between two that are all but equal, rounding may choose
    verdicts = [] if tokens is not None and len(rows) > 1 else metrics.judge(limits, chunk)
    steady = all(default.holds(mine.repeats[k]) for k in ("max_relative", "stepwise"))
    over = next((r for r in rows if not r["ok"]), None)
    return {
        "question": "1. Is the compiler right? Engine against reference engine, same program, same decoded weights.",
        "reference": name,
        "reference_repeats": theirs.repeats,
        "stages": rows,
        "staged": len(rows) > 1 or len(artifact.program.stages) == 1,
        "chunk": chunk,
        "tokens": tokens,
        "limits": verdicts,
        "first_stage_over": over["stage"] if over else None,
        "ok": all(v["ok"] for v in verdicts) and over is None and steady,
    }


def _same_tokens(mine: Sequence[NpArray | None], theirs: Sequence[NpArray | None]) -> dict[str, int] | None:
    """How many ids are equal, place by place; None where none were generated on both sides."""
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=False) if a is not None and b is not None]
    if not pairs:
        return None
    equal = sum(int(np.count_nonzero(a[: len(b)] == b[: len(a)])) for a, b in pairs)
    return {"equal": equal, "of": sum(max(len(a), len(b)) for a, b in pairs)}


def _judge_engine(artifact: Artifact, engine: str) -> tuple[str, str]:
    size = sum(math.prod(p.shape) for p in artifact.program.params.values())
    if engine != "torch" and importlib.util.find_spec("torch") is not None:
        return "torch", ""
    if engine != "numpy" and size <= NUMPY_LIMIT:
        return "numpy", ""
    if engine in ("torch", "numpy"):
        return "", f"the {engine} engine was chosen, and it is itself the reference"
    return "", f"torch is not installed and {size / 1e6:.0f} M parameters are too many for the numpy engine"


def _judge_session(artifact: Artifact, name: str, threads: int | None) -> EngineSession:
    def weight(param: str) -> NpArray:
        return artifact.tensors[param].decode()

    if name == "numpy":
        from vlac.engines.numpy_engine import NumpySession

        return NumpySession(artifact.program, weight)
    from vlac.engines.torch_engine import TorchSession
    from vlac.goldens import fits

    return TorchSession(artifact.program, weight, threads=threads, keep_weights=fits(artifact.program))


def _stage_of(program: Program) -> dict[str, str]:
    """Value name -> the stage that makes it, in schedule order."""
    owner: dict[str, str] = {}
    for step in program.schedule.steps:
        for out in program.stage(step.stage).outputs:
            owner.setdefault(out, step.stage)
        if isinstance(step, Repeat):
            for i in range(step.times):
                owner[f"x_after_step{i}"] = step.stage
    return owner


def _stage_rows(
    program: Program,
    mine: Sequence[Mapping[str, NpArray]],
    theirs: Sequence[Mapping[str, NpArray]],
    limits: Sequence[Limit],
) -> list[dict[str, Any]]:
    """Per stage, in order: its worst value over observations (one over a limit, else by max|d|/max)."""
    each = {step.stage for step in program.schedule.steps if isinstance(step, Call) and step.each}
    worst: dict[str, dict[str, Any]] = {}
    counted: dict[str, set[str]] = {}
    for name, stage in _stage_of(program).items():
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            pair = _comparable(a.get(name), b.get(name), per_camera=stage in each)
            if pair is None:
                continue
            counted.setdefault(stage, set()).add(name)
            row: dict[str, Any] = {"stage": stage, "value": name, "observation": i, **metrics.summary(*pair)}
            row["ok"] = all(x.holds(row[x.metric]) for x in limits if x.metric in row)
            if stage not in worst or _badness(row) > _badness(worst[stage]):
                worst[stage] = row
    for stage, row in worst.items():
        row["values"] = len(counted[stage])
    return list(worst.values())


def _badness(row: Mapping[str, Any]) -> tuple[bool, float]:
    figure = row["max_relative"]
    return not row["ok"], math.inf if math.isnan(figure) else figure


def _comparable(a: NpArray | None, b: NpArray | None, per_camera: bool) -> tuple[NpArray, NpArray] | None:
    """Two float values of one name, if they can be laid side by side.

    An artifact of fixed size has slots for every camera: of per-camera values the rows that both have are compared.
    """
    if a is None or b is None or a.dtype.kind != "f" or b.dtype.kind != "f":
        return None
    if per_camera and a.ndim == b.ndim and a.shape[1:] == b.shape[1:]:
        rows = min(len(a), len(b))
        return a[:rows], b[:rows]
    return (a, b) if a.shape == b.shape else None


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
        chunks, taps, floor = _run_reference(reference, read, artifact, given, progress)
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
    rows = _stage_rows(artifact.program, mine.taps, taps, stage_limits)
    over = next((r["stage"] for r in rows if not r["ok"]), None)
    if floor is None:
        not_asked.append("How far do two noise seeds of the reference lie apart? Give --reference CKPT.")
    return {
        "question": "2. What did the recipe cost? Artifact against the untouched fp32 checkpoint, same inputs.",
        "reference": origin,
        "limits": verdicts,
        **figures,
        "tokens": _same_tokens(mine.tokens, [t.get(TOKENS) for t in taps]),
        "noise_floor": {**floor, "source": floor_from} if floor else None,
        "drift_over_noise": figures["relative_l2"] / floor["relative_l2"] if floor and floor["relative_l2"] else None,
        "stages": rows,
        "first_stage_over": over,
        "ok": all(v["ok"] for v in verdicts),
    }


def _run_reference(
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
        theirs = _answers(program, session, policy.io, policy.tokenizer, given, progress, what)
        taps = [t if i is None else {**t, TOKENS: i} for t, i in zip(theirs.taps, theirs.tokens, strict=True)]
        rng = np.random.Generator(np.random.PCG64([7, 7]))
        noise = np.asarray(rng.standard_normal(given[0].noise.shape), dtype=np.float32)
        other = [Golden(given[0].images, given[0].state, given[0].task, noise, noise, noise)]
        asked = other if samples(program) else []
        moved = _answers(program, session, policy.io, policy.tokenizer, asked, progress, "its noise floor").chunks
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
