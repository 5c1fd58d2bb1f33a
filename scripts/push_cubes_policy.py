"""The bundled policy's shape: LeRobot's own SmolVLAPolicy at small dims, its tokenizer, and how it is saved.

Used by train_push_cubes.py, with the Python of .venv-lerobot (scripts/peers/lerobot.sh).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors
from peers.lerobot_reference import lerobot_config
from smolvla_checkpoint import SPECIAL, Shape, policy_config, write_vlm

from vlac.sim import INSTRUCTIONS

CHUNK = 10
SHAPE = Shape(
    text={
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    vision={
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 64,
        "patch_size": 8,
    },
    cameras={"top": (64, 64), "follow": (64, 64)},
    scale_factor=2,
    vocab=320,
    state_dim=4,
    action_dim=2,
    policy={
        "chunk_size": CHUNK,
        "n_action_steps": 5,
        "max_state_dim": 8,
        "max_action_dim": 8,
        "tokenizer_max_length": 32,
        "expert_width_multiplier": 0.75,
        "freeze_vision_encoder": False,
        "train_expert_only": False,
    },
)


def write_backbone(folder: Path) -> None:
    """The local stand-in for the VLM's hub repository, with a byte-level BPE trained on the instructions."""
    write_vlm(folder / "vlm", SHAPE, train_tokenizer())


def train_tokenizer() -> str:
    """Text of a tokenizer.json; every word of the instructions becomes one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{phrase}\n" for phrase in INSTRUCTIONS], trainer)
    return str(tokenizer.to_str(pretty=False))


def new_policy(folder: Path, seed: int) -> SmolVLAPolicy:
    """A policy with fresh weights, every one that an action depends on trained; `folder` holds vlm/."""
    torch.manual_seed(seed)
    with contextlib.chdir(folder):
        policy = SmolVLAPolicy(lerobot_config(policy_config(SHAPE)))
    for name, weight in policy.named_parameters():  # LeRobot would leave the last layer's keys and values random
        weight.requires_grad_(not name.endswith(("lm_head.weight", "text_model.norm.weight")))
    check_position_ids(policy)
    draw_weights(policy)
    return policy.float()


@torch.no_grad()
def draw_weights(policy: SmolVLAPolicy) -> None:
    """Fresh weights at the scale of these widths: transformers draws with the 0.02 of models ten times as wide, and
    positions that hardly show beside the pixels. Biases and norms stay as they are."""
    layers = 2 * SHAPE.text["num_hidden_layers"]
    width = SHAPE.text["hidden_size"]
    for name, weight in policy.named_parameters():
        if "vlm_with_expert" not in name or weight.ndim < 2:
            continue
        scale = weight[0].numel() ** -0.5
        if name.endswith("embed_tokens.weight"):
            scale = width**-0.5  # LeRobot multiplies what it looks up, and image tokens, by sqrt(width)
        elif name.endswith("modality_projection.proj.weight"):
            scale *= width**-0.5
        elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
            scale *= layers**-0.5
        if name.endswith("position_embedding.weight"):
            weight.copy_(waves(*weight.shape))
        else:
            weight.normal_(0, scale)


def waves(places: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, [places, width]: a start from which near patches look alike."""
    side = int(places**0.5)
    grid = torch.arange(side) / side
    frequencies = torch.arange(1, width // 8 + 1) * 0.5 * torch.pi
    phases = grid[:, None] * frequencies
    one = torch.cat([phases.sin(), phases.cos()], 1)
    one = torch.nn.functional.pad(one, (0, width // 2 - one.shape[1]))
    rows, columns = one[:, None].expand(side, side, -1), one[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(places, width) * 0.7


def load_policy(folder: Path) -> SmolVLAPolicy:
    """As a LeRobot user would; the names in the folder are relative to it."""
    with contextlib.chdir(folder):
        return SmolVLAPolicy.from_pretrained(".").float().eval()


def check_position_ids(policy: SmolVLAPolicy) -> None:
    """transformers computes a patch's row by rounding fractions, wrongly for some grids and versions: not for ours."""
    embeddings = policy.model.vlm_with_expert.get_vlm_model().vision_model.embeddings
    seen: list[torch.Tensor] = []
    hook = embeddings.position_embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    size = SHAPE.vision["image_size"]
    side = size // SHAPE.vision["patch_size"]
    with torch.no_grad():
        policy.model.vlm_with_expert.embed_image(torch.zeros(1, 3, size, size))
    hook.remove()
    assert torch.equal(seen[0].reshape(-1), torch.arange(side * side)), "wrong position ids in this transformers"


def save(policy: SmolVLAPolicy, stats: Mapping[str, Mapping[str, torch.Tensor]], folder: Path) -> None:
    """LeRobot's own files: config, weights, processors with the statistics; and vlm/ beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_backbone(folder)
    policy.save_pretrained(folder)
    with contextlib.chdir(folder):
        for processor in make_smolvla_pre_post_processors(policy.config, stats):
            processor.save_pretrained(".")


class Probe(torch.nn.Module):
    """Helps the backbone to see early: linear readings of where things are, from the image tokens and from the state
    token before the last layer, and of what the expert does next. Thrown away after training."""

    AHEAD = 5

    def __init__(self, policy: SmolVLAPolicy):
        super().__init__()
        width, tokens = SHAPE.text["hidden_size"], (8 // SHAPE.scale_factor) ** 2
        self.cameras = torch.nn.ModuleList(torch.nn.Linear(tokens * width, 4) for _ in SHAPE.cameras)
        self.inner, self.outer = torch.nn.Linear(width, 128), torch.nn.Linear(128, 6 + 2 * self.AHEAD)
        backbone = policy.model.vlm_with_expert.get_vlm_model()
        self._images: list[torch.Tensor] = []
        self._hidden: list[torch.Tensor] = []
        backbone.connector.register_forward_hook(lambda module, inputs, output: self._images.append(output))
        last = backbone.text_model.layers[-1].input_layernorm
        last.register_forward_hook(lambda module, inputs, output: self._hidden.append(output))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The error of the readings of what was just computed for `batch`."""
        here = batch["pusher"]
        seen = [(batch["cubes"] - 0.5) / 0.25, ((batch["cubes"] - here[:, None]) / 0.25).clamp(-2, 2)]
        loss = torch.zeros(())
        for head, tokens, truth in zip(self.cameras, self._images, seen, strict=True):
            scale = tokens.shape[-1] ** 0.5  # as LeRobot scales image tokens
            loss = loss + ((head(tokens.flatten(1) * scale) - truth.flatten(1)) ** 2).mean()
        read = self.outer(torch.nn.functional.silu(self.inner(self._hidden[0][:, -1])))
        places = torch.cat([(batch["named"] - here) / 0.25, (batch["other"] - here) / 0.25, batch["way"]], 1)
        loss = loss + ((read[:, :6] - places) ** 2).mean()
        wanted, inside = batch["action"][:, : self.AHEAD], ~batch["action_is_pad"][:, : self.AHEAD, None]
        errors = (read[:, 6:].unflatten(1, (self.AHEAD, 2)) - wanted) ** 2
        self.forget()
        return loss + (errors * inside).sum() / inside.sum() / 2

    def forget(self) -> None:
        self._images.clear()
        self._hidden.clear()


def flow_loss(policy: SmolVLAPolicy, batch: dict[str, torch.Tensor], draws: int) -> torch.Tensor:
    """SmolVLAPolicy.forward's loss with `draws` times and noises for each observation, whose prefix, which sees no
    action, is computed once: by the same LeRobot functions that sampling calls."""
    model = policy.model
    images, image_masks = policy.prepare_images(batch)
    prefix, pad, blocks = model.embed_prefix(
        images,
        image_masks,
        batch["observation.language.tokens"],
        batch["observation.language.attention_mask"],
        policy.prepare_state(batch),
    )
    reach = torch.cumsum(blocks, dim=1)
    mask = (reach[:, None, :] <= reach[:, :, None]) & pad[:, None, :] & pad[:, :, None]
    positions = torch.cumsum(pad, dim=1) - 1
    _, cache = model.vlm_with_expert.forward(mask, positions, None, [prefix, None], use_cache=True)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.repeat(draws, 1, 1, 1), layer.values.repeat(draws, 1, 1, 1)
    actions = policy.prepare_action(batch).repeat(draws, 1, 1)
    noise = model.sample_noise(actions.shape, actions.device)
    time = model.sample_time(actions.shape[0], actions.device)
    mixed = time[:, None, None] * noise + (1 - time[:, None, None]) * actions
    velocity = model.denoise_step(pad.repeat(draws, 1), cache, mixed, time)
    inside = ~batch["action_is_pad"].repeat(draws, 1)
    count = policy.config.action_feature.shape[0]
    errors = ((noise - actions - velocity) ** 2)[:, :, :count].mean(-1)
    return (errors * inside).sum() / inside.sum()
