"""Whether the checkpoint that `checkpoint.resume` names belongs to the model that a recipe trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from loong_core.errors import CheckpointError, UserError
from loong_core.findings import Findings
from loong_core.recipe import Recipe
from loong_core.registry import Registry, architecture_of, resolve
from loong_core.types import ModelShape
from loong_core.validate_model import Model, config_of_weights

KEY = "checkpoint.resume"
_SHOWN = 5
_REMEDY = "Give the model that was saved, or start a new run from its weights (model.weights)."


def check_resume(recipe: Recipe, model: Model, registry: Registry, findings: Findings) -> None:
    """Another model's parameters may have the same names and shapes, so its checkpoint could be loaded and trained on.
    A run's own checkpoints need no look: its folder is compared with the recipe."""
    path = recipe.checkpoint.resume
    if isinstance(path, Path):
        findings.absorb(KEY, [f"{KEY}: {text}" for text in _problems(path, model, registry)])


def _problems(path: Path, model: Model, registry: Registry) -> Iterator[str]:
    if not path.is_dir():
        yield f"`{path}` is no folder. Name a checkpoint of a run, as `runs/NAME/checkpoints/step-00001000`."
        return
    try:
        config = config_of_weights(path, registry)
        architecture = architecture_of(config)
        owner = next((f for f in registry.table("model_families").values() if architecture in f.hf_architectures), None)
        if owner is not None and architecture not in model.family.hf_architectures and model.family.hf_architectures:
            yield f"`{path}` is of another model: {owner.name} there, {model.family.name} here. {_REMEDY}"
            return
        shape = cast(ModelShape, resolve(model.family.describe, f"family {model.family.name}")(model.family, config))
    except CheckpointError as error:
        yield from error.problems
        return
    except UserError as error:
        yield f"`{path}` is of another model: {error}"
        return
    there, here = dict(shape.fields), dict(model.shape.fields)
    changed = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    if changed:
        listed = [f"{key} ({there.get(key)!r} there, {here.get(key)!r} here)" for key in changed[:_SHOWN]]
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        yield f"`{path}` is of another model; they differ in {', '.join(listed)}{more}. {_REMEDY}"
