"""The plugin and recipe contracts, applied to this package."""

from __future__ import annotations

from loong_core.testing import PluginContract, RecipeContract


class TestPlugin(PluginContract):
    plugin = "llm"


class TestRecipes(RecipeContract):
    folder = "loong_llm"
