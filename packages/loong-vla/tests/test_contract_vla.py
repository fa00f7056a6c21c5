"""The plugin contract, applied to this package."""

from __future__ import annotations

from loong_core.testing import PluginContract


class TestPlugin(PluginContract):
    plugin = "vla"
