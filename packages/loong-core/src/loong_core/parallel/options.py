"""Settings of the megatron planner, decoded from `parallel.options`."""

from __future__ import annotations

from typing import Literal

from loong_core.recipe import Section


class MegatronOptions(Section):
    overlap: bool = True
    """Overlap gradient reduction and parameter gathering with compute where there is data parallelism."""
    dispatch: Literal["auto", "gather", "alltoall"] = "auto"
    """How tokens reach experts on other ranks: gather (all ranks of the group see all tokens; the experts are not cut)
    or alltoall (each token is sent per expert). auto: gather in groups of up to 8 ranks where experts are not cut."""
    bucket_size: int | None = None
    """Parameters per gradient bucket; null takes megatron-core's own rule."""
