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
from vlac.bench import bench, board_of, drop_page_cache, judge, summarise, watched
from vlac.errors import ArtifactError, EngineError, InputError, Unsupported
from vlac.report import bench_text


def test_percentiles_of_a_known_row() -> None:
    s = summarise([float(i) for i in range(101)])
    assert (s["p50"], s["p90"], s["p95"], s["p99"], s["max"]) == (50, 90, 95, 99, 100)
    assert s["mean"] == 50 and s["sd"] == pytest.approx(29.3, abs=0.01)
    assert summarise([3.0])["sd"] == 0.0


# --- may these figures be quoted? ------------------------------------------------------------------------------

QUIET = {"temperature": 50.0, "frequency": 2400.0, "throttled": 0, "load": 0.0, "swap": 0}


@pytest.mark.parametrize(
    ("changes", "verdict", "word"),
    [
        ({}, "VALID", ""),
        ({"throttled": 0x50005}, "INVALID", "throttled"),
        ({"temperature": 85.0}, "INVALID", "85 C"),
        ({"swap": 1 << 28}, "INVALID", "swap grew"),
        ({"frequency": 1500.0}, "VALID", "clock moved"),
        ({"temperature": None}, "UNVERIFIED", "temperature"),
        ({"throttled": None}, "UNVERIFIED", "throttling"),
    ],
)
def test_a_run_is_judged_by_what_the_board_told(changes: dict[str, Any], verdict: str, word: str) -> None:
    end = {**QUIET, **changes}
    start = {k: (None if end[k] is None else v) for k, v in QUIET.items()}
    seen = [start, end]
    said, remarks = judge(board_of(seen), seen, runs=200)
    assert said == verdict and (not word or any(word in r for r in remarks)), remarks


def test_sticky_throttle_bits_of_an_earlier_day_do_not_spoil_a_run() -> None:
    seen = [{**QUIET, "throttled": 0x50000}] * 2
    assert judge(board_of(seen), seen, runs=200)[0] == "VALID"


def test_other_work_on_the_machine_invalidates() -> None:
    seen = [{**QUIET, "load": 64.0 * machine.usable_cores()}, QUIET]
    said, remarks = judge(board_of(seen), seen, runs=200)
    assert said == "INVALID" and "other work" in remarks[0]


def test_few_runs_make_no_p99() -> None:
    assert any("p99 of 30 runs" in r for r in judge(board_of([QUIET]), [QUIET], runs=30)[1])


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


def test_this_machine_describes_itself() -> None:
    d = machine.describe()
    assert d["cpu"] and d["cores"] >= 1 and d["system"] and json.dumps(d)
    assert set(machine.sample()) == set(QUIET)


# --- the fresh process -----------------------------------------------------------------------------------------


def test_a_watched_process_tells_how_it_ended() -> None:
    code, noise, seen = watched([sys.executable, "-c", "import sys; sys.exit('broken')"], lambda: {"load": 1.0})
    assert code == 1 and "broken" in noise and len(seen) >= 2


@pytest.mark.skipif(not hasattr(os, "kill") or sys.platform == "win32", reason="signals")
def test_a_process_killed_by_its_engine_is_reported() -> None:
    code, _, _ = watched([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGABRT)"], dict)
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


def test_the_report_is_plain_json(report: dict[str, Any]) -> None:
    assert np.isfinite([s["mean"] for s in report["stages"].values()]).all()
    assert json.loads(json.dumps(report)) == report
