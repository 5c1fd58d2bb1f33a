"""ARM CPUs, emulated (scripts/peers/arm.sh): vlac and the aarch64 wheels give the answers of this machine, and a kernel
that is wrong is noticed."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import arm_parity
import pytest

READY = (arm_parity.where() / "ready").is_file()
pytestmark = [
    pytest.mark.arm,
    pytest.mark.skipif(not READY, reason="no emulated ARM here: scripts/peers/arm.sh makes it, or says why it cannot"),
]
CPUS = tuple(arm_parity.cpus())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arm")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    return arm_parity.compile_policies(folder) | arm_parity.write_ops(folder / "ops")


@pytest.fixture(scope="module")
def ours(folder: Path, runs: dict[str, Any]) -> arm_parity.Answers:
    return arm_parity.here(folder, runs)


@pytest.fixture(scope="module")
def theirs(folder: Path, runs: dict[str, Any]) -> dict[str, arm_parity.Answers]:
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        return dict(zip(CPUS, pool.map(lambda n: arm_parity.emulated(n, folder, runs), CPUS), strict=True))


@pytest.fixture(scope="module")
def wrong(folder: Path) -> Path:
    """A place before the wheels, with onnxruntime and ggml in which SDOT and UDOT are exchanged."""
    site, place = arm_parity.where() / "site", folder / "wrong"
    for package, libraries in (("transcribe_cpp_native", "libggml-cpu-*.so"), ("onnxruntime", "*.so*")):
        shutil.copytree(site / package, place / package, copy_function=os.link)
        files = sorted((site / package).rglob(libraries))
        changed = {f.name: arm_parity.wrong_dot_products(f, place / f.relative_to(site)) for f in files}
        assert sum(changed.values()) > 100, changed
        assert changed.get("libggml-cpu-armv8.0_1.so", 0) == 0
    return place


@pytest.fixture(scope="module")
def show(theirs: dict[str, arm_parity.Answers], ours: arm_parity.Answers, runs: dict[str, Any]) -> None:
    rows = [row for name in CPUS for row in arm_parity.compare(name, ours, theirs[name], runs)]
    print("\n" + arm_parity.table(rows))


@pytest.mark.usefixtures("show")
@pytest.mark.parametrize("cpu", CPUS)
def test_the_answers_are_those_of_this_machine(
    cpu: str, theirs: dict[str, arm_parity.Answers], ours: arm_parity.Answers, runs: dict[str, Any]
) -> None:
    rows = arm_parity.compare(cpu, ours, theirs[cpu], runs)
    assert len(rows) == len(arm_parity.POLICIES) + 1 + 2 * 11 + 26
    assert [r for r in rows if not r.ok] == []


@pytest.mark.parametrize(
    ("cpu", "library"),
    [("pi4", "armv8.0_1"), ("pi5", "armv8.2_2"), ("orin", "armv8.2_2"), ("thor", "armv8.6_2")],
)
def test_ggml_takes_the_kernels_of_the_cpu(
    cpu: str, library: str, theirs: dict[str, arm_parity.Answers], ours: arm_parity.Answers
) -> None:
    assert theirs[cpu].info["runs"]["gguf-q8"]["cpu_library"] == f"libggml-cpu-{library}.so"


def test_the_guest_knows_that_it_is_emulated(theirs: dict[str, arm_parity.Answers], ours: arm_parity.Answers) -> None:
    assert all("qemu" in a.info["emulated"] and a.info["machine"] == "aarch64" for a in theirs.values())
    assert not ours.info["emulated"]


def test_no_latency_is_reported_under_emulation(folder: Path, runs: dict[str, Any]) -> None:
    done = guest(folder, "-m", "vlac.cli", "bench", runs["onnx-fp32"]["path"])
    assert done.returncode == 2
    assert "no latency is reported under emulation" in done.stderr


def guest(folder: Path, *arguments: str, cpu: str = "pi5") -> subprocess.CompletedProcess[str]:
    python, env = arm_parity.guest(cpu, folder)
    return subprocess.run(
        [*python, *arguments], env={**os.environ, **env}, capture_output=True, text=True, timeout=1800, check=False
    )


def ops(runs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in runs.items() if "x" in v}


def test_a_wrong_kernel_is_noticed(folder: Path, runs: dict[str, Any], ours: arm_parity.Answers, wrong: Path) -> None:
    """Told to trust it, ggml runs its wrong kernels; every format that multiplies 8 bits is found, and no other."""
    there = arm_parity.emulated("pi5", folder, ops(runs), site=wrong, VLAC_ARM_TRUST="1")
    bad = {(r.run, r.op) for r in arm_parity.compare("pi5", ours, there, ops(runs)) if not r.ok}
    quantised = ("q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "iq4_nl")
    assert {op for run, op in bad if run == "ggml ops"} == {f"linear_{f}_{n}" for f in quantised for n in (70, 17, 1)}
    assert {f"linear_int8_{n}" for n in (70, 17, 1)} <= {op for run, op in bad if run == "onnxruntime ops"}
    assert not [op for _, op in bad if "f32" in op or "f16" in op or op in ("attention", "norms")]


def test_a_wrong_library_is_not_used(folder: Path, runs: dict[str, Any], ours: arm_parity.Answers, wrong: Path) -> None:
    """Its self-test refuses the variants with wrong dot products, and the one without gives the right answers."""
    asked = {"ggml ops": runs["ggml ops"]}
    there = arm_parity.emulated("pi5", folder, asked, site=wrong, XDG_CACHE_HOME=str(folder / "anew"))
    assert there.info["runs"]["ggml ops"]["cpu_library"] == "libggml-cpu-armv8.0_1.so"
    assert [r for r in arm_parity.compare("pi5", ours, there, asked) if not r.ok] == []
