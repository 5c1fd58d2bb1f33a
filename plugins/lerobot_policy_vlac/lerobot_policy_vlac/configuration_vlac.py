"""The configuration of policy type "vlac": which artifact, which engine, and the features that LeRobot asks for."""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig


@PreTrainedConfig.register_subclass("vlac")
@dataclass
class VlacConfig(PreTrainedConfig):
    """What is in a policy folder's config.json.

    Attributes:
        artifact: the artifact's name inside the policy folder: a .gguf file or a folder.
        engine, threads: as for `vlac.load`; None = the best that is installed, the engine's own number.
        chunk_size, n_action_steps: rows of a chunk, and how many of them are executed before the policy is asked again.
        seed: of the sampler's noise, one stream from each `reset` on; None = fresh noise.
    """

    artifact: str = ""
    engine: str | None = None
    threads: int | None = None
    chunk_size: int = 50
    n_action_steps: int = 50
    seed: int | None = None

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> None:
        """A compiled policy is not trained."""

    def get_scheduler_preset(self) -> None:
        """A compiled policy is not trained."""

    def validate_features(self) -> None:
        if not self.artifact:
            raise ValueError("policy type vlac needs `artifact`; make a policy folder: python -m lerobot_policy_vlac")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(f"n_action_steps {self.n_action_steps} of a chunk of {self.chunk_size}")
