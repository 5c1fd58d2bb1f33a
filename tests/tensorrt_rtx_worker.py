"""Parses and builds folders of the tensorrt targets with TensorRT for RTX; runs in .venv-tensorrt-rtx, without a GPU.

python tensorrt_rtx_worker.py FOLDER...: one JSON line for each graph: {"folder", "stage", "error", "plan_bytes"}; error
is "" where a plan was made. A file instead of a folder is one graph without symbols.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tensorrt_rtx as trt


class Log(trt.ILogger):
    """Keeps what went wrong."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.lines.append(message)


def build(path: Path, inputs: dict[str, dict[str, list[int]]]) -> tuple[str, int]:
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        return "; ".join(f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors), 0
    config = builder.create_builder_config()
    if any(shape["least"] != shape["largest"] for shape in inputs.values()):
        profile = builder.create_optimization_profile()
        for i in range(network.num_inputs):
            shape = inputs[network.get_input(i).name]
            profile.set_shape(network.get_input(i).name, shape["least"], shape["largest"], shape["largest"])
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return ("", plan.nbytes) if plan is not None else (" | ".join(log.lines)[:800] or "no plan, no reason", 0)


def main() -> None:
    for name in sys.argv[1:]:
        folder = Path(name)
        graphs = {}
        if folder.is_dir():
            graphs = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["tensorrt"]["inputs"]
        for stage, inputs in (graphs or {folder.stem: {}}).items():
            path = folder / f"{stage}.onnx" if graphs else folder
            error, size = build(path, inputs)
            print(json.dumps({"folder": name, "stage": stage, "error": error, "plan_bytes": size}), flush=True)


if __name__ == "__main__":
    main()
