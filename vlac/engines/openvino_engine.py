"""OpenVINO on the same ONNX artifacts; for int8 on the weight-only graphs, with dynamic quantisation of activations.

Options: "precision" ("f32" or "bf16", of every stage), "device" (default "CPU").
Default precision: f32; in int8 and int4 artifacts stages outside a Repeat use bf16 where the CPU has it, because there
the weights' rounding is ten times larger. A repeated stage carries the flow state and stays f32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlac.artifact import Artifact
from vlac.engines.base import Engine, EngineSession, NpArray, Values
from vlac.engines.onnx_files import SINGLE, default_threads, graph_files, integer_formats, repeated_stages
from vlac.errors import EngineError
from vlac.graph import Program, Stage, infer_stage

DECLINES: Mapping[str, str] = {
    "time_embedding": "OpenVINO computes its float64 sinusoids in float32; lowering turns them into a table of steps",
    **dict.fromkeys(("pack_codes", "unpack_codes"), "OpenVINO divides int32 in float32: words of codes come out wrong"),
}
"""op -> why this engine does not run it."""

PRECISIONS = ("f32", "bf16")
FEW_ROWS = 9
"""Attention and MLPs over fewer rows than this are kept from OpenVINO's code generator: see `_snippets`."""
_NATIVE_ERRORS = (RuntimeError, ValueError, TypeError, OSError)


class OpenVinoSession(EngineSession):
    """One compiled model and one request per stage, made when the artifact is opened."""

    engine = "openvino"

    def __init__(self, artifact: Artifact, threads: int | None, options: Mapping[str, Any]) -> None:
        import openvino

        files = graph_files(artifact, self.engine, "portable")
        self._core = openvino.Core()
        self._path = artifact.path
        self._single = self.one_graph = bool(artifact.manifest.get("single_file"))
        device = str(options.get("device", "CPU"))
        if device.split(".")[0] not in {d.split(".")[0] for d in self._core.available_devices}:
            raise EngineError(f"openvino has no device {device!r}; there are: {self._core.available_devices}")
        precisions = self._precisions(artifact, list(files), device, options.get("precision"))
        count = threads or default_threads()
        self._requests: dict[str, Any] = {}
        self._inputs: dict[str, dict[str, int]] = {}
        self._outputs: dict[str, tuple[str, ...]] = {}
        program = artifact.program
        for stage, path in files.items():
            properties = _properties(artifact, device, count, precisions[stage])
            properties |= _snippets(program, stage, device)
            inputs = None if self._single else [n for n, _ in program.stage(stage).inputs]
            self._outputs[stage] = (program.schedule.result,) if self._single else program.stage(stage).outputs
            self._open(stage, path, device, properties, inputs)
        self.info = {
            "engine": self.engine,
            "openvino": openvino.__version__,
            "device": str(self._core.get_property(device, "FULL_DEVICE_NAME")),
            "precision": precisions,
            "threads": count,
        }

    def _precisions(self, artifact: Artifact, stages: list[str], device: str, asked: Any) -> dict[str, str]:
        if asked is not None:
            if asked not in PRECISIONS:
                raise EngineError(f"openvino precision {asked!r}; there are: {', '.join(PRECISIONS)}")
            return dict.fromkeys(stages, str(asked))
        fast = "BF16" in self._core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        if not (fast and integer_formats(artifact)):
            return dict.fromkeys(stages, "f32")
        exact = repeated_stages(artifact) | {SINGLE}
        return {s: "f32" if s in exact else "bf16" for s in stages}

    def _open(
        self, stage: str, path: Path, device: str, properties: Mapping[str, Any], inputs: list[str] | None
    ) -> None:
        try:
            compiled = self._core.compile_model(str(path), device, dict(properties))
            self._requests[stage] = compiled.create_infer_request()
        except _NATIVE_ERRORS as error:
            raise EngineError(
                f"openvino cannot load {path}: {str(error)[:500]}",
                remedy="compile again; the files need openvino 2025.4 or later",
            ) from None
        # a port may carry several names, and keeps its place: inputs are found by name, outputs by position
        ports = {name: i for i, port in enumerate(compiled.inputs) for name in port.get_names()}
        wanted = [next(iter(p.get_names())) for p in compiled.inputs] if inputs is None else inputs
        lost = [n for n in wanted if n not in ports]
        if lost or len(compiled.outputs) != len(self._outputs[stage]):
            raise EngineError(
                f"{path}: its ports are not those of stage {stage} (missing {lost})", remedy="compile again"
            )
        self._inputs[stage] = {n: ports[n] for n in wanted}

    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        if self._single or stage not in self._requests:
            raise EngineError(
                f"{self._path} has no stage {stage}; it holds {', '.join(self._requests)}",
                remedy="single-file artifacts run as a whole" if self._single else "compile again",
            )
        return self._run(stage, inputs)

    def run_all(self, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray] | None:
        """The whole schedule of a --single-file artifact; see OnnxRuntimeSession.run_all."""
        return self._run(SINGLE, inputs) if self._single else None

    def _run(self, stage: str, inputs: Values) -> dict[str, NpArray]:
        request = self._requests[stage]
        feed = {i: np.ascontiguousarray(inputs[name]) for name, i in self._inputs[stage].items()}
        try:
            request.infer(feed, share_inputs=True)
        except _NATIVE_ERRORS as error:
            raise EngineError(f"openvino failed in stage {stage} of {self._path}: {error}") from None
        return {name: request.get_output_tensor(i).data.copy() for i, name in enumerate(self._outputs[stage])}

    def close(self) -> None:
        self._requests.clear()


def _properties(artifact: Artifact, device: str, threads: int, precision: str) -> dict[str, Any]:
    formats = integer_formats(artifact)
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if device != "CPU":
        return properties
    # rows of activations are quantised in groups: 256 is fastest with one scale per weight row, 32 is int4's own block
    group = 32 if "int4" in formats else 256 if formats else 0
    return {
        **properties,
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }


def _snippets(program: Program, stage: str, device: str) -> dict[str, str]:
    """Turns generated kernels off where they are known to fail; all other stages keep them, for they are the fast ones.

    OpenVINO 2026.4 ends the process when it compiles linear -> activation -> linear over 1 to 8 rows, and refuses
    masked grouped heads with one query. Of 720 random stages all compile without, and all from 9 rows on with.
    """
    stages = program.stages if stage == SINGLE else (program.stage(stage),)
    off = device == "CPU" and any(_few_rows(s, program) for s in stages)
    return {"SNIPPETS_MODE": "DISABLE"} if off else {}


def _few_rows(stage: Stage, program: Program) -> bool:
    """Whether the stage has attention, or a linear after another linear, over less than FEW_ROWS rows."""
    least = {s.name: s.buckets[0] for s in program.symbols}
    types = infer_stage(program.bind(least).stage(stage.name), program.params)

    def few(value: str) -> bool:
        shape = types[value].shape if value in types else ()
        return bool(shape) and isinstance(shape[0], int) and shape[0] < FEW_ROWS

    after: set[str] = set()  # values of few rows that depend on a linear
    for n in stage.nodes:
        if n.op == "attention" and (few(n.inputs[0]) or few(n.inputs[1])):
            return True
        if n.op == "linear" and n.inputs[0] in after:
            return True
        if few(n.name) and (n.op == "linear" or not after.isdisjoint(n.inputs)):
            after.add(n.name)
    return False


class OpenVinoEngine(Engine):
    """openvino, if it is installed."""

    name = "openvino"

    def missing(self) -> str:
        from importlib.util import find_spec

        if find_spec("openvino") is None:
            return "openvino is not installed; pip install 'vlac-compiler[openvino]' (or only openvino)"
        return ""

    def open(
        self, artifact: Artifact, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> EngineSession:
        if why := self.missing():
            raise EngineError(why)
        return OpenVinoSession(artifact, threads, options or {})


ENGINE = OpenVinoEngine()
