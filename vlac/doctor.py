"""What this machine has, and which engines and targets really work on it, each tried in a process of its own.

Every engine makes a small computation, every target is written and run by its engines (vlac.doctor_worker). What there
is to try comes from the engines and the registry. A broken native library can kill the process that loads it; `vlac
doctor` must survive that and say which one it was.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vlac import __version__, machine
from vlac.board import readers as board
from vlac.board.reading import Absent, Tree
from vlac.engines.base import NAMES, get_engine
from vlac.engines.onnxruntime_engine import NO_TELEMETRY
from vlac.registry import Target, families, passes, readers, targets
from vlac.runtime.session import ANY_ARTIFACT
from vlac.tables import pairs, size

COMPILE_SIDE: Mapping[str, str] = {
    "torch": "runs the fp32 reference when compiling and for parity",
    "huggingface_hub": "downloads checkpoints by hub id",
    "onnx": "writes the onnx targets",
}
"""Distribution -> why a machine that compiles wants it; a robot does not."""

NO_BITS = "not available: no Raspberry Pi's get_throttled here"
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
    "torch": "import torch; c = torch.cuda.is_available()\n"
    "version = torch.__version__ + (', ' + torch.cuda.get_device_name() if c else ', no CUDA device')\n"
    "y = torch.from_numpy(x).matmul(torch.tensor([[float(i - j) for j in range(3)] for i in range(4)])).numpy()",
    "numpy": "version = np.__version__\ny = x @ (np.arange(4)[:, None] - np.arange(3)[None, :]).astype(np.float32)",
}
_CHECK_GGML = (
    "from vlac.engines.ggml_lib import load\n"
    "lib = load()\n"
    "print(' '.join(str(v) for v in (getattr(lib, 'provider', ''), getattr(lib, 'version', '')) if v))\n"
)


def examine() -> dict[str, Any]:
    """Machine, engines and targets with their self-tests, and advice, as JSON values. Never raises for a broken one."""
    tried = _try_targets()
    engines = {name: _engine(name, tried) for name in NAMES}
    memory = machine.memory()
    heat, throttling = board.temperatures(Tree()), board.throttling(Tree())
    side = {name: {"version": _version(name), "for": why} for name, why in COMPILE_SIDE.items()}
    return {
        "vlac": __version__,
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "machine": machine.describe(),
        "board": {k: str(v) if isinstance(v, Absent) else v for k, v in board.describe(Tree()).items()},
        "available_bytes": memory.get("available", 0),
        "swap_used_bytes": memory.get("swap_used", 0),
        "emulated": machine.emulation(),
        "temperature_c": str(heat) if isinstance(heat, Absent) else max(heat.values()),
        "throttled": str(throttling) if isinstance(throttling, Absent) else throttling.get("get_throttled", NO_BITS),
        "engines": engines,
        "targets": {t.name: _target(t, tried, engines) for t in targets.all()},
        "compile_side": side,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k in _VARIABLES},
        "advice": _advice(engines, side),
    }


def _advice(engines: Mapping[str, Mapping[str, Any]], side: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Commands that would make more work here."""
    said = [f"{name}: {e['fix']}" for name, e in engines.items() if not e["installed"] and e["fix"]]
    said += [f"{name} is broken: reinstall it" for name, e in engines.items() if e["broken"]]
    if not side["onnx"]["version"]:
        said.append("to write onnx targets: pip install 'vlac-compiler[onnx]'")
    if not any(e["works"] for name, e in engines.items() if name not in ANY_ARTIFACT):
        robots = [n for n in engines if n not in ANY_ARTIFACT]
        said.append(f"no engine for a robot works here: install at least one of {', '.join(robots)}")
    return said


_COMMAND = re.compile(r"pip install [^;()]+")


def _fix(why: str) -> str:
    """The command that an engine names as its own remedy."""
    found = _COMMAND.search(why)
    return found[0].strip() if found else ""


# --- every target on every engine ----------------------------------------------------------------------------------

Tried = Mapping[tuple[str, str], Mapping[str, Any]]
"""(engine, target) -> what vlac.doctor_worker found; engine "-" for a target that was only written."""


def _try_targets() -> Tried:
    here = {name for name in NAMES if not get_engine(name).missing()}
    asked: dict[str, list[str]] = {}
    for t in targets.all():
        for name in [e for e in t.engines if e in here] or ["-"]:
            asked.setdefault(name, []).append(t.name)
    return {(name, t): found for name, listed in asked.items() for t, found in _worker(name, listed).items()}


def _worker(engine: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Tries targets one after another; where the process dies, goes on behind the one that killed it."""
    found: dict[str, dict[str, Any]] = {}
    left = list(names)
    while left:
        done = _process([sys.executable, "-m", "vlac.doctor_worker", engine, *left])
        for line in done.stdout.splitlines():
            if line.startswith('{"target"'):
                row = json.loads(line)
                found[row["target"]] = row
        left = [n for n in left if n not in found]
        if left:
            found[left[0]] = {"target": left[0], "written": False, "works": False, "says": _why(done)}
            left = left[1:]
    return found


def _target(t: Target, tried: Tried, engines: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether it can be written here, and what of each of its engines."""
    rows = {e: tried[e, t.name] for e in (*t.engines, "-") if (e, t.name) in tried}
    states = {
        e: ("works" if rows[e]["works"] else rows[e]["says"] or "not run") if e in rows else engines[e]["says"]
        for e in t.engines
        if e in engines
    }
    said = next((r["says"] for r in rows.values() if not r["written"]), "")
    return {
        "written": any(r["written"] for r in rows.values()),
        "works": any(r["works"] for r in rows.values()),
        "engines": states,
        "says": said,
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


def _engine(name: str, tried: Tried) -> dict[str, Any]:
    missing = get_engine(name).missing()
    if missing:
        nothing = {"installed": False, "works": False, "broken": False, "version": ""}
        return {**nothing, "says": missing, "fix": _fix(missing)}
    works, said = _own_check(name, tried)
    return {
        "installed": True,
        "works": works,
        "broken": not works,
        "version": said if works else "",
        "says": "" if works else said,
        "fix": "",
    }


def _own_check(name: str, tried: Tried) -> tuple[bool, str]:
    """A computation without any target; of an engine that has none here, its targets."""
    if name == "ggml":
        return _try(_CHECK_GGML)
    if name in _CHECKS:
        return _try(_CHECK_ONNX.format(model=ONNX_MATMUL, run=_CHECKS[name]))
    rows = [row for (engine, _), row in tried.items() if engine == name]
    if any(row["works"] for row in rows):
        return True, "runs what its targets write"
    return False, next((row["says"] for row in rows), "no target for it is registered")


def _try(code: str) -> tuple[bool, str]:
    """Runs a check in its own interpreter: (it passed, its last line or why it did not)."""
    done = _process([sys.executable, "-c", code])
    if done.returncode == 0:
        return True, (done.stdout.strip().splitlines() or [""])[-1]
    return False, _why(done)


def _process(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A finished process with telemetry off; return code 124 where it took too long."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    try:
        return subprocess.run(
            command,
            env=dict([NO_TELEMETRY]) | os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {TIMEOUT_S:.0f} s")


def _why(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"the process was killed by signal {-done.returncode}"
    return (done.stderr.strip().splitlines() or ["it failed without a word"])[-1]


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
    if not isinstance(d["temperature_c"], str):
        rows.append(("temperature", f"{d['temperature_c']:.0f} C"))
    if d["throttled"] and not isinstance(d["throttled"], str):
        rows.append(("throttled", hex(d["throttled"])))
    if d["emulated"]:
        rows.append(("EMULATED", f"{d['emulated']}; timings mean nothing here"))
    lines = ["machine", *pairs(rows), "", "engines"]
    lines += pairs([(name, _state(e)) for name, e in d["engines"].items()])
    lines += ["", "targets", *pairs(_target_rows(d["targets"]))]
    lines += ["", "to compile here"]
    lines += pairs([(n, f"{p['version'] or 'not installed'}: {p['for']}") for n, p in d["compile_side"].items()])
    if d["environment"]:
        lines += ["", "environment", *pairs(list(d["environment"].items()))]
    if d["advice"]:
        lines += ["", "to do", *(f"  {a}" for a in d["advice"])]
    return "\n".join(lines)


def _target_rows(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """Targets of which the same is to be said on one line."""
    rows: dict[str, list[str]] = {}
    for name, t in found.items():
        good = [e for e, state in t["engines"].items() if state == "works"]
        bad = [f"{e}: {state}" for e, state in t["engines"].items() if state not in ("works", "not run")]
        if good:
            said = f"works on {', '.join(good)}" + "".join(f"; not on {b}" for b in bad)
        elif t["written"]:
            said = f"can be written, runs elsewhere: no {' or '.join(t['engines'])} here"
        else:
            said = f"cannot be written: {t['says']}"
        rows.setdefault(said, []).append(name)
    return [(_shortened(names), said) for said, names in rows.items()]


def _shortened(names: list[str]) -> str:
    """ "gguf-q4, -q8" for names that begin alike."""
    said = ""
    for i, name in enumerate(names):
        family, dash, rest = name.partition("-")
        alike = i > 0 and dash and names[i - 1].partition("-")[0] == family
        said += (", " if i else "") + (f"-{rest}" if alike else name)
    return said


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
