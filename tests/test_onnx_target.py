"""ONNX artifacts of a toy policy: what lies in the folder, and what both engines make of it, staged and as one file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_artifacts import LINEARS, flow_inputs, flow_program, program_of, relative_max, run_schedule, weights_of, write

from vlac.artifact import Artifact
from vlac.engines.base import get_engine
from vlac.engines.numpy_engine import NumpySession
from vlac.errors import Unsupported, VlacError
from vlac.graph import Call, Program, Repeat, StageBuilder
from vlac.registry import targets
from vlac.weights import LazyTensor

pytest.importorskip("onnx")

FORMATS = {
    "fp32": {},
    "fp16": dict.fromkeys((*LINEARS, "table"), "f16"),
    "int8": dict.fromkeys((*LINEARS, "table"), "int8"),
    "int4": {**dict.fromkeys(LINEARS, "int4"), "table": "int8"},
}
# largest |chunk - fp32 chunk| and |chunk - chunk with the decoded weights|, over the chunk's largest value; measured
# 2.4e-7, 1.7e-4, 1.0e-2, 1.2e-1 and 2.7e-7, 2.7e-7, 7.0e-3, 5.4e-3 (integer kernels round activations, too)
BOUNDS = {"fp32": (2e-6, 2e-6), "fp16": (5e-4, 2e-6), "int8": (2e-2, 1.5e-2), "int4": (0.2, 1.5e-2)}


def chunk(program: Program, artifact: Artifact | None, engine: str = "numpy", cameras: int = 2) -> np.ndarray:
    """The chunk by an engine, or by numpy with the original weights, or with the artifact's decoded ones."""
    if engine == "numpy":
        weight = (lambda n: program.weights[n].load()) if artifact is None else (lambda n: artifact.tensors[n].decode())
        return run_schedule(program, NumpySession(program, weight), flow_inputs(cameras))
    assert artifact is not None
    session = get_engine(engine).open(artifact, threads=1)
    whole = session.run_all(flow_inputs(cameras), {})
    return run_schedule(program, session, flow_inputs(cameras)) if whole is None else whole[program.schedule.result]


@pytest.mark.parametrize("single", [False, True], ids=["staged", "single"])
@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_chunk_of_a_flow_policy(engine: str, precision: str, single: bool, tmp_path: Path) -> None:
    program = flow_program(FORMATS[precision])
    artifact = write(program, tmp_path, single_file=single)
    got = chunk(program, artifact, engine)
    to_original, to_decoded = BOUNDS[precision]
    assert relative_max(got, chunk(program, None)) <= to_original
    assert relative_max(got, chunk(program, artifact)) <= to_decoded


@pytest.mark.parametrize("precision", FORMATS)
def test_every_file_passes_the_checker_and_loads_in_plain_onnxruntime(precision: str, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    for single in (False, True):
        write(flow_program(FORMATS[precision]), tmp_path / str(single), single_file=single)
    files = sorted(tmp_path.rglob("*.onnx"))
    assert len(files) == (8 if precision == "int8" else 4), files
    for file in files:
        onnx.checker.check_model(str(file))
        onnx.shape_inference.infer_shapes_path(str(file), str(tmp_path / "shapes.onnx"), strict_mode=True)
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def test_one_camera_and_three(tmp_path: Path) -> None:
    for cameras in (1, 3):
        program = flow_program(cameras=cameras)
        want = chunk(program, None, cameras=cameras)
        for single in (False, True):
            artifact = write(program, tmp_path / f"{cameras}{single}", single_file=single)
            assert relative_max(chunk(program, artifact, "onnxruntime", cameras), want) <= 2e-6


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("single", [False, True], ids=["staged", "single"])
def test_the_same_program_gives_the_same_bytes(precision: str, single: bool, tmp_path: Path) -> None:
    digests = []
    for i in range(2):
        write(flow_program(FORMATS[precision]), tmp_path / str(i), single_file=single)
        files = sorted((tmp_path / str(i)).iterdir())
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert digests[0] == digests[1]


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from onnx_artifacts import *;"
        "write(flow_program({'vq': 'int8', 'gate': 'int4'}), Path(sys.argv[1]))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])}
    manifests = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        subprocess.run([sys.executable, "-c", code, str(out)], check=True, env={**env, "PYTHONHASHSEED": seed})
        manifests.append((out / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]


def test_manifest_lists_every_file_with_size_and_hash(tmp_path: Path) -> None:
    write(flow_program(FORMATS["int8"]), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    names = {f.name for f in tmp_path.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    for name, row in manifest["files"].items():
        data = (tmp_path / name).read_bytes()
        assert row == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["onnx"]["flow"] == {"integer": "flow.onnx", "portable": "flow.portable.onnx"}


def test_decoded_tensors_are_the_weights(tmp_path: Path) -> None:
    program = flow_program(FORMATS["int4"])
    artifact = write(program, tmp_path)
    assert set(artifact.tensors) == set(program.params)
    for name, stored in artifact.tensors.items():
        want = program.weights[name].load()
        limit = {"f32": 0.0, "int8": 8e-3, "int4": 0.12}[stored.format]
        assert np.linalg.norm(stored.decode() - want) <= limit * np.linalg.norm(want), name


def test_large_tensors_start_on_a_page_and_small_ones_on_a_cache_line(tmp_path: Path) -> None:
    s = StageBuilder("one")
    s.output(s.linear(s.linear(s.input("state", "f32", 1, 8), "@small", "@bias"), "@large"))
    weights = weights_of({"small": (300, 8), "bias": (300,), "large": (60, 300)})
    artifact = write(program_of(s, weights=weights), tmp_path)
    parts = [p for row in artifact.manifest["tensors"].values() for p in row["parts"].values()]
    assert any(p["nbytes"] >= 1 << 16 for p in parts) and any(p["nbytes"] < 1 << 16 for p in parts)
    assert all(p["offset"] % (4096 if p["nbytes"] >= 1 << 16 else 64) == 0 for p in parts)


def test_weights_are_loaded_one_at_a_time(tmp_path: Path) -> None:
    """Streaming: each tensor is asked for once, also where two graphs and two stages read it."""
    program = flow_program(FORMATS["int8"])
    loads: list[str] = []

    def counted(name: str, tensor: LazyTensor) -> LazyTensor:
        return LazyTensor(tensor.shape, lambda: (loads.append(name), tensor.load())[1])

    weights = program.weights.with_(**{n: counted(n, w) for n, w in program.weights.items()})
    write(program.replace(weights=weights), tmp_path)
    assert sorted(loads) == sorted(program.params)


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    program = flow_program(FORMATS["fp16"])
    large = program.weights.with_(gate=program.weights["gate"].map(lambda w: w * np.float32(1e6)))
    with pytest.raises(Unsupported, match=r"tensor gate holds .*float16 ends at 65504"):
        write(program.replace(weights=large), tmp_path)


def test_outputs_that_are_inputs_or_constants(tmp_path: Path) -> None:
    s = StageBuilder("one")
    state = s.input("state", "f32", 1, 4)
    s.output(s.op("add", state, "@w", name="sum"), state, s.arange(start=0, stop=3))
    program = program_of(s, weights=weights_of({"w": (4,)}))
    artifact = write(program, tmp_path)
    value = np.arange(4, dtype=np.float32)[None]
    for engine in ("onnxruntime", "openvino"):
        out = get_engine(engine).open(artifact).run("one", {"state": value}, {})
        assert list(out) == ["sum", "state", "arange.1"]
        assert np.array_equal(out["state"], value) and np.array_equal(out["arange.1"], [0, 1, 2])


def test_a_parameter_no_stage_reads_is_kept(tmp_path: Path) -> None:
    s = StageBuilder("one")
    s.output(s.relu(s.input("state", "f32", 1, 4)))
    artifact = write(program_of(s, weights=weights_of({"w": (4,)})), tmp_path)
    assert artifact.tensors["w"].decode().shape == (4,)


def test_single_file_needs_a_result_that_leaves_the_loop(tmp_path: Path) -> None:
    s = StageBuilder("flow")
    x, _ = s.input("x", "f32", 2, 4), s.input("step", "i32", 1)
    s.output(s.op("relu", x, name="y"), s.op("tanh", x, name="z"))
    loop = Repeat("flow", 3, "step", (("y", "x", "noise"),))
    program = program_of(s, weights=weights_of({}), steps=(loop,), result="z")
    with pytest.raises(Unsupported, match="its result z is no output that a Repeat carries or collects"):
        write(program, tmp_path, single_file=True)


@pytest.mark.parametrize("stop", [(), (3,), (2, 3), (99,)])
def test_one_file_collects_and_stops_as_the_schedule_does(stop: tuple[int, ...], tmp_path: Path) -> None:
    s = StageBuilder("decode")
    x, step = s.input("x", "f32", 2, 4), s.input("step", "i32", 1)
    s.output(s.op("scale", x, name="y", factor=2.0), s.op("add", step, step, name="double"))
    program = program_of(
        s,
        weights=weights_of({}),
        steps=(Repeat("decode", 5, "step", (("y", "x", "noise"),), (("y", "all"),), "double" if stop else "", stop),),
        result="all",
    )
    noise = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    turns = 2 if 2 in stop else 5  # "double" runs 0, 2, 4, ...
    want = np.zeros((10, 4), np.float32)
    want[: 2 * turns] = np.concatenate([noise * 2.0 ** (i + 1) for i in range(turns)])
    artifact = write(program, tmp_path, single_file=True)
    for engine in ("onnxruntime", "openvino"):
        out = get_engine(engine).open(artifact, threads=1).run_all({"noise": noise}, {})
        assert np.array_equal(out["all"], want), engine


def test_the_engines_are_refused_where_all_decline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlac.engines import onnxruntime_engine, openvino_engine

    for module in (onnxruntime_engine, openvino_engine):
        monkeypatch.setattr(module, "DECLINES", {"relu": "a test says so"})
    s = StageBuilder("one")
    s.output(s.relu(s.input("state", "f32", 1, 4)))
    with pytest.raises(VlacError, match=r"no engine runs this program: .*a test says so"):
        write(program_of(s, weights=weights_of({}), steps=(Call("one"),)), tmp_path)


@pytest.mark.parametrize(
    ("target", "linear", "embed"),
    [
        ("onnx-fp32", "f32", "f32"),
        ("onnx-fp16", "f16", "f16"),
        ("onnx-int8", "int8", "int8"),
        ("onnx-int4", "int4", "int8"),
    ],
)
def test_plans(target: str, linear: str, embed: str) -> None:
    plan = targets.get(target).plan
    formats = [plan("w", (8, 8), role) for role in ("linear", "embed", "head", "other")]
    assert formats == [linear, embed, "f32", "f32"]
