"""One training run as the workers see it: built once from a resolved recipe, then passed everywhere."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from loong_core import ops, validate
from loong_core.registry import Registry, resolve

if TYPE_CHECKING:
    from loong_core.ops import Ops
    from loong_core.recipe import Recipe
    from loong_core.types import Backend, Cluster, ModelFamily, ModelShape, ParallelPlan, PrecisionPolicy, Task


@dataclass(kw_only=True)
class Run:
    """Everything a worker knows. Only `step` changes: the number of optimizer steps done."""

    recipe: Recipe
    folder: Path
    registry: Registry
    cluster: Cluster
    backend: Backend
    plan: ParallelPlan
    precision: PrecisionPolicy
    family: ModelFamily
    config: dict[str, Any]
    shape: ModelShape
    task: Task
    ops: Ops
    device: str
    rank: int = 0
    world: int = 1
    step: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()


def create(prepared: validate.Prepared, registry: Registry, folder: Path) -> Run:
    """Set up this worker's device and process group, and bind ops.

    `prepared` is what `loong_core.validate` made of the recipe: workers and the parent see the same facts. Rank and
    world come from the launcher's environment (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`); without one this is a world of one.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    backend = prepared.backend
    device = resolve(backend.setup)(int(os.environ.get("LOCAL_RANK", "0")))
    _start_process_group(backend.collective, rank, world, device)
    if prepared.recipe.run.deterministic:
        torch.use_deterministic_algorithms(True)
    impls = list(registry.table("ops").values())
    return Run(
        recipe=prepared.recipe,
        folder=folder,
        registry=registry,
        cluster=prepared.cluster,
        backend=backend,
        plan=prepared.plan,
        precision=prepared.precision,
        family=prepared.family,
        config=prepared.config,
        shape=prepared.shape,
        task=prepared.task,
        ops=ops.bind(impls, prepared.op_request, prepared.recipe.ops),
        device=device,
        rank=rank,
        world=world,
    )


def _start_process_group(collective: str, rank: int, world: int, device: str) -> None:
    """Join the world; a world of one needs neither address nor port."""
    if dist.is_initialized():
        return
    timeout = datetime.timedelta(minutes=30)
    bound = torch.device(device) if device.startswith("cuda") else None
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(collective, timeout=timeout, device_id=bound)
    else:
        store = dist.HashStore()
        dist.init_process_group(collective, store=store, rank=rank, world_size=world, timeout=timeout, device_id=bound)
