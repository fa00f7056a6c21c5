"""How Pi0.5 and GR00T want their inputs: sizes, prompts, normalisation and time, read from the files of a policy.

A policy's `config.json` (LeRobot's or OpenPI's) decides; a GR00T base model adds `processor_config.json`,
`statistics.json` and `embodiment_id.json`. Where a file is silent, LeRobot 0.6's defaults hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loong_core.errors import DataError, RecipeError
from loong_core.suggest import did_you_mean
from loong_vla import images, normalise
from loong_vla.normalise import Mode, Normaliser
from loong_vla.options import RobotOptions
from loong_vla.processing import Camera, Processing, Robot, beta_time
from loong_vla.prompts import GrootPrompts, Pi05Prompts
from loong_vla.tasks import Count


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is known of a policy: family, resolved fields of its shape, config.json, folders with its further files, its
    tokenizer, the recipe's settings of the data, and what the task counts.

    `relative` computes statistics of actions that count from the state, given their mask, the number of steps and
    whether every step has its own (`normalise.relative_statistics`); a server has none.
    """

    family: str
    fields: Mapping[str, Any]
    config: Mapping[str, Any]
    tokenizer: Any
    settings: RobotOptions = field(default_factory=RobotOptions)
    folders: Sequence[Path] = ()
    count: Count = "auto"
    relative: Callable[[np.ndarray, int, bool], Mapping[str, Any]] | None = None

    @property
    def groot(self) -> bool:
        """Whether this is a GR00T."""
        return self.family.startswith("groot")

    def file(self, name: str) -> dict[str, Any]:
        """A JSON object beside the weights, empty where there is none."""
        for folder in self.folders:
            if (folder / name).is_file():
                try:
                    content = json.loads((folder / name).read_text("utf-8"))
                except (OSError, ValueError) as error:
                    raise DataError(f"`{folder / name}` cannot be read as JSON: {error}.") from None
                return content if isinstance(content, dict) else {}
        return {}


def processing(policy: Policy, robot: Robot) -> Processing:
    """How a robot's data become this policy's inputs.

    Raises:
        DataError: statistics or cameras that the policy needs are not there.
        RecipeError: the recipe asks for something the family has not.
    """
    return (_groot if policy.groot else _pi05)(policy, robot)


def needed(policy: Policy) -> dict[str, tuple[str, ...]]:
    """The statistics a policy needs by `state` and `action`, where they are not its own or of relative actions."""
    modes = {key: _mode(policy, key) for key in ("state", "action")}
    if policy.groot and policy.config.get("use_relative_actions"):
        return {"state": (*normalise.NEEDED["min_max"], *normalise.NEEDED["quantiles"]), "action": ()}
    if policy.config.get("use_relative_actions"):
        modes["action"] = "identity"
    return {key: normalise.NEEDED[mode] for key, mode in modes.items()}


def _mode(policy: Policy, key: str) -> Mode:
    asked = policy.settings.normalise.get("state" if key == "state" else "action")
    if asked is not None:
        return asked
    if policy.groot:
        return "min_max"
    named = (policy.config.get("normalization_mapping") or {}).get(key.upper())
    if named is None:
        return "quantiles"
    if str(named) not in normalise.MODES:
        allowed = ", ".join(normalise.MODES)
        raise RecipeError(f"config.json: normalization_mapping.{key.upper()} {named!r} is not one of {allowed}.")
    return normalise.MODES[str(named)]


# ------------------------------------------------------------------------------------------------------- cameras
def cameras(policy: Policy, robot: Robot) -> tuple[Camera, ...]:
    """The policy's cameras and what fills them.

    Raises:
        DataError: a camera of the policy is not mapped, or mapped to a feature that is no camera of the dataset.
    """
    chosen = policy.settings.cameras
    names = _named_cameras(policy.config)
    if isinstance(chosen, Mapping):
        found = dict(chosen)
        if unknown := [name for name in found if names and name not in names]:
            raise DataError(
                f"data.options.cameras: the policy has no camera {', '.join(unknown)}; it has {', '.join(names)}."
                f"{did_you_mean(unknown[0], names)}"
            )
        _all_named(names, found)
        found = {name: found.get(name) for name in names or found}
    elif chosen is not None:
        if names and len(chosen) > len(names):
            raise DataError(f"data.options.cameras lists {len(chosen)}, but the policy has only {', '.join(names)}.")
        keys = names or [name or f"camera {number}" for number, name in enumerate(chosen)]
        _all_named(names, keys[: len(chosen)])
        found = dict(zip(keys, [*chosen, *[None] * (len(keys) - len(chosen))], strict=True))
    elif names:
        found = {name: _alike(name, list(robot.cameras)) for name in names}
        missing = [name for name, feature in found.items() if feature is None and "empty_camera" not in name]
        if missing:
            raise DataError(
                f"`{robot.where}` has no camera {', '.join(missing)}, which config.json of the policy names; it has "
                f"{', '.join(robot.cameras) or 'none'}. Map them in data.options.cameras, as {{{missing[0]}: "
                f"{next(iter(robot.cameras), 'observation.images.front')}}}; null stands for a camera that "
                "this robot lacks."
            )
    else:
        found = {name: name for name in (sorted(robot.cameras) if policy.groot else robot.cameras)}
    wrong = [name for name in found.values() if name is not None and name not in robot.cameras]
    if wrong:
        known = f"its cameras are {', '.join(robot.cameras) or 'none'}.{did_you_mean(wrong[0], list(robot.cameras))}"
        raise DataError(f"data.options.cameras: `{wrong[0]}` is no camera of `{robot.where}`; {known}")
    if not any(found.values()):
        raise DataError(f"`{robot.where}`: the policy would see no camera. Map at least one in data.options.cameras.")
    tokens = [token.lower() for token in policy.settings.wrist]
    return tuple(
        Camera(name, feature, any(token in (text or "").lower() for token in tokens for text in (name, feature)))
        for name, feature in found.items()
    )


def _all_named(names: Sequence[str], given: Collection[str]) -> None:
    if silent := [name for name in names if name not in given and "empty_camera" not in name]:
        raise DataError(
            f"data.options.cameras says nothing of {', '.join(silent)}, which the policy has too. Name the dataset's "
            "camera for it, or null where this robot has none."
        )


def _named_cameras(config: Mapping[str, Any]) -> list[str]:
    features = config.get("input_features") or {}
    return [name for name, entry in features.items() if isinstance(entry, Mapping) and entry.get("type") == "VISUAL"]


def _alike(name: str, known: Sequence[str]) -> str | None:
    """The feature of the same name, or of the same last part of it."""
    last = [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    return name if name in known else last[0] if len(last) == 1 else None


# --------------------------------------------------------------------------------------------------------- Pi0.5
def _pi05(policy: Policy, robot: Robot) -> Processing:
    fields, config, settings = policy.fields, policy.config, policy.settings
    if settings.embodiment is not None:
        raise RecipeError(f"data.options.embodiment: {policy.family} has no embodiments. Remove the key.")
    side, horizon = fields["image_size"], fields["horizon"]
    statistics, relative = robot.statistics, None
    if config.get("use_relative_actions"):
        exclude = config.get("relative_exclude_joints", ["gripper"])
        relative = normalise.relative_mask(robot.action_names, robot.action, exclude)
        if policy.relative is not None:
            statistics = {**(statistics or {}), settings.action: policy.relative(relative, horizon, False)}
    with_state = {"auto": config.get("discrete_state_input", True), "state": True, "task": False}[settings.prompt]
    draw = beta_time(config.get("time_sampling_beta_alpha", 1.5), config.get("time_sampling_beta_beta", 1.0))
    scale, offset = config.get("time_sampling_scale", 0.999), config.get("time_sampling_offset", 0.001)
    return Processing(
        cameras=cameras(policy, robot),
        size=(side, side),
        resize=images.pad_resize(side, side),
        prompts=Pi05Prompts(policy.tokenizer, fields["prompt_length"], with_state),
        states=_normaliser(policy, robot, "state", statistics),
        actions=_normaliser(policy, robot, "action", statistics),
        robot=robot,
        state_size=fields["state_size"],
        action_size=fields["action_size"],
        horizon=horizon,
        steps=horizon,
        time=lambda uniform: draw(uniform) * scale + offset,
        relative=relative,
        drop_tail=bool(settings.drop_tail),
        past_end=policy.count != "recorded",
        padding_counts=policy.count == "everything",
    )


def _normaliser(
    policy: Policy, robot: Robot, key: str, statistics: Mapping[str, Mapping[str, Any]] | None, **more: Any
) -> Normaliser:
    feature, size = getattr(policy.settings, key), getattr(robot, key)
    return normalise.normaliser(_mode(policy, key), statistics, feature, size, robot.where, **more)


# --------------------------------------------------------------------------------------------------------- GR00T
DEFAULT_CROP = 230 / 256
"""The share of an image that GR00T N1.7 sees where no processor_config.json says."""


def _groot(policy: Policy, robot: Robot) -> Processing:
    from loong_vla.groot_assets import Assets, bounds

    fields = policy.fields
    assets = Assets.read(policy)
    found = bounds(policy, robot, assets)
    seen = cameras(policy, robot)
    height, width = size = _pair(fields["image_size"])
    crop = assets.crop if assets.sized else DEFAULT_CROP
    unit = fields["patch"] * fields["merge"]
    if assets.albumentations:
        resize = images.edge_resize(height, edge=assets.edge, crop=crop, letterbox=assets.letterbox, unit=unit)
        first = next(camera.feature for camera in seen if camera.feature is not None)
        height, width = size = resize(np.zeros((*robot.cameras[first], 3), np.uint8), None).shape[:2]
    else:
        resize = images.square_resize(height, width, edge=assets.edge, crop=crop, letterbox=assets.letterbox)
    draw = beta_time(fields["time_alpha"], fields["time_beta"])
    scale = fields["time_scale"]
    count = sum(camera.feature is not None for camera in seen)
    augment = policy.settings.augment
    return Processing(
        cameras=seen,
        size=size,
        resize=resize,
        prompts=GrootPrompts(
            policy.tokenizer,
            fields["image_token"],
            (height // unit) * (width // unit),
            count,
            robot.tasks,
            formalise=assets.formalise,
        ),
        states=found.states,
        actions=found.actions,
        robot=robot,
        state_size=fields["state_size"],
        action_size=fields["action_size"],
        horizon=fields["horizon"],
        steps=min(found.steps, fields["horizon"]),
        time=lambda uniform: (1 - draw(uniform)) * scale,
        relative=found.relative,
        embodiment=assets.embodiment,
        drop_tail=policy.settings.drop_tail is not False,
        past_end=policy.count not in ("auto", "recorded"),
        padding_counts=policy.count == "everything",
        random_crop=assets.albumentations and augment != "none",
        state_dropout=assets.state_dropout,
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
