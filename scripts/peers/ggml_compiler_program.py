"""LeRobot's SmolVLA as a program of ggml-compiler: three stages and a loop over the flow steps.

Run by its command line (ggml_compiler.sh), with the checkpoint in VLAC_CHECKPOINT. The stages call LeRobot's own
modules; only what joins them is written here.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

import ggml_compiler
import torch
from ggml_compiler import api
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, make_att_2d_masks
from transformers import DynamicCache


def program() -> Any:
    with contextlib.chdir(os.environ["VLAC_CHECKPOINT"]):
        policy = SmolVLAPolicy.from_pretrained(".").to(torch.float32).eval()
    model, config = policy.model, policy.config
    towers = model.vlm_with_expert
    layers = towers.num_vlm_layers
    cameras = len(config.image_features)

    def encode(image: torch.Tensor) -> torch.Tensor:
        embedding = towers.embed_image(image)
        return embedding * math.sqrt(embedding.shape[-1])

    def prefix(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *images, tokens, mask, state = given
        words = towers.embed_language_tokens(tokens)
        state_row = model.state_proj(state)[:, None, :]
        embeddings = torch.cat([*images, words * math.sqrt(words.shape[-1]), state_row], dim=1)
        shown = torch.ones(1, sum(i.shape[1] for i in images), dtype=torch.bool)
        valid = torch.cat([shown, mask, torch.ones(1, 1, dtype=torch.bool)], dim=1)
        blocks = torch.zeros(1, embeddings.shape[1], dtype=torch.bool)
        blocks[:, -1] = True
        _, cache = towers.forward(
            attention_mask=make_att_2d_masks(valid, blocks),
            position_ids=torch.cumsum(valid, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        return tuple(x for layer in cache.layers for x in (layer.keys, layer.values))

    def step(x: torch.Tensor, time: torch.Tensor, mask: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache()
        for i in range(layers):
            cache.update(kv[2 * i], kv[2 * i + 1], i)
        rows = kv[0].shape[2] - mask.shape[1] - 1
        valid = torch.cat([torch.ones(1, rows, dtype=torch.bool), mask, torch.ones(1, 1, dtype=torch.bool)], dim=1)
        velocity = model.denoise_step(valid, cache, x, time.reshape(1))
        return x - velocity / config.num_steps

    image = torch.zeros(1, 3, *config.resize_imgs_with_padding)
    tokens = torch.zeros(1, config.tokenizer_max_length, dtype=torch.long)
    mask = torch.ones(1, config.tokenizer_max_length, dtype=torch.bool)
    state = torch.zeros(1, config.max_state_dim)
    noise = torch.zeros(1, config.chunk_size, config.max_action_dim)
    with torch.no_grad():
        embedding = encode(image)
        kv = prefix(*[embedding] * cameras, tokens, mask, state)
    names = [f"kv{i}" for i in range(len(kv))]
    images, embeddings = ([f"{n}{i}" for i in range(cameras)] for n in ("image", "embedding"))
    body = [api.call("encode", [i], [e]) for i, e in zip(images, embeddings, strict=True)]
    body.append(api.call("prefix", [*embeddings, "tokens", "mask", "state"], names))
    times = [1 - i / config.num_steps for i in range(config.num_steps)]
    turn = api.call("step", ["x", "time", "mask", *names], ["x"])
    body.append(api.loop(config.num_steps, [turn], carry={"x": "noise"}, scalars={"time": times}))
    stages = {
        "encode": api.Stage(encode, (image,)),
        "prefix": api.Stage(prefix, (*[embedding] * cameras, tokens, mask, state)),
        "step": api.Stage(step, (noise, torch.ones(1), mask, *kv)),
    }
    driver = api.Driver([*images, "tokens", "mask", "state", "noise"], body, ["x"])
    return ggml_compiler.Program(model, stages, driver)
