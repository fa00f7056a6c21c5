"""Checkpoint formats: Hugging Face folders in and out, and sharded ones. `plugin.py` is what loong loads."""

from loong_ckpt.__about__ import __version__

__all__ = ["__version__"]
