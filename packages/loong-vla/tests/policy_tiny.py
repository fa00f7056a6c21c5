"""Run folders of tiny policies with random weights, as training leaves them, without training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from loong_ckpt import hf
from loong_core.ops import OPS, bind
from loong_core.precision import POLICIES
from loong_core.recipe import Recipe
from loong_core.registry import resolve
from loong_core.types import ModelFamily, OpRequest, ParallelPlan
from loong_vla import open_stream
from loong_vla.lerobot.generate import generate
from loong_vla.lerobot.layout import Dataset
from loong_vla.lerobot.source import options_of
from loong_vla.models.groot import GROOT_N17
from loong_vla.models.pi05 import PI05

RECIPES = Path(open_stream.__file__).parent / "recipes"
FAMILIES: dict[str, ModelFamily] = {"pi05_tiny_cpu": PI05, "groot_tiny_cpu": GROOT_N17}
CAMERAS = {"observation.images.front": (24, 32), "observation.images.wrist": (20, 20)}


def make_dataset(folder: Path, frames: tuple[int, ...] = (14, 12, 13, 17), seed: int = 0) -> Dataset:
    return generate(folder, episodes=len(frames), frames=frames, cameras=CAMERAS, seed=seed)


def make_run(folder: Path, dataset: Dataset, name: str = "pi05_tiny_cpu", **config: Any) -> Any:
    """What training knows of a run: folder with recipe, tokenizer, statistics and export."""
    content: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    content["model"]["config"] |= config
    content["data"]["path"] = str(dataset.root)
    content["run"] |= {"name": folder.name, "dir": str(folder.parent)}
    recipe, family = Recipe.model_validate(content), FAMILIES[name]
    shape = resolve(family.describe)(family, content["model"]["config"])
    plan = ParallelPlan(planner="torch", world=1, micro_batch=4, micro_batches=2)
    run = SimpleNamespace(
        recipe=recipe, folder=folder, family=family, config=content["model"]["config"], shape=shape,
        plan=plan, precision=POLICIES[0], device="cpu",
        cluster=SimpleNamespace(devices_per_node=1), rank=0, world=1, notes=[], is_main=True, step=0,
    )  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    settings = options_of(recipe.data.options)
    use = open_stream.processing_of(run, dataset, None, settings)
    open_stream.save_statistics(folder, use, settings)
    run.model = make_model(run)
    whole = {parameter.spec.role: parameter for parameter in run.model.local_parameters()}
    hf.save(
        folder / "hf",
        run,
        SimpleNamespace(parameters=whole.values, gather=lambda parameter: parameter.tensor.detach()),  # type: ignore
    )
    return run


def make_model(run: Any, seed: int = 5) -> Any:
    ops = bind(OPS, OpRequest("cpu", "float32", {}, {}), {})
    model = resolve(run.family.builder)(run.shape, SimpleNamespace(ops=ops, precision=POLICIES[0], device="cpu"))[0]
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.local_parameters():
        spec = parameter.spec
        scale = 0.9 / spec.shape[-1] ** 0.5 if len(spec.shape) > 1 else 0.3
        parameter.assign(torch.randn(spec.shape, generator=generator) * scale + (spec.init == "ones"))
    return model.eval()
