"""Readers of a board: each gives a value, or Absent with the reason; none needs root.

Sources: Documentation/ABI of the Linux kernel (cpufreq, thermal, powercap, hwmon), Raspberry Pi's `vcgencmd
get_throttled`, NVIDIA's nvpmodel and devfreq nodes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vlac.board.reading import Absent, Tree, first

PI_BITS = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
    16: "under-voltage since boot",
    17: "frequency capped since boot",
    18: "throttled since boot",
    19: "soft temperature limit since boot",
}
"""Bits of get_throttled. The since-boot ones may be cleared by the kernel's own polling: sample during the run too."""

_CPU = "/sys/devices/system/cpu"


# --- what stands still -------------------------------------------------------------------------------------------


def model(tree: Tree) -> str | Absent:
    """The board or the computer, as firmware names it."""
    vendor, product = (tree.text(f"/sys/class/dmi/id/{n}") for n in ("sys_vendor", "product_name"))
    dmi: str | Absent = f"{vendor} {product}" if isinstance(vendor, str) and isinstance(product, str) else product
    return first(tree.text("/proc/device-tree/model"), dmi)


def system_release(tree: Tree) -> str | Absent:
    """A Jetson's L4T release line."""
    text = tree.text("/etc/nv_tegra_release")
    return text if isinstance(text, Absent) else ", ".join(p.strip(" #") for p in text.split(",")[:2])


def is_raspberry(tree: Tree) -> bool:
    """Whether the device tree names a Raspberry Pi."""
    return "raspberry pi" in str(model(tree)).lower()


def governor(tree: Tree) -> str | Absent:
    """The cpufreq governor; where cores differ, each core's."""
    files = tree.glob(f"{_CPU}/cpu[0-9]*/cpufreq/scaling_governor")
    if not files:
        return _no_cpufreq()
    names = [tree.text(f) for f in files]
    if len({str(n) for n in names}) == 1:
        return names[0]
    return ", ".join(f"{f.parents[1].name} {n}" for f, n in zip(files, names, strict=True))


def _no_cpufreq() -> Absent:
    return Absent(f"{_CPU}/cpu*/cpufreq is missing (a virtual machine, or a kernel without a cpufreq driver)")


def power_mode(tree: Tree) -> str | Absent:
    """The power budget that is set: nvpmodel's mode on a Jetson, the platform profile or energy preference on a PC."""
    if not isinstance(system_release(tree), Absent):
        return first(_nvpmodel_asked(tree), _nvpmodel_status(tree))
    profile = tree.text("/sys/firmware/acpi/platform_profile")
    wish = tree.text(f"{_CPU}/cpu0/cpufreq/energy_performance_preference")
    told = [
        f"{name} {text}"
        for name, text in (("platform profile", profile), ("energy preference", wish))
        if isinstance(text, str)
    ]
    return ", ".join(told) or Absent("no nvpmodel (Jetson), no platform profile, no energy preference")


def _nvpmodel_asked(tree: Tree) -> str | Absent:
    text = tree.command("nvpmodel", "-q")
    if isinstance(text, Absent):
        return text
    name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if "Power Mode:" in line), "")
    number = next((line.strip() for line in reversed(text.splitlines()) if line.strip().isdigit()), "?")
    return f"nvpmodel {number} {name}" if name else Absent("nvpmodel -q names no mode")


def _nvpmodel_status(tree: Tree) -> str | Absent:
    """The mode that nvpmodel's service wrote down ("pmode:0002"), with its name from nvpmodel.conf."""
    text = tree.text("/var/lib/nvpmodel/status")
    if isinstance(text, Absent):
        return text
    number = text.rpartition(":")[2].strip()
    if not number.isdigit():
        return Absent(f"/var/lib/nvpmodel/status holds {text[:40]!r}")
    conf = tree.text("/etc/nvpmodel.conf")
    for line in conf.splitlines() if isinstance(conf, str) else ():
        words = dict(w.split("=", 1) for w in line.replace("<", " ").replace(">", " ").split() if "=" in w)
        if line.lstrip().startswith("< POWER_MODEL") and words.get("ID") == str(int(number)):
            return f"nvpmodel {int(number)} {words.get('NAME', '')}".strip()
    return f"nvpmodel {int(number)}"


def clock_limits(tree: Tree) -> dict[str, float] | Absent:
    """MHz that the fastest core may run at: min, max (as set now), hardware_max."""
    found = {}
    for name, file in (
        ("min", "scaling_min_freq"),
        ("max", "scaling_max_freq"),
        ("hardware_max", "cpuinfo_max_freq"),
    ):
        values = [tree.number(f) for f in tree.glob(f"{_CPU}/cpu[0-9]*/cpufreq/{file}")]
        known = [v / 1000 for v in values if isinstance(v, int)]
        if known:
            found[name] = max(known)
    return found or _no_cpufreq()


def boost(tree: Tree) -> str | Absent:
    """Whether the clock may rise above what it can hold."""
    for file, on in (("intel_pstate/no_turbo", "0"), ("cpufreq/boost", "1")):
        text = tree.text(f"{_CPU}/{file}")
        if isinstance(text, str):
            return "on" if text == on else "off"
    return Absent("neither intel_pstate/no_turbo nor cpufreq/boost is there")


def page_size(tree: Tree) -> int | Absent:
    """Bytes of a memory page (16 KiB on a Pi 5's default kernel); a copied tree tells its own in /proc/self/smaps."""
    if str(tree.root) == "/":
        return os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else Absent("this system has no sysconf")
    text = tree.text("/proc/self/smaps")
    for line in text.splitlines() if isinstance(text, str) else ():
        if line.startswith("KernelPageSize:"):
            return int(line.split()[1]) * 1024
    return Absent("/proc/self/smaps tells no KernelPageSize")


def memory(tree: Tree) -> dict[str, int] | Absent:
    """Bytes: total, available, swap_total, swap_used."""
    text = tree.text("/proc/meminfo")
    if isinstance(text, Absent):
        return text
    rows = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if value.split()[:1] and value.split()[0].isdigit():
            rows[key] = int(value.split()[0]) * 1024
    if not {"MemTotal", "MemAvailable"} <= set(rows):
        return Absent("/proc/meminfo has no MemTotal and MemAvailable")
    swap = rows.get("SwapTotal", 0)
    return {
        "total": rows["MemTotal"],
        "available": rows["MemAvailable"],
        "swap_total": swap,
        "swap_used": swap - rows.get("SwapFree", 0),
    }


def swap_devices(tree: Tree) -> list[str] | Absent:
    """Where swap lies: names such as /dev/zram0, /swapfile; none without swap."""
    text = tree.text("/proc/swaps")
    return text if isinstance(text, Absent) else [line.split()[0] for line in text.splitlines()[1:] if line.split()]


# --- what moves --------------------------------------------------------------------------------------------------


def cpu_clocks(tree: Tree) -> list[float] | Absent:
    """Every core's present clock in MHz."""
    files = tree.glob(f"{_CPU}/cpu[0-9]*/cpufreq/scaling_cur_freq")
    if not files:
        return _no_cpufreq()
    values = [tree.number(f) for f in files]
    known = [v / 1000 for v in values if isinstance(v, int)]
    return known or next(v for v in values if isinstance(v, Absent))


def gpu_clock(tree: Tree) -> float | Absent:
    """An integrated GPU's present clock in MHz, where it is a devfreq device (Jetson)."""
    for file in tree.glob("/sys/class/devfreq/*/cur_freq"):
        if any(word in file.parent.name for word in ("gpu", "ga10b", "gb10b", "gv11b", "gp10b")):
            value = tree.number(file)
            return value / 1e6 if isinstance(value, int) else value
    return Absent("no GPU among /sys/class/devfreq")


_CHIPS = ("cpu", "soc", "gpu", "tj", "pkg", "core", "package")
_SENSORS = ("k10temp", "coretemp", "zenpower", "cpu_thermal")


def temperatures(tree: Tree) -> dict[str, float] | Absent:
    """Thermal zones of the chip in degrees Celsius (all zones where none says that it is the chip's)."""
    zones: dict[str, float] = {}
    for file in tree.glob("/sys/class/thermal/thermal_zone*/temp"):
        name, value = tree.text(file.parent / "type"), tree.number(file)
        if isinstance(value, int) and 0 < value < 150_000:
            zones[str(name) if isinstance(name, str) else file.parent.name] = value / 1000
    chips = {k: v for k, v in zones.items() if any(word in k.lower() for word in _CHIPS)}
    if chips:
        return chips
    for file in tree.glob("/sys/class/hwmon/hwmon*/temp1_input"):
        name, value = tree.text(file.parent / "name"), tree.number(file)
        if str(name) in _SENSORS and isinstance(value, int):
            return {str(name): value / 1000}
    return zones or Absent("no thermal zone and no CPU temperature among /sys/class/hwmon")


def heat_limit(tree: Tree) -> float | Absent:
    """Degrees Celsius at which this machine slows itself down: 80 on a Raspberry Pi, else its lowest passive trip."""
    if is_raspberry(tree):
        return 80.0
    trips = []
    for file in tree.glob("/sys/class/thermal/thermal_zone*/trip_point_*_type"):
        value = tree.number(file.with_name(file.name.replace("_type", "_temp")))
        if tree.text(file) == "passive" and isinstance(value, int) and value > 0:
            trips.append(value / 1000)
    return min(trips) if trips else Absent("no thermal zone has a passive trip point")


def throttling(tree: Tree) -> dict[str, int] | Absent:
    """Whatever tells of slowing down: "get_throttled" (bits), "count ..." (since boot), "state ..." (of a cooler)."""
    found: dict[str, int] = {}
    pi = _get_throttled(tree)
    if isinstance(pi, int):
        found["get_throttled"] = pi
    for kind in ("core", "package"):
        # the package's counter is repeated in each of its cores; cores have their own
        counts = [tree.number(f) for f in tree.glob(f"{_CPU}/cpu[0-9]*/thermal_throttle/{kind}_throttle_count")]
        known = [c for c in counts if isinstance(c, int)]
        if known:
            found[f"count {kind}"] = sum(known) if kind == "core" else max(known)
    for file in tree.glob("/sys/class/hwmon/hwmon*/oc*_event_cnt"):
        value = tree.number(file)
        if isinstance(value, int):
            found[f"count over-current {file.name.split('_')[0]}"] = value
    for file in tree.glob("/sys/class/thermal/cooling_device*/cur_state"):
        name, state = str(tree.text(file.parent / "type")), tree.number(file)
        if isinstance(state, int) and any(w in name.lower() for w in ("cpufreq", "throttle", "processor", "devfreq")):
            found[f"state {name}"] = max(state, found.get(f"state {name}", 0))
    if found:
        return found
    reasons = [pi.why] if isinstance(pi, Absent) and is_raspberry(tree) else []
    return Absent("; ".join([*reasons, "no throttle counters, over-current counters or CPU cooling devices in /sys"]))


def _get_throttled(tree: Tree) -> int | Absent:
    if not is_raspberry(tree):
        return Absent("no Raspberry Pi")
    files = [f for p in ("soc", "soc@*", "*") for f in tree.glob(f"/sys/devices/platform/{p}/*firmware/get_throttled")]
    text = first(*(tree.text(f) for f in files[:1])) if files else Absent("no get_throttled in /sys/devices/platform")
    if isinstance(text, Absent):
        said = tree.command("vcgencmd", "get_throttled")
        text = first(text, said.partition("=")[2] if isinstance(said, str) else said)
    if isinstance(text, Absent):
        return text
    try:
        return int(text, 16)
    except ValueError:
        return Absent(f"get_throttled says {text[:40]!r}")


def pi_flags(bits: int) -> list[str]:
    """Names of the bits that are set."""
    return [name for bit, name in PI_BITS.items() if bits >> bit & 1]


def cpu_ticks(tree: Tree) -> float | Absent:
    """Seconds that all CPUs together have worked since boot (user, nice, system, interrupts)."""
    text = tree.text("/proc/stat")
    if isinstance(text, Absent):
        return text
    fields: Sequence[str] = text.splitlines()[0].split()[1:]
    if len(fields) < 7:
        return Absent("/proc/stat has no cpu line")
    try:
        busy = sum(int(fields[i]) for i in (0, 1, 2, 5, 6))
    except ValueError:
        return Absent(f"/proc/stat begins with {text[:40]!r}, no numbers")
    return busy / (os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100)


def processes(tree: Tree) -> dict[str, tuple[str, float]]:
    """pid -> name and CPU seconds of every process that can be read."""
    found = {}
    rate = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    for file in tree.root.glob("proc/[0-9]*/stat"):
        text = tree.text(file)
        if isinstance(text, str) and ")" in text:
            head, _, tail = text.rpartition(")")
            fields = tail.split()
            if len(fields) > 12 and fields[11].isdigit() and fields[12].isdigit():
                found[file.parent.name] = (head.partition("(")[2], (int(fields[11]) + int(fields[12])) / rate)
    return found


def load_average(tree: Tree) -> float | Absent:
    """Tasks that wanted a CPU over the last minute."""
    text = tree.text("/proc/loadavg")
    if isinstance(text, Absent):
        return text
    try:
        load = float(text.split()[0])
    except ValueError:
        load = math.nan
    return load if math.isfinite(load) else Absent(f"/proc/loadavg begins with {text[:40]!r}, no number")


def describe(tree: Tree) -> Mapping[str, Any]:
    """Everything that is set, not sampled."""
    return {
        "model": model(tree),
        "release": system_release(tree),
        "governor": governor(tree),
        "power_mode": power_mode(tree),
        "clock_limits_mhz": clock_limits(tree),
        "boost": boost(tree),
        "page_size": page_size(tree),
        "memory": memory(tree),
        "swap_devices": swap_devices(tree),
    }
