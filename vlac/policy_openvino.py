"""The adapter class of vlac.policy_adapter, imported by physicalai on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from physicalai.inference.adapters.openvino import OpenVINOAdapter
from physicalai.inference.adapters.registry import adapter_registry

from vlac.policy_adapter import settings
from vlac.policy_package import OPENVINO


@adapter_registry.register(OPENVINO, extensions=(".xml",))
class WithSettings(OpenVINOAdapter):  # type: ignore[misc]
    """physicalai's adapter; what the caller sets wins over the package."""

    def load(self, model_path: Path) -> None:
        """Compiles the model as the package says."""
        self.config: dict[str, Any] = {**settings(model_path), **self.config}
        super().load(model_path)
