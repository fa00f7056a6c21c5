"""Train a recipe inside a test: what `loong train` does, with forked ranks instead of launched ones."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from loong_core import run_folder
from loong_core.testing.ranks import RankError, run_ranks


def run_training(
    folder: Path, recipe: dict[str, Any], world: int = 1, *, kill_at: int | None = None, timeout: float = 240.0
) -> list[dict[str, Any]]:
    """Train `recipe` on `world` ranks with run folders in `folder`; returns the rows of its metrics.jsonl.

    `kill_at` kills every rank, as a power cut would, after that many steps and once some checkpoint is committed.
    Raises what the run raises: `RankError` with the failing rank's traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.json"
    run = {"dir": str(folder)} | recipe.get("run", {})
    path.write_text(json.dumps(recipe | {"run": run, "launch": {"devices": world}}))
    # The parent's part imports what workers need (transformers for a tokenizer), so it runs in a child as well.
    (prepared,) = run_ranks(1, _prepare, path, megatron=True, timeout=timeout)
    target = Path(prepared)
    recipe_path = target / run_folder.RECIPE
    if kill_at is None:
        run_ranks(world, _work, recipe_path, timeout=timeout)
    else:
        plugin = folder / "power_cut.py"
        plugin.write_text(POWER_CUT.format(step=kill_at))
        with contextlib.suppress(RankError):
            run_ranks(world, _work, recipe_path, timeout=timeout, env={"LOONG_PLUGIN_FILES": str(plugin)})
    metrics = (target / "metrics.jsonl").read_text().splitlines() if (target / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in metrics]


def _prepare(rank: int, path: Path) -> str:
    from loong_core import plugins, validate
    from loong_core.data.prepare import prepare
    from loong_core.recipe_load import load
    from loong_core.registry import Registry

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    registry = Registry(plugins.load())
    prepared = validate.prepare(load(str(path), [], registry), registry)
    target = run_folder.create(prepared, registry)
    if registry.get("data_sources", prepared.recipe.data.source).stream is None:
        prepare(prepared.recipe, target, registry=registry)
    return str(target)


def _work(rank: int, recipe_path: Path) -> int:
    from loong_core.train import worker

    with warnings.catch_warnings():
        # pytest may have made warnings errors; megatron-core's are no business of the run that is tested
        warnings.simplefilter("ignore")
        code = worker.main(recipe_path)
    if code:
        raise RuntimeError((recipe_path.parent / "logs" / f"exit-{rank:04d}.json").read_text())
    return code


POWER_CUT = """
import os, signal, time
from loong_core.hookspecs import hookimpl

@hookimpl
def loong_step_end(run, metrics):
    if run.step == {step}:
        while not list(run.folder.glob("checkpoints/step-*/manifest.json")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
"""
"""A plugin that kills every rank once `step` steps are done and some checkpoint is committed."""
