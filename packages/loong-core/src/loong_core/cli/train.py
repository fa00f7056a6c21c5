"""`loong train`: check, make the run folder, prepare the data, start the workers; under torchrun, join them instead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loong_core.cli import output

if TYPE_CHECKING:
    from loong_core.recipe_load import LoadedRecipe
    from loong_core.registry import Registry
    from loong_core.startup import Startup
    from loong_core.validate import Prepared

RecipeName = Annotated[str, typer.Argument(help="A YAML or JSON file, a run folder, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted keys to override: optim.lr=1e-4 data.path=[a.jsonl,b.jsonl] checkpoint.every=null."),
]


def train(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Train a recipe. Everything is checked before the first worker starts.

    Run it again to continue where it stopped. It starts its own workers (launch.devices), and joins those of torchrun
    or srun when started by them.

    \b
    Examples:
      loong train quickstart
      loong train recipe.yaml optim.lr=1e-4 parallel.tp=4
      torchrun --nproc-per-node 8 -m loong_core train recipe.yaml
    """
    from loong_core import launch, recipe_load, registry
    from loong_core.startup import Startup

    startup = Startup()
    plugins = registry.open_registry()
    if launch.in_worker():
        raise typer.Exit(_join(recipe, overrides or [], plugins, startup))
    loaded = recipe_load.read(recipe, overrides or [], plugins)
    raise typer.Exit(_start(loaded, plugins, startup))


def _start(loaded: LoadedRecipe, registry: Registry, startup: Startup) -> int:
    from loong_core import launch, run_folder, validate

    prepared = validate.prepare(loaded, registry)
    folder = run_folder.folder_of(prepared.recipe)
    fresh = not folder.is_dir() or not any(folder.iterdir())
    run_folder.create(prepared, registry)
    _announce(prepared, folder)
    startup.mark("checks")
    streamed = registry.get("data_sources", prepared.recipe.data.source).stream is not None
    code = 0 if streamed else _prepare_data(prepared, folder / run_folder.RECIPE)
    startup.mark("data")
    if code:
        if fresh:
            run_folder.discard(folder)
        return code
    path = folder / run_folder.RECIPE
    return launch.launch(path, prepared.cluster, prepared.backend, folder, startup, prepared.plan)


def _prepare_data(prepared: Prepared, recipe_path: Path) -> int:
    """Tokenizers and caches are made once, by a process of its own: they may need libraries this process never loads.
    Several machines each do it; the cache is committed by rename, so whoever is first wins."""
    from loong_core import launch

    command = [sys.executable, "-m", "loong_core.data.prepare", str(recipe_path)]
    environment = launch.worker_variables(prepared.cluster, prepared.backend, os.environ)
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    code = subprocess.run(command, env=environment, check=False).returncode
    return code if code in (0, 2) else 1


def _join(recipe: str, overrides: list[str], registry: Registry, startup: Startup) -> int:
    """One rank of a world that somebody else started: rank 0 checks, writes and speaks, the others follow it."""
    from loong_core import recipe_load, run_folder, validate
    from loong_core.errors import LoongError
    from loong_core.train import worker

    main = os.environ.get("RANK", "0") == "0"
    try:
        loaded = recipe_load.read(recipe, overrides, registry)
        prepared = validate.prepare(loaded, registry, purpose="train" if main else "worker")
    except LoongError as error:
        return output.error(error) if main else error.exit_code
    if main:
        folder = run_folder.create(prepared, registry)
        _announce(prepared, folder)
    else:
        folder = run_folder.wait_for(prepared)
    startup.mark("checks")
    return worker.main(folder / run_folder.RECIPE, startup)


def _announce(prepared: Prepared, folder: Path) -> None:
    recipe, plan = prepared.recipe, prepared.plan
    degrees = " ".join(f"{name} {getattr(plan, name)}" for name in ("tp", "pp", "cp", "ep", "dp"))
    weights = f"weights of {recipe.model.weights}" if recipe.model.weights is not None else "random weights"
    model = f"{prepared.family.name}, {output.count(plan.parameters)} parameters, {prepared.precision.name}, {weights}"
    size = f"x {recipe.data.seq_len} tokens" if prepared.task.counts == "tokens" else "samples"
    output.pairs(
        [
            ("run", f"{folder}, {recipe.run.steps} steps of {recipe.data.global_batch} {size}"),
            ("model", model),
            ("layout", f"{plan.world} x {prepared.backend.name}, {plan.planner}: {degrees}"),
            ("ops", ", ".join(f"{choice.op} {choice.name}" for choice in prepared.ops.values())),
        ]
    )
    for note in prepared.notes:
        if note.startswith("warning:"):
            output.warn(note)
