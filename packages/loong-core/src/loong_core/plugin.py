"""What the core itself provides, registered through the same door as any stranger's plugin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from loong_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from loong_core.recipe import Recipe
    from loong_core.types import Backend, Cluster, DataSource, OpImpl, ParallelPlanner, PrecisionPolicy


@hookimpl
def loong_backends() -> Iterable[Backend]:
    """CPU (gloo) and CUDA (NCCL)."""
    from loong_core.backends import cpu, cuda

    return [cpu.BACKEND, cuda.BACKEND]


@hookimpl
def loong_precision_policies() -> Iterable[PrecisionPolicy]:
    """fp32 and bf16."""
    from loong_core.precision import POLICIES

    return POLICIES


@hookimpl
def loong_parallel_planners() -> Iterable[ParallelPlanner]:
    """Megatron's five dimensions."""
    from loong_core.parallel.plan import PLANNERS

    return PLANNERS


@hookimpl
def loong_ops() -> Iterable[OpImpl]:
    """The plain-torch references, and what Transformer Engine brings."""
    from loong_core.ops import OPS

    return OPS


@hookimpl
def loong_data_sources() -> Iterable[DataSource]:
    """text, jsonl, parquet."""
    from loong_core.data.sources import SOURCES

    return SOURCES


@hookimpl(trylast=True)
def loong_choose_planner(recipe: Recipe, cluster: Cluster) -> str | None:
    """The core answers last, so that any plugin may know better."""
    from loong_core.parallel.plan import choose_planner

    return choose_planner(recipe, cluster)
