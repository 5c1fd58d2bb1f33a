"""Energy and power of a board, where a sensor can be read by any user.

Sources: Linux powercap's RAPL counters (microjoules that wrap at max_energy_range_uj), the INA3221 rails of a Jetson
(millivolts times milliamperes), the Raspberry Pi 5's power management chip (`vcgencmd pmic_read_adc`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from vlac.board.readers import is_raspberry
from vlac.board.reading import Absent, Tree

COVERS = {
    "RAPL": "the CPU packages (and DRAM where it has a counter); not the rest of the computer",
    "INA3221": "the module's input rail, or the sum of its rails where no rail is the total",
    "PMIC": "the rails of the power management chip; not what USB devices draw",
}
_TOTAL = "VDD_IN"


def read(tree: Tree) -> dict[str, Any] | Absent:
    """One look: {"source", "uj": {domain: [count, range]}} for counters or {"source", "mw": {rail: mW}} for power."""
    looks = (_rapl(tree), _ina3221(tree), _pmic(tree))
    for look in looks:
        if not isinstance(look, Absent):
            return look
    return Absent("; ".join(look.why for look in looks if isinstance(look, Absent)))


def _rapl(tree: Tree) -> dict[str, Any] | Absent:
    """Package domains, and DRAM inside them: cores and graphics are parts of a package and would count twice."""
    found, hidden = {}, ""
    for folder in tree.glob("/sys/class/powercap/intel-rapl:*"):
        name = tree.text(folder / "name")
        if not isinstance(name, str) or not name.startswith(("package", "dram")):
            continue
        count, top = tree.number(folder / "energy_uj"), tree.number(folder / "max_energy_range_uj")
        if isinstance(count, Absent):
            hidden = count.why
        else:
            found[f"{name} ({folder.name})"] = [count, top if isinstance(top, int) else 0]
    if found:
        return {"source": "RAPL", "uj": found}
    return Absent(hidden or "no RAPL counters in /sys/class/powercap")


def _ina3221(tree: Tree) -> dict[str, Any] | Absent:
    rails = {}
    for label in tree.glob("/sys/class/hwmon/hwmon*/in[0-9]*_label"):
        number = label.name[2 : -len("_label")]
        if tree.text(label.parent / "name") != "ina3221":
            continue
        name, volts = tree.text(label), tree.number(label.with_name(f"in{number}_input"))
        amperes = tree.number(label.with_name(f"curr{number}_input"))
        if isinstance(name, str) and name != "NC" and isinstance(volts, int) and isinstance(amperes, int):
            rails[name] = volts * amperes / 1000
    return {"source": "INA3221", "mw": rails} if rails else Absent("no INA3221 rails in /sys/class/hwmon")


_ADC = re.compile(r"(\w+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9.]+)[AV]")


def _pmic(tree: Tree) -> dict[str, Any] | Absent:
    if not is_raspberry(tree):
        return Absent("no Raspberry Pi's power management chip")
    text = tree.command("vcgencmd", "pmic_read_adc")
    if isinstance(text, Absent):
        return text
    values = {(m[1], m[2]): float(m[3]) for m in _ADC.finditer(text)}
    both = [(n, a, values[n, "V"]) for (n, kind), a in values.items() if kind == "A" and (n, "V") in values]
    rails = {name: 1000 * amperes * volts for name, amperes, volts in both}
    return {"source": "PMIC", "mw": rails} if rails else Absent("vcgencmd pmic_read_adc lists no rails (before a Pi 5)")


def watts(look: Mapping[str, Any]) -> float:
    """Watts of one look at power rails."""
    mw = look["mw"]
    return float(mw[_TOTAL] if _TOTAL in mw else sum(mw.values())) / 1000


def spent(times: Sequence[float], looks: Sequence[Mapping[str, Any]], start: float, end: float) -> float | Absent:
    """Joules between two moments: counters unwrapped, or power integrated by trapezes; linear between looks.

    times: seconds of the looks, ascending; all looks from one source. Absent unless they span the moments: nothing is
    extrapolated.
    """
    if len(times) < 2 or times[0] > start or times[-1] < end:
        return Absent(f"the looks at the sensor do not span the run of {end - start:.1f} s")
    import numpy as np  # the sampler, which runs beside a measurement, needs none

    joules = _counted(looks) if "uj" in looks[0] else _integrated(times, looks)
    return float(np.interp(end, times, joules) - np.interp(start, times, joules))


def _counted(looks: Sequence[Mapping[str, Any]]) -> list[float]:
    """Joules since the first look. A counter that fell has wrapped, at most once between two looks."""
    joules = [0.0]
    for before, after in pairwise(looks):
        step = 0
        for domain, (count, top) in after["uj"].items():
            moved = count - before["uj"].get(domain, (count, top))[0]
            step += moved if moved >= 0 else moved + top
        joules.append(joules[-1] + step / 1e6)
    return joules


def _integrated(times: Sequence[float], looks: Sequence[Mapping[str, Any]]) -> list[float]:
    power = [watts(look) for look in looks]
    joules = [0.0]
    for i in range(1, len(times)):
        joules.append(joules[-1] + (times[i] - times[i - 1]) * (power[i] + power[i - 1]) / 2)
    return joules
