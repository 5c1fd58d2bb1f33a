"""LeRobot policy plugin for artifacts of vlac; importing it registers the policy type "vlac"."""

from __future__ import annotations

from .configuration_vlac import VlacConfig

__all__ = ["VlacConfig"]
