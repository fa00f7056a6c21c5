"""What lies beside the weights of an exported Pi0.5: the configuration, statistics and processors that LeRobot opens.

A folder with them is a policy that LeRobot evaluates and deploys as one of its own. Names and layout of the files are
those that lerobot 0.6 writes for `pi05`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_core.errors import CheckpointError
from loong_vla.pi05_shape import OWN_KEYS

if TYPE_CHECKING:
    from loong_core.train.run import Run

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
    weights = run.recipe.model.weights
    found = {**(beside(weights) if weights is not None else {}), **files}
    config = policy_config(json.loads(found["config.json"]), run.shape.fields)
    statistics = _statistics(run)
    if statistics is not None:
        config = fitted(config, statistics, _cameras(run))
        found |= processors(config, statistics)
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
    return {
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


def fitted(config: Mapping[str, Any], statistics: Mapping[str, Any], cameras: tuple[str, ...]) -> dict[str, Any]:
    """The configuration with the sizes of the state and action that `statistics` are of, and `cameras`, unless the
    policy names its own."""
    side = (config.get("image_resolution") or [224, 224])[0]
    inputs = {name: entry for name, entry in (config.get("input_features") or {}).items() if entry["type"] == "VISUAL"}
    inputs = inputs or {name: {"type": "VISUAL", "shape": [3, side, side]} for name in cameras}
    sizes = {name: max(len(values) for values in statistics[name].values()) for name in FEATURES}
    return {
        **config,
        "input_features": {**inputs, "observation.state": {"type": "STATE", "shape": [sizes["observation.state"]]}},
        "output_features": {"action": {"type": "ACTION", "shape": [sizes["action"]]}},
    }


def processors(config: Mapping[str, Any], statistics: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """LeRobot's two pipelines, of files by name: from a robot's observation to the policy's input, and from its output
    to the robot's action. `statistics` are of `observation.state` and `action`."""
    import numpy as np
    from safetensors.numpy import save

    modes = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"}
    modes = {**modes, **(config.get("normalization_mapping") or {})}
    known = {
        f"{feature}.{name}": np.asarray(values, np.float32)
        for feature in FEATURES
        for name, values in statistics[feature].items()
    }
    relative = bool(config.get("use_relative_actions"))
    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    outputs = config["output_features"]

    def scaling(name: str, features: Mapping[str, Any], state: str) -> dict[str, Any]:
        return {
            "registry_name": name,
            "config": {"eps": 1e-8, "features": dict(features), "norm_map": modes},
            "state_file": state,
        }

    before = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {
            "registry_name": "relative_actions_processor",
            "config": {
                "enabled": relative,
                "exclude_joints": config.get("relative_exclude_joints", ["gripper"]),
                "action_names": config.get("action_feature_names"),
            },
        },
        scaling("normalizer_processor", {**config["input_features"], **outputs}, BEFORE_STATE),
        {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}},
        {
            "registry_name": "tokenizer_processor",
            "config": {
                "max_length": config.get("tokenizer_max_length", 200),
                "task_key": "task",
                "padding_side": "right",
                "padding": "max_length",
                "truncation": True,
                "tokenizer_name": PALIGEMMA,
            },
        },
        device,
    ]
    after = [
        scaling("unnormalizer_processor", outputs, AFTER_STATE),
        {"registry_name": "absolute_actions_processor", "config": {"enabled": relative}},
        device,
    ]
    return {
        f"{BEFORE}.json": _json({"name": BEFORE, "steps": before}),
        f"{AFTER}.json": _json({"name": AFTER, "steps": after}),
        BEFORE_STATE: save(known),
        AFTER_STATE: save(known),
    }


def _statistics(run: Run) -> dict[str, dict[str, Any]] | None:
    """What the run's data was normalised by, under LeRobot's names; None where it left nothing."""
    path = run.folder / STATISTICS
    if not path.is_file():
        return None
    named = {feature: run.recipe.data.options.get(option, feature) for feature, option in FEATURES.items()}
    try:
        content = json.loads(path.read_bytes())
        return {feature: dict(content[name]) for feature, name in named.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read as statistics of {' and '.join(named.values())} ({error!r}). Start the run anew, "
            "or remove the file to export without processors."
        ) from error


def _cameras(run: Run) -> tuple[str, ...]:
    """The dataset's cameras, in the order the policy sees them; the policy's own names where the recipe maps them."""
    named = run.recipe.data.options.get("cameras")
    if isinstance(named, Mapping):
        return tuple(named)
    if named is not None:
        return tuple(name or f"observation.images.empty_camera_{index}" for index, name in enumerate(named))
    if not isinstance(run.recipe.data.path, (str, Path)) or not (Path(run.recipe.data.path) / "meta").is_dir():
        return ()
    from loong_vla.lerobot.layout import open_dataset

    return tuple(open_dataset(run.recipe.data.path).cameras)


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
