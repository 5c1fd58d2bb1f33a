#!/usr/bin/env python3
"""Builds the TensorRT plans of an artifact on the board that runs them. Stands alone: Python, its tensorrt module, and
NVIDIA's driver; copy the folder, run this file in it.

    python3 build.py [--force] [--workspace MB] [--commands]

Plans go to prepared/tensorrt/, named by GPU and TensorRT version; with another GPU, version or artifact they are built
again. --commands prints the trtexec lines that do the same, and builds nothing. A timing cache makes rebuilds quick.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path("prepared") / "tensorrt"
WORKSPACE_MB = 2048
LEVEL = 3
"""Of the builder's effort, 0 to 5."""
LEAST = {"10.3": (10, 3), "10.16": (10, 15)}
"""Dialect -> the first TensorRT that reads it."""

Say = Callable[[str], None]


class BuildError(Exception):
    """What is missing or failed, and what to do about it."""


def gpu(ordinal: int = 0) -> tuple[str, int]:
    """(name, compute capability times ten) of a GPU, asked of the driver; BuildError without one."""
    for library in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            cuda = ctypes.CDLL(library)
            break
        except OSError:
            continue
    else:
        raise BuildError("no NVIDIA driver: libcuda is not there")
    device, name, value = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), ordinal):
        raise BuildError("the NVIDIA driver finds no GPU")
    if cuda.cuDeviceGetName(name, 256, device):
        raise BuildError("the NVIDIA driver does not tell the GPU's name")
    parts = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            raise BuildError("the NVIDIA driver does not tell the GPU's compute capability")
        parts.append(value.value)
    return name.value.decode(errors="replace"), 10 * parts[0] + parts[1]


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a tensorrt artifact; BuildError for anything else."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        manifest["tensorrt"]["inputs"], manifest["checksum"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BuildError(f"{folder} holds no artifact of a tensorrt target (no such manifest.json)") from None
    return dict(manifest)


def key(name: str, sm: int, version: str) -> str:
    """What plans are named by: "NVIDIA-Orin-sm87-trt10.3.0"."""
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}-sm{sm}-trt{version}"


def check(manifest: dict[str, Any], name: str, sm: int, version: str) -> None:
    """BuildError when this GPU or this TensorRT cannot run the artifact."""
    about = manifest["tensorrt"]
    if sm < about["least_sm"]:
        raise BuildError(
            f"{name} has compute capability {sm / 10}, {manifest['target']} needs {about['least_sm'] / 10}; "
            "compile for --target tensorrt-fp16 or tensorrt-int8"
        )
    found = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if found < LEAST[about["dialect"]]:
        raise BuildError(
            f"TensorRT {version} does not read dialect {about['dialect']}; compile with --trt 10.3, "
            f"or use TensorRT {'.'.join(map(str, LEAST[about['dialect']]))} or later"
        )


def plan_file(folder: Path, stage: str, named: str) -> Path:
    """Where the plan of a stage lies."""
    return folder / FOLDER / f"{stage}.{named}.plan"


def ready(folder: Path, manifest: dict[str, Any], named: str) -> bool:
    """Whether plans for this GPU and version, of this artifact, are there and whole."""
    try:
        stamp = json.loads((folder / FOLDER / f"{named}.json").read_text(encoding="utf-8"))
        return bool(stamp["artifact"] == manifest["checksum"]) and all(
            sha256(plan_file(folder, stage, named)) == stamp["plans"][stage] for stage in manifest["tensorrt"]["inputs"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def ever_built(folder: Path) -> bool:
    """Whether plans were built here before, for whatever GPU, version and artifact."""
    return any((folder / FOLDER).glob("*.json"))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def command(folder: Path, manifest: dict[str, Any], stage: str, named: str, workspace_mb: int = WORKSPACE_MB) -> str:
    """The trtexec line that builds the same plan."""
    inputs = manifest["tensorrt"]["inputs"][stage]
    parts = [
        f"trtexec --onnx={folder / stage}.onnx --stronglyTyped --saveEngine={plan_file(folder, stage, named)}",
        f"--timingCacheFile={folder / FOLDER / named}.cache --memPoolSize=workspace:{workspace_mb} --noTF32",
        f"--builderOptimizationLevel={LEVEL} --skipInference",
    ]
    if is_dynamic(inputs):
        for flag, end in (("min", "least"), ("opt", "largest"), ("max", "largest")):
            shapes = ",".join(f"{name}:{'x'.join(map(str, shape[end]))}" for name, shape in inputs.items())
            parts.append(f"--{flag}Shapes={shapes}")
    return " ".join(parts)


def is_dynamic(inputs: dict[str, dict[str, list[int]]]) -> bool:
    """Whether a stage has an input whose shape is chosen per call."""
    return any(shape["least"] != shape["largest"] for shape in inputs.values())


def build(
    folder: Path, force: bool = False, workspace_mb: int = WORKSPACE_MB, say: Say = lambda text: None
) -> dict[str, Any]:
    """Plans of every stage, built unless they are there. Returns key, GPU, versions, bytes and seconds of each plan.

    Raises: BuildError. A plan that was begun and not finished is never left under its name.
    """
    import tensorrt as trt

    manifest = read_manifest(folder)
    name, sm = gpu()
    version = str(trt.__version__)
    check(manifest, name, sm, version)
    named = key(name, sm, version)
    plans: dict[str, dict[str, Any]] = {}
    built = force or not ready(folder, manifest, named)
    if built:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        (folder / FOLDER / f"{named}.json").unlink(missing_ok=True)
        for stage in manifest["tensorrt"]["inputs"]:
            say(f"building {stage} for {name}, TensorRT {version}")
            say(f"  {command(folder, manifest, stage, named, workspace_mb)}")
            started = time.perf_counter()
            data = _plan(trt, folder, manifest, stage, named, workspace_mb)
            path = plan_file(folder, stage, named)
            _write(path, data)
            plans[stage] = {"seconds": round(time.perf_counter() - started, 2)}
        digests = {stage: sha256(plan_file(folder, stage, named)) for stage in manifest["tensorrt"]["inputs"]}
        stamp = {"artifact": manifest["checksum"], "gpu": name, "sm": sm, "tensorrt": version, "plans": digests}
        _write(folder / FOLDER / f"{named}.json", json.dumps(stamp, indent=1).encode())
    for stage in manifest["tensorrt"]["inputs"]:
        path = plan_file(folder, stage, named)
        plans.setdefault(stage, {}).update(file=str(path), bytes=path.stat().st_size)
    return {"key": named, "gpu": name, "sm": sm, "tensorrt": version, "built": built, "plans": plans}


def _write(path: Path, data: Any) -> None:
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as f:
            f.write(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _plan(trt: Any, folder: Path, manifest: dict[str, Any], stage: str, named: str, workspace_mb: int) -> Any:
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(folder / f"{stage}.onnx")):
        why = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise BuildError(f"TensorRT {trt.__version__} does not read {stage}.onnx: {why}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    config.builder_optimization_level = LEVEL
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 stays float32
    inputs = manifest["tensorrt"]["inputs"][stage]
    if is_dynamic(inputs):
        profile = builder.create_optimization_profile()
        for name, shape in inputs.items():
            profile.set_shape(name, shape["least"], shape["largest"], shape["largest"])
        config.add_optimization_profile(profile)
    kept = folder / FOLDER / f"{named}.cache"
    cache = config.create_timing_cache(kept.read_bytes() if kept.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(
            f"TensorRT {trt.__version__} builds no plan of {stage}.onnx (its own messages are above); "
            "close other programs if memory ran out, or give another --workspace"
        )
    _write(kept, config.get_timing_cache().serialize())
    return plan


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="build again what is there")
    parser.add_argument("--workspace", type=int, default=WORKSPACE_MB, metavar="MB", help="memory for the builder")
    parser.add_argument("--commands", action="store_true", help="print the trtexec lines and build nothing")
    asked = parser.parse_args()
    folder = Path(__file__).resolve().parent
    try:
        if asked.commands:
            manifest = read_manifest(folder)
            for stage in manifest["tensorrt"]["inputs"]:
                print(command(folder, manifest, stage, "here", asked.workspace))
            return 0
        made = build(folder, asked.force, asked.workspace, say=print)
    except ImportError as error:
        print(f"error: {error}\n  -> install TensorRT's Python module (JetPack: python3-libnvinfer)", file=sys.stderr)
        return 2
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(made, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
