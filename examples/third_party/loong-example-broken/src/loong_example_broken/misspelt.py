"""Broken on purpose: the hook's name is misspelt."""

from __future__ import annotations

from loong_core import ModelFamily, hookimpl


@hookimpl
def loong_model_familys() -> list[ModelFamily]:
    """Never called."""
    return []
