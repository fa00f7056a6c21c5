"""Where the first weights come from: a Hugging Face folder, a native checkpoint, or the seed."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING

from loong_core.errors import CheckpointError, RecipeError
from loong_core.registry import resolve
from loong_core.train.init import initialise

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from loong_core.registry import Registry
    from loong_core.train.engine import Engine
    from loong_core.train.run import Run
    from loong_core.types import CheckpointFormat

DEFAULT_STD = 0.02


def start_weights(run: Run, engine: Engine) -> None:
    """Give the freshly built model its weights."""
    weights = run.recipe.model.weights
    if weights is None:
        std = float(run.shape.fields.get("init_std") or DEFAULT_STD)
        initialise(engine, run.recipe.run.seed, std, run.cluster.devices_per_node)
    else:
        found = format_of(weights, run.registry)
        resolve(found.load)(weights, run, engine)
        engine.weights_changed()


def freeze(run: Run, engine: Engine) -> None:
    """Stop gradients of the parameters whose role matches a pattern of `model.freeze`, besides those that the family
    itself freezes."""
    patterns = run.recipe.model.freeze
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(spec.role, pattern) for spec in run.shape.parameters):
            roles = ", ".join(sorted({spec.role for spec in run.shape.parameters})[:8])
            raise RecipeError(f"model.freeze: no parameter matches {pattern!r}. Roles look like: {roles}, ...")
    matched: dict[Tensor, set[bool]] = {}
    for parameter in engine.parameters():
        role = parameter.spec.role
        match = parameter.spec.frozen or any(fnmatch.fnmatchcase(role, pattern) for pattern in patterns)
        matched.setdefault(parameter.trained, set()).add(match)
        if len(matched[parameter.trained]) > 1:
            raise RecipeError(
                f"model.freeze: {role} is trained together with the other experts of its layer, so they "
                "freeze together. Use a pattern that matches all of them, as layers.3.moe.*."
            )
    for tensor, found in matched.items():
        tensor.requires_grad_(found == {False})


def format_of(folder: Path, registry: Registry) -> CheckpointFormat:
    """The installed checkpoint format that recognises `folder`."""
    formats = registry.table("checkpoint_formats")
    for candidate in formats.values():
        if resolve(candidate.claims)(folder):
            return candidate
    raise CheckpointError(
        f"{folder}: no installed checkpoint format recognises this folder. Installed: {', '.join(sorted(formats))}."
    )
