"""The networks of the field under their known names, and the user's own."""

from __future__ import annotations

from hasten.models.registry import available, build
from hasten.models.source import ModelSource, from_recipe, resolve

__all__ = ["ModelSource", "available", "build", "from_recipe", "resolve"]
