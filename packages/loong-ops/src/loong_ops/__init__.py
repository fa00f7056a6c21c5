"""Fused kernels for the ops that `loong_core.ops` declares. `plugin.py` is what loong loads."""

from loong_ops.__about__ import __version__

__all__ = ["__version__"]
