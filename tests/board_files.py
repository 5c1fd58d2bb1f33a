"""Folders that stand for boards: the files that a Pi 4, a Pi 5, a Jetson Orin and an x86 laptop show to any user."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

CPU = "sys/devices/system/cpu"
MEMORY = "MemTotal: {total} kB\nMemFree: 1000 kB\nMemAvailable: {free} kB\nSwapTotal: {swap} kB\nSwapFree: {swap} kB\n"
STAT = "cpu  1000 0 500 90000 20 0 10 0 0 0\n"


def cores(count: int, governor: str, now: int, top: int) -> dict[str, str]:
    return {
        f"{CPU}/cpu{i}/cpufreq/{name}": f"{value}\n"
        for i in range(count)
        for name, value in (
            ("scaling_governor", governor),
            ("scaling_cur_freq", now),
            ("scaling_min_freq", top // 4),
            ("scaling_max_freq", top),
            ("cpuinfo_max_freq", top),
        )
    }


def common(total: int, free: int, swap: int = 0) -> dict[str, str]:
    return {
        "proc/meminfo": MEMORY.format(total=total, free=free, swap=swap),
        "proc/stat": STAT,
        "proc/loadavg": "0.10 0.05 0.01 1/200 4321\n",
        "proc/swaps": "Filename Type Size Used Priority\n" + ("/dev/zram0 partition 100 0 5\n" if swap else ""),
        "proc/self/smaps": "00-01 r--p\nKernelPageSize:       16 kB\n",
        "proc/77/stat": "77 (compile this) R 1 1 1 0 -1 0 0 0 0 0 400 100 0 0 20 0\n",
    }


PI4 = {
    **common(3884000, 3300000, 102396),
    **cores(4, "ondemand", 600000, 1800000),
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48199\n",
}

ADC = """     3V7_WL_SW_A current(0)=0.10000000A
   VDD_CORE_A current(7)=2.50000000A
   EXT5V_V volt(24)=5.10000000V
   3V7_WL_SW_V volt(8)=3.70000000V
   VDD_CORE_V volt(15)=0.80000000V
"""
PI5 = {
    **common(8256000, 7500000, 204784),
    **cores(4, "ondemand", 2400000, 2400000),
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "usr/bin/vcgencmd": "#!/bin/sh\ncase $1 in get_throttled) echo throttled=0x0;; pmic_read_adc) cat <<'X'\n"
    + ADC
    + "X\n;; esac\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "61000\n",
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "3\n",
}

ORIN = {
    **common(7800000, 6000000),
    **cores(6, "schedutil", 1728000, 1728000),
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "1020000000\n",
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    **{
        f"sys/class/hwmon/hwmon1/{name}": f"{value}\n"
        for i, (rail, volts, amperes) in enumerate(
            (("VDD_IN", 5000, 2000), ("VDD_CPU_GPU_CV", 5000, 800), ("VDD_SOC", 5000, 400), ("NC", 1, 1)), start=1
        )
        for name, value in ((f"in{i}_label", rail), (f"in{i}_input", volts), (f"curr{i}_input", amperes))
    },
    "sys/class/hwmon/hwmon3/oc1_event_cnt": "4\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "52300\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "99000\n",
    "sys/class/thermal/thermal_zone1/type": "tj-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "54100\n",
    "sys/class/thermal/cooling_device0/type": "cpu-throttle-alert\n",
    "sys/class/thermal/cooling_device0/cur_state": "0\n",
}

LAPTOP = {
    **common(16000000, 12000000, 8000000),
    **cores(8, "powersave", 3400000, 4700000),
    "sys/class/dmi/id/sys_vendor": "LENOVO\n",
    "sys/class/dmi/id/product_name": "21C1\n",
    "sys/firmware/acpi/platform_profile": "balanced\n",
    f"{CPU}/cpu0/cpufreq/energy_performance_preference": "balance_performance\n",
    f"{CPU}/intel_pstate/no_turbo": "0\n",
    **{f"{CPU}/cpu{i}/thermal_throttle/core_throttle_count": "3\n" for i in range(8)},
    **{f"{CPU}/cpu{i}/thermal_throttle/package_throttle_count": "7\n" for i in range(8)},
    "sys/class/thermal/thermal_zone0/type": "acpitz\n",
    "sys/class/thermal/thermal_zone0/temp": "20000\n",
    "sys/class/thermal/thermal_zone5/type": "x86_pkg_temp\n",
    "sys/class/thermal/thermal_zone5/temp": "71000\n",
    "sys/class/thermal/thermal_zone5/trip_point_0_type": "passive\n",
    "sys/class/thermal/thermal_zone5/trip_point_0_temp": "100000\n",
    "sys/class/powercap/intel-rapl:0/name": "package-0\n",
    "sys/class/powercap/intel-rapl:0/energy_uj": "262143000000\n",
    "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850\n",
    "sys/class/powercap/intel-rapl:0:0/name": "core\n",
    "sys/class/powercap/intel-rapl:0:0/energy_uj": "1000\n",
    "sys/class/powercap/intel-rapl:0:0/max_energy_range_uj": "262143328850\n",
}

BOARDS: Mapping[str, Mapping[str, str]] = {"pi4": PI4, "pi5": PI5, "orin": ORIN, "laptop": LAPTOP}


def write_board(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if name.startswith("usr/bin/"):
            path.chmod(0o755)
    return root
