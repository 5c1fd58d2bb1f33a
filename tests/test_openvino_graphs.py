"""What is done to OpenVINO's graphs before they are compiled: known shapes, and moves that a loop makes once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_cases import CASES

import vlac
from vlac.artifact import Artifact, open_artifact
from vlac.engines import openvino_engine
from vlac.engines.base import get_engine
from vlac.engines.openvino_graphs import changing_inputs, keep_bf16, set_shapes, split
from vlac.goldens import synthetic
from vlac.runtime.inputs import prepared
from vlac.runtime.session import execute

openvino, onnx = pytest.importorskip("openvino"), pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:the task is longer")


def test_weights_behind_a_reshape_stay_int8_when_rows_become_known(tmp_path: Path) -> None:
    codes = np.arange(128 * 128).reshape(128, 128).astype(np.int8)
    constants = {"shape": np.array([-1, 128]), "codes": codes, "scales": np.full(128, 0.01, np.float32)}
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["rows"]),
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=1),
        helper.make_node("MatMul", ["rows", "w"], ["y"]),
    ]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ["N", 4, 32]), ("y", ["N", 128]))]
    graph = helper.make_graph(
        nodes, "toy", made[:1], made[1:], [numpy_helper.from_array(v, k) for k, v in constants.items()]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "x.onnx")

    def held(known: bool) -> str:
        """The type of the product's weights after the model's rows are set to 8."""
        model = openvino.Core().read_model(tmp_path / "x.onnx")
        if known:
            set_shapes(model, {"x": [8, 4, 32]})
        else:
            model.reshape([8, 4, 32])
        asked = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}
        ran = openvino.Core().compile_model(model, "CPU", asked).get_runtime_model().get_ordered_ops()
        product = next(n for n in ran if n.get_rt_info()["layerType"].value == "FullyConnected")
        return str(product.input_value(1).get_element_type().to_string())

    assert held(known=True) == "i8"
    assert held(known=False) == "f32"  # when this fails, Model.reshape can be had back


def _chunks(artifact: Artifact, precision: str) -> list[np.ndarray[Any, Any]]:
    """Of observations that differ in everything, the first one twice, from one session."""
    session = get_engine("openvino").open(artifact, threads=1, options={"precision": precision})
    seen = synthetic(artifact.io, 2, seed=5)
    found = []
    for one in (*seen, seen[0]):
        given = prepared(artifact.io, artifact.tokenizer, artifact.program, one)
        found.append(execute(artifact.program, session, given.env, given.symbols))
    return found


# family -> what a loop's products read of the prefix: keys and values of its layers
MOVED = {"smolvla_tiny": 8, "pi0_tiny": 6, "pi0fast_tiny": 6, "groot_n17_tiny": 6}


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("family", MOVED)
def test_moves_made_once_leave_the_bits(family: str, precision: str, tmp_path: Path, monkeypatch: Any) -> None:
    case = CASES[family]
    vlac.compile(case.checkpoint, "openvino-int8", tmp_path / "out", goldens=0, **case.options)
    artifact, found = open_artifact(tmp_path / "out"), []

    def counted(*args: Any) -> Any:
        found.append(split(*args))
        return found[-1]

    monkeypatch.setattr(openvino_engine, "split", counted)
    chunks = _chunks(artifact, precision)
    assert [len(f.before.get_results()) for f in found if f] == [MOVED[family]]
    names = {n for i in found[0].stage.inputs for n in i.get_names()}
    assert sum(n.endswith("/moved") for n in names) == MOVED[family]
    monkeypatch.setattr(openvino_engine, "split", lambda *args: None)
    for chunk, whole in zip(chunks, _chunks(artifact, precision), strict=True):
        assert np.array_equal(chunk, whole)
    assert np.array_equal(chunks[0], chunks[2]) and not np.array_equal(chunks[0], chunks[1])


def test_bfloat16_weights_are_not_held_in_float32_too() -> None:
    """A bias or GELU behind a product keeps it as it was: these are part of its kernel."""
    from openvino import Model, Tensor, Type, op, opset13

    rng = np.random.default_rng(0)

    def weight(*shape: int) -> Any:
        bits = rng.standard_normal(shape, np.float32).view(np.uint32) >> 16
        tensor = Tensor(Type.bf16, list(shape))
        tensor.data.view(np.uint16)[:] = bits
        return opset13.convert(op.Constant(tensor), "f32")

    def held(model: Any) -> list[str]:
        products = (n for n in model.get_ordered_ops() if n.get_type_name() == "MatMul")
        return [p.input_value(1).get_element_type().to_string() for p in products]

    x = opset13.parameter([8, 64], np.float32)
    plain = opset13.matmul(x, weight(64, 96), False, False)
    turned = opset13.matmul(opset13.tanh(plain), weight(64, 96), False, True)
    biased = opset13.add(
        opset13.matmul(turned, weight(64, 32), False, False), opset13.constant(np.ones(32, np.float32))
    )
    gelu = opset13.gelu(opset13.matmul(biased, weight(32, 32), False, False), "tanh")
    scores = opset13.matmul(gelu, biased, False, True)
    model = Model([opset13.result(scores)], [x], "toy")
    ask = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 1}
    given = rng.standard_normal((8, 64), np.float32)
    whole = openvino.Core().compile_model(model.clone(), "CPU", ask)(given)[0]
    assert held(model) == ["f32"] * 5
    assert keep_bf16(model) == 2
    assert sorted(held(model)) == ["bf16", "bf16", "f32", "f32", "f32"]
    assert keep_bf16(model) == 0
    kept = openvino.Core().compile_model(model, "CPU", ask)(given)[0]
    assert np.linalg.norm(kept - whole) <= 2e-2 * np.linalg.norm(whole)


def test_only_what_a_loop_leaves_alone_is_taken() -> None:
    """Keys from outside and keys of the turn, joined; values of the turn alone; and a sum that is no move."""
    from openvino import Model, opset13

    x = opset13.parameter([4, 6], np.float32, name="x")
    prefix = opset13.parameter([-1, 6], np.float32, name="prefix")
    scales = opset13.parameter([-1, 6], np.float32, name="scales")
    for p, name in ((x, "x"), (prefix, "prefix"), (scales, "scales")):
        p.output(0).set_names({name})

    def heads(rows: Any, order: list[int]) -> Any:
        return opset13.transpose(opset13.reshape(rows, [-1, 2, 3], True), order)

    keys = heads(opset13.concat([prefix, opset13.relu(x)], 0), [1, 2, 0])
    scores = opset13.matmul(heads(x, [1, 0, 2]), keys, False, False)
    values = heads(opset13.concat([opset13.add(prefix, scales), opset13.relu(x)], 0), [1, 0, 2])
    model = Model([opset13.result(opset13.matmul(scores, values, False, False))], [x, prefix, scales], "toy")
    rng = np.random.default_rng(0)
    given = {"x": rng.standard_normal((4, 6), np.float32)}
    given |= {n: rng.standard_normal((5, 6), np.float32) for n in ("prefix", "scales")}
    core = openvino.Core()
    ask = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    whole = core.compile_model(model.clone(), "CPU", ask)(given)[0]

    assert split(model.clone(), {"x", "prefix"}, "f32") is None
    parts = split(model, {"x"}, "f32")
    assert parts is not None
    assert [next(iter(i.get_names())) for i in parts.before.inputs] == ["prefix"]
    assert len(parts.before.get_results()) == 1
    moved = core.compile_model(parts.before, "CPU", ask)(given["prefix"])[0]
    assert np.array_equal(moved, given["prefix"].reshape(5, 2, 3).transpose(1, 2, 0))
    stage = core.compile_model(parts.stage, "CPU", ask)
    names = [next(iter(i.get_names())) for i in stage.inputs]
    assert len(names) == 4 and names[-1].endswith("/moved")
    assert np.array_equal(stage([*(given[n] for n in names[:-1]), moved])[0], whole)


def test_changing_inputs_are_the_loops_own(tmp_path: Path) -> None:
    case = CASES["smolvla_tiny"]
    vlac.compile(case.checkpoint, "openvino-int8", tmp_path / "out", goldens=0, **case.options)
    program = open_artifact(tmp_path / "out").program
    assert changing_inputs(program, "flow") == {"step", "x"}
    assert changing_inputs(program, "prefix") is None
