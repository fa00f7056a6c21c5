"""Decoder-only language models as data: families, text tasks, recipes. `plugin.py` is what loong loads."""

from loong_llm.__about__ import __version__

__all__ = ["__version__"]
