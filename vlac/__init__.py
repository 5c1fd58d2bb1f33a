"""vlac, the VLA compiler: a vision-language-action policy from a checkpoint onto a robot's own computer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vlac.api import compile, inspect, load
    from vlac.runtime.observation import pad_state, preprocess_image

__all__ = ["__version__", "compile", "inspect", "load", "pad_state", "preprocess_image"]

_LAZY = {
    "compile": "vlac.api",
    "inspect": "vlac.api",
    "load": "vlac.api",
    "preprocess_image": "vlac.runtime.observation",
    "pad_state": "vlac.runtime.observation",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vlac' has no attribute {name!r}")
