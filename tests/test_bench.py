"""What bench computes and judges, what the machine tells, and one real measurement in a fresh process."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlac import machine
from vlac.bench import bench, control_rate, deadline, drop_page_cache, summarise, system_delta, watched
from vlac.board.reading import Tree
from vlac.errors import ArtifactError, EngineError, InputError, Unsupported
from vlac.peers.compare import compare
from vlac.profile import profile
from vlac.report import bench_text


def test_percentiles_of_a_known_row() -> None:
    s = summarise([float(i) for i in range(101)])
    assert (s["p50"], s["p90"], s["p95"], s["p99"], s["max"]) == (50, 90, 95, 99, 100)
    assert s["mean"] == 50 and s["sd"] == pytest.approx(29.3, abs=0.01)
    assert summarise([3.0])["sd"] == 0.0


# --- what a latency means for a robot --------------------------------------------------------------------------


def test_the_control_rate_is_rows_executed_over_latency() -> None:
    rate = control_rate({"p50": 100.0, "p99": 200.0}, steps=25, rows=50)
    assert (rate["chunk_hz"], rate["control_hz"], rate["control_hz_p99"]) == (10, 250, 125)
    assert rate["control_hz_whole_chunk"] == 500 and "n_action_steps" in rate["formula"]


def test_a_chunk_is_late_when_its_rows_are_executed_before_it_ends() -> None:
    found = deadline([90.0, 110.0, 99.0, 101.0], steps=5, rate=50)
    assert isinstance(found, dict) and found["budget_ms"] == 100 and found["misses"] == 2 and found["share"] == 0.5
    low, high = found["interval95"]
    assert 0 < low < 0.5 < high < 1
    assert str(deadline([1.0], 5, None)).startswith("not available: no control rate")


def test_memory_that_a_gpu_shares_counts_once() -> None:
    looks: list[dict[str, Any]] = [{"memory": {"available": v}} for v in (900, 400, 600)]
    assert system_delta(looks) == 500
    assert system_delta([{"memory": "not available: no /proc"}]) == "not available: no /proc"


@pytest.mark.parametrize(("wrong", "named"), [({"rate": 0.0}, "--rate 0"), ({"runs": 3, "sustain": True}, "--sustain")])
def test_wishes_that_mean_nothing(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        bench("no-such-artifact", **wrong)


# --- emulation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "emulator"),
    [
        ("qemu-aarch64-static", True),
        ("qemu-x86_64-sta", True),
        ("box64", True),
        ("FEXInterpreter", True),
        ("rosetta", True),
        ("python3.11", False),
        ("qemuless", False),
    ],
)
def test_emulators_are_known_by_name(program: str, emulator: bool) -> None:
    assert machine.is_emulator(program) is emulator


X86 = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Some CPU\nflags\t\t: fpu avx2\n"
PI5 = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n"


@pytest.mark.parametrize(
    ("name", "cpuinfo", "contradicts"),
    [
        ("x86_64", X86, False),
        ("aarch64", PI5, False),
        ("aarch64", X86, True),
        ("x86_64", PI5, True),
        ("aarch64", "", False),
        ("x86_64", X86.replace("Some CPU", "QEMU TCG CPU version 2.5+"), True),
    ],
)
def test_a_cpu_of_another_kind_than_the_interpreter_is_emulated(name: str, cpuinfo: str, contradicts: bool) -> None:
    assert bool(machine.contradiction(name, cpuinfo)) is contradicts


def test_no_latency_under_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "emulation", lambda: "the program that really runs is qemu-aarch64-static")
    with pytest.raises(Unsupported, match="no latency is reported under emulation"):
        bench("nowhere")
    with pytest.raises(Unsupported, match="no latency is reported under emulation"):
        profile("nowhere")
    with pytest.raises(Unsupported, match="no latency is reported under emulation"):
        compare([], Path("nowhere"))


def test_this_machine_describes_itself() -> None:
    d = machine.describe()
    assert d["cpu"] and d["cores"] >= 1 and d["system"] and json.dumps(d)


# --- the fresh process -----------------------------------------------------------------------------------------


def test_a_watched_process_tells_how_it_ended() -> None:
    command = [sys.executable, "-c", "import sys, time; time.sleep(1.2); sys.exit('broken')"]
    code, noise, looks = watched(command, Tree())
    assert code == 1 and "broken" in noise
    assert len(looks) >= 3 and looks[-1]["t"] - looks[0]["t"] > 1.2
    assert "processes" in looks[0] and "processes" in looks[-1]


@pytest.mark.skipif(not hasattr(os, "kill") or sys.platform == "win32", reason="signals")
def test_a_process_killed_by_its_engine_is_reported() -> None:
    code, _, _ = watched([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGABRT)"], Tree())
    assert code == -6


def test_nothing_to_measure() -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        bench("no-such-artifact")
    with pytest.raises(InputError, match="--runs 0"):
        bench("no-such-artifact", runs=0)


pytest.importorskip("torch", reason="compiling this artifact wants the torch engine")

import vlac  # noqa: E402


@pytest.fixture(scope="module")
def artifact(golden: Any, tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("bench") / "f32"
    vlac.compile(golden("smolvla_tiny").checkpoint, "gguf-f32", out)
    return out


@pytest.fixture(scope="module")
def report(artifact: Path) -> dict[str, Any]:
    return bench(artifact, engine="torch", threads=1, runs=4)


def test_a_measurement_keeps_load_first_and_steady_state_apart(report: dict[str, Any]) -> None:
    assert report["engine"] == "torch" and report["runs"] == 4
    assert {"vision", "prefix", "flow", "chunk"} <= set(report["stages"])
    load = report["load"]
    assert load["to_first_chunk_ms"] > load["import_ms"] + load["load_ms"] + load["first_ms"] > 0
    chunk = report["stages"]["chunk"]
    assert chunk["p50"] <= chunk["p90"] <= chunk["p95"] <= chunk["p99"] <= chunk["max"]
    parts = sum(report["stages"][k]["mean"] for k in ("vision", "prefix", "flow"))
    assert parts <= chunk["mean"]
    assert report["rate"]["control_hz"] == pytest.approx(report["rate"]["chunk_hz"] * report["rate"]["n_action_steps"])


def test_chunks_with_something_to_reuse_are_rows_of_their_own(report: dict[str, Any]) -> None:
    assert list(report["reuse"]) == ["one_camera_new", "state_new"]
    assert all(row["p50"] > 0 for row in report["reuse"].values())
    assert "one camera new" in bench_text(report, "md") and "only the state new" in bench_text(report, "md")


def test_a_measurement_names_what_was_measured(report: dict[str, Any], artifact: Path) -> None:
    (file,) = artifact.glob("*.gguf")
    assert report["artifact"]["bytes"] == file.stat().st_size
    assert report["artifact"]["files"][file.name]["sha256"] == report["artifact"]["sha256"]
    assert report["memory"]["peak_rss_bytes"] > report["memory"]["before_load_bytes"] > 1e6
    assert report["versions"]["vlac"] == vlac.__version__ and "torch" in report["versions"]
    assert report["verdict"] in ("VALID", "INVALID", "UNVERIFIED")


def test_every_form_holds_the_same_figures(report: dict[str, Any]) -> None:
    p50 = report["stages"]["chunk"]["p50"]
    assert json.loads(bench_text(report, "json"))["stages"]["chunk"]["p50"] == p50
    rows = [json.loads(line) for line in bench_text(report, "jsonl").splitlines()]
    assert next(r for r in rows if r["phase"] == "chunk")["p50_ms"] == p50
    table = list(csv.DictReader(io.StringIO(bench_text(report, "csv"))))
    assert [r["phase"] for r in table] == list(report["stages"])
    assert float(next(r for r in table if r["phase"] == "chunk")["p50_ms"]) == p50
    text = bench_text(report, "md")
    assert report["artifact"]["sha256"] in text and text.count("\n| smolvla_tiny") == len(report["stages"])


def test_an_engine_that_is_not_there_is_refused_before_measuring(artifact: Path) -> None:
    with pytest.raises(EngineError, match="does not run on engine 'onnxruntime'"):
        bench(artifact, engine="onnxruntime", runs=1)


def test_dropping_the_page_cache_keeps_the_file(artifact: Path) -> None:
    from vlac.artifact import open_artifact

    opened = open_artifact(artifact)
    before = opened.path.read_bytes()
    assert "page cache" in drop_page_cache(opened)
    assert opened.path.read_bytes() == before


BOARD = (
    *("model", "release", "governor", "power_mode", "clock_limits_mhz", "boost", "page_size", "memory", "swap_devices"),
    *("temperature_c", "heat_limit_c", "frequency_mhz", "gpu_mhz", "throttled", "throttling", "load_average"),
    *("other_work", "swap_growth_bytes", "energy"),
)


def test_every_field_of_the_board_is_there_or_says_why_not(report: dict[str, Any]) -> None:
    for field in BOARD:
        value = report["board"][field]
        assert value is not None and value != "", field
        assert not str(value).startswith("not available") or len(str(value)) > 20, field
    assert report["deadline"].startswith("not available: no control rate")
    assert report["memory"]["major_faults"] >= 0
    assert report["steady"]["course"].startswith("not available: 4 chunks are too few")
    assert report["steady"]["reached"].startswith("not available: the run took")
    assert report["board"]["looks"]["count"] >= 2


def test_a_sustained_run_on_a_board_whose_clock_falls(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlac import steady

    monkeypatch.setattr("vlac.bench.SUSTAIN_S", 2.0)  # a busy machine may never settle
    cpufreq = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    cpufreq.mkdir(parents=True)
    (cpufreq / "scaling_max_freq").write_text("2400000\n")
    (cpufreq / "scaling_cur_freq").write_text("1500000\n")
    monkeypatch.setattr(steady, "WINDOW_S", 0.3)
    found = bench(artifact, engine="torch", threads=1, sustain=True, rate=1e5, root=tmp_path)
    assert found["steady"]["seconds"] >= 0.9 and found["steady"]["chunks"] >= found["runs"]
    assert found["deadline"]["misses"] == found["runs"] == len(found["samples_ms"]["chunk"])
    assert found["board"]["frequency_mhz"]["min"] == 1500
    assert found["verdict"] == "INVALID" and "clock moved: 1500 MHz during the run, of 2400" in " ".join(
        found["remarks"]
    )
    assert "clock 1500 MHz before" in bench_text(found, "md") and "chunk has" in bench_text(found, "md")


def test_the_report_is_plain_json(report: dict[str, Any]) -> None:
    assert np.isfinite([s["mean"] for s in report["stages"].values()]).all()
    assert json.loads(json.dumps(report)) == report
