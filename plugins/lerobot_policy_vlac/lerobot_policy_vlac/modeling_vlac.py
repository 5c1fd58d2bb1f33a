"""A LeRobot policy that is a vlac session: observations go in raw, actions come out in the robot's units."""

from __future__ import annotations

from collections import deque
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

import vlac

from .configuration_vlac import VlacConfig


class VlacPolicy(PreTrainedPolicy):
    """See VlacConfig. It has no parameters of its own that could be trained or moved to a device."""

    config_class = VlacConfig
    name = "vlac"

    def __init__(self, config: VlacConfig, *, folder: str | Path | None = None, **kwargs: Any) -> None:
        super().__init__(config)
        config.validate_features()
        root = folder if folder is not None else config.pretrained_path
        if root is None:
            raise ValueError("policy type vlac is loaded from a policy folder: give --policy.path")
        name = PurePosixPath(config.artifact)
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"artifact {config.artifact!r} leaves the policy folder")
        self.session = vlac.load(Path(root) / name, engine=config.engine, threads=config.threads)
        # LeRobot asks policies for the device of their parameters
        self.placement = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.reset()

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> VlacPolicy:
        """Opens a policy folder (local, or a repository on the hub)."""
        folder = Path(pretrained_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(pretrained_name_or_path), revision=kwargs.get("revision")))
        if config is None:
            config = PreTrainedConfig.from_pretrained(folder)
        if not isinstance(config, VlacConfig):
            raise ValueError(f"{folder}: policy type {config.type!r}, expected vlac")
        return cls(config, folder=folder).eval()

    def get_optim_params(self) -> dict[str, Any]:
        return {}

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any] | None]:
        raise RuntimeError("a compiled policy cannot be trained; train the checkpoint and compile it again")

    def reset(self) -> None:
        """Forgets the actions that are left of the last chunk."""
        self._left: deque[Tensor] = deque()
        self._noise = None if self.config.seed is None else np.random.default_rng(self.config.seed)

    def predict_action_chunk(self, batch: dict[str, Any], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """[B, chunk_size, action_dim] in the robot's units, for pictures [B, 3, H, W] in [0, 1] (or uint8), raw
        states [B, d] and a task each."""
        io = self.session.io
        size = next(v.shape[0] for k, v in batch.items() if isinstance(v, Tensor) and k.startswith("observation."))
        chunks = [self._act(batch, i, size, None if noise is None else noise[i].cpu().numpy(), io) for i in range(size)]
        return torch.from_numpy(np.stack(chunks))

    def _act(self, batch: dict[str, Any], i: int, size: int, noise: Any, io: Any) -> Any:
        pictures = {k: _picture(batch[k][i]) for k in self._cameras(batch)}
        state = batch.get(io.state_key)
        tasks = batch.get("task", "")
        if noise is None and self._noise is not None:
            noise = self._noise.standard_normal((io.chunk_size, io.max_action_dim)).astype(np.float32)
        return self.session.act(
            images=pictures,
            state=None if state is None else state[i].cpu().numpy(),
            task=(tasks if isinstance(tasks, str) else tasks[i % len(tasks)]) if io.text_steps else None,
            noise=noise,
        )

    def _cameras(self, batch: dict[str, Any]) -> list[str]:
        known = {c.key for c in self.session.io.cameras} | {k for k in self.session.io.rename if "image" in k}
        return [k for k in batch if k in known]

    def select_action(self, batch: dict[str, Any], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
        """[B, action_dim]: the next row of the chunk; a new chunk after n_action_steps rows."""
        if not self._left:
            chunk = self.predict_action_chunk(batch, noise=noise)
            self._left.extend(chunk[:, : self.config.n_action_steps].transpose(0, 1))
        return self._left.popleft()


def _picture(image: Tensor) -> Any:
    """[3, H, W] -> [H, W, 3]; values stay what they are (uint8, or float in [0, 1])."""
    return np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).numpy())
