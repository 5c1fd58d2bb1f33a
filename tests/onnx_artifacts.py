"""Toy programs written as ONNX artifacts, for the tests of both ONNX engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlac.artifact import Artifact, Sidecars, open_artifact
from vlac.graph import Call, Param, Program, Repeat, Schedule, StageBuilder, check
from vlac.io import IO, Camera
from vlac.registry import silent
from vlac.weights import LazyTensor, Weights

TOY_IO = IO(
    cameras=(Camera("observation.images.top", (3, 8, 8)),),
    image_steps=(),
    state_key="observation.state",
    state_dim=4,
    state_steps=(),
    text_steps=(),
    action_key="action",
    action_dim=4,
    max_action_dim=8,
    chunk_size=5,
    n_action_steps=5,
    action_steps=(),
    normalised_action_steps=(),
)


def weights_of(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Gaussian weights, rows scaled by fan-in."""
    rng = np.random.default_rng(seed)
    return Weights({k: LazyTensor.of(rng.standard_normal(s) / np.sqrt(s[-1])) for k, s in shapes.items()})


def program_of(
    *stages: StageBuilder,
    weights: Weights,
    formats: Mapping[str, str] | None = None,
    steps: tuple[Call | Repeat, ...] = (),
    result: str = "",
) -> Program:
    built = tuple(s.build() for s in stages)
    params = {k: Param(w.shape, (formats or {}).get(k, "f32")) for k, w in weights.items()}
    schedule = Schedule(steps or tuple(Call(s.name) for s in built), result or built[-1].outputs[0])
    return check(Program("toy", (), built, params, schedule, weights))


def write(program: Program, folder: Path, **options: Any) -> Artifact:
    """The program as an ONNX artifact, opened."""
    from vlac.targets.onnx import emit

    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"format_version": 1, "engines": ["onnxruntime", "openvino"], "target": "onnx-toy", "family": "toy"}
    emit(program, Sidecars(str(program), TOY_IO.to_json(), manifest, None, None), folder, options, silent)
    return open_artifact(folder)


def write_unchecked(program: Program, folder: Path) -> Artifact:
    """The same for a program whose stage inputs no runtime would give (one op, alone)."""
    from vlac.artifact import _folder_tensors
    from vlac.targets.onnx import emit

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    emit(program, Sidecars(str(program), "{}", {}, None, None), folder, {}, silent)
    manifest = json.loads((folder / "manifest.json").read_text())
    return Artifact(folder, "folder", program, TOY_IO, manifest, None, _folder_tensors(folder, manifest), lambda: None)


def flow_program(formats: Mapping[str, str] | None = None, cameras: int = 2) -> Program:
    """A small policy with the parts a flow family has: cameras, prompt, state, grouped heads, masks, rope, steps."""
    width = 64
    v = StageBuilder("vision")
    x = v.patchify(v.input("pixels", "f32", 3, 8, 8), patch=2, block=2)
    x = v.add(v.linear(x, "@patch", "@patch.bias"), "@position")
    h = v.layer_norm(x, "@ln", "@ln.bias", eps=1e-6)
    qkv = [v.linear(h, f"@v{n}") for n in "qkv"]
    x = v.add(x, v.attention(*qkv, heads=4, kv_heads=4, scale=0.25))
    x = v.linear(v.gelu(x, approximate="tanh"), "@vout")
    v.output(v.op("reshape", x, name="image_tokens", shape=(4, width)))

    p = StageBuilder("prefix")
    image = p.input("image_tokens", "f32", 4 * cameras, width)
    image_valid = p.input("image_valid", "bool", cameras)
    text = p.embed(p.input("tokens", "i32", 3), "@table")
    state = p.linear(p.input("state", "f32", 1, 8), "@state")
    h = p.concat(image, text, state, axis=0)
    one = p.full(shape=(1,), value=1.0, dtype="bool")
    valid = p.concat(p.repeat_each(image_valid, times=4), p.input("token_valid", "bool", 3), one, axis=0)
    n = 4 * cameras + 4
    positions = p.sub(p.cumsum(p.cast(valid, dtype="i32")), p.full(shape=(1,), value=1.0, dtype="i32"))
    block = p.concat(p.full(shape=(n - 1,), value=0.0, dtype="i32"), p.full(shape=(1,), value=1.0, dtype="i32"), axis=0)
    h = p.rms_norm(h, "@rms", eps=1e-6)
    q = p.rope(p.linear(h, "@pq"), positions, head_dim=16, base=10000.0)
    k = p.op("rope", p.linear(h, "@pk"), positions, name="k", head_dim=16, base=10000.0)
    value = p.op("linear", h, "@pv", name="v")
    y = p.attention(q, k, value, p.attention_mask(block, block, valid), heads=4, kv_heads=2, scale=0.25)
    p.op("add", h, y, name="hidden")
    count = p.op("reduce_sum", p.cast(valid, dtype="i32"), name="count")
    p.op("concat", valid, name="valid", axis=0)
    p.output("k", "v", "valid", count)

    f = StageBuilder("flow")
    keys, values = f.input("k", "f32", n, 32), f.input("v", "f32", n, 32)
    valid, count = f.input("valid", "bool", n), f.input("count", "i32", 1)
    noisy, step = f.input("x", "f32", 5, 8), f.input("step", "i32", 1)
    h = f.add(f.linear(noisy, "@in", "@in.bias"), f.embed(step, "@times"))
    positions = f.add(f.arange(start=0, stop=5), count)
    q = f.rope(f.linear(h, "@fq"), positions, head_dim=16, base=10000.0)
    own = f.rope(f.linear(h, "@fk"), positions, head_dim=16, base=10000.0)
    causal = f.attention_mask(
        f.arange(start=0, stop=5), f.arange(start=0, stop=5), f.full(shape=(5,), value=1.0, dtype="bool")
    )
    seen = f.tile(f.reshape(valid, shape=(1, n)), rows=5)
    y = f.attention(
        q,
        f.concat(keys, own, axis=0),
        f.concat(values, f.linear(h, "@fv"), axis=0),
        f.concat(seen, causal, axis=1),
        heads=4,
        kv_heads=2,
        scale=0.25,
    )
    h = f.add(h, y)
    h = f.add(h, f.linear(f.mul(f.silu(f.linear(h, "@gate")), f.linear(h, "@up")), "@down"))
    f.op("add", noisy, f.scale(f.linear(h, "@out", "@out.bias"), factor=-0.2), name="x_next")
    f.output("x_next")

    w, kv = width, 32
    shapes: dict[str, tuple[int, ...]] = {"patch": (w, 12), "patch.bias": (w,), "position": (16, w), "ln": (w,)}
    shapes |= {"ln.bias": (w,), "vq": (w, w), "vk": (w, w), "vv": (w, w), "vout": (w // 4, w), "table": (9, w)}
    shapes |= {"state": (w, 8), "rms": (w,), "pq": (64, w), "pk": (kv, w), "pv": (kv, w), "in": (w, 8), "in.bias": (w,)}
    shapes |= {"times": (5, w), "fq": (64, w), "fk": (kv, w), "fv": (kv, w), "gate": (96, w), "up": (96, w)}
    shapes |= {"down": (w, 96), "out": (8, w), "out.bias": (8,)}
    steps = (Call("vision", "camera"), Call("prefix"), Repeat("flow", 5, "step", (("x_next", "x", "noise"),)))
    return program_of(v, p, f, weights=weights_of(shapes), formats=formats, steps=steps, result="x_next")


LINEARS = ("vq", "vk", "vv", "vout", "pq", "pk", "pv", "fq", "fk", "fv", "gate", "up", "down")
"""Weights of flow_program that a target may quantise."""


def flow_inputs(cameras: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Runtime inputs of flow_program; with two cameras or more the last one was not given."""
    rng = np.random.default_rng(seed)
    given = np.array([True] * max(1, cameras - 1) + [False] * (cameras - max(1, cameras - 1)))
    pixels = rng.uniform(-1, 1, (cameras, 3, 8, 8)).astype(np.float32) * given[:, None, None, None]
    return {
        "pixels": pixels.astype(np.float32),
        "image_valid": given,
        "tokens": np.array([3, 8, 0], np.int32),
        "token_valid": np.array([True, True, False]),
        "state": rng.standard_normal((1, 8)).astype(np.float32),
        "noise": rng.standard_normal((5, 8)).astype(np.float32),
    }


def run_schedule(program: Program, session: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The schedule over an engine's stages, the plain way."""
    env = dict(inputs)
    for step in program.schedule.steps:
        if isinstance(step, Repeat):
            env.update(session.repeat(step, env, {}))
        elif step.each:
            parts: list[dict[str, np.ndarray]] = []
            for pixels, given in zip(inputs["pixels"], inputs["image_valid"], strict=True):
                made = session.run(step.stage, {**env, "pixels": pixels}, {})
                parts.append({k: a if given else np.zeros_like(a) for k, a in made.items()})
            env.update({k: np.concatenate([p[k] for p in parts]) for k in parts[0]})
        else:
            env.update(session.run(step.stage, env, {}))
    return env[program.schedule.result]


def relative_max(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| over max |b|."""
    return float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max())
