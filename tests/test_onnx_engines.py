"""ONNX Runtime and OpenVINO as engines: broken files are named, options act, results repeat."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_artifacts import LINEARS, flow_inputs, flow_program, relative_max, run_schedule, write

from vlac.artifact import Artifact, manifest_checksum, open_artifact
from vlac.engines import onnxruntime_engine
from vlac.engines.base import get_engine
from vlac.engines.onnx_files import default_threads
from vlac.errors import ArtifactError, EngineError, VlacError

pytest.importorskip("onnx")
both = pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(flow_program(), tmp_path)
    return tmp_path


def rehash(folder: Path) -> Artifact:
    """Opens the folder after making its manifest agree with the files, as one who tampers would."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, row in manifest["files"].items():
        data = (folder / name).read_bytes()
        row.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest["checksum"] = manifest_checksum(manifest)
    path.write_text(json.dumps(manifest))
    return open_artifact(folder)


@both
def test_info_names_versions_and_threads(engine: str, folder: Path) -> None:
    session = get_engine(engine).open(open_artifact(folder), threads=1)
    assert session.engine == session.info["engine"] == engine
    assert session.info["threads"] == 1 and session.info[engine][0].isdigit()
    assert get_engine(engine).open(open_artifact(folder)).info["threads"] == default_threads()


@both
@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
def test_runs_repeat_bit_for_bit(engine: str, precision: str, tmp_path: Path) -> None:
    program = flow_program({} if precision == "f32" else dict.fromkeys(LINEARS, precision))
    artifact = write(program, tmp_path)
    runs = []
    for threads in (1, 2):
        session = get_engine(engine).open(artifact, threads=threads)
        runs += [run_schedule(program, session, flow_inputs()) for _ in range(2)]
    assert all(np.array_equal(runs[0], r) for r in runs[1:])


@both
def test_returned_arrays_belong_to_the_caller(engine: str, folder: Path) -> None:
    session = get_engine(engine).open(open_artifact(folder), threads=1)
    pixels = flow_inputs()["pixels"]
    first = session.run("vision", {"pixels": pixels[0]}, {})["image_tokens"]
    kept = first.copy()
    session.run("vision", {"pixels": pixels[1]}, {})
    assert np.array_equal(first, kept)
    first += 1
    assert np.array_equal(session.run("vision", {"pixels": pixels[0]}, {})["image_tokens"], kept)


@both
def test_a_changed_graph_file_is_not_loaded(engine: str, folder: Path) -> None:
    artifact = open_artifact(folder)
    data = bytearray((folder / "flow.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "flow.onnx").write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"flow\.onnx is not the file that was compiled"):
        get_engine(engine).open(artifact)


@both
def test_truncated_data_is_named(engine: str, folder: Path) -> None:
    artifact = open_artifact(folder)
    data = (folder / "prefix.onnx.data").read_bytes()
    (folder / "prefix.onnx.data").write_bytes(data[:-64])
    with pytest.raises(ArtifactError, match=r"prefix\.onnx\.data.*(bytes|outside)"):
        open_artifact(folder)
    with pytest.raises(VlacError, match=r"prefix\.onnx"):
        get_engine(engine).open(artifact)


@both
@pytest.mark.parametrize(
    "broken",
    [b"", b"\x00" * 100, b"not a protobuf at all", b"\xff" * 4096],
    ids=["empty", "zeros", "text", "ones"],
)
def test_a_graph_that_is_no_graph_is_an_error(engine: str, broken: bytes, folder: Path) -> None:
    (folder / "vision.onnx").write_bytes(broken)
    with pytest.raises(EngineError, match=r"vision\.onnx"):
        get_engine(engine).open(rehash(folder))


FUZZ = """
import sys
from pathlib import Path
import numpy as np
from test_onnx_engines import rehash
from onnx_artifacts import flow_inputs
from vlac.engines.base import get_engine
from vlac.errors import VlacError
folder, engine = Path(sys.argv[1]), sys.argv[2]
good = (folder / "vision.onnx").read_bytes()
rng = np.random.default_rng(0)
for i in range(60):
    bad = bytearray(good[: rng.integers(1, len(good))] if i % 3 == 0 else good)
    for at in rng.integers(0, len(bad), 3):
        bad[at] = rng.integers(256)
    (folder / "vision.onnx").write_bytes(bytes(bad))
    try:
        get_engine(engine).open(rehash(folder), threads=1).run("vision", flow_inputs(), {})
    except VlacError as error:
        assert "vision" in str(error), error
    except KeyError as error:  # the run lacks an input that a renamed port asks for
        assert engine == "onnxruntime", error
print("survived")
"""


@both
def test_garbled_graphs_never_crash(engine: str, folder: Path) -> None:
    """In a process of its own: a crash would take the test run with it."""
    path = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    run = subprocess.run(
        [sys.executable, "-c", FUZZ, str(folder), engine], capture_output=True, text=True, env={"PYTHONPATH": path}
    )
    assert run.stdout.strip() == "survived", run.stderr[-2000:]


@both
def test_missing_graphs_are_named(engine: str, folder: Path) -> None:
    artifact = open_artifact(folder)
    manifest = {**artifact.manifest, "onnx": {"vision": artifact.manifest["onnx"]["vision"]}}
    changed = Artifact(**{**vars(artifact), "manifest": manifest})
    with pytest.raises(ArtifactError, match="no graph of stage prefix"):
        get_engine(engine).open(changed)
    for broken in ([], {"vision": 5}, {"vision": {"portable": 7}}, {"vision": {"portable": "../vision.onnx"}}):
        changed = Artifact(**{**vars(artifact), "manifest": {**artifact.manifest, "onnx": broken}})
        with pytest.raises(VlacError, match=r"holds no ONNX graphs|no graph of stage vision|leaves the artifact"):
            get_engine(engine).open(changed)
    with pytest.raises(EngineError, match="holds no ONNX graphs"):
        get_engine(engine).open(Artifact(**{**vars(artifact), "manifest": {"target": "gguf-q8"}}))


@both
def test_a_stage_that_is_not_there(engine: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    session = get_engine(engine).open(open_artifact(folder), threads=1)
    with pytest.raises(EngineError, match="has no stage decode; it holds vision, prefix, flow"):
        session.run("decode", {}, {})
    assert session.run_all(flow_inputs(), {}) is None
    whole = write(flow_program(), tmp_path_factory.mktemp("single"), single_file=True)
    with pytest.raises(EngineError, match="single-file artifacts run as a whole"):
        get_engine(engine).open(whole, threads=1).run("vision", flow_inputs(), {})


@both
def test_wrong_shapes_are_an_engine_error_not_a_crash(engine: str, folder: Path) -> None:
    session = get_engine(engine).open(open_artifact(folder), threads=1)
    with pytest.raises(EngineError, match="failed in stage vision"):
        session.run("vision", {"pixels": np.zeros((3, 7, 8), np.float32)}, {})


def test_unknown_options_are_refused(folder: Path) -> None:
    artifact = open_artifact(folder)
    with pytest.raises(EngineError, match="no provider 'NoSuchProvider'"):
        get_engine("onnxruntime").open(artifact, options={"provider": "NoSuchProvider"})
    with pytest.raises(EngineError, match="precision 'f8'; there are: f32, bf16"):
        get_engine("openvino").open(artifact, options={"precision": "f8"})
    with pytest.raises(EngineError, match="no device 'ABACUS'"):
        get_engine("openvino").open(artifact, options={"device": "ABACUS"})


def test_openvino_computes_in_one_precision_and_hands_over_f32(tmp_path: Path) -> None:
    artifact = write(flow_program(dict.fromkeys(LINEARS, "int8")), tmp_path)
    precision = get_engine("openvino").open(artifact, threads=1).info["precision"]
    assert len(set(precision.values())) == 1
    handed = {t.dtype for s in artifact.program.stages for _, t in s.inputs}
    assert handed <= {"f32", "i32", "bool"}
    exact = get_engine("openvino").open(artifact, threads=1, options={"precision": "f32"}).info["precision"]
    assert set(exact.values()) == {"f32"}


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "kernels"),
    [
        ("x86_64", "flags : fpu avx2 avx512_vnni", "integer"),
        ("AMD64", "flags : fpu avx2 avx_vnni", "integer"),
        ("x86_64", "flags : fpu avx2 avx512f", "float"),
        ("x86_64", None, "float"),
        ("aarch64", "Features : fp asimd", "integer"),
    ],
)
def test_int8_products_that_would_saturate_are_avoided(
    machine: str, cpuinfo: str | None, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(onnxruntime_engine, "CPUINFO", tmp_path / "cpuinfo")
    assert onnxruntime_engine.int8_kernels() == kernels


def test_onnxruntime_with_float_activations_is_exact_in_the_decoded_weights(tmp_path: Path) -> None:
    program = flow_program(dict.fromkeys(LINEARS, "int8"))
    artifact = write(program, tmp_path)
    decoded = run_schedule(program, get_engine("numpy").open(artifact), flow_inputs())
    for kernels, bound in (("float", 2e-6), ("integer", 1.5e-2)):
        session = get_engine("onnxruntime").open(artifact, threads=1, options={"int8": kernels})
        assert session.info["int8"] == kernels
        assert relative_max(run_schedule(program, session, flow_inputs()), decoded) <= bound
    with pytest.raises(EngineError, match="int8='double'; there are: integer, linears, float"):
        get_engine("onnxruntime").open(artifact, options={"int8": "double"})


@both
def test_a_missing_engine_says_how_to_install_it(engine: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert f"{engine} is not installed; pip install" in get_engine(engine).missing()
    with pytest.raises(EngineError, match="pip install"):
        get_engine(engine).open(open_artifact(folder))


def test_telemetry_is_off_before_the_library_is_loaded(folder: Path, tmp_path: Path) -> None:
    """A stand-in for the package tells what the environment was when it was imported."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "onnxruntime.py").write_text(
        "import os, sys\nprint('seen', os.environ.get('ORT_DISABLE_TELEMETRY'))\nsys.stdout.flush()\nos._exit(0)\n"
    )
    code = (
        "from vlac.artifact import open_artifact\nfrom vlac.engines.base import get_engine\n"
        f"get_engine('onnxruntime').open(open_artifact({str(folder)!r}))"
    )
    for given, seen in ({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0"):
        env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
        paths = os.pathsep.join([str(tmp_path / "fake"), *filter(None, sys.path)])
        done = subprocess.run(
            [sys.executable, "-c", code], env={**env, **given, "PYTHONPATH": paths}, capture_output=True, text=True
        )
        assert done.stdout.split() == ["seen", seen], done.stderr


@pytest.mark.parametrize(
    ("cpu", "options", "plain"),
    [
        ("aarch64", {"kleidiai": False}, True),
        ("aarch64", {}, False),
        ("x86_64", {"kleidiai": False}, False),
        ("x86_64", {}, False),
    ],
)
def test_kleidiai_is_left_out_on_arm_when_asked(
    cpu: str, options: dict[str, bool], plain: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does to the numbers is seen on an ARM CPU (test_arm.py)."""
    given: list[bool] = []
    settings = onnxruntime_engine._settings

    def noted(*args: Any) -> Any:
        result = settings(*args)
        try:
            given.append(result.get_session_config_entry("mlas.disable_kleidiai") == "1")
        except RuntimeError:  # not set
            given.append(False)
        return result

    monkeypatch.setattr(onnxruntime_engine, "_settings", noted)
    monkeypatch.setattr(onnxruntime_engine.platform, "machine", lambda: cpu)
    session = get_engine("onnxruntime").open(open_artifact(folder), options=options)
    assert given and set(given) == {plain}
    assert session.info.get("kleidiai", True) is not plain
    assert get_engine("onnxruntime").parity_options == {"kleidiai": False}
