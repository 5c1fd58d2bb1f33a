"""OpenVINO on the same ONNX artifacts; for int8 on the weight-only graphs, with dynamic quantisation of activations.

Options: "precision" ("f32" or "bf16", of every stage), "device" (default "CPU"), "prepared" (False: as if
`vlac prepare` had never been run).
Default precision: f32; bf16 where the CPU has it in artifacts whose weights are rounded coarser than that (int8, int4:
three times bf16's own error) or are bf16 themselves, in stages with enough work to gain time by it. What crosses
between stages, and the flow state, is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlac.artifact import Artifact
from vlac.dims import ROWS
from vlac.engines.base import Engine, EngineSession, NpArray, Values
from vlac.engines.onnx_files import SINGLE, default_threads, graph_files, integer_formats
from vlac.engines.onnxruntime_engine import int8_kernels
from vlac.engines.openvino_graphs import changing_inputs, keep_bf16, set_shapes, split
from vlac.engines.prepared import Prepared
from vlac.errors import EngineError
from vlac.formats import FORMATS
from vlac.graph import Program, Stage, infer_stage, symbols_in
from vlac.layouts import INT4
from vlac.work import stage_works

DECLINES: Mapping[str, str] = {
    "time_embedding": "OpenVINO computes its float64 sinusoids in float32; lowering turns them into a table of steps",
    "round_f16": "OpenVINO leaves out the conversion to float16 and back",
    "round_fp8": "OpenVINO 2026.4 rounds some values to the other float8 neighbour",
    **dict.fromkeys(("pack_codes", "unpack_codes"), "OpenVINO divides int32 in float32: words of codes come out wrong"),
}
"""op -> why this engine does not run it."""

PRECISIONS = ("f32", "bf16")
LEAST_GROUP, LARGEST_GROUP = 128, 384
"""Of values that share a scale: smaller groups cost time (128: 9 % of SmolVLA's vision), larger ones accuracy."""
FEW_ROWS = 9
"""Attention and MLPs over fewer rows than this are kept from OpenVINO's code generator: see `_snippets`."""
SMALL, INTEGER_SHARE = 8_000_000, 1 / 16
"""Multiply-accumulates of one run of a stage below which bf16 gains no time over f32 (Zen 4, two cores: bf16 took 1.03
to 1.2 of f32's time with int8 weights up to 60 million; with bf16 weights at most 0.1 ms are lost; by hand). A product
with integer weights is the same in both: only what is around it gains, so that it counts for a sixteenth."""
_NATIVE_ERRORS = (RuntimeError, ValueError, TypeError, OSError)


@dataclass
class _Opened:
    """A compiled model's request, positions of its inputs by name, and the arrays that it reads now."""

    request: Any
    inputs: Mapping[str, int]
    given: dict[str, NpArray] = field(default_factory=dict)
    before: _Opened | None = None
    """What runs first, when its own inputs change; this model's last inputs are its outputs."""


class OpenVinoSession(EngineSession):
    """One compiled model and one request per stage, made when the artifact is opened.

    How many rows of a chunk are computed (symbol N) is fixed in a model: shapes that are known cost a tenth less per
    flow step, and a robot asks for the same number every time. Other numbers get models of their own when they are
    first asked for. How long the prompt is, and how many cameras there are, stays open.
    """

    engine = "openvino"

    def __init__(self, artifact: Artifact, threads: int | None, options: Mapping[str, Any]) -> None:
        openvino = _without_telemetry()
        device = str(options.get("device", "CPU"))
        # where products of codes saturate, activations that the program rounds on fixed scales stay float
        exact = device != "CPU" or int8_kernels() == "integer"
        files = graph_files(artifact, self.engine, "portable" if exact else "unrounded")
        self._core, self._tensor = openvino.Core(), openvino.Tensor
        self._path = artifact.path
        self._single = self.one_graph = bool(artifact.manifest.get("single_file"))
        if device.split(".")[0] not in {d.split(".")[0] for d in self._core.available_devices}:
            raise EngineError(f"openvino has no device {device!r}; there are: {self._core.available_devices}")
        precisions = self._precisions(artifact, list(files), device, options.get("precision"))
        count = threads or default_threads()
        self._device, self._files = device, files
        self._open_now: dict[tuple[str, int], _Opened] = {}
        self.profiling = bool(options.get("profile"))
        self._op_ms: dict[str, dict[str, float]] = {}
        program = self._program = artifact.program
        stages = () if self._single else program.stages
        self._by_rows = {s.name for s in stages if _reads_rows(s)}
        self._outputs = {s.name: s.outputs for s in stages} or {SINGLE: (program.schedule.result,)}
        version = openvino.__version__
        prepared = Prepared(artifact, self.engine, openvino=version, device=device)
        self._properties = {
            stage: _properties(device, count, precisions[stage])
            | _groups(program, stage, device)
            | _snippets(program, stage, device)
            for stage in files
        }

        def cache(folder: Path) -> None:
            for stage in files:
                if cached := _cached(program, stage, folder):
                    self._compile(stage, self._most_rows, self._properties[stage] | cached)

        self._most_rows = program.max_symbols().get(ROWS, 0)
        if options.get("prepare"):
            prepared.make(cache)
        use = prepared.usable(cache) if options.get("prepared", True) else False
        for stage in files:
            self._properties[stage] |= _cached(program, stage, prepared.folder) if use else {}
            self._properties[stage] |= {"PERF_COUNT": True} if self.profiling else {}
            self._opened(stage, self._most_rows)
        self.info = {
            "engine": self.engine,
            "openvino": version,
            "prepared": use,
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
        rounded = any(p.format == "bf16" for p in artifact.program.params.values()) or integer_formats(artifact)
        gain = _gains(artifact.program) if fast and rounded else {}
        return {s: "bf16" if gain.get(s) or (s == SINGLE and any(gain.values())) else "f32" for s in stages}

    def _opened(self, stage: str, rows: int) -> _Opened:
        """The stage's model for chunks of so many rows; that of the whole chunk is kept, and the last of fewer rows."""
        key = (stage, rows if stage in self._by_rows else 0)
        if key not in self._open_now:
            for old in [k for k in self._open_now if k[0] == stage and k[1] != self._most_rows]:
                del self._open_now[old]
            self._open_now[key] = self._open(stage, rows)
        return self._open_now[key]

    def _compile(self, stage: str, rows: int, properties: Mapping[str, Any]) -> tuple[Any, Any]:
        """The compiled model of a stage, and of what runs before it if anything does (see openvino_graphs.split)."""
        path, precision = str(self._files[stage]), properties["INFERENCE_PRECISION_HINT"]
        here = self._device == "CPU" and not self._single
        changing = changing_inputs(self._program, stage) if here else None
        once = here and changing is None and precision == "bf16"
        if stage not in self._by_rows and changing is None and not once:
            return self._core.compile_model(path, self._device, dict(properties)), None
        model = self._core.read_model(path)
        if stage in self._by_rows:
            types = self._program.bind({ROWS: rows}).stage(stage).inputs
            set_shapes(model, {n: [d if isinstance(d, int) else None for d in t.shape] for n, t in types})
        if once:  # in a loop the conversions around these products would take 2 % of its time
            keep_bf16(model)
        parts = split(model, changing, precision) if changing is not None else None
        if parts is None:
            return self._core.compile_model(model, self._device, dict(properties)), None
        own = {k: v for k, v in properties.items() if not k.startswith("CACHE_")}
        before = self._core.compile_model(parts.before, self._device, own)
        return self._core.compile_model(parts.stage, self._device, dict(properties)), before

    def _open(self, stage: str, rows: int) -> _Opened:
        path = self._files[stage]
        try:
            compiled, before = self._compile(stage, rows, self._properties[stage])
            request, first = compiled.create_infer_request(), before.create_infer_request() if before else None
        except _NATIVE_ERRORS as error:
            raise EngineError(
                f"openvino cannot load {path}: {str(error)[:500]}",
                remedy="compile again; the files need openvino 2025.4 or later",
            ) from None
        # a port may carry several names, and keeps its place: inputs are found by name, outputs by position
        ports, ports_before = _ports(compiled), _ports(before) if before else {}
        if self._single:
            wanted = [next(iter(p.get_names())) for p in compiled.inputs]
        else:
            wanted = [name for name, _ in self._program.stage(stage).inputs]
        lost = [n for n in wanted if n not in ports and n not in ports_before]
        if lost or len(compiled.outputs) != len(self._outputs[stage]):
            raise EngineError(
                f"{path}: its ports are not those of stage {stage} (missing {lost})", remedy="compile again"
            )
        earlier = _Opened(first, {n: ports_before[n] for n in wanted if n in ports_before}) if first else None
        return _Opened(request, {n: ports[n] for n in wanted if n in ports}, before=earlier)

    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        if self._single or stage not in self._files:
            raise EngineError(
                f"{self._path} has no stage {stage}; it holds {', '.join(self._files)}",
                remedy="single-file artifacts run as a whole" if self._single else "compile again",
            )
        return self._run(stage, inputs, symbols.get(ROWS, self._most_rows))

    def run_all(self, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray] | None:
        """The whole schedule of a --single-file artifact; see OnnxRuntimeSession.run_all."""
        return self._run(SINGLE, inputs, self._most_rows) if self._single else None

    def _run(self, stage: str, inputs: Values, rows: int) -> dict[str, NpArray]:
        opened = self._opened(stage, rows)
        request, before = opened.request, opened.before
        try:
            if before and self._hand_over(before, inputs):
                before.request.infer()
                made = before.request.output_tensors
                for i, tensor in enumerate(made, len(request.input_tensors) - len(made)):
                    request.set_input_tensor(i, tensor)
                if self.profiling:
                    self._note(stage, before.request.profiling_info)
            self._hand_over(opened, inputs)
            request.infer()
        except _NATIVE_ERRORS as error:
            for handed in [o.given for o in (opened, before) if o]:
                handed.clear()  # to be handed over again
            raise EngineError(f"openvino failed in stage {stage} of {self._path}: {error}") from None
        if self.profiling:
            self._note(stage, request.profiling_info)
        return {name: request.get_output_tensor(i).data.copy() for i, name in enumerate(self._outputs[stage])}

    def _hand_over(self, opened: _Opened, inputs: Values) -> bool:
        """Gives a model what it reads; whether anything is another array than last time."""
        changed = False
        for name, i in opened.inputs.items():
            value = np.require(inputs[name], requirements=("C", "W"))
            # what a loop reads in every turn (keys and values, above all) is handed over once
            if opened.given.get(name) is not value:
                opened.given[name], changed = value, True
                opened.request.set_input_tensor(i, self._tensor(value, shared_memory=True))
        return changed

    def _note(self, stage: str, nodes: Any) -> None:
        times = self._op_ms.setdefault(stage, {})
        for node in nodes:
            times[node.node_type] = times.get(node.node_type, 0.0) + 1e3 * node.real_time.total_seconds()

    def op_times(self) -> dict[str, dict[str, float]]:
        return self._op_ms

    def close(self) -> None:
        self._open_now.clear()


def _ports(compiled: Any) -> dict[str, int]:
    """Position of each input by every name that it has."""
    return {name: i for i, port in enumerate(compiled.inputs) for name in port.get_names()}


def _reads_rows(stage: Stage) -> bool:
    """Whether the shape of an input depends on how many rows of the chunk are computed."""
    return any(ROWS in symbols_in(t.shape) for _, t in stage.inputs)


def _without_telemetry() -> Any:
    """The package openvino; its converter, imported with it, would load a module that reports to its makers."""
    import sys

    hidden = sys.modules.get("openvino_telemetry", ...)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    finally:
        del sys.modules["openvino_telemetry"]
        if hidden is not ...:
            sys.modules["openvino_telemetry"] = hidden
    return openvino


def _cached(program: Program, stage: str, folder: Path) -> dict[str, str]:
    """Where OpenVINO keeps the compiled model; not with rotary embeddings, which OpenVINO 2026.4 reads back wrongly:
    keys of 1e18, or subtly wrong ones."""
    stages = program.stages if stage == SINGLE else (program.stage(stage),)
    wrong = any(n.op == "rope" for s in stages for n in s.nodes)
    return {} if wrong else {"CACHE_DIR": str(folder), "CACHE_MODE": "OPTIMIZE_SPEED"}


def _properties(device: str, threads: int, precision: str) -> dict[str, Any]:
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if device != "CPU":
        return properties
    return {**properties, "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}


def _groups(program: Program, stage: str, device: str) -> dict[str, int]:
    """How many values of a row of activations share a scale, for all linears of a stage; 0: they stay float.

    Weights that come in blocks want their own block. For int8 weights: the size that divides the input widths of most
    of the work, the largest of those. Sizes that divide no width cost up to a tenth; widths below the size are not
    quantised at all; sizes that are no multiple of 16 turn the integer kernels off.
    """
    stages = program.stages if stage == SINGLE else (program.stage(stage),)
    names = [n.inputs[1] for s in stages for n in s.nodes if n.op == "linear" and n.inputs[1].startswith("@")]
    weights = [program.params[name[1:]] for name in names]
    if device != "CPU":
        return {}
    blocks = [FORMATS[w.format].block for w in weights]
    if max(blocks, default=1) > 1:
        return {"DYNAMIC_QUANTIZATION_GROUP_SIZE": min(b for b in blocks if b > 1)}
    work: dict[int, int] = {}
    for w in weights:
        if w.format == "int8":
            work[w.shape[1]] = work.get(w.shape[1], 0) + w.shape[0] * w.shape[1]
    most = min([LARGEST_GROUP, *work]) // 16 * 16
    sizes = range(most, max(min(LEAST_GROUP, most), 16) - 1, -16)
    best = max(sizes, key=lambda size: sum(v for k, v in work.items() if k % size == 0), default=0)
    return {"DYNAMIC_QUANTIZATION_GROUP_SIZE": best if work else 0}


def _gains(program: Program) -> dict[str, bool]:
    """Stage -> whether bf16 saves time there; see SMALL."""
    found = {}
    for stage in stage_works(program):
        shares = (p.macs * (INTEGER_SHARE if p.format in ("int8", *INT4) else 1) for p in stage.pieces)
        found[stage.name] = sum(shares) >= SMALL
    return found


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
