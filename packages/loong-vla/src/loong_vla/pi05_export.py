"""What lies beside the weights of an exported Pi0.5: the configuration, statistics and processors that LeRobot opens.

A folder with them is a policy that LeRobot evaluates and deploys as one of its own. Names and layout of the files are
those that lerobot 0.6 writes for `pi05`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_core.errors import CheckpointError
from loong_vla.normalise import MODES
from loong_vla.options import RobotOptions
from loong_vla.pi05_shape import OWN_KEYS

if TYPE_CHECKING:
    from loong_core.train.run import Run
    from loong_vla.processing import Robot

logger = logging.getLogger(__name__)

STATISTICS = "statistics.json"
"""File of a run folder, where its data leaves what states and actions were normalised by: feature -> statistic ->
numbers."""

BEFORE, AFTER = "policy_preprocessor", "policy_postprocessor"
BEFORE_STATE = f"{BEFORE}_step_3_normalizer_processor.safetensors"
AFTER_STATE = f"{AFTER}_step_0_unnormalizer_processor.safetensors"
PALIGEMMA = "google/paligemma-3b-pt-224"
"""The tokenizer of every published Pi0.5. LeRobot's file names it; it is not part of the policy's folder."""

FEATURES = {"observation.state": "state", "action": "action"}
"""What LeRobot calls the state and the action, and the options of the data source that name them in a dataset."""

SMALL = 64_000_000
_FOREIGN = ("architectures", "model_type", "torch_dtype", "transformers_version")
_TOKEN_NUMBERS = ("bos_token_id", "eos_token_id", "pad_token_id")


def sidecars(run: Run, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of an export that are not weights: those given, those of the folder the run started from, and in place
    of these what the run's data changes: sizes of state and action, cameras, statistics.

    Raises:
        CheckpointError: the statistics in the run folder cannot be read.
    """
    from loong_vla.lerobot.source import options_of

    weights = run.recipe.model.weights
    found = {**(beside(weights) if weights is not None else {}), **files}
    config = policy_config(json.loads(found["config.json"]), run.shape.fields)
    settings = options_of(run.recipe.data.options) if (run.folder / STATISTICS).is_file() else RobotOptions()
    statistics = _statistics(run, settings)
    if statistics is not None:
        config = fitted(config, statistics, _robot(run, settings), settings)
        found |= processors(config, statistics)
        if settings.prompt == "task":
            logger.warning("LeRobot's processor puts the state into every prompt of Pi0.5; this policy read the task.")
    found["config.json"] = _json(config)
    return found


def beside(folder: Path) -> dict[str, bytes]:
    """Processors of a policy's folder, and the statistics they use, by name."""
    if not folder.is_dir():
        return {}
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name.startswith((BEFORE, AFTER))
        and path.suffix in (".json", ".safetensors")
        and path.is_file()
        and path.stat().st_size <= SMALL
    }


def policy_config(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """LeRobot's configuration: its own without keys it does not know, or made from another one (OpenPI's)."""
    foreign = (*OWN_KEYS, *_FOREIGN, *_TOKEN_NUMBERS)
    if config.get("type") == "pi05":
        kept = {key: value for key, value in config.items() if key not in foreign}
        return {"n_action_steps": fields["horizon"], **kept}
    sizes = {"sizes": config["sizes"]} if "sizes" in config else {}
    return {
        **sizes,
        "type": "pi05",
        "paligemma_variant": config.get("paligemma_variant", "gemma_2b"),
        "action_expert_variant": config.get("action_expert_variant", "gemma_300m"),
        "chunk_size": fields["horizon"],
        "n_action_steps": fields["horizon"],
        "max_action_dim": fields["action_size"],
        "max_state_dim": fields["state_size"],
        "image_resolution": [fields["image_size"]] * 2,
        "tokenizer_max_length": fields["prompt_length"],
        "num_inference_steps": fields["sampling_steps"],
        "min_period": fields["shortest_period"],
        "max_period": fields["longest_period"],
    }


def fitted(
    config: Mapping[str, Any], statistics: Mapping[str, Any], robot: Robot | None, settings: RobotOptions
) -> dict[str, Any]:
    """The configuration with the sizes, cameras and normalisation of what the policy was trained on. `robot`: None
    where its data are not there any more; the policy's cameras then are those it named before."""
    import numpy as np

    from loong_vla.families import Policy, cameras

    side = (config.get("image_resolution") or [224, 224])[0]
    found = {name: entry for name, entry in (config.get("input_features") or {}).items() if entry["type"] == "VISUAL"}
    if robot is not None:
        policy = Policy(family="pi05", fields={}, config=config, tokenizer=None, settings=settings)
        image = {"type": "VISUAL", "shape": [3, side, side]}
        found = {camera.name: found.get(camera.name, image) for camera in cameras(policy, robot)}
    sizes = {name: max(map(np.size, statistics[name].values()), default=0) for name in FEATURES}
    if robot is not None:
        sizes = {"observation.state": robot.state, "action": robot.action}
    modes = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
    modes |= config.get("normalization_mapping") or {}
    names = {mode: name for name, mode in MODES.items()}
    modes |= {kind.upper(): names[mode] for kind, mode in settings.normalise.items()}
    named = {"action_feature_names": list(robot.action_names)} if robot is not None and robot.action_names else {}
    return {
        **config,
        **named,
        "input_features": {**found, "observation.state": {"type": "STATE", "shape": [sizes["observation.state"]]}},
        "output_features": {"action": {"type": "ACTION", "shape": [sizes["action"]]}},
        "normalization_mapping": modes,
    }


def processors(config: Mapping[str, Any], statistics: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """LeRobot's two pipelines, as files by name: from a robot's observation to the policy's input, and from its output
    to the robot's action. `config` is `fitted`, `statistics` are of `observation.state` and `action`."""
    import numpy as np
    from safetensors.numpy import save

    known = {
        f"{feature}.{name}": np.asarray(values, np.float32)
        for feature in FEATURES
        for name, values in statistics[feature].items()
    }
    pipelines = {BEFORE: _before(config), AFTER: _after(config)}
    found = {f"{name}.json": _json({"name": name, "steps": steps}) for name, steps in pipelines.items()}
    return {**found, BEFORE_STATE: save(known), AFTER_STATE: save(known)}


def _before(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    relative = {
        "enabled": bool(config.get("use_relative_actions")),
        "exclude_joints": config.get("relative_exclude_joints", ["gripper"]),
        "action_names": config.get("action_feature_names"),
    }
    tokenizer = {
        "max_length": config.get("tokenizer_max_length", 200),
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": PALIGEMMA,
    }
    features = {**config["input_features"], **config["output_features"]}
    return [
        _step("rename_observations_processor", rename_map={}),
        _step("to_batch_processor"),
        _step("relative_actions_processor", **relative),
        _scaling("normalizer_processor", features, config, BEFORE_STATE),
        _step("pi05_prepare_state_tokenizer_processor_step"),
        _step("tokenizer_processor", **tokenizer),
        _step("device_processor", device="cpu", float_dtype=None),
    ]


def _after(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        _scaling("unnormalizer_processor", config["output_features"], config, AFTER_STATE),
        _step("absolute_actions_processor", enabled=bool(config.get("use_relative_actions"))),
        _step("device_processor", device="cpu", float_dtype=None),
    ]


def _step(name: str, **settings: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": settings}


def _scaling(name: str, features: Mapping[str, Any], config: Mapping[str, Any], state: str) -> dict[str, Any]:
    settings = {"eps": 1e-8, "features": dict(features), "norm_map": config["normalization_mapping"]}
    return {"registry_name": name, "config": settings, "state_file": state}


def _statistics(run: Run, settings: RobotOptions) -> dict[str, dict[str, Any]] | None:
    """What the run's data was normalised by, under LeRobot's names; None where it left nothing."""
    path = run.folder / STATISTICS
    if not path.is_file():
        return None
    named = {feature: getattr(settings, option) for feature, option in FEATURES.items()}
    try:
        content = json.loads(path.read_bytes())
        return {feature: dict(content[name]) for feature, name in named.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read as statistics of {' and '.join(named.values())} ({error!r}). Start the run anew, "
            "or remove the file to export without processors."
        ) from error


def _robot(run: Run, settings: RobotOptions) -> Robot | None:
    """The robot of the run's dataset; None where that is not there any more."""
    path = run.recipe.data.path
    if not isinstance(path, Path) or not (path / "meta").is_dir():
        return None
    from loong_vla.lerobot.layout import open_dataset
    from loong_vla.open_stream import robot_of

    return robot_of(open_dataset(path), settings)


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
