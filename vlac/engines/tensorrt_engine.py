"""TensorRT on the plans that `vlac build` made of a tensorrt artifact on this machine.

Every stage has its plan; what a stage reads and makes lies in device memory that stays. A sampler's loop is one CUDA
graph, captured at its first run for these shapes: its turns follow each other on the device, with the state in float32.
Plans of another GPU, TensorRT or artifact are built again while loading. Options: "graphs" (False: every turn is
launched by itself).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlac.artifact import Artifact
from vlac.dims import bind_dim
from vlac.engines import tensorrt_build
from vlac.engines.base import Engine, EngineSession, NpArray, Values
from vlac.engines.cuda_driver import Cuda
from vlac.errors import EngineError
from vlac.graph import Repeat, Stage, infer_stage, stage_symbols
from vlac.ops import DTYPES, Type

DECLINES: Mapping[str, str] = {
    "time_embedding": "TensorRT computes float64 in float32; lowering turns it into a table of steps",
}
"""op -> why this engine does not run it."""


class _StagePlan:
    """One stage's context and the device memory of its inputs and outputs, each as large as it can get."""

    def __init__(
        self, cuda: Cuda, engine: Any, stage: Stage, types: Mapping[str, Type], most: Mapping[str, int]
    ) -> None:
        self.cuda = cuda
        self.engine, self.context = engine, engine.create_execution_context()
        self.inputs = dict(stage.inputs)
        self.outputs = {n: types[n] for n in stage.outputs}
        self.symbols = stage_symbols(stage)
        self.at: dict[str, int] = {}
        self._seen: dict[str, NpArray] = {}
        self._shape: tuple[tuple[str, int], ...] | None = None
        for name, t in {**self.inputs, **self.outputs}.items():
            self.at[name] = cuda.allocate(_bytes(t, most))
            if not self.context.set_tensor_address(name, self.at[name]):
                raise EngineError(f"plan of {stage.name} has no tensor {name}", remedy="run `vlac build --force`")

    def bind(self, symbols: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
        """Sets the shapes of this call; returns what they depend on."""
        shape = tuple((s, symbols[s]) for s in sorted(self.symbols))
        if shape != self._shape:
            for name, t in self.inputs.items():
                if not self.context.set_input_shape(name, _shape(t, symbols)):
                    raise EngineError(f"input {name}: the plan has no profile for {_shape(t, symbols)}")
            self._shape = shape
        return shape

    def upload(self, values: Values, skip: tuple[str, ...] = ()) -> None:
        """Inputs that are not the very arrays of the last call."""
        for name in self.inputs:
            if name not in skip and self._seen.get(name) is not values[name]:
                self.cuda.upload(self.at[name], np.ascontiguousarray(values[name]))
                self.cuda.wait()  # the host's array may be a copy that goes away
                self._seen[name] = values[name]
        for name in skip:
            self._seen.pop(name, None)

    def run(self) -> None:
        if not self.context.execute_async_v3(self.cuda.stream):
            raise EngineError("TensorRT could not run a plan", remedy="run `vlac build --force`, then `vlac parity`")

    def download(self, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        made: dict[str, NpArray] = {n: np.empty(_shape(t, symbols), DTYPES[t.dtype]) for n, t in self.outputs.items()}
        for name, array in made.items():
            self.cuda.download(array, self.at[name])
        self.cuda.wait()
        return made


class TensorRTSession(EngineSession):
    """Plans of one artifact on the first GPU."""

    engine = "tensorrt"

    def __init__(self, artifact: Artifact, options: Mapping[str, Any]) -> None:
        import tensorrt as trt

        made = _built(artifact)
        self._cuda = Cuda()
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
        self._stages: dict[str, _StagePlan] = {}
        self._graphs: dict[str, tuple[Any, int]] = {}
        self._by_graph = bool(options.get("graphs", True))
        self._indices: dict[str, int] = {}
        most = artifact.program.max_symbols()
        for stage in artifact.program.stages:
            path = made["plans"][stage.name]["file"]
            engine = self._runtime.deserialize_cuda_engine(Path(path).read_bytes())
            if engine is None:
                raise EngineError(f"TensorRT {trt.__version__} cannot load {path}", remedy="run `vlac build --force`")
            types = infer_stage(stage, artifact.program.params)
            self._stages[stage.name] = _StagePlan(self._cuda, engine, stage, types, most)
        self.info = {
            "engine": self.engine,
            "tensorrt": made["tensorrt"],
            "gpu": made["gpu"],
            "compute_capability": made["sm"] / 10,
            "cuda_graphs": self._by_graph,
        }

    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        self._cuda.enter()
        plan = self._stages[stage]
        plan.bind(symbols)
        plan.upload(inputs)
        plan.run()
        return plan.download(symbols)

    def repeat(self, step: Repeat, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        """The whole loop on the device, as one graph; one call per turn where the host looks at every turn."""
        if step.until or step.collect:
            return super().repeat(step, inputs, symbols)
        self._cuda.enter()
        plan = self._stages[step.stage]
        shape = plan.bind(symbols)
        changing = (step.index, *(into for _, into, _ in step.carry))
        plan.upload(inputs, skip=changing)
        for _, into, initial in step.carry:
            self._cuda.upload(plan.at[into], np.ascontiguousarray(inputs[initial]))
        self._cuda.wait()
        known, graph = self._graphs.get(step.stage, (None, 0))
        if self._by_graph and known == shape:
            self._cuda.launch(graph)
            return plan.download(symbols)
        self._turns(step, plan, symbols)
        made = plan.download(symbols)
        if self._by_graph:
            self._capture(step, plan, symbols, shape)
        return made

    def _turns(self, step: Repeat, plan: _StagePlan, symbols: Mapping[str, int]) -> None:
        if step.stage not in self._indices:
            self._indices[step.stage] = self._cuda.allocate(4 * step.times)
            self._cuda.upload(self._indices[step.stage], np.arange(step.times, dtype=np.int32))
            self._cuda.wait()
        for i in range(step.times):
            if step.index in plan.at:
                self._cuda.copy(plan.at[step.index], self._indices[step.stage] + 4 * i, 4)
            plan.run()
            if i + 1 < step.times:
                for out, into, _ in step.carry:
                    self._cuda.copy(plan.at[into], plan.at[out], _bytes(plan.outputs[out], symbols))

    def _capture(self, step: Repeat, plan: _StagePlan, symbols: Mapping[str, int], shape: Any) -> None:
        """After a run with these shapes, as TensorRT wants it. A graph of other shapes goes."""
        if step.stage in self._graphs:
            self._cuda.drop(self._graphs.pop(step.stage)[1])
        self._cuda.begin_capture()
        try:
            self._turns(step, plan, symbols)
        finally:
            graph = self._cuda.end_capture()
        self._graphs[step.stage] = (shape, graph)

    def close(self) -> None:
        if not self._stages:
            return
        self._cuda.enter()
        for _, graph in self._graphs.values():
            self._cuda.drop(graph)
        for pointer in (*self._indices.values(), *(a for p in self._stages.values() for a in p.at.values())):
            self._cuda.free(pointer)
        self._graphs.clear()
        self._stages.clear()
        self._runtime = None
        self._cuda.close()


def _shape(t: Type, symbols: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(str(bind_dim(d, symbols))) for d in t.shape)


def _bytes(t: Type, symbols: Mapping[str, int]) -> int:
    return int(np.prod(_shape(t, symbols))) * int(np.dtype(DTYPES[t.dtype]).itemsize)


def _built(artifact: Artifact) -> dict[str, Any]:
    """What tensorrt_build.build tells of plans that fit, built again where others were there; EngineError without."""
    if "tensorrt" not in artifact.manifest:
        raise EngineError(
            f"{artifact.path} holds no graphs for TensorRT (target {artifact.manifest.get('target')})",
            remedy="compile with --target tensorrt-fp16 or another of the tensorrt targets",
        )
    try:
        manifest = tensorrt_build.read_manifest(artifact.path)
        if not tensorrt_build.ever_built(artifact.path):
            import tensorrt

            tensorrt_build.check(manifest, *tensorrt_build.gpu(), str(tensorrt.__version__))
            raise EngineError(
                f"{artifact.path} has no plans yet: TensorRT builds them on the machine that runs them",
                remedy=f"run `vlac build {artifact.path}` here, once (minutes)",
            )
        return tensorrt_build.build(artifact.path)
    except (tensorrt_build.BuildError, OSError) as error:
        raise EngineError(str(error), remedy=f"see `vlac build {artifact.path}`") from None


class TensorRTEngine(Engine):
    """NVIDIA's TensorRT, if its Python module and a GPU are there."""

    name = "tensorrt"

    def missing(self) -> str:
        from importlib.util import find_spec

        if find_spec("tensorrt") is None:
            return (
                "TensorRT's Python module is not installed; JetPack has it (python3-libnvinfer; a virtual environment "
                "needs --system-site-packages), elsewhere pip install tensorrt"
            )
        try:
            tensorrt_build.gpu()
        except tensorrt_build.BuildError as error:
            return f"{error}; run it on a machine with an NVIDIA GPU"
        return ""

    def open(
        self, artifact: Artifact, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> EngineSession:
        if why := self.missing():
            raise EngineError(f"engine tensorrt cannot be used here: {why}")
        return TensorRTSession(artifact, options or {})


ENGINE = TensorRTEngine()
