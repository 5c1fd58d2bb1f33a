"""A range of chunk latencies on a device of the table: every node takes its arithmetic or its bytes, whichever is more.

t = sum over nodes of max(2 MAC / (a x peak), bytes / (b x bandwidth)) + nodes x overhead; a and b are what programs
reach of the device's peaks, and give the range. It is an estimate, never a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlac.artifact import Artifact, open_artifact
from vlac.bench import control_rate
from vlac.estimate.devices import Device, Unit, device
from vlac.formats import FORMATS
from vlac.tables import markdown, number, size
from vlac.work import Piece, StageWork, stage_works

NODE_US = {"cpu": (0.5, 8.0), "gpu": (0.0, 10.0)}
"""Microseconds that starting a node costs: on x86 0.5 to 8 were measured (`--calibrate`); a GPU hides it in a graph."""
RUNTIME_BYTES = (60_000_000, 250_000_000)
"""Interpreter, libraries and an engine's own buffers: peak RSS of small models over several engines."""
COPIES = (1.0, 2.1)
"""Weights in memory over weights on disk: mapped as they are, or copied once more in the order that kernels want."""
ROOMY = 0.6
"""Share of RAM up to which a policy fits beside a system and a camera driver."""


def estimate(path: str | Path, key: str, threads: int | None = None) -> dict[str, Any]:
    """What a chunk of this artifact would take on a device: milliseconds low..high by unit and stage; what fits.

    threads: cores used of a CPU, default all. Every input is new, prompt and cameras at their largest.

    Raises: Unsupported names the devices there are; ArtifactError.
    """
    which, artifact = device(key), open_artifact(path)
    works = stage_works(artifact.program)
    need = memory_range(artifact, works)
    return {
        "artifact": str(path),
        "target": artifact.manifest["target"],
        "device": {"key": which.key, "name": which.name},
        "work": [
            {
                "stage": w.name,
                "runs": w.runs,
                "gmac": w.runs * sum(p.macs for p in w.pieces) / 1e9,
                "gmac_by_format": _by_format(w),
                "weight_bytes": w.runs * w.weight_bytes,
                "value_bytes": w.runs * (w.port_bytes + sum(p.value_bytes for p in w.pieces)),
            }
            for w in works
        ],
        "units": [_unit(unit, works, artifact, threads) for unit in which.units],
        "memory": {"bytes": list(need), "fits": fits(which, need)},
        "is": "an estimate from counts and published peaks, not a measurement",
    }


def _by_format(w: StageWork) -> dict[str, float]:
    found: dict[str, float] = {}
    for p in w.pieces:
        if p.macs:
            name = p.format if p.op == "linear" else f"{p.op} f32"
            found[name] = found.get(name, 0.0) + w.runs * p.macs / 1e9
    return found


def _unit(unit: Unit, works: Sequence[StageWork], artifact: Artifact, threads: int | None) -> dict[str, Any]:
    share = min(1.0, threads / unit.cores) if threads and unit.cores else 1.0
    stages = {w.name: [1e3 * w.runs * t for t in seconds(unit, w, share)] for w in works}
    low, high = (sum(v[i] for v in stages.values()) for i in (0, 1))
    io = artifact.io
    rates = [control_rate({"p50": ms, "p99": ms}, io.n_action_steps, io.chunk_size) for ms in (high, low)]
    return {
        "unit": unit.name,
        "cores": round(unit.cores * share),
        "chunk_ms": [low, high],
        "stages_ms": stages,
        "control_hz": [r["control_hz"] for r in rates],
        "formula": rates[0]["formula"],
        "achieved": list(unit.achieved),
        "achieved_bandwidth": list(unit.achieved_bandwidth),
        "sources": list(unit.sources),
        **({"needs": "the target tensorrt, or the engine torch on a CUDA device"} if unit.name == "gpu" else {}),
    }


def seconds(unit: Unit, w: StageWork, share: float = 1.0) -> tuple[float, float]:
    """(least, most) seconds of one run of a stage, on a share of the unit's cores."""
    kind = "gpu" if unit.name == "gpu" else "cpu"
    ends = []
    for best in (1, 0):
        arithmetic, moved = unit.achieved[best], unit.achieved_bandwidth[best] * unit.bandwidth * 1e9
        total = 1e-6 * NODE_US[kind][1 - best] * len(w.pieces)
        for p in w.pieces:
            compute = 2 * p.macs / (arithmetic * share * unit.gops[multiplied(p, kind)] * 1e9)
            total += max(compute, (p.weight_bytes + _values(p, kind)) / moved)
        ends.append(total)
    return ends[0], ends[1]


def _values(p: Piece, kind: str) -> int:
    """Bytes of values that go through memory: on a CPU those of small results stay in its caches."""
    return p.value_bytes if kind == "gpu" or p.value_bytes > 1 << 20 else 0


def multiplied(p: Piece, unit: str = "cpu") -> str:
    """What a node's products are made of: "int8" for quantised weights, "f16" for float16, else "f32".

    Kernels quantise activations where weights have 8 bits or fewer. On a CPU attention multiplies float32, and so do
    bfloat16 weights where there are no instructions for them; on a GPU both are half precision.
    """
    half = "f16" if unit == "gpu" else "f32"
    if p.op != "linear" or p.format == "bf16":
        return half
    return p.format if p.format in ("f32", "f16") else "int8"


def memory_range(artifact: Artifact, works: Sequence[StageWork]) -> tuple[int, int]:
    """Bytes that acting takes at least and at most: weights as stored or copied, the largest values, the runtime."""
    weights = _stored(artifact)
    values = max((p.value_bytes for w in works for p in w.pieces), default=0) + sum(w.port_bytes for w in works)
    return (
        int(COPIES[0] * weights + values + RUNTIME_BYTES[0]),
        int(COPIES[1] * weights + 2 * values + RUNTIME_BYTES[1]),
    )


def _stored(artifact: Artifact) -> int:
    """Bytes of the stored weights, by shape and format."""
    params = artifact.program.params.values()
    return round(sum(FORMATS[p.format].bits / 8 * math.prod(p.shape) for p in params))


def fits(which: Device, need: tuple[int, int]) -> dict[str, str]:
    """RAM in GB -> "fits", "tight" (over 60 % of it) or "does not fit"."""
    found = {}
    for ram in which.ram_gb:
        have = ram * 1e9
        verdict = "fits" if need[1] <= ROOMY * have else "does not fit" if need[0] > ROOMY * have else "tight"
        found[f"{ram:g}"] = verdict
    return found


def text(r: dict[str, Any]) -> str:
    """The estimate for people."""
    lines = [f"{r['artifact']} ({r['target']}) on {r['device']['name']}: an estimate, not a measurement", ""]
    rows = [
        [w["stage"], w["runs"], number(w["gmac"]), _formats(w["gmac_by_format"]), size(w["weight_bytes"])]
        + [_range(u["stages_ms"][w["stage"]]) for u in r["units"]]
        for w in r["work"]
    ]
    rows.append(
        [
            *("chunk", "", number(sum(w["gmac"] for w in r["work"])), ""),
            size(sum(w["weight_bytes"] for w in r["work"])),
            *(_range(u["chunk_ms"]) for u in r["units"]),
        ]
    )
    columns = ["stage", "runs", "GMAC", "of it", "weights read"] + [f"{u['unit']} ms" for u in r["units"]]
    lines += [*markdown(columns, rows), ""]
    for u in r["units"]:
        cores = f" ({u['cores']} cores)" if u["cores"] else ""
        needs = f"; needs {u['needs']}" if "needs" in u else ""
        lines.append(f"{u['unit']}{cores}: {_range(u['control_hz'])} Hz control{needs}")
        lines += [f"  {source}" for source in u["sources"]]
    lines.append(r["units"][0]["formula"])
    low, high = r["memory"]["bytes"]
    ram = ", ".join(f"{k} GB {v}" for k, v in r["memory"]["fits"].items())
    lines.append(f"memory {size(low)}..{size(high)}: {ram}")
    return "\n".join(lines)


def _range(ends: Sequence[float]) -> str:
    return f"{number(ends[0])}..{number(ends[1])}"


def _formats(by: dict[str, float]) -> str:
    total = sum(by.values())
    most = sorted(by.items(), key=lambda v: -v[1])
    return ", ".join(f"{name} {100 * v / total:.0f} %" for name, v in most if v > 0.005 * total)
