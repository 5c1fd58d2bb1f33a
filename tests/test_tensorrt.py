"""The tensorrt targets: what is in their graphs, what these compute, and what is refused where there is no GPU.

That the families' answers come out is in test_matrix.py (graphs in ONNX Runtime), that NVIDIA's builder takes the
graphs in test_tensorrt_rtx.py, the rules in test_tensorrt_rules.py, the engine on a stand-in for a GPU in
test_tensorrt_engine.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import CASES
from onnx_artifacts import program_of, weights_of
from test_ops import CASES as OP_CASES
from test_ops import Case
from test_ops import program_of as program_of_op

import vlac
import vlac.plans
from vlac import trt_rules
from vlac.artifact import Artifact, open_artifact
from vlac.engines.base import EngineSession, get_engine
from vlac.engines.numpy_engine import run_stage
from vlac.errors import EngineError, Unsupported, VlacError
from vlac.graph import Program, Repeat, StageBuilder
from vlac.layouts import half_scales, quantize_int4_blocks, quantize_int8_rows, unpack_int4
from vlac.prepare import prepare as prepare_for_here
from vlac.registry import silent, targets
from vlac.runtime.actions import apply_action_steps
from vlac.runtime.session import execute, prepare
from vlac.runtime.tokenizer import load_tokenizer
from vlac.targets import _trt_activations as activations
from vlac.targets import tensorrt

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")

NpArray = np.ndarray[Any, Any]
VARIANTS = ("tensorrt", "tensorrt-fp16", "tensorrt-bf16", "tensorrt-int8", "tensorrt-fp8", "tensorrt-int4")


def emitted(program: Program, folder: Path, half: str = "", trt: str = "10.3") -> dict[str, Path]:
    """The graphs of a program that has been lowered, without the rest of an artifact."""
    from test_ops import SIDECAR_IO

    from vlac.artifact import Sidecars

    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"format_version": 1, "target": "tensorrt", "family": "toy", "engines": ["tensorrt"]}
    sidecars = Sidecars(str(program), SIDECAR_IO.to_json(), manifest, None, None)
    tensorrt.emit(program, sidecars, folder, {"trt": trt}, silent, half=half)
    return {s.name: folder / f"{s.name}.onnx" for s in program.stages}


def run_graph(path: Path, values: Mapping[str, NpArray], wanted: tuple[str, ...] = ()) -> dict[str, NpArray]:
    """A graph in ONNX Runtime, nothing fused; `wanted`: values inside it as more outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto: Any = str(path)
    if wanted:
        proto = onnx.load(str(path))
        proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(w) for w in wanted)
        proto = proto.SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    outputs = [o.name for o in session.get_outputs()]
    return dict(zip(outputs, session.run(outputs, {n: values[n] for n in names}), strict=True))


def distance(found: NpArray, told: NpArray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - told) / max(np.linalg.norm(told.astype(np.float64)), 1e-30))


@pytest.fixture(scope="module", params=VARIANTS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    case = CASES["smolvla_tiny"]
    out = tmp_path_factory.mktemp("trt") / "out"
    path = vlac.compile(case.checkpoint, request.param, out, goldens=1, **case.options).path
    assert path is not None
    return open_artifact(path)


# --- what is in the graphs -------------------------------------------------------------------------------------


def test_stages_begin_and_end_in_float32(artifact: Artifact) -> None:
    """The flow state above all: what is narrower is cast inside."""
    allowed = {onnx.TensorProto.FLOAT, onnx.TensorProto.INT32, onnx.TensorProto.BOOL}
    for stage in artifact.program.stages:
        graph = onnx.load(str(artifact.path / f"{stage.name}.onnx"), load_external_data=False).graph
        assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} <= allowed
        assert [o.name for o in graph.output] == list(stage.outputs)


def test_nothing_but_floats_touches_the_flow_state(artifact: Artifact) -> None:
    """From x to the first product and from the last product to x_next every value is float32."""
    (step,) = [s for s in artifact.program.schedule.steps if isinstance(s, Repeat)]
    ((out, into, _),) = step.carry
    proto = onnx.load(str(artifact.path / f"{step.stage}.onnx"), load_external_data=False)
    graph = onnx.shape_inference.infer_shapes(proto).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    makers = {o: node for node in graph.node for o in node.output}
    behind, products = [out], 0
    while behind:
        name = behind.pop()
        if name not in makers:
            continue
        assert kinds[name] == onnx.TensorProto.FLOAT, name
        products += makers[name].op_type == "MatMul"
        if makers[name].op_type in ("Add", "Sub", "Mul", "Reshape", "Slice"):
            behind += [i for i in makers[name].input if i in makers]
    readers = [node for node in graph.node if into in node.input]
    assert products >= 1 and {r.op_type for r in readers} <= {"MatMul", "Add", "Shape"}


def test_the_variant_is_what_it_says(artifact: Artifact) -> None:
    target = str(artifact.manifest["target"])
    protos = [onnx.load(str(p), load_external_data=False) for p in sorted(artifact.path.glob("*.onnx"))]
    kinds = {w.data_type for m in protos for w in m.graph.initializer}
    ops = {node.op_type for m in protos for node in m.graph.node}
    t = onnx.TensorProto
    named = {"-fp16": t.FLOAT16, "-bf16": t.BFLOAT16, "-int8": t.INT8, "-fp8": t.FLOAT8E4M3FN, "-int4": t.INT4}
    suffix = target.removeprefix("tensorrt")
    for other, kind in named.items():
        if other != "-fp16":  # int8, fp8 and int4 attend in float16
            assert (kind in kinds) == (other == suffix)
    assert ("QuantizeLinear" in ops) == (suffix in ("-int8", "-fp8"))
    assert ops.isdisjoint({"Attention", "RMSNormalization", "RotaryEmbedding", "Clip"})
    assert {e.version for m in protos for e in m.opset_import} <= ({20, 21} if suffix == "-int4" else {20})


def test_what_the_board_needs_is_in_the_manifest(artifact: Artifact) -> None:
    about = artifact.manifest["tensorrt"]
    assert about["dialect"] == "10.3"
    assert about["least_sm"] == {"-fp8": 89, "-bf16": 80, "-int4": 80}.get(
        str(artifact.manifest["target"]).removeprefix("tensorrt"), 75
    )
    assert set(about["inputs"]) == {s.name for s in artifact.program.stages}
    assert about["inputs"]["flow"]["x"] == {"least": [2, 8], "largest": [10, 8]}
    assert artifact.engines == ("tensorrt",)


def test_newer_operators(tmp_path: Path) -> None:
    """Attention where its limits allow, with a mask whose rows may be empty: as the reference has it."""
    b = StageBuilder("one")
    given = b.input("noise", "f32", 5, 128)
    q, k, v = (b.op("linear", given, f"@{w}") for w in "qkv")
    q = b.op("rope", b.op("rms_norm", q, eps=1e-6), b.op("arange", start=0, stop=5), head_dim=64, base=1e4)
    valid = b.input("token_valid", "bool", 5)
    rows = b.op("arange", start=0, stop=5)
    mask = b.op("attention_mask", rows, rows, valid)
    b.output(b.op("attention", q, k, v, mask, heads=4, kv_heads=2, scale=0.125, name="y"))
    program = program_of(b, weights=weights_of({"q": (256, 128), "k": (128, 128), "v": (128, 128)}))
    program = program.replace(params={n: type(p)(p.shape, "f16") for n, p in program.params.items()})
    x = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    values = {"noise": x, "token_valid": np.array([True, False, True, True, False])}
    want = run_stage(program, "one", values, lambda n: program.weights[n].load())["y"]
    for trt, has in (("10.16", {"Attention", "RMSNormalization", "RotaryEmbedding"}), ("10.3", set())):
        path = emitted(program, tmp_path / trt, "f16", trt)["one"]
        ops = {n.op_type for n in onnx.load(str(path)).graph.node}
        assert ops & {"Attention", "RMSNormalization", "RotaryEmbedding"} == has
        assert trt_rules.check_file(path, trt) == []
        assert distance(run_graph(path, values)["y"], want) <= 2e-3
    assert trt_rules.check_file(tmp_path / "10.16" / "one.onnx", "10.3")


@pytest.mark.parametrize("half", ["", "f16"])
@pytest.mark.parametrize("trt", ["10.3", "10.16"])
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_every_op_of_the_table(case: Case, trt: str, half: str, tmp_path: Path) -> None:
    program, values = program_of_op(case)
    if case.op == "time_embedding":
        with pytest.raises(Unsupported, match="time_embedding wants float64"):
            emitted(program, tmp_path, half, trt)
        return
    want = run_stage(program, "only", values, lambda n: program.weights[n].load())
    got = run_graph(emitted(program, tmp_path, half, trt)["only"], values)
    for name, told in want.items():
        found = got[name]
        assert found.dtype == told.dtype and found.shape == told.shape
        if told.dtype != np.float32:
            assert np.array_equal(found, told) or (case.op == "pack_codes" and (found != told).mean() < 0.05)
            continue
        if case.op == "weighted_mask" and half:
            found = np.where(found < -2e4, np.float32(-1e30), found)  # masked as far as float16 goes
        kept = [i for i in range(len(told)) if i not in case.unread]
        bound = 1e-5 if not half or case.op != "attention" else 3e-3
        assert np.isfinite(found).all()
        assert np.abs(found[kept] - told[kept]).max() <= bound * max(float(np.abs(told).max()), 1e-3)


class _Evaluated(EngineSession):
    """Graphs in ONNX's own evaluator, which knows bfloat16 where ONNX Runtime has no kernels for it."""

    engine = "onnx"

    def __init__(self, artifact: Artifact) -> None:
        from onnx.reference import ReferenceEvaluator

        stages = artifact.program.stages
        self._stages = {s.name: (s, ReferenceEvaluator(str(artifact.path / f"{s.name}.onnx"))) for s in stages}

    def run(self, stage: str, inputs: Mapping[str, NpArray], symbols: Mapping[str, int]) -> dict[str, NpArray]:
        about, evaluator = self._stages[stage]
        return dict(zip(about.outputs, evaluator.run(None, {n: inputs[n] for n, _ in about.inputs}), strict=True))


@pytest.mark.parametrize("name", ["smolvla_tiny", "groot_n17_tiny", "tinyvla_tiny"])
def test_bfloat16_gives_the_originals_answer(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = vlac.compile(case.checkpoint, "tensorrt-bf16", tmp_path / "out", goldens=1, **case.options).path
    artifact = open_artifact(path or "")
    tokenizer = load_tokenizer(artifact.tokenizer, "t") if artifact.tokenizer else None
    ready = prepare(artifact.io, tokenizer, artifact.program, **case.observation(0))
    chunk = execute(artifact.program, _Evaluated(artifact), ready.env, ready.symbols)
    found = apply_action_steps(artifact.io.action_steps, chunk, ready.state)
    assert distance(found, case.answer(0)) <= 0.05


# --- Q and DQ --------------------------------------------------------------------------------------------------


def _calibrated(name: str, target: str) -> tuple[Program, Any]:
    from vlac.api import apply_own_passes, lower_for
    from vlac.checkpoint import read_policy

    case, entry = CASES[name], targets.get(target)
    policy = apply_own_passes(read_policy(str(case.checkpoint), case.read_options), entry)
    program, _, _ = lower_for(policy, entry, {})
    if entry.observe is not None:
        program, _ = entry.observe(policy, program)
    return program, policy


def _decoder(path: Path) -> Any:
    artifact = open_artifact(path)
    return lambda n: artifact.tensors[n].decode()


@pytest.mark.parametrize("target", ["tensorrt-int8", "tensorrt-fp8"])
@pytest.mark.parametrize("name", CASES)
def test_quantised_graphs_are_the_numpy_reference(name: str, target: str, tmp_path: Path) -> None:
    """The first stage node by node, each fed what it is fed in the graph: the same codes, scales and all. What is told
    apart from here to the chunk is rounding alone: which of two codes, or float16 numbers, lies nearer."""
    case = CASES[name]
    path = vlac.compile(case.checkpoint, target, tmp_path / "out", goldens=1, **case.options).path
    assert path is not None
    artifact = open_artifact(path)
    stage = artifact.program.stages[0]
    tokenizer = load_tokenizer(artifact.tokenizer, "t") if artifact.tokenizer else None
    asked = prepare(artifact.io, tokenizer, artifact.program, **case.observation(0))
    stage = artifact.program.bind(asked.symbols).stage(stage.name)
    values = {n: asked.env[n][0] if n == "pixels" and asked.env[n].ndim == 4 else asked.env[n] for n, _ in stage.inputs}
    graph = onnx.load(str(path / f"{stage.name}.onnx"), load_external_data=False).graph
    inside = {o for node in graph.node for o in node.output} - {o.name for o in graph.output}
    names = tuple(n.name for n in stage.nodes if n.name in inside)
    seen = {**values, **run_graph(path / f"{stage.name}.onnx", values, names)}
    for n in stage.nodes:  # float16 that was float16 already has one name
        if n.op == "round_f16" and n.name not in seen and n.inputs[0] in seen:
            seen[n.name] = seen[n.inputs[0]]
    from vlac.ops import OPS

    decode, compared = _decoder(path), 0
    for n in (n for n in stage.nodes if n.op in ("linear", "round_int8", "round_fp8", "round_f16", "attention")):
        operands = [i for i in n.inputs if not i.startswith("@")]
        if n.name not in seen or any(i not in seen for i in operands):
            continue
        given = [decode(i[1:]) if i.startswith("@") else seen[i] for i in n.inputs]
        given = [x.astype(np.float32) if x.dtype == np.float16 else x for x in given]
        want, found = OPS[n.op].reference(given, n.attr), seen[n.name].astype(np.float32)
        # a quotient or product at the very edge of a code, in float32 here and in float64 there
        same = np.isclose(found, want, rtol=0, atol=(1e-3 if n.op == "attention" else 2e-6) * float(np.abs(want).max()))
        assert (~same).sum() <= (max(4, 2e-3 * same.size) if n.op.startswith("round") else 0), (n.name, n.op)
        compared += n.op != "attention"
    assert compared >= 8


@pytest.mark.parametrize("name", ["smolvla_tiny", "groot_n17_tiny"])
def test_quantised_stages_with_attention_in_float32(name: str, tmp_path: Path) -> None:
    """The first stage end to end: but for attention's half precision, the graph is the program to rounding."""
    program, policy = _calibrated(name, "tensorrt-int8")
    stage = program.stages[0]
    paths = emitted(program, tmp_path / "out")
    tokenizer = load_tokenizer(policy.tokenizer, "t") if policy.tokenizer else None
    ready = prepare(policy.io, tokenizer, program, **CASES[name].observation(0))
    values = {n: ready.env[n][0] if n == "pixels" and ready.env[n].ndim == 4 else ready.env[n] for n, _ in stage.inputs}
    want = run_stage(program.bind(ready.symbols), stage.name, values, _decoder(tmp_path / "out"))
    got = run_graph(paths[stage.name], values)
    assert all(distance(got[o], want[o]) <= 2e-6 for o in stage.outputs)


def test_int4_is_the_numpy_reference(tmp_path: Path) -> None:
    """Scales are float16, codes the nearest under them, an odd number of outputs gets one more and loses it again."""
    b = StageBuilder("one")
    b.output(b.op("linear", b.input("noise", "f32", 3, 200), "@w", "@b", name="y"))
    program = program_of(b, weights=weights_of({"w": (7, 200), "b": (7,)}), formats={"w": "int4g128"})
    lowered = tensorrt.lower(program, {})
    path = emitted(lowered, tmp_path / "out", "f16")["one"]
    assert trt_rules.check_file(path) == []
    stored = _decoder(tmp_path / "out")("w")
    assert stored.shape == (8, 256) and distance(stored[:7, :200], program.weights["w"].load()) < 0.15
    x = np.random.default_rng(1).standard_normal((3, 200)).astype(np.float32)
    want = x @ stored[:7, :200].T + program.weights["b"].load()
    assert distance(run_graph(path, {"noise": x})["y"], want) <= 1e-3
    w = program.weights["w"].load()[:, :128]
    q, scale = quantize_int4_blocks(w, 128)
    parts = half_scales(w, "int4g128", "columns", {"scale": np.ascontiguousarray(scale.T)})
    codes = unpack_int4(parts["q"], (128, 7)).T
    assert parts["scale"].dtype == np.float16 and np.abs(codes.astype(int) - q).max() <= 1


def test_half_scales_keep_what_was_rounded_already() -> None:
    """Codes that a pass chose stay, rows that are nearly nothing get a scale above 0."""
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 128, (5, 64)).astype(np.int8)
    q[:, 0] = 127
    w = q * np.float32([0.1, 0.003, 1e-5, 2.0, 1e-12])[:, None]
    parts = half_scales(w, "int8", "rows", {"scale": quantize_int8_rows(w)[1]})
    assert (parts["scale"] > 0).all()
    assert np.array_equal(parts["q"][[0, 1, 3]], q[[0, 1, 3]])
    error = np.abs(parts["q"] * parts["scale"].astype(np.float32)[:, None] - w).max(axis=1)
    assert (error <= parts["scale"].astype(np.float32) * 0.6).all()


def test_scales_come_from_every_step_of_the_flow() -> None:
    """Each is the largest magnitude seen over 127; the last steps' values count as the first ones'."""
    program, policy = _calibrated("smolvla_tiny", "tensorrt-int8")
    flow = program.stage("flow")
    rounds = {n.inputs[0]: n.attr["largest"] for n in flow.nodes if n.op == "round_int8"}
    seen: dict[str, list[float]] = {name: [] for name in rounds}
    from vlac import calibrate
    from vlac.api import lower_for

    plain = lower_for(policy, targets.get("tensorrt-int8"), {})[0]

    def see(_: int, stage: str, values: Mapping[str, NpArray]) -> None:
        for name in rounds:
            seen[name].append(float(np.abs(values[name]).max()))

    given = calibrate.observations(policy, activations.SAMPLES)
    calibrate.watch(policy, given, {"flow": set(rounds)}, see, program=plain)
    assert all(len(v) == 10 * activations.SAMPLES for v in seen.values())
    assert all(np.float32(rounds[n]) == pytest.approx(max(v), rel=1e-6) for n, v in seen.items())
    assert any(max(v[::10]) < 0.99 * max(v) for v in seen.values())


def test_what_a_pass_rounded_stays(tmp_path: Path) -> None:
    case = CASES["smolvla_tiny"]
    recipe = ["quantize-weights:bits=8,group=channel,act=int8-tensor,match=vision.*,samples=1"]
    made = vlac.compile(case.checkpoint, "tensorrt-int8", tmp_path / "out", recipe, goldens=1, **case.options)
    program = open_artifact(made.path or "").program
    stages = {s.name for s in program.stages for n in s.nodes if n.op == "round_int8"}
    assert stages == {"vision"} and "activations" not in made.manifest


# --- refusals and the board's side -----------------------------------------------------------------------------


def test_a_dialect_that_there_is_not(tmp_path: Path) -> None:
    case = CASES["tinyvla_tiny"]
    with pytest.raises(VlacError, match=r"--trt '9'; there are: 10\.3, 10\.16"):
        vlac.compile(case.checkpoint, "tensorrt", tmp_path / "out", trt="9")
    with pytest.raises(VlacError, match="target gguf-q8 has no --trt"):
        vlac.compile(case.checkpoint, "gguf-q8", tmp_path / "out", trt="10.3")
    assert not (tmp_path / "out").exists()


def test_what_the_rules_refuse_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["tinyvla_tiny"]
    monkeypatch.setitem(trt_rules.OPERATORS, "10.3", trt_rules.OPERATORS["10.3"] - {"Gelu"})
    with pytest.raises(Unsupported, match=r"vision\.onnx: .* \(Gelu\): no importer in TensorRT 10\.3"):
        vlac.compile(case.checkpoint, "tensorrt-fp16", tmp_path / "out", goldens=1)
    assert not (tmp_path / "out").exists()


def test_no_gpu_is_said(artifact: Artifact) -> None:
    if not get_engine("tensorrt").missing():
        pytest.skip("there is a GPU with TensorRT")
    with pytest.raises(EngineError, match=r"no engine for .* is installed\n  tensorrt: "):
        vlac.load(artifact.path)
    with pytest.raises(EngineError, match="engine tensorrt cannot be used here"):
        vlac.load(artifact.path, engine="tensorrt")
    with pytest.raises(Unsupported, match="whose plans take the place of preparing"):
        prepare_for_here(artifact.path, "onnxruntime")
    with pytest.raises(EngineError, match="TensorRT cannot be used here"):
        vlac.plans.build(artifact.path)
    if artifact.manifest["target"] == "tensorrt-bf16":
        with pytest.raises(EngineError, match="does not run on engine 'onnxruntime'"):
            vlac.load(artifact.path, engine="onnxruntime")


def test_build_py_stands_alone(artifact: Artifact) -> None:
    """Without vlac on its path it prints what trtexec would do, and says what is missing."""
    listed = artifact.manifest["files"]
    assert "build.py" in listed
    command = [sys.executable, "-I", str(artifact.path / "build.py")]
    done = subprocess.run([*command, "--commands"], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(artifact.program.stages) and all(line.startswith("trtexec --onnx=") for line in lines)
    flow = next(line for line in lines if "/flow.onnx" in line)
    assert "--stronglyTyped" in flow and "--minShapes=" in flow and "x:2x8" in flow and "x:10x8" in flow
    if get_engine("tensorrt").missing():
        failed = subprocess.run(command, capture_output=True, text=True)
        assert failed.returncode == 2 and failed.stderr.startswith("error: ")


def test_plans_are_for_tensorrt(tmp_path: Path) -> None:
    case = CASES["tinyvla_tiny"]
    path = vlac.compile(case.checkpoint, "onnx-fp32", tmp_path / "out", goldens=1).path
    with pytest.raises(Unsupported, match=r"\(onnx-fp32\) holds no graphs for TensorRT"):
        vlac.plans.build(path or "")
