"""What lies beside the weights of an exported GR00T: the configuration, statistics and processors that LeRobot opens.

A run that starts from a base model leaves a base model that knows one more robot (`statistics.json`, `processor_config.
json`); one that starts from a policy of LeRobot's leaves such a policy, with its two processors. Names and layout are
those of lerobot 0.6.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_core.errors import CheckpointError
from loong_vla.groot_shape import EMBODIMENTS

if TYPE_CHECKING:
    from loong_core.train.run import Run
    from loong_vla.groot_assets import Assets
    from loong_vla.options import RobotOptions

logger = logging.getLogger(__name__)

OWN_KEYS = ("embodiments", "padding_as_keys")
"""Keys of config.json that only loong knows; LeRobot refuses a policy's configuration that has any."""

STATISTICS, PROCESSOR = "statistics.json", "processor_config.json"
COMPANIONS = (PROCESSOR, STATISTICS, "embodiment_id.json")
"""Files of a base model that say how its inputs and outputs are scaled."""

BEFORE, AFTER = "policy_preprocessor", "policy_postprocessor"
BEFORE_STATE = f"{BEFORE}_step_2_groot_n1_7_pack_inputs_v1.safetensors"
AFTER_STATE = f"{AFTER}_step_0_groot_action_unpack_unnormalize_v2.safetensors"
SMALL = 64_000_000

Bounds = Mapping[str, Mapping[str, list[float]]]
"""`state` and `action` -> `min` and `max`, and `mean` and `std` where they are known -> numbers."""


def sidecars(run: Run, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of an export that are not weights: those given, those of the folder the run started from, and in them
    the statistics that the run's data was scaled by.

    Raises:
        CheckpointError: the statistics in the run folder cannot be read.
    """
    weights = run.recipe.model.weights
    found = {**(beside(weights) if weights is not None else {}), **files}
    config: dict[str, Any] = json.loads(found["config.json"])
    is_policy = config.get("type") == "groot"
    if is_policy:
        config = {key: value for key, value in config.items() if key not in OWN_KEYS}
    learnt = _learnt(run) if (run.folder / STATISTICS).is_file() else None
    if learnt is not None:
        bounds, assets = learnt
        sizes = {key: len(entry["min"]) for key, entry in bounds.items()}
        if is_policy:
            state = {"type": "STATE", "shape": [sizes["state"]]}
            config["input_features"] = {**(config.get("input_features") or {}), "observation.state": state}
            config["output_features"] = {"action": {"type": "ACTION", "shape": [sizes["action"]]}}
            found |= processors(config, run.shape.fields, bounds, assets)
        elif (name := assets.name or _named(assets.embodiment, found)) is not None:
            found |= robot_files(found, name, bounds, run.shape.fields["horizon"])
        else:
            logger.warning(
                "Slot %d has no name in embodiment_id.json, so the export holds no statistics of it: LeRobot takes "
                "those of the dataset. Set data.options.embodiment to a name to have them.",
                assets.embodiment,
            )
    if is_policy:
        found["config.json"] = _json(config)
    return found


def beside(folder: Path) -> dict[str, bytes]:
    """Statistics and processors of a policy's folder, by name."""
    if not folder.is_dir():
        return {}
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if (path.name in COMPANIONS or path.name.startswith((BEFORE, AFTER)))
        and path.suffix in (".json", ".safetensors")
        and path.is_file()
        and path.stat().st_size <= SMALL
    }


def robot_files(files: Mapping[str, bytes], name: str, bounds: Bounds, horizon: int) -> dict[str, bytes]:
    """A base model's files with one more robot: all of its state and all of its action are one group each."""
    statistics, processor = (_object(files, file) for file in (STATISTICS, PROCESSOR))
    # A base model may scale by quantiles. What the run scaled by stands for either.
    groups = {
        key: {key: {**_required(entry), "q01": entry["min"], "q99": entry["max"]}} for key, entry in bounds.items()
    }
    settings = processor.setdefault("processor_kwargs", {})
    absolute = {"rep": "absolute", "type": "non_eef", "format": "default"}
    settings.setdefault("modality_configs", {})[name] = {
        "state": {"delta_indices": [0], "modality_keys": ["state"]},
        "action": {
            "delta_indices": list(range(horizon)),
            "modality_keys": ["action"],
            "action_configs": [absolute],
        },
    }
    return {STATISTICS: _json({**statistics, name: groups}), PROCESSOR: _json(processor)}


def processors(
    config: Mapping[str, Any], fields: Mapping[str, Any], bounds: Bounds, assets: Assets
) -> dict[str, bytes]:
    """LeRobot's two pipelines, as files by name: from a robot's observation to the policy's input, and from its output
    to the robot's action."""
    import numpy as np
    from safetensors.numpy import save

    features = {"observation.state": bounds["state"], "action": bounds["action"]}
    state = save(
        {
            f"{feature}.{name}": np.asarray(values, np.float32)
            for feature, entry in features.items()
            for name, values in entry.items()
        }
    )
    tag = str(config.get("embodiment_tag", "new_embodiment"))
    packing = {
        **{"state_horizon": 1, "action_horizon": fields["horizon"], "valid_action_horizon": fields["horizon"]},
        **{"video_horizon": None, "max_state_dim": fields["state_size"], "max_action_dim": fields["action_size"]},
        **{"language_key": "task", "formalize_language": assets.formalise, "embodiment_tag": tag},
        **{"embodiment_mapping": {**EMBODIMENTS, tag: assets.embodiment}, "normalize_min_max": True},
        **{"state_dropout_prob": 0.0, "clip_outliers": assets.clip, "use_percentiles": False},
        **{"video_modality_keys": None, "raw_stats": None, "modality_config": None},
    }
    side = fields["image_size"]
    seeing = {
        **{"model_name": "nvidia/Cosmos-Reason2-2B", "image_target_size": [side, side], "device": "cpu"},
        **{"image_crop_size": None, "shortest_image_edge": assets.edge, "letter_box_transform": assets.letterbox},
        **{"crop_fraction": assets.crop if assets.sized else 230 / 256, "use_albumentations": assets.albumentations},
    }
    acting = {
        **{"env_action_dim": len(bounds["action"]["min"]), "normalize_min_max": True, "clip_normalized_action": True},
        **{"libero_gripper_action": False, "libero_gripper_binarize": True},
    }
    device = _step("device_processor", device="cpu", float_dtype=None)
    steps = {
        BEFORE: [
            _step("rename_observations_processor", rename_map={}),
            _step("to_batch_processor"),
            _step("groot_n1_7_pack_inputs_v1", **packing) | {"state_file": BEFORE_STATE},
            _step("groot_n1_7_vlm_encode_v1", **seeing),
            device,
        ],
        AFTER: [_step("groot_action_unpack_unnormalize_v2", **acting) | {"state_file": AFTER_STATE}, device],
    }
    pipelines = {f"{name}.json": _json({"name": name, "steps": each}) for name, each in steps.items()}
    return {**pipelines, BEFORE_STATE: state, AFTER_STATE: state}


def _learnt(run: Run) -> tuple[Bounds, Assets] | None:
    """What the run's data was scaled by, where that is not in the files that the run started from."""
    from loong_vla.families import Policy
    from loong_vla.groot_assets import Assets
    from loong_vla.lerobot.source import options_of

    settings = options_of(run.recipe.data.options)
    folders = [run.recipe.model.weights, run.config.get("base_model_path")]
    here = [Path(folder) for folder in folders if folder is not None and Path(folder).is_dir()]
    fields, config = run.shape.fields, run.config
    assets = Assets.read(
        Policy(family=run.family.name, fields=fields, config=config, tokenizer=None, settings=settings, folders=here)
    )
    if assets.statistics and assets.modality and settings.statistics in ("auto", "policy"):
        return None
    if config.get("use_relative_actions"):
        logger.warning("The export holds no statistics of relative actions: LeRobot computes them from the dataset.")
        return None
    return _bounds(run.folder / STATISTICS, settings), assets


def _named(slot: int, files: Mapping[str, bytes]) -> str | None:
    """The name under which LeRobot finds a slot: the one for new robots, or the only one."""
    table = {**EMBODIMENTS, **_object(files, "embodiment_id.json")}
    names = [name for name, number in table.items() if number == slot]
    return "new_embodiment" if "new_embodiment" in names else names[0] if len(names) == 1 else None


def _bounds(path: Path, settings: RobotOptions) -> Bounds:
    try:
        content = json.loads(path.read_bytes())
        named = {"state": content[settings.state], "action": content[settings.action]}
        return {
            key: {
                name: list(entry[name])
                for name in ("min", "max", "mean", "std")
                if name in ("min", "max") or name in entry
            }
            for key, entry in named.items()
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read as statistics of {settings.state} and {settings.action} ({error!r}). Start the run "
            "anew, or remove the file to export without them."
        ) from error


def _required(entry: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """LeRobot refuses groups without mean and standard deviation, though it scales by bounds alone: where the run knows
    none, the middle and half of the range stand in."""
    ends = list(zip(entry["min"], entry["max"], strict=True))
    return {"mean": [(a + b) / 2 for a, b in ends], "std": [(b - a) / 2 for a, b in ends], **entry}


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    content = json.loads(files.get(name, b"{}"))
    return content if isinstance(content, dict) else {}


def _step(name: str, **settings: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": settings}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
