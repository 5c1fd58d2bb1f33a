"""The whole way through the house on LeRobot's own answers: raw picture, raw state, task string in; robot units out.

Bounds are max|a - b| / max|b| of a chunk. float32 targets are held to the product's promise; the others to named bounds
measured on these goldens (random tiny networks, a harsh case for few bits) with a margin of about two.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

import vlac
from vlac.engines.base import get_engine

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("smolvla_tiny", "smolvla_letterbox")
ONNX = ("torch", "onnxruntime", "openvino")
GGUF = ("torch", "ggml")
BOUNDS = {
    "onnx-fp32": (ONNX, 2e-5),
    "onnx-fp16": (ONNX, 2e-3),
    "onnx-int8": (ONNX, 6e-2),
    "onnx-int4": (ONNX, 0.55),
    "openvino-int8": (ONNX, 6e-2),
    "openvino-bf16": (ONNX, 2.5e-2),
    "gguf-f32": (GGUF, 2e-5),
    "gguf-f16": (GGUF, 3e-3),
    "gguf-bf16": (GGUF, 2.5e-2),
    "gguf-q8": (GGUF, 5e-2),
    "gguf-q6": (GGUF, 7e-2),
    "gguf-q5": (GGUF, 0.12),
    "gguf-q4": (GGUF, 0.12),
}


def chunks(policy, name, **kwargs):
    """(answer, LeRobot's answer) for every observation of a golden."""
    meta = json.loads((GOLDEN / name / "golden.json").read_text())
    with np.load(GOLDEN / name / "golden.npz") as z:
        for i, task in enumerate(meta["tasks"]):
            images = {k.split("/image/")[1]: z[k] for k in z.files if k.startswith(f"obs{i}/image/")}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", vlac.errors.VlacWarning)  # one task is longer than the prompt
                got = policy.act(images, z[f"obs{i}/state"], task, noise=z[f"obs{i}/noise"], **kwargs)
            key = "chunk_normalised" if kwargs.get("units") == "normalized" else "chunk_robot"
            yield got, z[f"obs{i}/{key}"].reshape(got.shape)


@pytest.fixture(scope="module", params=[(n, t) for n in NAMES for t in BOUNDS], ids=lambda p: f"{p[0]}-{p[1]}")
def compiled(request, tmp_path_factory):
    name, target = request.param
    out = tmp_path_factory.mktemp(name) / target
    vlac.compile(GOLDEN / name / "checkpoint", target, out)
    return name, target, out


def test_every_engine_agrees_with_lerobot(compiled):
    name, target, out = compiled
    engines, bound = BOUNDS[target]
    ran = []
    for engine in engines:
        if get_engine(engine).missing():
            continue
        ran.append(engine)
        with vlac.load(out, engine=engine, threads=1) as policy:
            worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in chunks(policy, name))
            again = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in chunks(policy, name))
        assert worst <= bound, (engine, worst)
        assert again == worst, f"{engine}: the second call differs from the first"
    if not ran:
        pytest.skip(f"none of {', '.join(engines)} is installed")


def test_normalised_units(tmp_path):
    vlac.compile(GOLDEN / "smolvla_tiny" / "checkpoint", "gguf-f32", tmp_path / "out")
    meta_state = "state_normalised"
    with vlac.load(tmp_path / "out", engine="numpy") as policy, np.load(GOLDEN / "smolvla_tiny" / "golden.npz") as z:
        images = {k.split("/image/")[1]: z[k] for k in z.files if k.startswith("obs0/image/")}
        state = z[f"obs0/{meta_state}"].reshape(-1)[: policy.hparams.state_dim]
        mask = z["obs0/mask"].reshape(-1)
        got = policy.act(
            images, state, tokens=z["obs0/tokens"].reshape(-1), mask=mask, noise=z["obs0/noise"], units="normalized"
        )
        want = z["obs0/chunk_normalised"].reshape(got.shape)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


def test_cameras_by_last_part_and_seeded_noise(tmp_path):
    vlac.compile(GOLDEN / "smolvla_tiny" / "checkpoint", "gguf-q8", tmp_path / "out")
    with vlac.load(tmp_path / "out", engine="numpy") as policy:
        assert [c.rsplit(".", 1)[-1] for c in policy.hparams.cameras] == ["top", "wrist"]
        picture = np.full((48, 48, 3), 90, np.uint8)
        state = np.zeros(policy.hparams.state_dim, np.float32)
        args = {"images": {"top": picture, "wrist": picture}, "state": state, "task": "pick up the red cube"}
        a, b, c = policy.act(**args, seed=1), policy.act(**args, seed=1), policy.act(**args, seed=2)
        assert a.dtype == np.float32 and a.shape == (policy.hparams.chunk_size, policy.hparams.action_dim)
        assert np.array_equal(a, b) and not np.array_equal(a, c)
        assert {"vision_ms", "prefix_ms", "flow_ms", "total_ms"} <= set(policy.stats)
