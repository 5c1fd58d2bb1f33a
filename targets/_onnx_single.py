"""`--single-file`: the whole schedule as one graph, from the program's runtime inputs to the normalised chunk.

Cameras are unrolled (pixels [C, 3, S, S] are cut into slots, a slot without a camera gives zeros), a Repeat becomes a
Loop whose body sees the weights of the graph around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlac.engines.onnx_files import SINGLE
from vlac.errors import Unsupported
from vlac.graph import RUNTIME_INPUTS, Call, Program, Repeat, infer_stage
from vlac.ops import DTYPES, Type
from vlac.targets._folder import TensorStore
from vlac.targets._onnx_emitter import StageEmitter, ints
from vlac.targets._onnx_graph import Graph, graph_names, onnx_type
from vlac.targets._onnx_ranges import Range

Bounds = Mapping[str, Mapping[str, Range]]


def write_single(
    program: Program, store: TensorStore, folder: Path, bounds: Bounds, forms: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Writes model.onnx (and model.portable.onnx where there are two forms); returns manifest["onnx"]."""
    files = graph_names(SINGLE, forms)
    for form, name in files.items():
        _Schedule(program, Graph(store, f"{SINGLE}.onnx.data"), bounds, form).write(folder / name)
    return {SINGLE: files}


def runtime_inputs(program: Program) -> list[tuple[str, Type]]:
    """What the schedule reads from the runtime, in RUNTIME_INPUTS order; pixels with the camera axis in front."""
    types: dict[str, Type] = {}
    for step in program.schedule.steps:
        for name, t in program.stage(step.stage).inputs:
            if name in RUNTIME_INPUTS:
                per_camera = isinstance(step, Call) and bool(step.each) and name == "pixels"
                types[name] = Type(t.dtype, (_slots(program), *t.shape)) if per_camera else t
        if isinstance(step, Repeat):
            inputs = dict(program.stage(step.stage).inputs)
            types.update({start: inputs[into] for _, into, start in step.carry if start in RUNTIME_INPUTS})
    if any(isinstance(s, Call) and s.each for s in program.schedule.steps):
        types.setdefault("image_valid", Type("bool", (_slots(program),)))
    return [(name, types[name]) for name in RUNTIME_INPUTS if name in types]


def _slots(program: Program) -> int:
    """Camera slots C: the length of image_valid or camera_valid, or how many cameras' outputs a later stage reads."""
    for stage in program.stages:
        for name, t in stage.inputs:
            if name in ("image_valid", "camera_valid"):
                return ints(t)[0]
    for step in program.schedule.steps:
        if isinstance(step, Call) and step.each:
            types = infer_stage(program.stage(step.stage), program.params)
            for stage in program.stages:
                for name, t in stage.inputs:
                    if name in program.stage(step.stage).outputs:
                        return ints(t)[0] // ints(types[name])[0]
    raise Unsupported(f"program {program.name}: no stage tells how many camera slots there are")


class _Schedule:
    """Emits the steps one after the other; `env` maps each value of the schedule to its name in the graph."""

    def __init__(self, program: Program, graph: Graph, bounds: Bounds, form: str) -> None:
        self.program = program
        self.graph = graph
        self.bounds = bounds
        self.form = form
        self.env = {name: graph.unique(name) for name, _ in runtime_inputs(program)}
        self.types: dict[str, Type] = dict(runtime_inputs(program))

    def write(self, path: Path) -> None:
        for step in self.program.schedule.steps:
            if isinstance(step, Repeat):
                self._repeat(step)
            elif step.each:
                self._each_camera(step)
            else:
                made = self._stage(self.graph, step.stage, self.env, f"{step.stage}/")
                self._define(step.stage, made)
        result = self.program.schedule.result
        if result not in self.env:
            raise Unsupported(
                f"program {self.program.name}: its result {result} is no output that a Repeat carries or collects"
            )
        out = self.graph.node("Identity", [self.env[result]], self.graph.unique(result))
        self.graph.save(path, self.program.name, runtime_inputs(self.program), [(out, self.types[result])])

    def _stage(self, graph: Graph, name: str, env: Mapping[str, str], prefix: str) -> dict[str, str]:
        stage = self.program.stage(name)
        given = {n: env[n] for n, _ in stage.inputs}
        return StageEmitter(graph, self.program, stage, self.bounds[name], self.form, given, prefix).emit()

    def _define(self, stage: str, made: Mapping[str, str]) -> None:
        types = infer_stage(self.program.stage(stage), self.program.params)
        self.env.update(made)
        self.types.update({name: types[name] for name in made})

    def _each_camera(self, step: Call) -> None:
        g, stage = self.graph, self.program.stage(step.stage)
        types = infer_stage(stage, self.program.params)
        slots = _slots(self.program)
        parts: dict[str, list[str]] = {o: [] for o in stage.outputs}
        for i in range(slots):
            at = g.const(i, np.int64)
            pixels = g.node("Gather", [self.env["pixels"], at], g.unique(f"{step.stage}/{i}/pixels"), axis=0)
            given = g.node("Gather", [self.env["image_valid"], at], g.unique(f"{step.stage}/{i}/given"), axis=0)
            made = self._stage(g, step.stage, {**self.env, "pixels": pixels}, f"{step.stage}/{i}/")
            for name, value in made.items():
                zero = g.const(np.zeros((), DTYPES[types[name].dtype]))
                parts[name].append(g.node("Where", [given, value, zero], g.unique(f"{value}/or_zero")))
        for name, values in parts.items():
            self.env[name] = g.node("Concat", values, g.unique(f"{step.stage}/{name}"), axis=0)
            shape = ints(types[name])
            self.types[name] = Type(types[name].dtype, (shape[0] * slots, *shape[1:]))

    def _repeat(self, step: Repeat) -> None:
        """Loop(times, true, carries..., buffers...): a value that is collected is written into its rows of a buffer of
        zeros, so that shapes stay static when the loop ends early."""
        g, body = self.graph, self.graph.body()
        types = infer_stage(self.program.stage(step.stage), self.program.params)
        turn, keep = g.unique(f"{step.stage}/turn"), g.unique(f"{step.stage}/keep")
        env = {**self.env, **{into: g.unique(f"{step.stage}/{into}") for _, into, _ in step.carry}}
        narrow = body.node("Cast", [turn], g.unique(f"{step.stage}/narrow"), to=onnx_type("INT32"))
        index = g.unique(f"{step.stage}/{step.index}")
        env[step.index] = body.node("Reshape", [narrow, g.const((1,), np.int64)], index)
        made = self._stage(body, step.stage, env, f"{step.stage}/")
        inputs = [(env[into], types[into]) for _, into, _ in step.carry]
        results = [(made[out], types[out]) for out, _, _ in step.carry]
        start = [self.env[first] for _, _, first in step.carry]
        for out, name in step.collect:
            rows, *rest = ints(types[out])
            whole = Type(types[out].dtype, (rows * step.times, *rest))
            before = g.unique(f"{step.stage}/{name}/before")
            inputs.append((before, whole))
            results.append((self._write(body, before, made[out], turn, rows), whole))
            start.append(g.const(np.zeros(ints(whole), DTYPES[whole.dtype])))
        again = self._again(body, step, keep, made)
        proto = body.loop_body(step.stage, turn, keep, inputs, again, results)
        names = [*(out for out, _, _ in step.carry), *(name for _, name in step.collect)]
        outs = [g.unique(f"{step.stage}/{name}/last") for name in names]
        g.node("Loop", [g.const(step.times, np.int64), g.const(True), *start], outs, body=proto)
        for name, out, (_, t) in zip(names, outs, results, strict=True):
            self.env[name], self.types[name] = out, t

    def _write(self, body: Graph, buffer: str, value: str, turn: str, rows: int) -> str:
        """`buffer` with `value` in rows turn * rows, ..., (turn + 1) * rows - 1."""
        g = self.graph
        first = body.node("Mul", [turn, g.const(rows, np.int64)], g.unique(f"{buffer}/first"))
        column = g.const(np.arange(rows, dtype=np.int64)[:, None])
        at = body.node("Add", [column, first], g.unique(f"{buffer}/rows"))
        return body.node("ScatterND", [buffer, at, value], g.unique(f"{buffer}/after"))

    def _again(self, body: Graph, step: Repeat, keep: str, made: Mapping[str, str]) -> str:
        """Scalar bool: whether another turn follows."""
        g = self.graph
        if not step.until:
            return body.node("Identity", [keep], g.unique(f"{step.stage}/again"))
        ids = g.const(step.stop, np.int32)
        equal = body.node("Equal", [made[step.until], ids], g.unique(f"{step.stage}/equal"))
        hits = body.node("Cast", [equal], g.unique(f"{step.stage}/hits"), to=onnx_type("INT32"))
        axes = g.const((0,), np.int64)
        found = body.node("ReduceMax", [hits, axes], g.unique(f"{step.stage}/found"), keepdims=0)
        return body.node("Equal", [found, g.const(0, np.int32)], g.unique(f"{step.stage}/again"))
