"""The engine tensorrt and `vlac build` on a stand-in for a GPU: memory is the host's, plans run in ONNX Runtime.

What this shows is vlac's side: which plan when, what is uploaded, how the loop is captured and launched again. That
TensorRT and CUDA do what their documentation says is left to scripts/on-device/jetson.sh.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import CASES, Case

import vlac
from vlac import plans
from vlac.engines import tensorrt_build, tensorrt_engine
from vlac.errors import EngineError

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::vlac.errors.VlacWarning")

NUMPY = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}


class Device:
    """Stands for vlac.engines.cuda_driver.Cuda, and counts."""

    last: Device

    def __init__(self) -> None:
        self.stream = 7
        self.memory: dict[int, Any] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.noted: list[Callable[[], None]] | None = None
        self.sent = self.launches = self.captures = 0
        Device.last = self

    def do(self, what: Callable[[], None]) -> None:
        what() if self.noted is None else self.noted.append(what)

    def enter(self) -> None: ...

    def wait(self) -> None:
        assert self.noted is None, "a stream that captures cannot be waited for"

    def allocate(self, size: int) -> int:
        buffer = ctypes.create_string_buffer(max(size, 1))
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, pointer: int) -> None:
        del self.memory[pointer]

    def upload(self, pointer: int, array: Any) -> None:
        assert self.noted is None and array.flags.c_contiguous
        self.sent += array.nbytes
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)

    def download(self, array: Any, pointer: int) -> None:
        assert self.noted is None
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def copy(self, into: int, pointer: int, size: int) -> None:
        self.do(lambda: ctypes.memmove(into, pointer, size) and None)

    def begin_capture(self) -> None:
        self.noted = []
        self.captures += 1

    def end_capture(self) -> int:
        assert self.noted is not None
        self.graphs[self.captures], self.noted = self.noted, None
        return self.captures

    def launch(self, graph: int) -> None:
        self.launches += 1
        for what in self.graphs[graph]:
            what()

    def drop(self, graph: int) -> None:
        del self.graphs[graph]

    def close(self) -> None:
        assert not self.memory and not self.graphs


class Context:
    def __init__(self, path: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.at: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.at[name] = pointer
        return name in [v.name for v in (*self.session.get_inputs(), *self.session.get_outputs())]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def execute_async_v3(self, stream: int) -> bool:
        shapes = dict(self.shapes)

        def run() -> None:
            feed = {}
            for i in self.session.get_inputs():
                kind, count = np.dtype(NUMPY[i.type]), int(np.prod(shapes[i.name]))
                data = (ctypes.c_char * (count * kind.itemsize)).from_address(self.at[i.name])
                feed[i.name] = np.frombuffer(data, kind).reshape(shapes[i.name]).copy()
            names = [o.name for o in self.session.get_outputs()]
            for name, made in zip(names, self.session.run(names, feed), strict=True):
                ctypes.memmove(self.at[name], np.ascontiguousarray(made).ctypes.data, made.nbytes)

        Device.last.do(run)
        return True


def stand_in(version: str) -> types.ModuleType:
    """A module named tensorrt with what vlac calls of it; plans hold the path of their graph."""
    trt: Any = types.ModuleType("tensorrt")
    trt.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    trt.__version__ = version
    trt.built = []

    class Logger:
        WARNING = 2

        def __init__(self, level: int) -> None: ...

    class Cache:
        def serialize(self) -> bytes:
            return b"timings"

    class Config:
        def __getattr__(self, name: str) -> Any:
            return lambda *a, **k: Cache()

    class Builder:
        def __init__(self, logger: Logger) -> None: ...
        def create_network(self, flags: int) -> Any:
            assert flags == 1 << 1
            return types.SimpleNamespace(path="")

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Any:
            return types.SimpleNamespace(set_shape=lambda name, least, best, most: None)

        def build_serialized_network(self, network: Any, config: Config) -> bytes:
            trt.built.append(Path(network.path).stem)
            return str(network.path).encode()

    class OnnxParser:
        def __init__(self, network: Any, logger: Logger) -> None:
            self.network = network

        def parse_from_file(self, path: str) -> bool:
            self.network.path = path
            return True

    class Runtime:
        def __init__(self, logger: Logger) -> None: ...
        def deserialize_cuda_engine(self, data: bytes) -> Any:
            return types.SimpleNamespace(create_execution_context=lambda: Context(data.decode()))

    trt.Logger, trt.Builder, trt.OnnxParser, trt.Runtime = Logger, Builder, OnnxParser, Runtime
    trt.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=1)
    trt.MemoryPoolType = types.SimpleNamespace(WORKSPACE=0)
    trt.BuilderFlag = types.SimpleNamespace(TF32=1)
    return trt


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """board(gpu=, sm=, version=): from here on this machine has that GPU and TensorRT."""

    def become(gpu: str = "Orin (nvgpu)", sm: int = 87, version: str = "10.3.0") -> Any:
        monkeypatch.setattr(tensorrt_build, "gpu", lambda ordinal=0: (gpu, sm))
        monkeypatch.setattr(tensorrt_engine, "Cuda", Device)
        monkeypatch.setitem(sys.modules, "tensorrt", stand_in(version))
        return sys.modules["tensorrt"]

    yield become


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    def get(name: str, target: str, trt: str = "10.3") -> Path:
        case = CASES[name]
        out = tmp_path_factory.mktemp("engine") / "out"
        path = vlac.compile(case.checkpoint, target, out, goldens=1, trt=trt, **case.options).path
        assert path is not None
        return path

    return get


def answers(path: Path, case: Case, engine: str, **more: Any) -> list[Any]:
    with vlac.load(path, engine=engine, threads=1, options={"reuse": False}) as policy:
        return [policy.act(**case.observation(i), **more) for i in case.observations]


def near(a: Any, b: Any) -> bool:
    """Equal but for the order of sums, which the engine's own session options change."""
    return bool(np.abs(a - b).max() <= 2e-3 * np.abs(b).max())


def test_plans_and_chunks(compiled: Callable[..., Path], board: Callable[..., Any]) -> None:
    case, path = CASES["smolvla_tiny"], compiled("smolvla_tiny", "tensorrt-fp16")
    trt = board()
    with pytest.raises(EngineError, match="has no plans yet"):
        vlac.load(path)
    report = plans.build(path)
    assert report["built"] and report["key"] == "Orin-nvgpu-sm87-trt10.3.0"
    assert trt.built == ["flow", "flow_once", "prefix", "prefix_state", "vision"]
    assert "Orin (nvgpu) (sm_87), TensorRT 10.3.0 built" in plans.text(report)
    names = {p.name for p in (path / "prepared" / "tensorrt").iterdir()}
    assert names == {f"{s}.{report['key']}.plan" for s in trt.built} | {
        f"{report['key']}{e}" for e in (".json", ".cache")
    }
    for found, told in zip(answers(path, case, "tensorrt"), answers(path, case, "onnxruntime"), strict=True):
        assert near(found, told)
    assert len(trt.built) == 5
    assert not plans.build(path)["built"] and plans.build(path, force=True)["built"]


def test_the_loop_is_captured_once_for_its_shapes(compiled: Callable[..., Path], board: Callable[..., Any]) -> None:
    case, path = CASES["smolvla_tiny"], compiled("smolvla_tiny", "tensorrt")
    board()
    plans.build(path)
    asked = case.observation(0)
    noise = [np.random.default_rng(i).standard_normal(asked["noise"].shape).astype(np.float32) for i in range(4)]
    with vlac.load(path, engine="onnxruntime", threads=1) as policy:
        told = [policy.act(**{**asked, "noise": x}) for x in noise]
        short = policy.act(**asked, n_actions=2)
    with vlac.load(path) as policy:
        assert policy.info["engine"] == "tensorrt" and policy.info["cuda_graphs"]
        found = [policy.act(**{**asked, "noise": x}) for x in noise]
        device = Device.last
        assert (device.captures, device.launches) == (1, 3)
        before = device.sent
        policy.act(**{**asked, "noise": noise[0]})
        assert device.sent - before < 4096  # noise and masks; the prefix's keys and values lie there already
        assert near(policy.act(**asked, n_actions=2), short)
        assert (device.captures, len(device.graphs)) == (2, 1)
    assert all(near(a, b) for a, b in zip(found, told, strict=True))
    with vlac.load(path, options={"graphs": False}) as policy:
        again = [policy.act(**{**asked, "noise": x}) for x in noise]
        assert Device.last.captures == 0
    assert all(near(a, b) for a, b in zip(again, told, strict=True))


def test_tokens_are_picked_turn_by_turn(compiled: Callable[..., Path], board: Callable[..., Any]) -> None:
    case, path = CASES["pi0fast_tiny"], compiled("pi0fast_tiny", "tensorrt")
    board()
    plans.build(path)
    for i, chunk in zip(case.observations, answers(path, case, "tensorrt"), strict=True):
        assert np.abs(chunk - case.answer(i)).max() <= 1e-4


def test_another_gpu_or_version_builds_again(compiled: Callable[..., Path], board: Callable[..., Any]) -> None:
    case, path = CASES["tinyvla_tiny"], compiled("tinyvla_tiny", "tensorrt-int8")
    board()
    plans.build(path)
    for change in ({"version": "10.7.0"}, {"gpu": "Thor", "sm": 110}):
        trt = board(**change)
        answers(path, case, "tensorrt")
        assert trt.built == ["policy", "vision"]
        answers(path, case, "tensorrt")
        assert trt.built == ["policy", "vision"]
    (plan,) = (path / "prepared" / "tensorrt").glob("vision.Thor-*.plan")
    plan.write_bytes(b"cut short")
    answers(path, case, "tensorrt")
    assert trt.built == ["policy", "vision"] * 2
    manifest = path / "manifest.json"
    changed = {**json.loads(manifest.read_text(encoding="utf-8")), "checksum": "of another artifact"}
    assert not tensorrt_build.ready(path, changed, "Thor-sm110-trt10.3.0")


@pytest.mark.parametrize(
    ("target", "trt", "machine", "why"),
    [
        ("tensorrt-fp8", "10.3", {"sm": 87}, "compute capability 8.7, tensorrt-fp8 needs 8.9"),
        ("tensorrt-int4", "10.3", {"sm": 75, "gpu": "T4"}, "T4 has compute capability 7.5, tensorrt-int4 needs 8.0"),
        ("tensorrt-fp16", "10.16", {}, "TensorRT 10.3.0 does not read dialect 10.16; compile with --trt 10.3"),
        ("tensorrt-fp16", "10.3", {"version": "8.6.2"}, "TensorRT 8.6.2 does not read dialect 10.3"),
    ],
)
def test_what_this_board_cannot(
    target: str, trt: str, machine: Any, why: str, compiled: Callable[..., Path], board: Callable[..., Any]
) -> None:
    path = compiled("tinyvla_v1_tiny", target, trt)
    board(**machine)
    with pytest.raises(EngineError, match=why.replace(".", r"\.")):
        plans.build(path)
    with pytest.raises(EngineError, match=why.replace(".", r"\.")):
        vlac.load(path)
    assert not (path / "prepared").exists()


def test_a_build_that_fails_leaves_no_plan(
    compiled: Callable[..., Path], board: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = compiled("tinyvla_v1_tiny", "tensorrt")
    trt = board()
    monkeypatch.setattr(trt.Builder, "build_serialized_network", lambda self, network, config: None)
    with pytest.raises(EngineError, match=r"builds no plan of policy\.onnx"):
        plans.build(path)
    assert not tensorrt_build.ever_built(path)
    with pytest.raises(EngineError, match="has no plans yet"):
        vlac.load(path)
