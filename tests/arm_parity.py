"""vlac's runtime on emulated ARM CPUs against the same artifacts on this machine: what scripts/test-arm runs.

    python tests/arm_parity.py [--cpu NAME ...] [--json FILE]

Artifacts are compiled here; a guest process (arm_guest.py) answers on each CPU. Two kinds are compared: whole policies
(chunks), and single ops in each format ("ops"), which say which kernel is off. Latency is never measured: under
emulation it means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from onnx_artifacts import TOY_IO, program_of, weights_of

from vlac.graph import StageBuilder

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "tests" / "golden" / "smolvla_tiny" / "checkpoint"
GUEST = ROOT / "tests" / "arm_guest.py"
POLICIES = {
    "onnx-fp32": "onnxruntime",
    "onnx-int8": "onnxruntime",
    "onnx-int4": "onnxruntime",
    "gguf-q8": "ggml",
    "gguf-q4": "ggml",
}
FAST = " fast"
"""Ending of runs with the options that a robot has, where parity's differ."""
ROWS, WIDTH, OUT = (70, 17, 1), 256, 384
FORMATS = {
    "onnxruntime": ("f32", "int8", "int4"),
    "ggml": ("f32", "f16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "iq4_nl"),
}
POLICY_LIMITS = {"onnx-fp32": 5e-6, "onnx-int8": 3e-2, "onnx-int4": 3e-2, "gguf-q8": 3e-2, "gguf-q4": 3e-2}
"""max|d|/max over a policy's chunks. Below f32 one activation that falls to the other side of a rounding, or a product
in float16, moves all that follows; that the kernels themselves agree is held by OP_LIMIT."""
OP_LIMIT = 1e-6
"""max|d|/max of one op: another order of summation and nothing else."""


def op_limit(run: str, op: str, features: frozenset[str]) -> float:
    """OP_LIMIT, or what is known to be different: by kind of op and by what the CPU has (facts in docs/arm.md)."""
    from vlac.engines.onnxruntime_engine import int8_kernels

    if op.startswith("linear_f16"):
        return 3e-3  # sums in float16 where the CPU or the reference has it
    if op.startswith("linear_int4") and (run.endswith(FAST) or "asimddp" not in features):
        return 3e-2  # KleidiAI: activations quantised by row; without DOTPROD: not at all; x86: in blocks of 32
    if op.startswith("linear_int8") and int8_kernels() == "float":
        return 3e-2  # this x86 cannot multiply uint8 by int8 exactly and keeps activations in float
    return OP_LIMIT


@cache
def cpus() -> dict[str, tuple[str, frozenset[str]]]:
    """Name -> (QEMU's -cpu, features), from scripts/peers/arm_cpus.txt."""
    text = (ROOT / "scripts" / "peers" / "arm_cpus.txt").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if not line.startswith("#")]
    return {r[0]: (r[1], frozenset(r[5].split())) for r in rows}


# --- what is asked ---------------------------------------------------------------------------------------------


def compile_policies(folder: Path) -> dict[str, dict[str, Any]]:
    """Requests for the five targets of the tiny SmolVLA, compiled into `folder`, with parity's options."""
    import vlac
    from vlac.engines.base import get_engine

    runs: dict[str, dict[str, Any]] = {}
    for target, engine in POLICIES.items():
        out = folder / (target + (".gguf" if engine == "ggml" else ""))
        path = vlac.compile(CHECKPOINT, target=target, out=out).path
        runs[target] = {"path": str(path), "engine": engine, "options": dict(get_engine(engine).parity_options)}
    runs["onnx-int4" + FAST] = {**runs["onnx-int4"], "options": {}}
    return runs


def write_ops(folder: Path) -> dict[str, dict[str, Any]]:
    """Requests for single ops: a linear of each format with 70, 17 and 1 rows, attention, norms with their likes."""
    from vlac.artifact import Sidecars
    from vlac.engines.base import get_engine
    from vlac.graph import Call
    from vlac.registry import silent, targets

    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "x.npy", np.random.default_rng(5).standard_normal((ROWS[0], WIDTH)).astype(np.float32))
    runs: dict[str, dict[str, Any]] = {}
    for engine, target in (("onnxruntime", "onnx-fp32"), ("ggml", "gguf-q8")):
        stages = [*(_linear(f) for f in FORMATS[engine]), _attention(), _norms()]
        linears = {f"{f}.{rows}.weight": f for f in FORMATS[engine] for rows in ROWS}
        shapes = dict.fromkeys(linears, (OUT, WIDTH)) | {"ln": (WIDTH,), "ln.bias": (WIDTH,)}
        steps = tuple(Call(s.name) for s in stages)
        program = program_of(*stages, weights=weights_of(shapes), formats=linears, steps=steps, result="norms")
        manifest = {"format_version": 1, "engines": [engine], "target": target, "family": "toy", "name": "ops"}
        sidecars = Sidecars(str(program), TOY_IO.to_json(), manifest, None, None)
        out = folder / engine
        out.mkdir()
        targets.get(target).emit(program, sidecars, out, {}, silent)
        path = out if engine == "onnxruntime" else next(out.glob("*.gguf"))
        options = dict(get_engine(engine).parity_options)
        runs[f"{engine} ops"] = {"path": str(path), "engine": engine, "options": options, "x": str(folder / "x.npy")}
    runs["onnxruntime ops" + FAST] = {**runs["onnxruntime ops"], "options": {}}
    return runs


def _linear(fmt: str) -> StageBuilder:
    b = StageBuilder(f"linear_{fmt}")
    x = b.input("noise", "f32", ROWS[0], WIDTH)
    for rows in ROWS:  # a weight each: ONNX Runtime fuses only what is read once
        part = x if rows == ROWS[0] else b.op("slice", x, axis=0, start=3, stop=3 + rows)
        b.output(b.op("linear", part, f"@{fmt}.{rows}.weight", name=f"linear_{fmt}_{rows}"))
    return b


def _attention() -> StageBuilder:
    b = StageBuilder("attention")
    x = b.input("noise", "f32", ROWS[0], WIDTH)
    b.output(b.op("attention", x, x, x, name="attention", heads=4, kv_heads=4, scale=0.125))
    return b


def _norms() -> StageBuilder:
    b = StageBuilder("norms")
    x = b.op("layer_norm", b.input("noise", "f32", ROWS[0], WIDTH), "@ln", "@ln.bias", eps=1e-6)
    x = b.add(b.silu(b.gelu(x, approximate="tanh")), b.softmax(x))
    b.output(b.op("rms_norm", x, "@ln", name="norms", eps=1e-6))
    return b


# --- running ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Values by "RUN/NAME", and what the guest said of itself."""

    values: Mapping[str, np.ndarray[Any, Any]]
    info: Mapping[str, Any]


def here(folder: Path, runs: Mapping[str, Any]) -> Answers:
    """The answers of this machine."""
    return _run([sys.executable], folder, runs, "here", {})


def guest(cpu: str, folder: Path, site: Path | None = None) -> tuple[list[str], dict[str, str]]:
    """The emulated Python and its environment; `site` stands before the wheels."""
    base = where()
    places = [*([str(site)] if site else []), str(base / "site"), str(ROOT)]
    env = {
        "PYTHONPATH": os.pathsep.join(places),
        "XDG_CACHE_HOME": str(folder / f"cache-{cpu}"),
        "OMP_NUM_THREADS": "1",
    }
    return [str(base / f"sys-{cpu}" / "usr" / "bin" / "python")], env


def emulated(cpu: str, folder: Path, runs: Mapping[str, Any], site: Path | None = None, **env: str) -> Answers:
    """The answers of an emulated CPU; env e.g. VLAC_ARM_CPU="max" for another -cpu."""
    python, own = guest(cpu, folder, site)
    return _run(python, folder, runs, cpu, {**own, **env})


def _run(python: Sequence[str], folder: Path, runs: Mapping[str, Any], name: str, env: Mapping[str, str]) -> Answers:
    ask, answer = folder / f"{name}.json", folder / f"{name}.npz"
    answer.unlink(missing_ok=True)
    ask.write_text(json.dumps({"runs": runs}), encoding="utf-8")
    done = subprocess.run(
        [*python, str(GUEST), str(ask), str(answer)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    if not answer.is_file():
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"{name}: the guest ended with exit code {done.returncode} and said: {last}")
    with np.load(answer) as z:
        return Answers({k: z[k] for k in z.files if k != "info"}, json.loads(str(z["info"])))


@cache
def where() -> Path:
    """The folder that scripts/peers/arm.sh prepared, or would."""
    done = subprocess.run([ROOT / "scripts/peers/arm.sh", "--where"], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


# --- comparing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One comparison: difference is max|d|/max|reference| (inf where there is no answer, with the reason in `why`)."""

    cpu: str
    run: str
    op: str
    difference: float
    limit: float
    why: str = ""

    @property
    def ok(self) -> bool:
        return self.difference <= self.limit  # False for NaN


def compare(cpu: str, ours: Answers, theirs: Answers, runs: Mapping[str, Any]) -> list[Row]:
    """A row for each policy and for each single op."""
    features = cpus()[cpu][1]
    rows = []
    for run, asked in runs.items():
        names = [k.removeprefix(f"{run}/") for k in ours.values if k.startswith(f"{run}/")]
        groups = {n: [n] for n in names} if "x" in asked else {"": names}
        for op, members in groups.items():
            limit = op_limit(run, op, features) if op else POLICY_LIMITS[run.removesuffix(FAST)]
            why = theirs.info["runs"][run].get("refused", "") or ours.info["runs"][run].get("refused", "")
            pairs = [(theirs.values.get(f"{run}/{n}"), ours.values[f"{run}/{n}"]) for n in members]
            rows.append(Row(cpu, run, op, max((_difference(*p) for p in pairs), default=np.inf), limit, why))
    return rows


def _difference(have: np.ndarray[Any, Any] | None, want: np.ndarray[Any, Any]) -> float:
    if have is None or have.shape != want.shape or not np.isfinite(have).all():
        return float("inf")
    return float(np.abs(have.astype(np.float64) - want).max() / np.abs(want).max())


def wrong_dot_products(source: Path, copy: Path) -> int:
    """Writes a copy of an aarch64 library in which SDOT and UDOT, 8-bit dot products, have changed places; how many.

    A kernel that is wrong on purpose, where CPUs with DOTPROD run it and nowhere else. Encodings: Arm Architecture
    Reference Manual, C7.2 SDOT/UDOT (vector, by element); bit 29 is their only difference. Only executable segments of
    the ELF file are looked at.
    """
    code = bytearray(source.read_bytes())
    table, size, count = struct.unpack_from("<Q", code, 32)[0], *struct.unpack_from("<HH", code, 54)
    changed = 0
    for i in range(count):
        kind, flags, offset, _, _, length = struct.unpack_from("<IIQQQQ", code, table + i * size)
        if kind != 1 or not flags & 1:
            continue
        words = np.frombuffer(code, "<u4", length // 4, offset)
        found = (words & 0x9FE0FC00 == 0x0E809400) | (words & 0x9FC0F400 == 0x0F80E000)
        words[found] ^= np.uint32(1 << 29)
        changed += int(found.sum())
    copy.unlink(missing_ok=True)  # it may be a link to the source
    copy.write_bytes(code)
    return changed


# --- the command -----------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Lines run x CPU: the largest difference, of single ops by format; "!" where one is over its limit."""
    names = list(dict.fromkeys(r.cpu for r in rows))
    lines = ["max|d|/max against this machine".ljust(34) + "".join(n.rjust(11) for n in names)]
    for key in dict.fromkeys(_label(r) for r in rows):
        cells = [[r for r in rows if r.cpu == n and _label(r) == key] for n in names]
        texts = [
            f"{max(r.difference for r in c):.1e}{' ' if all(r.ok for r in c) else '!'}" if c else "" for c in cells
        ]
        lines.append(key.ljust(34) + "".join(text.rjust(11) for text in texts))
    return "\n".join(lines)


def _label(row: Row) -> str:
    return f"{row.run.replace(' ops', '')}: {row.op.rsplit('_', 1)[0]}" if row.op else row.run


def main() -> int:
    parser = argparse.ArgumentParser(description="vlac's runtime on emulated ARM CPUs against this machine")
    parser.add_argument("--cpu", action="append", choices=[*cpus()], help="only these")
    parser.add_argument("--json", type=Path, help="write every comparison here")
    given = parser.parse_args()
    names = given.cpu or [*cpus()]
    with tempfile.TemporaryDirectory(prefix="vlac-arm-") as folder:
        print("compiling", flush=True)
        runs = compile_policies(Path(folder)) | write_ops(Path(folder) / "ops")
        ours = here(Path(folder), runs)
        with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
            theirs = dict(zip(names, pool.map(lambda n: emulated(n, Path(folder), runs), names), strict=True))
    rows = [row for n in names for row in compare(n, ours, theirs[n], runs)]
    print(table(rows))
    for name in names:
        library = theirs[name].info["runs"]["gguf-q8"].get("cpu_library", "none")
        print(f"{name}: {theirs[name].info['cpu']}, emulated as {cpus()[name][0]}; ggml's {library}")
    for r in (r for r in rows if not r.ok):
        print(f"WRONG on {r.cpu}: {r.run} {r.op}: {r.difference:.2e}, limit {r.limit:.0e} {r.why}")
    print("emulated: nothing here says how fast a board is")
    if given.json:
        found = {"host": ours.info, "guests": {n: a.info for n, a in theirs.items()}, "rows": [vars(r) for r in rows]}
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(r.ok for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
