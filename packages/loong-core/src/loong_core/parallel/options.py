"""Settings of the megatron planner, decoded from `parallel.options`."""

from __future__ import annotations

from loong_core.recipe import Section


class MegatronOptions(Section):
    overlap: bool = True
    """Overlap gradient reduction and parameter gathering with compute where there is data parallelism."""
    bucket_size: int | None = None
    """Parameters per gradient bucket; null takes megatron-core's own rule."""
