"""The plugin and recipe contracts, applied to this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from loong_core.testing import PluginContract, RecipeContract
from loong_vla.models.pi05 import presets

PUBLISHED = [f"model.config.{name}={value}" for name, value in presets()["pi05"].items() if isinstance(value, str)]


class TestPlugin(PluginContract):
    plugin = "vla"


class TestRecipes(RecipeContract):
    folder = "loong_vla"
    words: ClassVar[Mapping[str, Sequence[str]]] = {
        "pi05_full": ["model.config=pi05"],
        "pi05_libero": [*PUBLISHED, "model.config.max_action_dim=32"],
    }
