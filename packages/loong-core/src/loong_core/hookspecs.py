"""The contract: every hook a plugin may implement, with who calls it and when.

Provider hooks return descriptors of `types.py`. They are called at most once per process and kind, when a name of
that kind is first looked up, in plugin-name order, and must not import a tensor library. Event hooks run in workers.
No hook runs per layer, per op or per micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    import typer

    from loong_core.recipe import Recipe
    from loong_core.train.run import Run
    from loong_core.types import (
        Backend,
        CheckpointFormat,
        Cluster,
        DataSource,
        ModelFamily,
        OpImpl,
        ParallelPlanner,
        PrecisionPolicy,
        RecipeFolder,
        Task,
    )

PROJECT = "loong"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def loong_model_families() -> Iterable[ModelFamily]:
    """Model families. Called by the registry when a recipe or `loong models` asks for one."""


@hookspec
def loong_tasks() -> Iterable[Task]:
    """Training tasks (what an example is, what is minimised). Called by the registry when a recipe names one."""


@hookspec
def loong_parallel_planners() -> Iterable[ParallelPlanner]:
    """Parallel planners with the engine each builds. Called by the registry before planning."""


@hookspec
def loong_precision_policies() -> Iterable[PrecisionPolicy]:
    """Precision policies. Called by the registry before planning."""


@hookspec
def loong_backends() -> Iterable[Backend]:
    """Hardware backends. Called by the launcher in the parent process, and by `loong doctor`."""


@hookspec
def loong_ops() -> Iterable[OpImpl]:
    """Implementations of ops. Called once per worker before the model is built, and by `loong plan`."""


@hookspec
def loong_data_sources() -> Iterable[DataSource]:
    """Data sources. Called by the registry when a recipe or `loong data` names one."""


@hookspec
def loong_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """Checkpoint formats. Called by the registry when weights are loaded or saved."""


@hookspec
def loong_recipes() -> Iterable[RecipeFolder]:
    """Folders of recipes. Called by `loong recipes` and when a recipe or a `base:` is named."""


@hookspec
def loong_cli_commands(group: typer.Typer) -> None:
    """Add commands to the `loong` command line. Called at start-up, so it must import nothing heavy."""


@hookspec
def loong_validate(recipe: Recipe, cluster: Cluster) -> Iterable[str]:
    """Problems of a recipe on a cluster. Called in the parent before any worker starts; all are printed together."""


@hookspec(firstresult=True)
def loong_choose_planner(recipe: Recipe, cluster: Cluster) -> str | None:
    """Name the planner for `parallel.planner: auto`. The first answer wins; the core answers last."""


@hookspec
def loong_model_built(model: list[torch.nn.Module], run: Run) -> None:
    """Change the model (freeze, adapters, probes). Called in workers: weights loaded, optimizer not yet built."""


@hookspec
def loong_run_start(run: Run) -> None:
    """Called in workers before the first step."""


@hookspec
def loong_step_end(run: Run, metrics: dict[str, float]) -> None:
    """Called in workers after every optimizer step; the only per-step hook."""


@hookspec
def loong_checkpoint_saved(run: Run, path: Path) -> None:
    """Called on rank 0 once a checkpoint is durable under its final name."""


@hookspec
def loong_run_end(run: Run, error: BaseException | None) -> None:
    """Called in workers at the end, also after a failure (`error` set)."""
