"""Question 1 of parity: an engine against a reference engine on the same program with the same decoded weights."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlac import metrics
from vlac.artifact import Artifact, Golden
from vlac.engines.base import EngineSession
from vlac.errors import EngineError
from vlac.graph import Call, Program, Repeat
from vlac.layouts import INT4
from vlac.metrics import Limit
from vlac.parity_answers import Answers, NpArray, answers
from vlac.registry import Progress

NUMPY_LIMIT = 20_000_000
"""Parameters above which the numpy engine is too slow to serve as the reference of question 1."""

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

ROUNDINGS: Mapping[str, float] = {"f32": 2.0**-22, "f16": 2.0**-13, "bf16": 2.0**-10}
"""About the deviation, relative, of what kernels multiply once it is rounded, by format; 2^-8 in 8 bits."""


@dataclass(frozen=True)
class Judge:
    """A reference engine by name, and what it said."""

    name: str
    answers: Answers


def compiler(
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
    """The report of question 1; None, and why in `not_asked`, where there is no reference engine.

    engine: how the artifact was run, "torch cuda bf16". wanted: limits of the caller's.
    """
    name, why = judge_engine(artifact, engine)
    if not name:
        if any(x.question == "compiler" for x in wanted):
            raise EngineError(f"question 1 cannot be asked: {why}", remedy='pip install "vlac-compiler[compile]"')
        not_asked.append(f"1. Is the compiler right? {why}")
        return None
    by = judge(artifact, name, given, threads, progress, mine.tokens)
    report = judged(artifact, mine, by, wanted, grade)
    if (
        report["ok"]
        or any(x.question == "compiler" for x in wanted)
        or not (by_much := _moved(artifact.program, grade))
    ):
        return report
    moved = [judge(artifact, name, given, threads, progress, mine.tokens, (seed, by_much)) for seed in (1, 2, 3)]
    spread = max(_apart(artifact.program, m.answers, by.answers) for m in moved)
    wider = metrics.parse_limit(f"compiler.rel_l2<={max(2 * spread, 1e-9):.3g}")
    if wider.value <= metrics.parse_limit(COMPILER_LIMITS[grade]).value:
        return report
    return {**judged(artifact, mine, by, [wider], grade), "reference_spread": spread, "weights_moved": by_much}


def _moved(program: Program, grade: str) -> float:
    """By how much weights are moved, relative, to see what one rounding weighs; 0 where the limit needs no such excuse.

    Where the program rounds on fixed grids, kernels find codes ready: one part in 2^22, as much as float32 sums in
    another order differ. Packed keys and values are codes of what the kernels made: as much as those round.
    """
    ops = {n.op if n.op != "round_int8" else str(n.attr["form"]) for s in program.stages for n in s.nodes}
    if "pack_codes" in ops:
        return ROUNDINGS.get(grade, 2.0**-8)
    return 0.0 if ops.isdisjoint(("tensor", "round_fp8")) else ROUNDINGS["f32"]


def _apart(program: Program, a: Answers, b: Answers) -> float:
    """The largest relative L2 of a stage value, or of the chunk; of stages alone where ids are picked."""
    found = [float(r["relative_l2"]) for r in stage_rows(program, a.taps, b.taps, ())]
    if same_tokens(a.tokens, b.tokens) is None:
        found.append(float(metrics.summary(np.stack(a.normalised), np.stack(b.normalised))["relative_l2"]))
    return max(found)


def judge(
    artifact: Artifact,
    name: str,
    given: Sequence[Golden],
    threads: int | None,
    progress: Progress,
    follow: Sequence[NpArray | None] = (),
    moved: tuple[int, float] | None = None,
) -> Judge:
    """The answers of a reference engine; follow: ids that it takes instead of its own (see `execute`). moved: seed and
    size, relative, of a change of every weight (see `_moved`)."""
    session = _judge_session(artifact, name, threads, moved)
    try:
        what = f"{name} engine, same weights"
        return Judge(
            name,
            answers(artifact.program, session, artifact.io, artifact.tokenizer, given, progress, what, follow),
        )
    finally:
        session.close()


def judged(artifact: Artifact, mine: Answers, by: Judge, wanted: Sequence[Limit], grade: str) -> dict[str, Any]:
    """An engine's answers held against a reference's: the report of question 1."""
    theirs = by.answers
    default = metrics.parse_limit(COMPILER_LIMITS[grade])
    limits = [x for x in wanted if x.question == "compiler"] or [default]
    rows = stage_rows(artifact.program, mine.taps, theirs.taps, limits)
    chunk = metrics.summary(np.stack(mine.normalised), np.stack(theirs.normalised))
    tokens = same_tokens(mine.tokens, theirs.tokens)
    # ids are picked from values that the stages' rows judge: between two that are all but equal, rounding may choose
    verdicts = [] if tokens is not None and len(rows) > 1 else metrics.judge(limits, chunk)
    steady = all(default.holds(mine.repeats[k]) for k in ("max_relative", "stepwise"))
    over = next((r for r in rows if not r["ok"]), None)
    return {
        "question": "1. Is the compiler right? Engine against reference engine, same program, same decoded weights.",
        "reference": by.name,
        "reference_repeats": theirs.repeats,
        "stages": rows,
        "staged": len(rows) > 1 or len(artifact.program.stages) == 1,
        "chunk": chunk,
        "tokens": tokens,
        "limits": verdicts,
        "first_stage_over": over["stage"] if over else None,
        "ok": all(v["ok"] for v in verdicts) and over is None and steady,
    }


def same_tokens(mine: Sequence[NpArray | None], theirs: Sequence[NpArray | None]) -> dict[str, int] | None:
    """How many ids are equal, place by place; None where none were generated on both sides."""
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=False) if a is not None and b is not None]
    if not pairs:
        return None
    equal = sum(int(np.count_nonzero(a[: len(b)] == b[: len(a)])) for a, b in pairs)
    return {"equal": equal, "of": sum(max(len(a), len(b)) for a, b in pairs)}


def judge_engine(artifact: Artifact, engine: str) -> tuple[str, str]:
    """(the reference engine for an artifact that ran on `engine`, ""), or ("", why there is none)."""
    size = sum(math.prod(p.shape) for p in artifact.program.params.values())
    if engine != "torch" and importlib.util.find_spec("torch") is not None:
        return "torch", ""
    if engine != "numpy" and size <= NUMPY_LIMIT:
        return "numpy", ""
    if engine in ("torch", "numpy"):
        return "", f"the {engine} engine was chosen, and it is itself the reference"
    return "", f"torch is not installed and {size / 1e6:.0f} M parameters are too many for the numpy engine"


def _judge_session(
    artifact: Artifact, name: str, threads: int | None, moved: tuple[int, float] | None = None
) -> EngineSession:
    def weight(param: str) -> NpArray:
        w = artifact.tensors[param].decode()
        if moved is None:
            return w
        seed, size = moved
        signs = np.random.default_rng([seed, *param.encode()]).choice(np.array([-1, 1], np.float32), w.shape)
        return np.asarray(w * (1 + signs * np.float32(size)), np.float32)

    if name == "numpy":
        from vlac.engines.numpy_engine import NumpySession

        return NumpySession(artifact.program, weight)
    from vlac.engines.torch_engine import TorchSession
    from vlac.goldens import fits

    return TorchSession(artifact.program, weight, threads=threads, keep_weights=fits(artifact.program))


def _stage_of(program: Program) -> dict[str, str]:
    """Value name -> the stage that makes it, in schedule order.

    A loop that carries on its result is judged by that, turn by turn: what else it carries (the velocity that a solver
    of several steps remembers) is in the next turn's result by its own weight, and nobody reads it after the last.
    """
    owner: dict[str, str] = {}
    for step in program.schedule.steps:
        carried = {out for out, _, _ in step.carry} if isinstance(step, Repeat) else set()
        beside = carried - {program.schedule.result} if program.schedule.result in carried else set()
        for out in program.stage(step.stage).outputs:
            if out not in beside:
                owner.setdefault(out, step.stage)
        if isinstance(step, Repeat):
            for i in range(step.times):
                owner[f"x_after_step{i}"] = step.stage
    return owner


def stage_rows(
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
