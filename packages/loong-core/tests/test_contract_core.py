"""The plugin contract, applied to the core's own plugin, which comes through the same door as any other."""

from __future__ import annotations

from loong_core.testing import PluginContract


class TestCore(PluginContract):
    plugin = "core"
