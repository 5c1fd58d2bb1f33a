"""What this machine has and which engines really work on it, each tried on a small computation in a process of its own.

A broken native library can kill the process that loads it; `vlac doctor` must survive that and say which one it was.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vlac import __version__, machine
from vlac.engines.base import NAMES, get_engine
from vlac.engines.onnxruntime_engine import NO_TELEMETRY
from vlac.registry import families, passes, readers, targets
from vlac.tables import pairs, size

PACKAGES: Mapping[str, str] = {
    "onnxruntime": 'pip install "vlac-compiler[onnx]"',
    "openvino": 'pip install "vlac-compiler[openvino]"',
    "ggml": 'pip install "vlac-compiler[gguf]"',
    "torch": 'pip install "vlac-compiler[compile]"',
}
"""Engine -> what brings it."""

COMPILE_SIDE: Mapping[str, str] = {
    "torch": "runs the fp32 reference when compiling and for parity",
    "huggingface_hub": "downloads checkpoints by hub id",
    "onnx": "writes the onnx targets",
}
"""Distribution -> why a machine that compiles wants it; a robot does not."""

TIMEOUT_S = 180.0

# y[2,3] = x[2,4] @ w[4,3] as an ONNX model (opset 17, ir 8), with w[i,j] = i - j. Small enough to keep as bytes.
ONNX_MATMUL = (
    "CAg6gAEKEQoBeAoBdxIBeSIGTWF0TXVsEgRkaWFnKjsIBAgDEAFCAXdKMAAAAAAAAIC/AAAAwAAAgD8AAAAAAACAvwAAAEAAAIA/AAAAAAAAQE"
    "AAAABAAACAP1oTCgF4Eg4KDAgBEggKAggCCgIIBGITCgF5Eg4KDAgBEggKAggCCgIIA0IECgAQEQ=="
)

_CHECK_ONNX = """
import base64, numpy as np
model = base64.b64decode({model!r})
x = np.arange(8, dtype=np.float32).reshape(2, 4)
want = x @ (np.arange(4)[:, None] - np.arange(3)[None, :]).astype(np.float32)
{run}
assert np.abs(y - want).max() < 1e-5, f"a 2x4x3 matrix product is wrong: {{y.tolist()}}"
print(version)
"""

_CHECKS: Mapping[str, str] = {
    "onnxruntime": "import onnxruntime as o; version = o.__version__\n"
    "s = o.InferenceSession(model, providers=['CPUExecutionProvider']); y = s.run(None, {'x': x})[0]",
    "openvino": "import openvino as o; version = o.__version__\n"
    "c = o.Core(); y = c.compile_model(c.read_model(model, b''), 'CPU')(x)[0]",
    # a plan is built, not run: that takes CUDA's memory, which `vlac parity` shows to work
    "tensorrt": "import tensorrt as t; version = t.__version__; y = want\n"
    "b = t.Builder(t.Logger(t.Logger.ERROR)); n = b.create_network(0); p = t.OnnxParser(n, t.Logger(t.Logger.ERROR))\n"
    "assert p.parse(model) and b.build_serialized_network(n, b.create_builder_config()), 'it builds no plan'",
    "torch": "import torch; version = torch.__version__\n"
    "y = torch.from_numpy(x).matmul(torch.tensor([[float(i - j) for j in range(3)] for i in range(4)])).numpy()",
    "numpy": "version = np.__version__\ny = x @ (np.arange(4)[:, None] - np.arange(3)[None, :]).astype(np.float32)",
}
_CHECK_GGML = (
    "from vlac.engines.ggml_lib import load\n"
    "lib = load()\n"
    "print(' '.join(str(v) for v in (getattr(lib, 'provider', ''), getattr(lib, 'version', '')) if v))\n"
)


def examine() -> dict[str, Any]:
    """Machine, engines with their self-tests, and advice, as JSON values. Never raises for a broken engine."""
    engines = {name: _engine(name) for name in NAMES}
    emulated = machine.emulation()
    memory = machine.memory()
    advice = [f"{name}: {PACKAGES[name]}" for name, e in engines.items() if not e["installed"] and name in PACKAGES]
    advice += [f"{name} is broken: reinstall it ({PACKAGES[name]})" for name, e in engines.items() if e["broken"]]
    side = {name: {"version": _version(name), "for": why} for name, why in COMPILE_SIDE.items()}
    if not any(e["works"] for name, e in engines.items() if name not in ("torch", "numpy")):
        advice.append("no engine for a robot works here: install at least one of onnxruntime, openvino, ggml")
    return {
        "vlac": __version__,
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "machine": machine.describe(),
        "available_bytes": memory.get("available", 0),
        "swap_used_bytes": memory.get("swap_used", 0),
        "emulated": emulated,
        "temperature_c": machine.temperature(),
        "throttled": machine.throttled(),
        "engines": engines,
        "compile_side": side,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k in _VARIABLES},
        "advice": advice,
    }


_VARIABLES = (
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "VLAC_GGML_LIB",
    "VLAC_GGML_PROVIDER",
    "VLAC_TRACEBACK",
)


def _engine(name: str) -> dict[str, Any]:
    missing = get_engine(name).missing()
    if missing:
        return {"installed": False, "works": False, "broken": False, "version": "", "says": missing}
    works, said = _try(_CHECK_GGML if name == "ggml" else _CHECK_ONNX.format(model=ONNX_MATMUL, run=_CHECKS[name]))
    return {
        "installed": True,
        "works": works,
        "broken": not works,
        "version": said if works else "",
        "says": "" if works else said,
    }


def _try(code: str) -> tuple[bool, str]:
    """Runs a check in its own interpreter: (it passed, its last line or why it did not)."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=dict([NO_TELEMETRY]) | os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return True, (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode < 0:
        return False, f"the process was killed by signal {-done.returncode}"
    return False, (done.stderr.strip().splitlines() or ["it failed without a word"])[-1]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def onnx_model() -> bytes:
    """The model of the self-test, for tests that check what it computes."""
    return base64.b64decode(ONNX_MATMUL)


def text(d: Mapping[str, Any]) -> str:
    """The findings for people."""
    m = d["machine"]
    rows: list[tuple[str, Any]] = [
        ("vlac", f"{d['vlac']}, Python {d['python']}"),
        ("system", m["system"]),
        ("CPU", f"{m['cpu']}, {m['cores']} cores" + (f": {', '.join(m['features'])}" if m["features"] else "")),
        ("memory", f"{size(m['memory_bytes'])}, {size(d['available_bytes'])} available"),
    ]
    if m["board"]:
        rows.append(("board", m["board"]))
    if m["governor"]:
        rows.append(("governor", m["governor"]))
    if d["temperature_c"] is not None:
        rows.append(("temperature", f"{d['temperature_c']:.0f} C"))
    if d["throttled"]:
        rows.append(("throttled", hex(d["throttled"])))
    if d["emulated"]:
        rows.append(("EMULATED", f"{d['emulated']}; timings mean nothing here"))
    lines = ["machine", *pairs(rows), "", "engines"]
    lines += pairs([(name, _state(e)) for name, e in d["engines"].items()])
    lines += ["", "to compile here"]
    lines += pairs([(n, f"{p['version'] or 'not installed'}: {p['for']}") for n, p in d["compile_side"].items()])
    if d["environment"]:
        lines += ["", "environment", *pairs(list(d["environment"].items()))]
    if d["advice"]:
        lines += ["", "to install", *(f"  {a}" for a in d["advice"])]
    return "\n".join(lines)


def _state(e: Mapping[str, Any]) -> str:
    if e["works"]:
        return f"works, {e['version']}"
    return f"BROKEN: {e['says']}" if e["broken"] else f"not here: {e['says']}"


# --- what is plugged in ----------------------------------------------------------------------------------------


def plugged_in() -> dict[str, list[dict[str, Any]]]:
    """Families, readers, passes, targets and engines with a line about each; entry points of other packages too."""

    def first(doc: str) -> str:
        return doc.strip().splitlines()[0] if doc.strip() else ""

    listed: dict[str, list[dict[str, Any]]] = {
        "families": [{"name": e.name, "doc": first(e.doc)} for e in families.all()],
        "readers": [{"name": e.name, "doc": first(e.doc)} for e in readers.all()],
        "passes": [
            {
                "name": e.name,
                "doc": first(e.doc),
                "params": {k: {"type": t.__name__, "default": d, "help": h} for k, (t, d, h) in e.params.items()},
            }
            for e in passes.all()
        ],
        "targets": [
            {"name": e.name, "doc": first(e.doc), "engines": list(e.engines), "options": dict(e.options)}
            for e in targets.all()
        ],
    }
    listed["engines"] = [
        {"name": name, "doc": get_engine(name).missing() or "installed", "works_here": not get_engine(name).missing()}
        for name in NAMES
    ]
    return listed
