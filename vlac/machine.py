"""What the machine is, told without root: CPU, memory, board, emulation. What moves while it works is vlac.board's.

Every reader tolerates absence: a machine that does not tell gives "" or nothing, never a guess.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from vlac.errors import Unsupported

FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX int8",
    "asimd": "NEON",
    "asimddp": "DOTPROD",
    "asimdhp": "FP16",
    "i8mm": "I8MM",
    "bf16": "BF16",
    "sve": "SVE",
}
"""Flags of /proc/cpuinfo that change which kernels run."""

_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd42": "Cortex-A78AE",
    "0xd0c": "Neoverse N1",
    "0xd40": "Neoverse V1",
    "0xd4f": "Neoverse V2",
    "0xd83": "Neoverse V3AE",
}


def read_text(path: str | Path) -> str:
    """A small file's text without NUL and outer blanks; "" when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").replace("\0", "").strip()
    except OSError:
        return ""


def _cpuinfo(text: str | None = None) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in (read_text("/proc/cpuinfo") if text is None else text).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def cpu_name() -> str:
    """The CPU as it names itself; on ARM the core's name by its part number."""
    fields = _cpuinfo()
    part = fields.get("CPU part", "")
    name = fields.get("model name") or _ARM_PARTS.get(part, f"ARM part {part}" if part else "")
    if not name and sys.platform == "darwin":
        name = _ask("sysctl", "-n", "machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Instruction sets that matter here, by the names people use."""
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return [name for flag, name in FEATURES.items() if flag in flags]


def usable_cores() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> dict[str, int]:
    """total, available and swap_used in bytes; empty where /proc/meminfo is missing."""
    rows = {}
    for line in read_text("/proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if value.split()[:1]:
            rows[key] = int(value.split()[0]) * 1024
    if "MemTotal" not in rows:
        return {}
    swap = rows.get("SwapTotal", 0) - rows.get("SwapFree", 0)
    return {"total": rows["MemTotal"], "available": rows.get("MemAvailable", 0), "swap_used": swap}


def describe() -> dict[str, Any]:
    """The machine, for a report's header."""
    return {
        "cpu": cpu_name(),
        "features": cpu_features(),
        "cores": usable_cores(),
        "memory_bytes": memory().get("total", 0),
        "system": f"{_distribution()}, kernel {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
        "governor": read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "board": _board(),
        "page_size": os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0,
    }


def _distribution() -> str:
    for line in read_text("/etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.split("=", 1)[1].strip('"')
    return platform.system()


def _board() -> str:
    model = read_text("/proc/device-tree/model")
    release = read_text("/etc/nv_tegra_release").split(",")[0]
    mode = read_text("/var/lib/nvpmodel/status")
    return ", ".join(p for p in (model, release, mode) if p)


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


# --- emulation -------------------------------------------------------------------------------------------------


def emulation() -> str:
    """How this process is emulated, or "" when it runs on the CPU itself.

    Under user-mode QEMU `platform.machine()` and /proc/cpuinfo may both tell the guest's story, but the kernel still
    knows the emulator as the running program: QEMU rewrites /proc/self/... and leaves /proc/thread-self/... alone.
    """
    for link in ("/proc/thread-self/exe", f"/proc/self/task/{os.getpid()}/exe"):
        try:
            name = Path(link).readlink().name
        except OSError:
            continue
        if is_emulator(name):
            return f"the program that really runs is {name}"
    for comm in ("/proc/thread-self/comm", "/proc/self/comm"):
        if is_emulator(read_text(comm)):
            return f"the process is called {read_text(comm)}"
    return contradiction(platform.machine(), read_text("/proc/cpuinfo")) or _rosetta()


def refuse_emulated() -> None:
    """Unsupported when this process is emulated: called before anything is timed that is then reported."""
    if how := emulation():
        raise Unsupported(f"no latency is reported under emulation: {how}", remedy="measure on the board itself")


def is_emulator(program: str) -> bool:
    """Whether a program's name is that of a CPU emulator: qemu-aarch64-static, box64, FEXInterpreter, rosetta."""
    name = program.lower()
    return name.startswith(("qemu-", "box64", "box86", "fex")) or name == "rosetta"


def contradiction(machine: str, cpuinfo: str) -> str:
    """What in /proc/cpuinfo cannot be true of `machine`; "" when they agree or the file says nothing."""
    fields = _cpuinfo(cpuinfo)
    arm, x86 = machine.lower() in ("aarch64", "arm64", "armv7l"), machine.lower() in ("x86_64", "amd64", "i686")
    if arm and "vendor_id" in fields and "CPU implementer" not in fields:
        return f"Python says {machine}, /proc/cpuinfo describes {fields.get('model name') or fields['vendor_id']}"
    if x86 and "CPU implementer" in fields and "vendor_id" not in fields:
        return f"Python says {machine}, /proc/cpuinfo describes an ARM CPU"
    if "QEMU TCG" in fields.get("model name", ""):
        return f"the CPU is {fields['model name']}"
    return ""


def _rosetta() -> str:
    if sys.platform == "darwin" and _ask("sysctl", "-in", "sysctl.proc_translated") == "1":
        return "Rosetta translates this process"
    return ""
