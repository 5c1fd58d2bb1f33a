"""scripts/test-arm where it cannot run, and its parts that need no emulator."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import arm_parity
import numpy as np
import pytest

SCRIPT = arm_parity.ROOT / "scripts" / "peers" / "arm.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None or not Path("/etc/os-release").exists(), reason="no Linux")


def prepare(tmp_path: Path, **programs: str) -> tuple[int, str]:
    """arm.sh with some programs replaced by shell lines ("" for: not there): exit code and what it said."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in ("bash", "cat", "cut", "sha256sum", "dirname", "uname", "grep", "mkdir", "awk", "df", "mktemp", "rm",
                 "tail", "apt-get", "dpkg", "python3"):  # fmt: skip
        if name in programs:
            if programs[name]:
                (bin_ / name).write_text(f"#!/bin/sh\n{programs[name]}\n")
                (bin_ / name).chmod(0o755)
        elif there := shutil.which(name):
            (bin_ / name).symlink_to(there)
    env = {"PATH": str(bin_), "HOME": str(tmp_path), "VLAC_ARM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [shutil.which("bash") or "", str(SCRIPT)], env=env, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


X86 = 'case "$1" in -s-m|-sm) echo "Linux x86_64";; -s) echo Linux;; *) echo x86_64;; esac'


@pytest.mark.parametrize(
    ("programs", "words"),
    [
        ({"uname": 'case "$1" in -s) echo Linux;; *) echo aarch64;; esac'}, "this is Linux on aarch64"),
        ({"uname": 'case "$1" in -s) echo Darwin;; *) echo arm64;; esac'}, "this is Darwin on arm64"),
        ({"uname": X86, "apt-get": ""}, "no apt-get"),
        ({"uname": X86, "apt-get": "exit 0", "dpkg": "exit 0", "grep": "exit 1"}, "for Debian 12's packages"),
        (
            {"uname": X86, "apt-get": "exit 0", "dpkg": "exit 0", "grep": "exit 0", "df": "echo; echo / 9 9 4096 9 /"},
            "less than 800 MB free",
        ),
        (
            {"uname": X86, "apt-get": "echo no network >&2; exit 100", "dpkg": "exit 0", "grep": "exit 0"},
            "QEMU cannot be fetched",
        ),
    ],
)
def test_where_it_cannot_run_it_says_why_and_leaves_nothing(
    tmp_path: Path, programs: dict[str, str], words: str
) -> None:
    code, said = prepare(tmp_path, **programs)
    assert code == 3
    assert said.splitlines()[-1].startswith("ARM is not tested here: ")
    assert words in said
    assert not list((tmp_path / "cache").glob("*"))


def test_cpus_are_described_as_they_are_emulated() -> None:
    """DOTPROD in /proc/cpuinfo and none in the CPU is an illegal instruction; SME is left out by name."""
    cpus = arm_parity.cpus()
    assert set(cpus) >= {"pi4", "pi5", "orin", "thor"}
    for qemu, features in cpus.values():
        assert ("asimddp" in features) == (qemu != "cortex-a72")
        assert ("i8mm" in features) == qemu.startswith("max")
        assert "sme" not in features
        assert not qemu.startswith("max") or "sme=off" in qemu


SDOT, UDOT = 0x4E829420, 0x6E829420  # v0.4s, v1.16b, v2.16b
SDOT_BY_ELEMENT, UDOT_BY_ELEMENT = 0x4F82E020, 0x6F82E020  # v0.4s, v1.16b, v2.4b[0]
ADD, MUL = 0x4EA28420, 0x4EA29C20


def test_a_wrong_kernel_is_one_with_signs_exchanged(tmp_path: Path) -> None:
    """Only in what is executed: a table that looks like an instruction stays as it is."""
    code = np.array([SDOT, ADD, UDOT, SDOT_BY_ELEMENT, UDOT_BY_ELEMENT, MUL], "<u4").tobytes()
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, 2)
    at = 64 + 2 * 56
    segments = [struct.pack("<IIQQQQQQ", 1, flags, at + i * 24, 0, 0, 24, 24, 1) for i, flags in enumerate((5, 4))]
    (tmp_path / "a").write_bytes(bytes(header) + b"".join(segments) + code + code)
    os.link(tmp_path / "a", tmp_path / "b")
    assert arm_parity.wrong_dot_products(tmp_path / "a", tmp_path / "b") == 4
    words = np.frombuffer((tmp_path / "b").read_bytes()[at:], "<u4").tolist()
    assert words[:6] == [UDOT, ADD, SDOT, UDOT_BY_ELEMENT, SDOT_BY_ELEMENT, MUL]
    assert words[6:] == np.frombuffer(code, "<u4").tolist()
    assert (tmp_path / "a").read_bytes().endswith(code + code), "the library it was linked to stays whole"


@pytest.mark.parametrize("have", [None, np.array([1.0, np.nan]), np.array([1.0]), np.array([1.0, 2.1])])
def test_an_answer_that_is_missing_or_no_number_is_wrong(have: np.ndarray | None) -> None:
    want = np.array([1.0, 2.0])
    runs = {"onnxruntime ops": {"x": "there"}}
    info = {"runs": {"onnxruntime ops": {}}}
    ours = arm_parity.Answers({"onnxruntime ops/norms": want}, info)
    theirs = arm_parity.Answers({} if have is None else {"onnxruntime ops/norms": have}, info)
    (row,) = arm_parity.compare("pi5", ours, theirs, runs)
    assert not row.ok
    assert "!" in arm_parity.table([row])
    assert arm_parity.compare("pi5", ours, ours, runs)[0].ok
