"""Finds everything that a policy needs to act: weights, recipe, statistics, tokenizer, and what its robot looks like.

What training normalised by wins over what a dataset says today. A run folder knows everything but the robot's cameras,
which its dataset names; a policy's own folder has it all in LeRobot's files.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loong_core.errors import CheckpointError, DataError, Unsupported
from loong_vla import families, prompts
from loong_vla.lerobot.source import options_of
from loong_vla.options import RobotOptions
from loong_vla.policy import Policy
from loong_vla.processing import Robot

if TYPE_CHECKING:
    from loong_core.recipe import Recipe
    from loong_core.registry import Registry
    from loong_core.train.run import Run
    from loong_vla.lerobot.layout import Dataset

RECIPE, CHECKPOINTS, EXPORT, TOKENIZER = "recipe.yaml", "checkpoints", "hf", "tokenizer"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SCALES = "policy_preprocessor*.safetensors"
"""LeRobot's files with the statistics of a policy."""


@dataclass(frozen=True)
class Place:
    """Where a policy lies: the folder with its weights, its run folder and recipe where there are such."""

    weights: Path
    run: Path | None = None
    recipe: Recipe | None = None


def open_policy(
    path: Path,
    *,
    dataset: str | Path | None = None,
    options: RobotOptions | None = None,
    backend: str = "auto",
    precision: str | None = None,
    seed: int = 0,
) -> Policy:
    """The policy in a run folder (its newest checkpoint or export), a native checkpoint, or an exported folder.

    `dataset` tells what the robot looks like, by default the one the policy was trained on, where it is still there.
    `options` replace the recipe's `data.options`. `precision`: by default the run's, else bf16 where the backend is no
    CPU.

    Raises:
        UserError: something is missing or does not fit.
    """
    from loong_core.registry import open_registry

    registry = open_registry()
    place = find(path, registry)
    settings = options or options_of(place.recipe.data.options if place.recipe is not None else None)
    run, model = _model(place, registry, backend, precision)
    robots = _dataset(place, dataset)
    found = families.Policy(
        family=run.family.name,
        fields=run.shape.fields,
        config=run.config,
        tokenizer=_loaded(_tokenizer(place, run)),
        settings=settings,
        folders=_folders(place, run),
    )
    robot = _robot(place, run, settings, robots, found)
    return Policy(
        model, families.processing(found, robot), settings, device=run.device, seed=seed, family=run.family.name
    )


# ----------------------------------------------------------------------------------------------------- where it lies
def dataset_of(path: Path) -> Dataset | None:
    """The dataset that the policy in `path` was trained on, where it is still there."""
    from loong_core.registry import open_registry

    return _dataset(find(path, open_registry()), None)


def find(path: Path, registry: Registry) -> Place:
    """The weights that `path` means.

    Raises:
        CheckpointError: there are none.
    """
    from loong_core.recipe_load import load_file

    if not path.is_dir():
        raise CheckpointError(f"`{path}` is no folder. Name that of a run, of a checkpoint, or of an exported policy.")
    if (path / RECIPE).is_file() and not (path / "config.json").is_file():
        found = _newest(path, registry)
        if found is None:
            raise CheckpointError(f"The run in `{path}` has neither a complete checkpoint nor an export ({EXPORT}/).")
        return Place(found, path, load_file(path / RECIPE))
    for folder in (path, path.parent, path.parent.parent):  # an export or a checkpoint inside its run folder
        inside = folder == path or path.parent == folder / CHECKPOINTS or path == folder / EXPORT
        if inside and (folder / RECIPE).is_file():
            run = path.parent if path.name == EXPORT else path.parent.parent
            return Place(path, run if (run / RECIPE).is_file() else None, load_file(folder / RECIPE))
    return Place(path)


def _newest(folder: Path, registry: Registry) -> Path | None:
    """The newest undamaged checkpoint or export of a run folder."""
    from loong_core.registry import resolve

    formats = registry.table("checkpoint_formats").values()
    candidates = [*(folder / CHECKPOINTS).glob("step-*"), folder / EXPORT]
    candidates = [item for item in candidates if item.is_dir()]
    for item in sorted(candidates, key=lambda item: item.stat().st_mtime, reverse=True):
        claiming = next((known for known in formats if resolve(known.claims, known.name)(item)), None)
        if claiming is not None and not resolve(claiming.check, claiming.name)(item):
            return item
    return None


def _dataset(place: Place, given: str | Path | None) -> Dataset | None:
    from loong_vla.lerobot.layout import open_dataset

    if given is not None:
        return open_dataset(given)
    path = place.recipe.data.path if place.recipe is not None else None
    return open_dataset(path) if isinstance(path, Path) and (path / "meta" / "info.json").is_file() else None


def _folders(place: Place, run: Run) -> list[Path]:
    """Folders that may hold further files of the policy."""
    first = place.recipe.model.weights if place.recipe is not None else None
    named = (place.weights, first, run.config.get("base_model_path"))
    return [Path(name) for name in named if name is not None and Path(name).is_dir()]


def _tokenizer(place: Place, run: Run) -> Path:
    named = place.recipe.data.tokenizer if place.recipe is not None else None
    folders = [place.weights, *([named] if isinstance(named, Path) else [])]
    folders += [place.run / TOKENIZER] if place.run is not None else []
    folders += _folders(place, run)
    for folder in folders:
        if any((folder / name).is_file() for name in _TOKENIZERS):
            return folder
    raise CheckpointError(
        f"`{place.weights}` holds no tokenizer, so an instruction cannot be read. Copy the policy's tokenizer files "
        f"({' or '.join(_TOKENIZERS)}) there."
    )


def _loaded(folder: Path) -> Any:
    """The tokenizer of a folder. transformers would warn that it does not know the model beside it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return prompts.load_tokenizer(folder)
    finally:
        logging.set_verbosity(before)


# --------------------------------------------------------------------------------------------------------- the model
def _model(place: Place, registry: Registry, backend: str, precision: str | None) -> tuple[Run, Any]:
    """The model with its weights, in a world of one, without an optimizer; and the run it was built as."""
    from loong_core import validate
    from loong_core.recipe_load import load

    chosen = validate.choose_backend(backend, registry).backend
    recipe = _recipe(place, chosen.name, precision or _precision(place, chosen.device_type))
    with tempfile.TemporaryDirectory(prefix="loong-policy-") as name:
        folder = Path(name)
        (folder / "recipe.json").write_text(json.dumps(recipe))
        prepared = validate.prepare(load(str(folder / "recipe.json"), [], registry), registry, purpose="plan")
        if prepared.family.task != "flow_matching":
            raise Unsupported(f"`{place.weights}` holds a model of the family {prepared.family.name}, no robot policy.")

        import torch.distributed as dist

        from loong_core.registry import resolve
        from loong_core.train import run as runs
        from loong_core.train.start import start_weights

        alone = not dist.is_initialized()
        run = runs.create(prepared, registry, folder)
        try:
            engine = resolve(registry.get("parallel_planners", run.plan.planner).build)(run)
            start_weights(run, engine)
            module = engine.modules[0].eval()
            engine.close()
        finally:
            if alone:
                dist.destroy_process_group()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return run, module


def _recipe(place: Place, backend: str, precision: str) -> dict[str, Any]:
    """The smallest recipe with this model."""
    model: dict[str, Any] = {"weights": str(place.weights.absolute())}
    if place.recipe is not None:
        model["family"] = place.recipe.model.family
        if isinstance(place.recipe.model.config, dict):
            model["config"] = place.recipe.model.config
    return {
        "model": model,
        "task": {"name": "flow_matching"},
        "backend": backend,
        "precision": precision,
        "launch": {"devices": 1},
        "parallel": {"recompute": "none"},
        "data": {"source": "lerobot", "global_batch": 1},
    }


def _precision(place: Place, device: str) -> str:
    if device == "cpu":
        return "fp32"
    return place.recipe.precision if place.recipe is not None else "bf16"


# --------------------------------------------------------------------------------------------------------- the robot
def _robot(place: Place, run: Run, settings: RobotOptions, dataset: Dataset | None, policy: families.Policy) -> Robot:
    """What the policy was trained on, as far as it is known; its statistics first of all from its training."""
    statistics = _trained_statistics(place, run, settings)
    if dataset is not None:
        from loong_vla.check import feature_problems
        from loong_vla.open_stream import robot_of, statistics_of

        if problems := list(feature_problems(dataset, settings)):
            raise DataError(problems)
        if statistics is None:
            statistics = statistics_of(dataset, list(dataset.episodes), settings, families.needed(policy))
        return robot_of(dataset, settings, statistics)
    features = {**(run.config.get("input_features") or {}), **(run.config.get("output_features") or {})}
    sizes = {
        key: _size(getattr(settings, key), fallback, statistics, features)
        for key, fallback in (("state", "observation.state"), ("action", "action"))
    }
    cameras = _cameras(run, settings, features)
    if not all(sizes.values()) or not cameras:
        raise DataError(
            f"`{place.weights}` does not say what its robot looks like (state, actions, cameras). Name a dataset of it "
            "(--dataset)."
        )
    names = run.config.get("action_feature_names")
    return Robot(
        state=sizes["state"],
        action=sizes["action"],
        action_names=tuple(names) if isinstance(names, list) and len(names) == sizes["action"] else None,
        cameras=cameras,
        tasks=(),
        statistics=statistics,
        where=str(place.weights),
    )


def _trained_statistics(place: Place, run: Run, settings: RobotOptions) -> dict[str, Mapping[str, Any]] | None:
    """What the policy's training normalised by: its run's file, else LeRobot's processors beside the weights."""
    from loong_vla.open_stream import STATISTICS

    statistics: dict[str, dict[str, Any]] = {}
    path = place.run / STATISTICS if place.run is not None else None
    if path is not None and path.is_file():
        try:
            statistics = {name: dict(entry) for name, entry in json.loads(path.read_bytes()).items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"`{path}` cannot be read as statistics: {error}.") from None
    else:
        statistics = _processors(place.weights)
        renamed = {"observation.state": settings.state, "action": settings.action}
        statistics = {renamed.get(name, name): entry for name, entry in statistics.items()}
    if not statistics:
        return None
    if run.config.get("use_relative_actions") and run.family.name.startswith("groot"):
        steps = statistics.get(settings.action, {})
        statistics["relative_action"] = steps
        statistics[settings.action] = {name: np.atleast_2d(np.asarray(rows))[0] for name, rows in steps.items()}
    return dict(statistics)


def _processors(folder: Path) -> dict[str, dict[str, Any]]:
    """Feature -> statistic -> numbers, of the first of LeRobot's files that holds some."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    for path in sorted(folder.glob(_SCALES)):
        try:
            content = load_file(path)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"`{path}` cannot be read: {error}.") from None
        found: dict[str, dict[str, Any]] = {}
        for name, values in content.items():
            feature, _, statistic = name.rpartition(".")
            found.setdefault(feature, {})[statistic] = values
        if "action" in found:
            return found
    return {}


def _size(
    feature: str, fallback: str, statistics: Mapping[str, Mapping[str, Any]] | None, features: Mapping[str, Any]
) -> int:
    """Numbers of a feature, from the statistics or the configuration; 0 where neither knows."""
    for values in ((statistics or {}).get(feature) or {}).values():
        if np.ndim(values) and np.shape(values)[-1] > 1:
            return int(np.shape(values)[-1])
    entry = features.get(feature) or features.get(fallback) or {}
    shape = entry.get("shape") if isinstance(entry, Mapping) else None
    return int(shape[0]) if isinstance(shape, list) and len(shape) == 1 else 0


def _cameras(run: Run, settings: RobotOptions, features: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Camera features with height and width: those the recipe maps, else those of config.json."""
    shapes = {
        name: (int(entry["shape"][-2]), int(entry["shape"][-1]))
        for name, entry in features.items()
        if isinstance(entry, Mapping) and entry.get("type") == "VISUAL" and len(entry.get("shape") or ()) == 3
    }
    side = run.shape.fields["image_size"]
    usual = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    wanted = settings.cameras
    if wanted is None:
        return {name: size for name, size in shapes.items() if "empty_camera" not in name}
    pairs = wanted.items() if isinstance(wanted, Mapping) else ((name, name) for name in wanted)
    return {feature: shapes.get(name or "", usual) for name, feature in pairs if feature is not None}
