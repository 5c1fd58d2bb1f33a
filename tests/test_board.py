"""Boards that are folders: every reader on a Pi 4, a Pi 5, an Orin and a laptop; summaries, energy, verdicts, steps."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_files import BOARDS, CPU, write_board

from vlac import steady
from vlac.board import energy, readers, sampler
from vlac.board.reading import Absent, Tree
from vlac.board.summary import Run, slowest_used, summarise
from vlac.board.verdict import judge


@pytest.fixture
def board(tmp_path: Path) -> Callable[[str], Tree]:
    return lambda name: Tree(write_board(tmp_path / name, BOARDS[name]))


EXPECTED: dict[str, dict[str, Any]] = {
    "pi4": {
        "model": "Raspberry Pi 4 Model B Rev 1.4",
        "governor": "ondemand",
        "power_mode": "not available",
        "clock_limits_mhz": {"min": 450.0, "max": 1800.0, "hardware_max": 1800.0},
        "swap_devices": ["/dev/zram0"],
        "page_size": 16384,
        "temperature_c": {"cpu-thermal": 48.199},
        "throttling": {"get_throttled": 0x50000},
        "heat_limit": 80.0,
        "energy": "not available",
    },
    "pi5": {
        "model": "Raspberry Pi 5 Model B Rev 1.0",
        "throttling": {"get_throttled": 0},
        "heat_limit": 80.0,
        "energy": {"source": "PMIC", "mw": {"3V7_WL_SW": 370.0, "VDD_CORE": 2000.0}},
    },
    "orin": {
        "model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "release": "R36 (release), REVISION: 4.3",
        "power_mode": "nvpmodel 2 MAXN_SUPER",
        "governor": "schedutil",
        "gpu_mhz": 1020.0,
        "temperature_c": {"cpu-thermal": 52.3, "tj-thermal": 54.1},
        "heat_limit": 99.0,
        "throttling": {"count over-current oc1": 4, "state cpu-throttle-alert": 0},
        "swap_devices": [],
        "energy": {"source": "INA3221", "mw": {"VDD_IN": 10000.0, "VDD_CPU_GPU_CV": 4000.0, "VDD_SOC": 2000.0}},
    },
    "laptop": {
        "model": "LENOVO 21C1",
        "power_mode": "platform profile balanced, energy preference balance_performance",
        "boost": "on",
        "temperature_c": {"x86_pkg_temp": 71.0},
        "heat_limit": 100.0,
        "throttling": {"count core": 24, "count package": 7},
        "gpu_mhz": "not available",
        "energy": {"source": "RAPL", "uj": {"package-0 (intel-rapl:0)": [262143000000, 262143328850]}},
    },
}


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_tells_what_it_has(name: str, board: Callable[[str], Tree]) -> None:
    tree = board(name)
    told = {**readers.describe(tree), **sampler.look(tree), "heat_limit": readers.heat_limit(tree)}
    for key, want in EXPECTED[name].items():
        if want == "not available":
            assert str(told[key]).startswith("not available: ") and len(str(told[key])) > 25, key
        elif isinstance(want, dict):
            assert json.loads(json.dumps(told[key])) == pytest.approx(want) if key != "energy" else True
            assert key != "energy" or told[key]["source"] == want["source"]
            power = "mw" if key == "energy" and "mw" in want else None
            assert power is None or told[key]["mw"] == pytest.approx(want["mw"])
        else:
            assert told[key] == want, key


def test_what_a_user_may_not_read_says_so(board: Callable[[str], Tree], monkeypatch: pytest.MonkeyPatch) -> None:
    tree = board("laptop")
    counter = tree.path("/sys/class/powercap/intel-rapl:0/energy_uj")
    real = Path.read_text

    def guarded(path: Path, *args: Any, **kwargs: Any) -> str:
        if path == counter:
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)
    said = str(energy.read(tree))
    assert said.startswith("not available: /sys/class/powercap/intel-rapl:0/energy_uj is not readable by this user")


def test_an_empty_machine_answers_every_question_with_a_reason(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    told = {**readers.describe(tree), **sampler.look(tree)}
    for key, value in told.items():
        if key not in ("t", "own_s"):
            assert str(value).startswith("not available: "), key


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "is empty"), ("fast\n", "no number"), ("\xff\x00", "no number")],
)
def test_a_broken_file_is_a_reason_not_a_crash(tmp_path: Path, text: str, says: str) -> None:
    tree = Tree(write_board(tmp_path, {f"{CPU}/cpu0/cpufreq/scaling_cur_freq": text}))
    assert says in str(readers.cpu_clocks(tree))


def test_a_command_that_fails_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree(write_board(tmp_path, {"usr/bin/bad": "#!/bin/sh\necho no rights >&2; exit 3\n"}))
    assert str(tree.command("bad", "-q")) == "not available: bad -q: no rights"
    write_board(tmp_path, {"usr/bin/slow": "#!/bin/sh\nexec sleep 5\n"})
    monkeypatch.setattr("vlac.board.reading.ANSWER_S", 0.1)
    assert "gave no answer" in str(tree.command("slow"))
    assert "is not there" in str(tree.command("vcgencmd"))


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (0x0, []),
        (0x1, ["under-voltage"]),
        (0x50005, ["under-voltage", "throttled", "under-voltage since boot", "throttled since boot"]),
        (0x8, ["soft temperature limit"]),
    ],
)
def test_get_throttled_bits(bits: int, names: list[str]) -> None:
    assert readers.pi_flags(bits) == names


# --- energy ------------------------------------------------------------------------------------------------------


def counts(*values: int, top: int = 1000) -> list[dict[str, Any]]:
    return [{"source": "RAPL", "uj": {"package-0": [v, top]}} for v in values]


def test_a_counter_that_wraps_goes_on() -> None:
    # 900 -> 1000 is 100, and 50 more after the wrap
    assert energy.spent([0, 1], counts(900, 50), 0, 1) == pytest.approx(150e-6)
    assert energy.spent([0, 1, 2], counts(100, 400, 600), 0.5, 2) == pytest.approx(350e-6)


def test_power_is_integrated_and_nothing_is_extrapolated() -> None:
    looks = [{"source": "INA3221", "mw": {"VDD_IN": p, "VDD_SOC": 9e9}} for p in (2000.0, 4000.0, 4000.0)]
    assert energy.spent([0, 1, 3], looks, 0, 3) == pytest.approx(3 + 8)
    assert isinstance(energy.spent([0, 1, 3], looks, 0, 3.1), Absent)
    rails = [{"source": "INA3221", "mw": {"VDD_GPU_SOC": 1500.0, "VDD_CPU_CV": 500.0}}] * 2
    assert energy.spent([0, 2], rails, 0, 2) == pytest.approx(4)


# --- summaries and verdicts --------------------------------------------------------------------------------------


def course(tree: Tree, changes: dict[int, dict[str, Any]] | None = None, count: int = 12) -> list[dict[str, Any]]:
    """Looks every half second from t=0 on; changes from that look on."""
    others = (changes or {}).get(-1, {}).get("others", 0.0)
    base, looks = json.loads(json.dumps(sampler.look(tree), default=str)), []
    for i in range(count):
        base = {**base, **(changes or {}).get(i, {})}
        looks.append({**base, "t": i * 0.5, "own_s": 0.001 * i, "busy_s": base["busy_s"]})
    for i, look in enumerate(looks):
        look["busy_s"] = 100.0 + 0.5 * i * (1 + others)
    looks[0]["processes"] = {"1": ["init", 1.0], "9": ["chrome", 5.0]}
    looks[-1]["processes"] = {
        "1": ["init", 1.0],
        "9": ["chrome", 5.0 + (changes or {}).get(-1, {}).get("others", 0.0) * 5],
    }
    return looks


RUN = Run(start=1.0, end=5.0, threads=4, chunks=8, cpu_s=4.0)


def judged(tree: Tree, changes: dict[int, dict[str, Any]] | None = None) -> tuple[dict[str, Any], str, str]:
    found = summarise(tree, course(tree, changes), RUN, readers.describe(tree))
    verdict, remarks = judge(found, 200)
    return json.loads(json.dumps(found)), verdict, " ".join(remarks)


@pytest.mark.parametrize(
    ("name", "changes", "verdict", "word"),
    [
        ("pi5", {}, "VALID", ""),
        ("orin", {}, "VALID", ""),
        ("laptop", {}, "VALID", ""),
        ("pi5", {5: {"throttling": {"get_throttled": 0x50005}}}, "INVALID", "under-voltage, throttled"),
        ("pi5", {5: {"throttling": {"get_throttled": 0x20000}}}, "INVALID", "frequency capped since boot"),
        ("pi5", {5: {"cpu_mhz": [1500.0] * 4}}, "INVALID", "clock moved: 1500 MHz during the run, of 2400"),
        ("pi5", {5: {"cpu_mhz": [1500.0, 2400.0, 2400.0, 2400.0]}}, "INVALID", "clock moved"),
        ("pi5", {5: {"temperature_c": {"cpu-thermal": 83.0}}}, "INVALID", "temperature reached 83.0 C (limit 80"),
        ("laptop", {5: {"temperature_c": {"x86_pkg_temp": 83.0}}}, "VALID", ""),
        ("laptop", {5: {"cpu_mhz": [2500.0] * 8}}, "INVALID", "clock moved"),
        ("laptop", {5: {"throttling": {"count core": 25, "count package": 7}}}, "INVALID", "core throttled 1 times"),
        ("orin", {5: {"throttling": {"count over-current oc1": 6}}}, "INVALID", "over-current oc1 throttled 2 times"),
        ("orin", {5: {"throttling": {"state cpu-throttle-alert": 1}}}, "INVALID", "slowed down to state 1"),
        ("pi5", {-1: {"others": 0.5}}, "INVALID", "other work took 50 % of a core; most: chrome"),
        ("pi5", {-1: {"others": 0.05}}, "VALID", ""),
        ("pi5", {i: {"throttling": "not available: x"} for i in range(12)}, "UNVERIFIED", "throttling"),
        ("pi5", {i: {"temperature_c": "not available: x"} for i in range(12)}, "UNVERIFIED", "temperature"),
        ("pi5", {i: {"busy_s": "not available: x"} for i in range(12)}, "VALID", ""),
    ],
)
def test_a_run_is_judged_by_what_the_board_told(
    name: str, changes: dict[int, dict[str, Any]], verdict: str, word: str, board: Callable[[str], Tree]
) -> None:
    _, said, remarks = judged(board(name), changes)
    assert said == verdict and word in remarks, remarks


def test_sticky_bits_of_an_earlier_day_do_not_spoil_a_run(board: Callable[[str], Tree]) -> None:
    tree = board("pi4")
    looks = course(tree)
    for look in looks:
        look["cpu_mhz"] = [1800.0] * 4
    found = summarise(tree, looks, RUN, readers.describe(tree))
    assert judge(found, 200)[0] == "VALID"
    assert found["throttled"]["flags"]["start"] == ["under-voltage since boot", "throttled since boot"]
    assert found["throttling"]["meaning"] == []


def test_swap_that_grows(board: Callable[[str], Tree]) -> None:
    tree = board("pi4")
    more = {**readers.describe(tree)["memory"], "swap_used": 1 << 26}
    found, verdict, remarks = judged(tree, {4: {"memory": more, "cpu_mhz": [1800.0] * 4}})
    assert found["swap_growth_bytes"] == 1 << 26 and verdict == "INVALID" and "swap grew by 67 MB" in remarks


def test_before_during_and_after_are_apart(board: Callable[[str], Tree]) -> None:
    found, _, _ = judged(board("pi4"), {2: {"cpu_mhz": [1800.0] * 4}, 11: {"cpu_mhz": [900.0] * 4}})
    clock = found["frequency_mhz"]
    assert (clock["start"], clock["min"], clock["max"], clock["end"]) == (600, 1800, 1800, 900)


def test_energy_of_a_chunk(board: Callable[[str], Tree]) -> None:
    found, _, _ = judged(board("orin"))
    assert found["energy"]["joules_per_chunk"] == pytest.approx(10 * 4 / 8)
    assert found["energy"]["watts"] == pytest.approx(10) and found["energy"]["source"] == "INA3221"
    top = 262143328850
    wrapped = {7: {"energy": {"source": "RAPL", "uj": {"package-0 (intel-rapl:0)": [8_000_000 - 328850, top]}}}}
    found, _, _ = judged(board("laptop"), wrapped)
    assert found["energy"]["joules_per_chunk"] == pytest.approx(1.0)


def test_short_runs_claim_nothing_about_others_and_energy(board: Callable[[str], Tree]) -> None:
    tree = board("orin")
    short = Run(1.1, 1.3, 1, 10, 0.2)
    found = summarise(tree, course(tree), short, readers.describe(tree))
    assert "shorter than 2 s" in found["other_work"] and "shorter than 2 s" in found["energy"]
    assert found["looks"]["during"] == 1 and judge(found, 10)[0] == "UNVERIFIED"


def test_idle_cores_may_sleep() -> None:
    assert slowest_used([600, 2400, 600, 2300], 2) == 2300
    assert slowest_used([600, 2400], 4) == 600


# --- steps and drifts --------------------------------------------------------------------------------------------


def latencies(levels: list[tuple[int, float]], noise: float, seed: int = 0) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(seed)
    times = np.concatenate([level * (1 + noise * rng.standard_normal(n)) for n, level in levels])
    return list(np.cumsum(times) / 1e3), list(times)


def test_a_boost_that_ends_is_a_step() -> None:
    ends, times = latencies([(60, 20.0), (90, 27.0)], 0.05)
    times[20] = 500.0  # one slow chunk is none
    found = steady.course(ends, times)
    assert isinstance(found, dict) and found["kind"] == "step"
    assert found["at_s"] == pytest.approx(1.2, abs=0.1) and found["ratio"] == pytest.approx(1.35, abs=0.03)


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_step(seed: int) -> None:
    assert steady.course(*latencies([(100, 20.0)], 0.1, seed)) == {"kind": "even"}


def test_a_slow_rise_is_a_drift() -> None:
    times = list(np.linspace(20, 30, 100))
    found = steady.course(list(np.cumsum(times) / 1e3), times)
    assert isinstance(found, dict) and found["kind"] == "drift" and found["ratio"] > 1.2


def test_a_run_settles_when_its_last_windows_agree() -> None:
    ends, times = latencies([(50, 20.0), (200, 27.0)], 0.01)
    at = steady.settled(ends, times, window_s=1.0)
    assert at is not None and at >= 50
    assert steady.settled(ends[:80], times[:80], window_s=0.5) is None
    assert steady.settled([], [], 1.0) is None


# --- the process that looks --------------------------------------------------------------------------------------


def test_the_sampler_looks_until_it_is_told_to_end(board: Callable[[str], Tree], tmp_path: Path) -> None:
    tree, out = board("pi5"), tmp_path / "looks.jsonl"
    command = [sys.executable, "-m", "vlac.board.sampler", str(out), str(tree.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == b"looking\n"
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
        time.sleep(1.3)
        process.stdin.close()
        assert process.wait(10) == 0
    looks = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(looks) >= 3 and looks[0]["processes"]["77"] == ["compile this", 5.0]
    assert looks[1]["throttling"] == {"get_throttled": 0} and looks[1]["energy"]["source"] == "PMIC"


@pytest.mark.parametrize("name", BOARDS)
@pytest.mark.parametrize("seed", range(12))
def test_files_that_vanish_break_or_change_during_a_run(name: str, seed: int, tmp_path: Path) -> None:
    """Whatever a board's files say, and say a moment later: figures or reasons, never a crash or a NaN."""
    rng = random.Random(f"{name} {seed}")
    root = write_board(tmp_path / name, BOARDS[name])
    tree, looks = Tree(root), []
    about = readers.describe(tree)
    for i in range(9):
        for file in rng.sample(sorted(BOARDS[name]), rng.randrange(1, 8)):
            path, text = root / file, BOARDS[name][file]
            if path.exists():
                path.chmod(0o644)
            say = rng.choice(
                ["", "garbage\n", "-1\n", "99999999999999999999\n", "nan\n", "0x\n", "\x00\xff", text, text]
            )
            path.unlink() if path.exists() and rng.random() < 0.3 else path.write_text(say, encoding="utf-8")
            if path.exists() and rng.random() < 0.2:
                path.chmod(0)  # which root reads all the same
        about = readers.describe(tree) if i == 4 else about
        looks.append({**json.loads(json.dumps(sampler.look(tree), default=str)), "t": i * 0.5})
    for run in (RUN, Run(start=1.1, end=1.2, threads=1, chunks=1, cpu_s=0.1)):
        found = summarise(tree, looks, run, about)
        verdict, remarks = judge(found, 200)
        text = json.dumps(found, allow_nan=False)
        assert verdict in ("VALID", "INVALID", "UNVERIFIED") and all(isinstance(r, str) for r in remarks)
        assert "null" not in text.replace('"null"', "")
