"""The manifest of an artifact: where it came from, what was done, what each tensor was asked to be and became."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlac import __version__
from vlac.artifact import FORMAT_VERSION
from vlac.errors import VlacError
from vlac.formats import get_format
from vlac.graph import Program
from vlac.policy import Policy
from vlac.registry import Target


def census(requested: Mapping[str, str], program: Program, roles: Mapping[str, str]) -> dict[str, Any]:
    """Per tensor: role, shape, format requested and realised, bytes; and totals by realised format."""
    rows, count, size = {}, Counter[str](), Counter[str]()
    for name, p in program.params.items():
        fmt = get_format(p.format)
        nbytes = fmt.nbytes(p.shape)
        rows[name] = {
            "role": roles.get(name, "other"),
            "shape": list(p.shape),
            "requested": requested.get(name, p.format),
            "realised": p.format,
            "bytes": nbytes,
        }
        count[p.format] += math.prod(p.shape)
        size[p.format] += nbytes
    total = {f: {"values": count[f], "bytes": size[f]} for f in sorted(count)}
    return {"tensors": rows, "formats": total, "bytes": sum(size.values())}


def promoted(table: Mapping[str, Any]) -> list[str]:
    """Tensors whose realised format differs from the requested one, as lines for people."""
    return [
        f"{name}: asked {row['requested']}, became {row['realised']} {row['shape']}"
        for name, row in table["tensors"].items()
        if row["requested"] != row["realised"]
    ]


def refuse_promotion(table: Mapping[str, Any], allow: bool) -> None:
    """Raises when something became another format than asked and the user did not allow it."""
    lines = promoted(table)
    if lines and not allow:
        shown = "\n  ".join(lines[:8]) + (f"\n  ... {len(lines) - 8} more" if len(lines) > 8 else "")
        raise VlacError(
            f"{len(lines)} tensors cannot be held in the format asked for:\n  {shown}",
            remedy="give --allow-promote to accept this, or choose another format with "
            "--pass quantize-weights:format=...,match=...",
        )


def portable_name(policy: Policy) -> str:
    """A hub id as it is; of a local checkpoint its name alone, since where it lay is no property of the artifact."""
    local = Path(policy.source.checkpoint).expanduser()
    return policy.name if local.exists() else policy.source.checkpoint


def build(
    policy: Policy,
    target: Target,
    table: Mapping[str, Any],
    roles: Mapping[str, str],
    options: Mapping[str, Any],
    noise_floor: Mapping[str, float] | None,
    golden_kind: str,
    title: str,
) -> dict[str, Any]:
    """Everything but the layout's own keys ("files", "tensors"). No time and no path of a machine: compiling is
    reproducible."""
    return {
        "format_version": FORMAT_VERSION,
        "vlac": __version__,
        "family": policy.family,
        "display_name": title,
        "name": policy.name,
        "parameters": policy.parameters or sum(math.prod(t.shape) for t in policy.weights.values()),
        "target": target.name,
        "engines": list(target.engines),
        "options": dict(options),
        "source": {**asdict(policy.source), "checkpoint": portable_name(policy)},
        "history": [asdict(h) for h in policy.history],
        "warnings": list(policy.warnings),
        "ignored_config_keys": list(policy.ignored),
        "spec": asdict(policy.spec),
        "flow": asdict(policy.flow) if policy.flow else None,
        "units": policy.io.units,
        "census": dict(table),
        "golden": golden_kind,
        "noise_floor": dict(noise_floor) if noise_floor else None,
        "files": {},
    }
