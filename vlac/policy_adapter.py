"""OpenVINO in Intel's physicalai with the settings that a policy package of vlac's was exported with.

physicalai finds `register` by the entry point group physicalai.inference.adapters of the installed vlac. Its own
OpenVINO adapter takes settings from the caller only, and some models must not be compiled without theirs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlac.errors import ArtifactError
from vlac.policy_package import MANIFEST, OPENVINO, SIDE


def register(registry: Any) -> None:
    """Tells physicalai which module brings the backend; nothing heavy is imported."""
    registry.register_lazy_module(OPENVINO, "vlac.policy_openvino", extensions=(".xml",))


def settings(model: Path) -> dict[str, Any]:
    """OpenVINO's settings from the manifest beside a model; ArtifactError when there are none."""
    try:
        found = json.loads((model.parent / MANIFEST).read_text(encoding="utf-8"))[SIDE]["openvino"]
        return {str(k): v for k, v in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{model.parent} is not a package with an OpenVINO model of vlac's: {error!r}") from None
