"""What this package offers; the only file with hook implementations."""

from __future__ import annotations

from collections.abc import Iterable

from loong_core import ModelFamily, hookimpl


@hookimpl
def loong_model_families() -> Iterable[ModelFamily]:
    """The family seed_oss."""
    from loong_example_model.seed_oss import SEED_OSS

    return [SEED_OSS]
