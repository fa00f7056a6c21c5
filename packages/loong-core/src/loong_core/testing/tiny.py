"""A tiny run inside a rank: the product's own way from a recipe to an engine, on batches that every layout agrees on.

Everything here runs in ranks started by `loong_core.testing.ranks.run_ranks`, never in the test's own process.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loong_core.train.engine import Batch, Engine
    from loong_core.train.run import Run

SEQ_LEN = 16
GLOBAL_BATCH = 4


def settings(family: str, config: Mapping[str, Any], **changes: Mapping[str, Any] | str) -> dict[str, Any]:
    """A recipe for a few steps of a tiny model from random weights in fp32; `changes` are merged section by section."""
    recipe: dict[str, Any] = {
        "run": {"seed": 7, "steps": 8},
        "model": {"family": family, "config": dict(config)},
        "data": {"source": "jsonl", "seq_len": SEQ_LEN, "global_batch": GLOBAL_BATCH, "micro_batch": 1},
        "precision": "fp32",
        "backend": "cpu",
        "optim": {"lr": 1e-2, "warmup": 0, "schedule": "constant", "weight_decay": 0.01},
        "checkpoint": {"every": None, "export": None},
    }
    for section, change in changes.items():
        if isinstance(change, Mapping):
            recipe[section] = {**recipe.get(section, {}), **change}
        else:
            recipe[section] = change
    return recipe


def start(recipe: Mapping[str, Any], folder: Path, optimizer: bool = True) -> tuple[Run, Engine]:
    """Resolve the recipe as a worker does, build the engine, and bring in its first weights."""
    from loong_core import validate
    from loong_core.plugins import load
    from loong_core.recipe_load import load as load_recipe
    from loong_core.registry import Registry, resolve
    from loong_core.train import run as runs
    from loong_core.train.start import freeze, start_weights

    warnings.simplefilter("default")  # a worker does not run under the filters of pytest, which the fork inherited
    registry = Registry(load())
    loaded = load_recipe(str(_written(recipe, folder)), [], registry)
    run = runs.create(validate.prepare(loaded, registry, worker=True), registry, folder)
    engine: Engine = resolve(registry.get("parallel_planners", run.plan.planner).build)(run)
    start_weights(run, engine)
    freeze(run, engine)
    if optimizer:
        engine.optimizer(run.recipe.optim)
    return run, engine


def _written(recipe: Mapping[str, Any], folder: Path) -> Path:
    """The recipe as a file: of this process alone, because ranks share the folder."""
    path = folder / f"recipe-{os.getpid()}.json"
    path.write_text(json.dumps(recipe))
    return path


def batches(run: Run, step: int = 0) -> list[Batch]:
    """This rank's micro-batches of a global batch that depends on the step alone. One target in five does not count."""
    import torch

    data, plan = run.recipe.data, run.plan
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (data.global_batch, data.seq_len + 1)
    drawn = torch.randint(0, run.shape.vocabulary, shape, generator=generator)
    counted = torch.rand(data.global_batch, data.seq_len, generator=generator) > 0.2
    rows = {
        "tokens": drawn[:, :-1].contiguous(),
        "targets": torch.where(counted, drawn[:, 1:], -100),
        "positions": torch.arange(data.seq_len).expand(data.global_batch, -1).contiguous(),
    }
    replica = run.rank // (plan.tp * plan.cp) % plan.dp
    width = data.micro_batch
    firsts = [(micro * plan.dp + replica) * width for micro in range(plan.micro_batches)]
    return [{name: rows[name][first : first + width] for name in rows} for first in firsts]


def losses(recipe: Mapping[str, Any], folder: Path, steps: int) -> list[float]:
    """Losses of `steps` optimizer steps; the last one is that of an evaluation after them."""
    run, engine = start(recipe, folder)
    found = []
    for step in range(steps):
        found.append(engine.forward_backward(batches(run, step), step)["loss"])
        engine.step(run.recipe.optim.lr)
    found.append(engine.evaluate(batches(run, steps))["loss"])
    engine.close()
    return found


def worst(values: list[float], reference: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(value - exact) / abs(exact) for value, exact in zip(values, reference, strict=True))
