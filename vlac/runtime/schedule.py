"""Runs a program's schedule on an engine: which stage when, values handed on by name, every input checked before."""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import Any

import numpy as np

from vlac.engines.base import EngineSession, gathered
from vlac.errors import ArtifactError, EngineError
from vlac.graph import RUNTIME_INPUTS, Call, Program, Repeat, Stage
from vlac.ops import DTYPES
from vlac.runtime.inputs import bind
from vlac.runtime.observation import Array
from vlac.runtime.reuse import Reuse
from vlac.runtime.rtc import Guidance

NpArray = np.ndarray[Any, Any]
Taps = MutableMapping[str, NpArray]
Stats = MutableMapping[str, float]


def execute(
    program: Program,
    engine: EngineSession,
    env: Mapping[str, NpArray],
    symbols: Mapping[str, int],
    taps: Taps | None = None,
    stats: Stats | None = None,
    collected: Taps | None = None,
    reuse: Reuse | None = None,
    follow: NpArray | None = None,
    known: Mapping[str, NpArray] | None = None,
    guide: Guidance | None = None,
) -> Array:
    """The normalised chunk f32 [N, A] of one prepared observation.

    Args:
        env, symbols: from `prepare`.
        taps: if given, collects the outputs of every stage by name, and what a repeated stage carries on from a runtime
            input (noise) after each turn ("x_after_step0", ...).
        stats: if given, collects milliseconds per stage ("vision_ms": all cameras together, ...), and for a repeated
            stage how many bytes of earlier stages' results it reads in every turn ("flow_held_bytes").
        collected: if given, receives what a Repeat collects over its turns, by name; of an artifact that is one graph
            only its result.
        reuse: if given, stages whose inputs it knows are not run. Not together with `taps`.
        follow: ids of another engine, with `taps`: a loop that generates ids reads these instead of its own, so that
            two engines can be compared turn by turn; what is collected are its own.
        known: outputs of stages that have been run for this observation; these are not run again.
        guide: draws a flow loop towards an earlier chunk (vlac.runtime.rtc).

    An artifact that is one graph (`EngineSession.run_all`) has only its result to tap, and one time, "model_ms".

    Raises: EngineError when an input of a stage does not fit, or the chunk is not finite.
    """
    if guide is not None and engine.one_graph:
        raise EngineError(
            f"prev_chunk: {program.name} is one graph, and its loop cannot be guided from outside",
            remedy="compile it without single_file, as one file for each stage",
        )
    values: dict[str, NpArray] = {**env, **(known or {})}
    for stage in program.stages:
        check_rows(program, stage, values)
    started = time.perf_counter()
    whole = _run_whole(engine, values, symbols, reuse)
    if whole is not None:
        _note(stats, "model", started)
        if taps is not None:
            taps.update(whole)
        if collected is not None:
            names = {name for s in program.schedule.steps if isinstance(s, Repeat) for _, name in s.collect}
            collected.update({k: v for k, v in whole.items() if k in names or v.dtype == np.int32})
        return finite_chunk(whole[program.schedule.result], engine.engine)
    for step in program.schedule.steps:
        started = time.perf_counter()
        if known and all(o in known for o in program.stage(step.stage).outputs):
            continue
        out = _run_step(program, engine, step, values, symbols, taps, reuse, follow, guide)
        _note(stats, step.stage, started)
        if stats is not None and isinstance(step, Repeat):
            stats[f"{step.stage}_held_bytes"] = _held(program, step, values)
        values.update(out)
        if taps is not None:
            taps.update(out)
        if collected is not None and isinstance(step, Repeat):
            collected.update({name: out[name] for _, name in step.collect})
    result = values[program.schedule.result]
    if collected is not None and result.dtype == np.int32:
        collected[program.schedule.result] = result
    return finite_chunk(result, engine.engine)


def generated(program: Program, collected: Mapping[str, NpArray]) -> NpArray | None:
    """The ids that were generated, i32 [n], up to and with the one that ended a Repeat; None where there are none."""
    for step in program.schedule.steps:
        for out, name in step.collect if isinstance(step, Repeat) else ():
            ids = collected.get(name)
            if ids is not None and ids.dtype == np.int32 and ids.ndim == 1:
                ended = np.isin(ids, step.stop if isinstance(step, Repeat) and out == step.until else ())
                return np.array(ids[: int(ended.argmax()) + 1] if ended.any() else ids)
    ids = collected.get(program.schedule.result)
    return None if ids is None or ids.dtype != np.int32 else np.array(ids).reshape(-1)


def per_token(program: Program, stats: Mapping[str, float], tokens: NpArray | None) -> dict[str, float]:
    """{"decode_token_ms": milliseconds per generated token} of a loop that generates tokens one by one."""
    loops = [s.stage for s in program.schedule.steps if isinstance(s, Repeat) and s.collect]
    if tokens is None or not len(tokens):
        return {}
    return {f"{stage}_token_ms": stats[f"{stage}_ms"] / len(tokens) for stage in loops if f"{stage}_ms" in stats}


def _held(program: Program, step: Repeat, values: Mapping[str, NpArray]) -> int:
    """Bytes of the results of earlier stages that a loop reads in every turn."""
    own = {*step.own_inputs, *RUNTIME_INPUTS}
    return sum(values[name].nbytes for name, _ in program.stage(step.stage).inputs if name not in own)


def _note(stats: Stats | None, stage: str, started: float) -> None:
    if stats is not None:
        key = f"{stage}_ms"
        stats[key] = stats.get(key, 0.0) + (time.perf_counter() - started) * 1e3


def _run_step(
    program: Program,
    engine: EngineSession,
    step: Call | Repeat,
    values: Mapping[str, NpArray],
    symbols: Mapping[str, int],
    taps: Taps | None,
    reuse: Reuse | None,
    follow: NpArray | None,
    guide: Guidance | None = None,
) -> dict[str, NpArray]:
    if isinstance(step, Repeat):
        own = guide if guide is not None and guide.stage == step.stage else None
        return _repeat(program, engine, step, values, symbols, taps, reuse, follow, own)
    if step.each == "camera":
        return _each_camera(program, engine, step, values, symbols, reuse)
    if step.each:
        raise ArtifactError(f"schedule calls {step.stage} for each {step.each!r}, which this vlac does not know")
    inputs = checked(program, program.stage(step.stage), values, symbols)
    run = partial(engine.run, step.stage, inputs, symbols)
    return run() if reuse is None else reuse.stage(step.stage, inputs, run)


def run_step(
    program: Program,
    engine: EngineSession,
    step: Call | Repeat,
    values: Mapping[str, NpArray],
    symbols: Mapping[str, int],
    reuse: Reuse | None = None,
) -> dict[str, NpArray]:
    """Outputs of one step of the schedule, its inputs checked; `values` holds what it reads by name."""
    check_rows(program, program.stage(step.stage), values)
    return _run_step(program, engine, step, values, symbols, None, reuse, None)


def _run_whole(
    engine: EngineSession, values: Mapping[str, NpArray], symbols: Mapping[str, int], reuse: Reuse | None
) -> dict[str, NpArray] | None:
    """Everything at once, for an artifact that is one graph; None for others."""
    if reuse is None or not engine.one_graph:
        return engine.run_all(values, symbols)
    return reuse.stage("model", values, lambda: engine.run_all(values, symbols) or {})


def finite_chunk(chunk: NpArray, engine: str) -> Array:
    """The chunk as float32 [N, A], tokens [N] as [1, N]; EngineError when it has another rank or holds NaN or Inf."""
    chunk = chunk[None] if chunk.ndim == 1 else chunk
    if chunk.ndim != 2:
        raise EngineError(f"engine {engine} returned a chunk of shape {list(chunk.shape)}, expected [N, A]")
    bad = chunk.size - int(np.count_nonzero(np.isfinite(chunk)))
    if bad:
        raise EngineError(
            f"engine {engine}: {bad} of {chunk.size} values of the chunk are NaN or Inf; it is not passed on",
            remedy="stop the robot; run `vlac parity` on the artifact, and try another engine or a wider format",
        )
    return np.ascontiguousarray(chunk, dtype=np.float32)


def checked(
    program: Program, stage: Stage, values: Mapping[str, NpArray], symbols: Mapping[str, int]
) -> dict[str, NpArray]:
    """The inputs of one stage, with the shapes and dtypes of its bucket; EngineError names what does not fit."""
    result: dict[str, NpArray] = {}
    for name, kind in stage.inputs:
        value = values.get(name)
        if value is None:
            raise EngineError(f"stage {stage.name}: nothing gives its input {name}", remedy="compile again")
        shape = tuple(bind(d, symbols) for d in kind.shape)
        if value.shape != shape or value.dtype != DTYPES[kind.dtype]:
            raise EngineError(
                f"stage {stage.name}: input {name} is {value.dtype}{list(value.shape)}, "
                f"the program wants {kind.dtype}{list(shape)}"
            )
        result[name] = value
    check_rows(program, stage, result)
    return result


def check_rows(program: Program, stage: Stage, values: Mapping[str, NpArray]) -> None:
    """Ids that pick rows of a table must lie inside it, or an engine would read past its end: EngineError."""
    ids = {name for name, kind in stage.inputs if kind.dtype == "i32" and name in values}
    for node in stage.nodes if ids else ():
        if node.op != "embed" or node.inputs[0] not in ids or not node.inputs[1].startswith("@"):
            continue
        given, rows = values[node.inputs[0]], program.params[node.inputs[1][1:]].shape[0]
        if given.size and (int(given.min()) < 0 or int(given.max()) >= rows):
            raise EngineError(
                f"stage {stage.name}: {node.inputs[0]} holds {int(given.min())}..{int(given.max())}, "
                f"table {node.inputs[1][1:]} has rows 0..{rows - 1}"
            )


def _each_camera(
    program: Program,
    engine: EngineSession,
    step: Call,
    values: Mapping[str, NpArray],
    symbols: Mapping[str, int],
    reuse: Reuse | None,
) -> dict[str, NpArray]:
    """The stage for every camera that was given; outputs joined along axis 0 in slot order, zeros for the others."""
    stage = program.stage(step.stage)
    pixels, given = values["pixels"], values["image_valid"]
    found: dict[int, dict[str, NpArray]] = {}
    for slot in map(int, np.flatnonzero(given)):
        inputs = checked(program, stage, {**values, "pixels": pixels[slot]}, symbols)
        run = partial(engine.run, stage.name, inputs, symbols)
        found[slot] = run() if reuse is None else reuse.stage(stage.name, inputs, run, slot=slot, keep=len(pixels))
    first = next(iter(found.values()))
    blank = {name: np.zeros_like(first[name]) for name in stage.outputs}
    rows = [found.get(slot, blank) for slot in range(len(pixels))]
    return {name: np.concatenate([row[name] for row in rows], axis=0) for name in stage.outputs}


def _repeat(
    program: Program,
    engine: EngineSession,
    step: Repeat,
    values: Mapping[str, NpArray],
    symbols: Mapping[str, int],
    taps: Taps | None,
    reuse: Reuse | None,
    follow: NpArray | None,
    guide: Guidance | None,
) -> dict[str, NpArray]:
    stage = program.stage(step.stage)
    start = {into: values[initial] for _, into, initial in step.carry}
    for i in (0, step.times - 1):  # the first turn's inputs, and the last index a table is asked for
        inputs = checked(program, stage, {**values, **start, step.index: np.array([i], dtype=np.int32)}, symbols)
    if taps is None and guide is None:
        inputs.update({initial: values[initial] for _, _, initial in step.carry})
        run = partial(engine.repeat, step, inputs, symbols)
        return run() if reuse is None else reuse.stage(stage.name, inputs, run)
    out: dict[str, NpArray] = {}
    turns: list[dict[str, NpArray]] = []
    inputs.update(start)
    for i in range(step.times):
        inputs = {**inputs, step.index: np.array([i], dtype=np.int32)}
        out = engine.run(stage.name, inputs, symbols)
        if guide is not None:
            name, into, _ = step.carry[0]
            out = {**out, name: guide.guided(i, inputs[into], out[name])}
        turns.append({name: out[name] for name, _ in step.collect})
        for name, into, initial in step.carry:
            inputs[into] = out[name]
            # of what runs from turn to turn only a sampler's state: a decoder's caches would be gigabytes
            if taps is not None and initial in RUNTIME_INPUTS:
                taps[f"{into}_after_step{i}"] = np.array(out[name])
            if follow is not None and name in dict(step.collect) and out[name].dtype == np.int32:
                inputs[into] = np.array(follow[i : i + 1], dtype=np.int32)
        if follow is not None:
            if i + 1 == len(follow):
                break
        elif step.until and int(out[step.until][0]) in step.stop:
            break
    return {**out, **gathered(step, turns)}
