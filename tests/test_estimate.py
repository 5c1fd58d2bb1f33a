"""Counts of a program, the table of devices, the roofline, and the prediction for the machine at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlac import cli
from vlac.errors import InputError, Unsupported
from vlac.estimate.costs import Costs
from vlac.estimate.devices import MARKS, Unit, device, devices
from vlac.estimate.roofline import fits, multiplied, seconds
from vlac.work import Piece, StageWork, stage_works, work

ASKED = ("pi4", "pi5", "orin-nano", "orin-nx", "agx-orin", "thor", "x86-avx2", "x86-avx512")


# --- the table ---------------------------------------------------------------------------------------------------


def test_every_figure_of_the_table_has_a_mark_and_a_source() -> None:
    rows = json.loads((Path(cli.__file__).parents[1] / "estimate" / "devices.json").read_text())
    assert set(ASKED) <= set(rows) == set(devices())
    for key, row in rows.items():
        assert row["name"] and row["ram_gb"] and "cpu" in row["units"], key
        for unit in row["units"].values():
            for figure in (*unit["gops"].values(), unit["bandwidth"]):
                assert figure[0] > 0 and figure[1] in MARKS and len(figure[2]) > 5, key
            for low, high, mark, source in (unit["achieved"], unit["achieved_bandwidth"]):
                assert 0 < low < high <= 1 and mark in MARKS and len(source) > 5, key


def test_an_unknown_device_is_refused_with_those_there_are() -> None:
    with pytest.raises(Unsupported, match=r"no device 'pi3'.*pi4, pi5.*x86-avx512"):
        device("pi3")


# --- arithmetic --------------------------------------------------------------------------------------------------

UNIT = Unit("cpu", 4, {"f32": 100.0, "f16": 200.0, "int8": 400.0}, 10.0, (0.25, 0.5), (0.5, 1.0), ())


def piece(op: str = "linear", macs: int = 0, form: str = "f32", weights: int = 0, values: int = 0) -> Piece:
    return Piece(op, 2, 16, 64, macs, form, weights, values, False)


def test_a_node_takes_its_arithmetic_or_its_bytes() -> None:
    computing = StageWork("s", 1, (piece(macs=10**9, form="int8"),), 2, 0)
    low, high = seconds(UNIT, computing)
    assert low == pytest.approx(2 / 200, rel=1e-3) and high == pytest.approx(2 / 100, rel=1e-2)
    moving = StageWork("s", 1, (piece(macs=10, weights=10**9),), 2, 0)
    low, high = seconds(UNIT, moving)
    assert low == pytest.approx(0.1, rel=1e-3) and high == pytest.approx(0.2, rel=1e-2)
    assert seconds(UNIT, computing, share=0.5)[0] == pytest.approx(2 / 100, rel=1e-3)


def test_small_nodes_cost_their_overhead() -> None:
    low, high = seconds(UNIT, StageWork("s", 1, (piece(),) * 100, 2, 0))
    assert low == pytest.approx(50e-6) and high == pytest.approx(800e-6)


@pytest.mark.parametrize(
    ("op", "form", "cpu", "gpu"),
    [
        ("linear", "int8", "int8", "int8"),
        ("linear", "q4_k", "int8", "int8"),
        ("linear", "f16", "f16", "f16"),
        ("linear", "bf16", "f32", "f16"),
        ("linear", "f32", "f32", "f32"),
        ("attention", "f32", "f32", "f16"),
    ],
)
def test_what_is_multiplied(op: str, form: str, cpu: str, gpu: str) -> None:
    assert (multiplied(piece(op, form=form)), multiplied(piece(op, form=form), "gpu")) == (cpu, gpu)


def test_what_fits() -> None:
    pi = device("pi5")
    assert fits(pi, (10**9, int(1.1e9))) == {"2": "fits", "4": "fits", "8": "fits", "16": "fits"}
    assert fits(pi, (int(1.1e9), int(3e9))) == {"2": "tight", "4": "tight", "8": "fits", "16": "fits"}
    assert fits(pi, (int(5e9), int(9e9)))["2"] == "does not fit"


def test_costs_lie_between_what_was_measured() -> None:
    costs = Costs(
        linear={"f32": {64: {1: 1e-6, 16: 4e-6}, 256: {1: 16e-6, 16: 64e-6}}},
        attention={3: [(1e6, 1e-3), (4e6, 4e-3)]},
        op={"add": (1e-6, 1000, 11e-6, 11000), "index": (5e-6, 100, 5e-6, 101)},
        call=1e-3,
        node=1e-6,
        first=(2e-6,),
    )

    def linear(rows: int, width: int) -> Piece:
        return Piece("linear", 2, rows, width, rows * width * width, "f32", 0, 0, False)

    assert costs.piece(linear(16, 64)) == pytest.approx(4e-6)
    assert costs.piece(linear(4, 64)) == pytest.approx(2e-6)
    assert costs.piece(linear(16, 128)) == pytest.approx(16e-6)
    assert costs.piece(linear(32, 256)) == pytest.approx(128e-6)
    assert costs.piece(Piece("attention", 3, 1, 1, 2_000_000, "f32", 0, 0, False)) == pytest.approx(2e-3)
    assert costs.piece(Piece("mystery", 1, 1, 1, 0, "f32", 0, 6000, False)) == pytest.approx(6e-6)
    assert costs.piece(Piece("cumsum", 1, 1, 1, 0, "f32", 0, 100, True)) == pytest.approx(5e-6)
    stage = StageWork("s", 10, (linear(16, 64),) * 2, 3, 0)
    assert costs.stage(stage) == pytest.approx(10 * (1e-3 + 8e-6 + 2e-6) + 4e-6)


# --- on artifacts ------------------------------------------------------------------------------------------------

pytest.importorskip("torch", reason="compiling this artifact wants the torch engine")

import vlac  # noqa: E402
from vlac.artifact import open_artifact  # noqa: E402


@pytest.fixture(scope="module")
def artifact(golden: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("estimate") / "q8"
    vlac.compile(golden("smolvla_tiny").checkpoint, "gguf-q8", out, goldens=1)
    return out


def run(*args: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.app([str(a) for a in args])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_pieces_add_up_to_the_work_of_the_program(artifact: Path) -> None:
    program = open_artifact(artifact).program
    totals = work(program)
    works = stage_works(program)
    assert {w.name for w in works} == set(totals)
    for w in works:
        assert w.runs * sum(p.macs for p in w.pieces) == totals[w.name].macs
    assert next(w for w in works if w.name == "flow").runs > 1
    assert {p.format for w in works for p in w.pieces} > {"q8_0", "f32"}


@pytest.mark.parametrize("key", ASKED)
def test_an_estimate_is_a_range(key: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("estimate", artifact, "--device", key, "--json", capsys=capsys)
    report = json.loads(out)
    assert code == 0 and report["is"].startswith("an estimate")
    for unit in report["units"]:
        low, high = unit["chunk_ms"]
        assert 0 < low < high and unit["control_hz"][0] < unit["control_hz"][1]
        assert sum(v[0] for v in unit["stages_ms"].values()) == pytest.approx(low)
        assert all(any(mark in s for mark in MARKS) for s in unit["sources"])
    assert set(report["memory"]["fits"].values()) == {"fits"} if key != "pi4" else True
    text = run("estimate", artifact, "--device", key, capsys=capsys)[1]
    assert "an estimate, not a measurement" in text and "GMAC" in text and "GB fits" in text


def test_more_threads_are_not_slower(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, four = (
        json.loads(run("estimate", artifact, "--device", "pi5", "--threads", n, "--json", capsys=capsys)[1])
        for n in (1, 4)
    )
    assert one["units"][0]["chunk_ms"][0] > four["units"][0]["chunk_ms"][0]
    assert (one["units"][0]["cores"], four["units"][0]["cores"]) == (1, 4)


def test_refusals(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("estimate", artifact, "--device", "toaster", capsys=capsys)
    assert code == 2 and "no device 'toaster'" in err and "orin-nano-super" in err
    assert run("estimate", artifact, capsys=capsys)[0] == 2
    assert run("estimate", artifact, "--device", "pi5", "--calibrate", capsys=capsys)[0] == 2
    assert run("estimate", artifact, "--device", "pi5", "--engine", "ggml", capsys=capsys)[0] == 2
    from vlac.estimate.calibrate import calibrate

    with pytest.raises(InputError, match="--runs 0"):
        calibrate(artifact, runs=0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of a second: the sizes of a tiny model, measured briefly."""
    from vlac.estimate import probe, stages

    monkeypatch.setattr(stages, "WIDTHS", (64, 256))
    monkeypatch.setattr(stages, "ROWS", (1, 16, 128))
    monkeypatch.setattr(stages, "ATTENTION", ((16, 64), (64, 128)))
    monkeypatch.setattr(probe, "LEAST_S", 0.002)
    monkeypatch.setattr(probe, "ROUNDS", 3)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "target",
    ["gguf-q8", *(pytest.param(t, marks=pytest.mark.slow) for t in ("onnx-fp32", "onnx-int8", "openvino-int8"))],
)
def test_a_prediction_beside_the_measurement(target: str, golden: Any, tmp_path: Path) -> None:
    from vlac.engines.base import get_engine
    from vlac.estimate.calibrate import calibrate, text

    engine = {"gguf-q8": "ggml", "onnx-fp32": "onnxruntime", "onnx-int8": "onnxruntime"}.get(target, "openvino")
    if why := get_engine(engine).missing():
        pytest.skip(why)
    vlac.compile(golden("smolvla_tiny").checkpoint, target, tmp_path / "out", goldens=1)
    report = calibrate(tmp_path / "out", engine=engine, threads=1, runs=3)
    # how close it is, benchmarks/estimate.py measures; here only that nothing is off by an order of magnitude
    assert 0.2 < report["ratio"] < 5, text(report)
    assert report["clock"] == "CPU time of one thread" and report["costs"]["stream_gb_s"] > 0.1
    assert set(report["stages"]) == {s.stage for s in open_artifact(tmp_path / "out").program.schedule.steps}
    assert "predicted" in text(report) and json.loads(json.dumps(report)) == report
