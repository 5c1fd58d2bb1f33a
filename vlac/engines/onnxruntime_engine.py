"""ONNX Runtime on the stage files of an ONNX artifact (CPU by default), or on the one file of a --single-file artifact.

Options: "provider" (default CPUExecutionProvider), "spinning" (threads wait busily: for a machine with nothing else),
"int8" ("integer": activations of linears and long attention are quantised; "linears": attention stays float; "float":
weights are widened when loading; default: see `int8_kernels`), "prepared" (False: as if `vlac prepare` had never been
run), "kleidiai" (False, on ARM: int4 linears quantise what they multiply in blocks of 32, as on x86, and not by row as
KleidiAI's faster kernels do).
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vlac.artifact import Artifact
from vlac.engines.base import Engine, EngineSession, NpArray, Values
from vlac.engines.onnx_files import SINGLE, default_threads, graph_files, integer_formats
from vlac.engines.prepared import Prepared
from vlac.errors import EngineError
from vlac.graph import Program, infer_stage

DECLINES: Mapping[str, str] = {}
"""op -> why this engine does not run it; none."""

CPUINFO = Path("/proc/cpuinfo")
CPU = "CPUExecutionProvider"
NO_TELEMETRY = ("ORT_DISABLE_TELEMETRY", "1")
"""Environment variable and value that keep ONNX Runtime from sending anything; set before it is imported."""

INT8 = {"integer": "integer", "linears": "linears", "float": "portable"}
"""Ways to run int8 linears -> which graph has it."""


class OnnxRuntimeSession(EngineSession):
    """One InferenceSession per stage, made when the artifact is opened."""

    engine = "onnxruntime"

    def __init__(self, artifact: Artifact, threads: int | None, options: Mapping[str, Any]) -> None:
        # read when the library is loaded, and the wheels send by default; the call stops only events that come later
        os.environ.setdefault(*NO_TELEMETRY)
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        provider = str(options.get("provider", CPU))
        if provider not in onnxruntime.get_available_providers():
            raise EngineError(
                f"onnxruntime {onnxruntime.__version__} has no provider {provider!r}; "
                f"there are: {', '.join(onnxruntime.get_available_providers())}"
            )
        int8 = str(options.get("int8", int8_kernels() if provider == CPU else "float"))
        if int8 not in INT8:
            raise EngineError(f"onnxruntime int8={int8!r}; there are: {', '.join(INT8)}")
        files = graph_files(artifact, self.engine, INT8[int8])
        self.profiling = bool(options.get("profile"))
        two_forms = any("integer" in row for row in artifact.manifest["onnx"].values())
        widen = two_forms and int8 == "float"
        count = threads or default_threads()
        self._path = artifact.path
        self._single = self.one_graph = bool(artifact.manifest.get("single_file"))
        spinning = bool(options.get("spinning"))
        packed = {k: bool(integer_formats(artifact)) or not _one_row(artifact.program, k) for k in files}
        as_x86 = options.get("kleidiai", True) is False and platform.machine().lower() in ("aarch64", "arm64")
        settings = {k: _settings(onnxruntime, count, widen, spinning, packed[k], as_x86) for k in files}
        for setting in settings.values() if "tensorrt" in artifact.manifest else ():
            # to check what TensorRT is given: fusing breaks on float8, and would round what meets 4-bit weights
            setting.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # MatMul + Add would become Gemm, which dequantised weights are not fused with: widened at every run; and
        # QuantizeLinear moved through a reshape gets another type than its zero point (1.31)
        disabled = ["MatMulAddFusion", "QDQPropagationTransformer"] if integer_formats(artifact) and not widen else []
        providers = [provider] if provider == CPU else [provider, CPU]
        prepared = Prepared(artifact, self.engine, onnxruntime=onnxruntime.__version__, provider=provider, int8=int8)

        def pack(folder: Path) -> None:
            for stage, path in files.items():
                saving = _settings(onnxruntime, count, widen, False, packed[stage])
                _save_packed(saving, folder / f"{stage}.onnx")
                _open(onnxruntime, path, saving, providers, disabled)

        if options.get("prepare"):
            prepared.make(pack)
        # what was prepared is packed for KleidiAI's kernels
        use = prepared.usable(pack) if options.get("prepared", True) and not as_x86 else False
        if use:
            files = {stage: prepared.folder / f"{stage}.onnx" for stage in files}
        if self.profiling:
            for setting in settings.values():
                setting.enable_profiling = True
                setting.profile_file_prefix = str(Path(tempfile.gettempdir()) / "vlac-profile")
        self._sessions = {k: _open(onnxruntime, p, settings[k], providers, disabled) for k, p in files.items()}
        self._inputs = {k: [i.name for i in s.get_inputs()] for k, s in self._sessions.items()}
        self._outputs = {k: [o.name for o in s.get_outputs()] for k, s in self._sessions.items()}
        self.info = {
            "engine": self.engine,
            "onnxruntime": onnxruntime.__version__,
            "provider": provider,
            "threads": count,
            "prepared": use,
            **({"int8": int8} if two_forms else {}),
            **({"kleidiai": False} if as_x86 else {}),
        }

    def run(self, stage: str, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray]:
        if self._single or stage not in self._sessions:
            raise EngineError(
                f"{self._path} has no stage {stage}; it holds {', '.join(self._sessions)}",
                remedy="single-file artifacts run as a whole" if self._single else "compile again",
            )
        return self._run(stage, inputs)

    def run_all(self, inputs: Values, symbols: Mapping[str, int]) -> dict[str, NpArray] | None:
        """The whole schedule of a --single-file artifact: {result name: normalised chunk}; None for a staged artifact.

        `inputs` holds the runtime inputs that the program reads, by name; `pixels` stacked as f32 [C, 3, S, S] in slot
        order, zeros for a camera that was not given.
        """
        return self._run(SINGLE, inputs) if self._single else None

    def _run(self, stage: str, inputs: Values) -> dict[str, NpArray]:
        feed = {name: np.ascontiguousarray(inputs[name]) for name in self._inputs[stage]}
        try:
            made = self._sessions[stage].run(self._outputs[stage], feed)
        except _native_errors() as error:
            raise EngineError(f"onnxruntime failed in stage {stage} of {self._path}: {error}") from None
        return dict(zip(self._outputs[stage], made, strict=True))

    def op_times(self) -> dict[str, dict[str, float]]:
        if not self.profiling:
            return {}
        self.profiling = False
        return {stage: _kernel_times(Path(session.end_profiling())) for stage, session in self._sessions.items()}

    def close(self) -> None:
        self.op_times()  # its files are removed when they are read
        self._sessions.clear()


def _one_row(program: Program, stage: str) -> bool:
    """Whether a stage's linears all read one row: float weights are then as fast where they lie in the mapped file, and
    need no copy in another order (570 MB less of SmolVLA's prefix, whose weights two stages read)."""
    if stage not in {s.name for s in program.stages}:
        return False
    types = infer_stage(program.stage(stage), program.params)
    linears = [n for n in program.stage(stage).nodes if n.op == "linear"]
    return bool(linears) and all(types[n.name].shape[0] == 1 for n in linears)


def _settings(
    onnxruntime: Any, threads: int, widen: bool, spinning: bool, packed: bool = True, as_x86: bool = False
) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    # int4 weights times int8 activations: 127 GF/s of a core against 109 with float ones
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    options.add_session_config_entry("session.disable_prepacking", "0" if packed else "1")
    if widen:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if as_x86:
        options.add_session_config_entry("mlas.disable_kleidiai", "1")
    return options


def _kernel_times(path: Path) -> dict[str, float]:
    """Op -> milliseconds, of a file that onnxruntime's profiler wrote; removes it."""
    times: dict[str, float] = {}
    for event in json.loads(path.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            op = event["args"]["op_name"]
            times[op] = times.get(op, 0.0) + event["dur"] / 1e3
    path.unlink()
    return times


def _save_packed(options: Any, path: Path) -> None:
    """Has the session write its optimised graph and the weights as its kernels want them, to be mapped, not copied."""
    options.optimized_model_filepath = str(path)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", f"{path.name}.data"),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(key, value)


def int8_kernels() -> str:
    """ "integer" where uint8 x int8 products are exact, else "float".

    x86 without VNNI adds pairs of products in saturating 16 bits (255 * 127 * 2 > 32767): silently wrong sums.
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return "integer"
    try:
        words = set(CPUINFO.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return "float"  # not Linux: nobody tells, so the safe one
    return "integer" if words & {"avx512_vnni", "avx_vnni"} else "float"


def _open(onnxruntime: Any, path: Path, options: Any, providers: list[str], disabled: list[str]) -> Any:
    try:
        # without the fallback: it retries on another provider after printing to stdout
        return onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=providers, disabled_optimizers=disabled, enable_fallback=0
        )
    except _native_errors() as error:
        raise EngineError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path}: {str(error)[:500]}",
            remedy="compile again; the files need onnxruntime 1.23 or later",
        ) from None


def _native_errors() -> tuple[type[Exception], ...]:
    """Everything onnxruntime raises: its exception classes share no base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    own = [v for v in vars(native).values() if isinstance(v, type) and issubclass(v, Exception)]
    return (RuntimeError, ValueError, TypeError, OSError, *own)


class OnnxRuntimeEngine(Engine):
    """onnxruntime, if it is installed."""

    name = "onnxruntime"
    parity_options: ClassVar[Mapping[str, Any]] = {"kleidiai": False}

    def missing(self) -> str:
        from importlib.util import find_spec

        if find_spec("onnxruntime") is None:
            return "onnxruntime is not installed; pip install 'vlac-compiler[onnx]' (or only onnxruntime)"
        return ""

    def open(
        self, artifact: Artifact, *, threads: int | None = None, options: Mapping[str, Any] | None = None
    ) -> EngineSession:
        if why := self.missing():
            raise EngineError(why)
        return OnnxRuntimeSession(artifact, threads, options or {})


ENGINE = OnnxRuntimeEngine()
