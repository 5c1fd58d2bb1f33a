"""A toy flow policy that reads every runtime input, as an artifact in memory: two cameras of 12 x 12 pixels, a prompt,
a state of 3, chunks of 5 x 4 actions out of 6 columns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from vlac.artifact import Artifact, StoredTensor
from vlac.dims import symbol
from vlac.graph import Call, Param, Program, Repeat, Schedule, StageBuilder, Symbol, check
from vlac.io import IO, Camera, Step

CHUNK, COLUMNS, ACTIONS, STATE, PROMPT, VOCAB, WIDTH = 5, 6, 4, 3, 8, 40, 8

TOKENIZER = {
    "version": "1.0",
    "truncation": {"direction": "Left", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 30}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0,
        "pad_token": "<pad>",
    },
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {w: i for i, w in enumerate(["<unk>", "<pad>", "pick", "up", "the", "red", "cube", "now", "please"])},
        "unk_token": "<unk>",
    },
}  # fmt: skip


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    return {
        "patch": draw(WIDTH, 48),
        "words": draw(VOCAB, WIDTH),
        "state": draw(WIDTH, STATE + 1),
        "query": draw(WIDTH, COLUMNS),
        "out": draw(COLUMNS, WIDTH),
        "dts": np.full((3, 1), 1 / 3, np.float32),
    }


def program(special: bool = False) -> Program:
    c, t = symbol("C"), symbol("T")
    v = StageBuilder("vision")
    patches = v.patchify(v.input("pixels", "f32", 3, 12, 12), patch=4, block=1)
    v.output(v.linear(patches, "@patch", name="image_tokens"))

    p = StageBuilder("prefix")
    rows = [p.input("image_tokens", "f32", c * 9, WIDTH)]
    valid = [p.repeat_each(p.input("image_valid", "bool", c), times=9)]
    if special:
        ids = p.full(shape=(1,), value=7.0, dtype="i32")
        rows.append(p.tile(p.embed(ids, "@words"), rows=c))
        valid.append(p.input("camera_valid", "bool", c))
    rows.append(p.embed(p.input("tokens", "i32", t), "@words"))
    valid.append(p.input("token_valid", "bool", t))
    rows.append(p.linear(p.input("state", "f32", 1, STATE + 1), "@state"))
    valid.append(p.full(shape=(1,), value=1.0, dtype="bool"))
    p.output(p.concat(*rows, axis=0, name="memory"), p.concat(*valid, axis=0, name="memory_valid"))

    f = StageBuilder("flow")
    length = c * (10 if special else 9) + t + 1
    step = f.input("step", "i32", 1)
    x = f.input("x", "f32", CHUNK, COLUMNS)
    memory, ok = f.input("memory", "f32", length, WIDTH), f.input("memory_valid", "bool", length)
    zeros = f.full(shape=(CHUNK,), value=0.0, dtype="i32")
    keys = f.full(shape=(length,), value=0.0, dtype="i32")
    mask = f.attention_mask(zeros, keys, ok)
    read = f.attention(f.linear(x, "@query"), memory, memory, mask, heads=2, kv_heads=2, scale=2.0)
    velocity = f.sub(f.linear(read, "@out"), x)
    f.output(f.add(x, f.mul(velocity, f.embed(step, "@dts")), name="x_next"))
    return check(
        Program(
            "toy",
            (Symbol("C", (1, 2)), Symbol("T", (4, PROMPT))),
            (v.build(), p.build(), f.build()),
            {k: Param(w.shape) for k, w in weights().items()},
            Schedule(
                (Call("vision", each="camera"), Call("prefix"), Repeat("flow", 3, "step", (("x_next", "x", "noise"),))),
                "x_next",
            ),
        )
    )


def io(**changes: Any) -> IO:
    value = IO(
        cameras=(Camera("observation.images.top", (3, 20, 30)), Camera("observation.images.wrist", (3, 12, 12))),
        image_steps=(
            Step("resize_with_pad", {"width": 12, "height": 12, "align": "right-bottom", "value": 0.0}),
            Step("affine", {"scale": 2.0, "offset": -1.0}),
        ),
        state_key="observation.state",
        state_dim=STATE,
        state_steps=(
            Step("normalise", {"mode": "MEAN_STD", "eps": 1e-8, "mean": [1.0, 2.0, 3.0], "std": [1.0, 0.0, 2.0]}),
            Step("pad", {"size": STATE + 1}),
        ),
        text_steps=(
            Step("ensure_suffix", {"suffix": " please"}),
            Step("tokenise", {"max_length": PROMPT, "padding": "max_length", "truncation": True}),
        ),
        action_key="action",
        action_dim=ACTIONS,
        max_action_dim=COLUMNS,
        chunk_size=CHUNK,
        n_action_steps=3,
        action_steps=(
            Step("take", {"size": ACTIONS}),
            Step("unnormalise", {"mode": "MIN_MAX", "eps": 1e-8, "min": [-10, 0, 5, -1], "max": [10, 1, 5, 1]}),
        ),
        normalised_action_steps=(Step("take", {"size": ACTIONS}),),
        image_size=12,
        vocab_size=VOCAB,
    )
    return dataclasses.replace(value, **changes)


def artifact(special: bool = False, static: bool = False, manifest: dict[str, Any] | None = None, **io_changes: Any):
    import json

    drawn = program(special)
    if static:
        drawn = drawn.bind(drawn.max_symbols())
    tensors = {k: StoredTensor(w.shape, "f32", lambda w=w: w) for k, w in weights().items()}
    return Artifact(
        path=Path("toy"),
        container="folder",
        program=drawn,
        io=io(**io_changes),
        manifest={"engines": ["numpy"], "target": "toy-f32", "family": "toy", "files": {}, **(manifest or {})},
        tokenizer=json.dumps(TOKENIZER).encode(),
        tensors=tensors,
        golden_bytes=lambda: None,
    )


def observation(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "images": {
            "top": rng.integers(0, 256, (20, 30, 3), dtype=np.uint8),
            "wrist": rng.integers(0, 256, (12, 12, 3), dtype=np.uint8),
        },
        "state": [1.5, 2.0, -1.0],
        "task": "pick up the red cube",
        "seed": seed,
    }
