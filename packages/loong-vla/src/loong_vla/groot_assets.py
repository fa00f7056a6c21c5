"""The files beside a GR00T base model that say how its inputs are scaled, and what stands in for them.

A base model knows some robots by name and has statistics for them, by groups of numbers (arm, gripper, ...). For a new
robot the dataset's minimum and maximum are taken, or, with actions that count from the state, statistics of every step
of a chunk. Source: LeRobot 0.6, `processor_groot.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from loong_core.errors import DataError, RecipeError, Unsupported
from loong_core.suggest import did_you_mean
from loong_vla import normalise
from loong_vla.groot_shape import EMBODIMENTS
from loong_vla.normalise import Normaliser
from loong_vla.processing import Robot

if TYPE_CHECKING:
    from loong_vla.families import Policy

_NEW = "new_embodiment"
LEARNT_STEPS = 40
"""The longest chunk of the published weights: relative actions have statistics for that many steps."""


@dataclass(frozen=True, kw_only=True)
class Assets:
    """What processor_config.json and embodiment_id.json say. `modality` and `statistics` are those of the embodiment,
    empty where the model does not know it; `sized` is whether image sizes are given at all."""

    embodiment: int
    name: str | None
    modality: Mapping[str, Any]
    statistics: Mapping[str, Any]
    percentiles: bool
    relative: bool
    clip: bool
    formalise: bool
    albumentations: bool
    letterbox: bool
    sized: bool
    edge: int | None
    crop: float | None
    state_dropout: float

    @staticmethod
    def read(policy: Policy) -> Assets:
        """The assets of a policy, of the embodiment that the recipe or config.json names.

        Raises:
            RecipeError: there is no such embodiment, or the model was not built for it.
        """
        said = policy.file("processor_config.json").get("processor_kwargs")
        said = said if isinstance(said, dict) else {}
        name, slot = _embodiment(policy)
        target, window = said.get("image_target_size"), said.get("image_crop_size")
        crop = said.get("crop_fraction")
        if crop is None and window and target:
            crop = window[0] / target[0]
        modality = (said.get("modality_configs") or {}).get(name) if name else None
        statistics = policy.file("statistics.json").get(name) if name else None
        return Assets(
            embodiment=slot,
            name=name,
            modality=modality if isinstance(modality, dict) else {},
            statistics=statistics if isinstance(statistics, dict) else {},
            percentiles=bool(said.get("use_percentiles", False)),
            relative=bool(said.get("use_relative_action", False)),
            clip=said.get("clip_outliers", True) is not False,
            formalise=said.get("formalize_language", True) is not False,
            albumentations=said.get("use_albumentations") is True,
            letterbox=said.get("letter_box_transform") is True,
            sized=target is not None,
            edge=said.get("shortest_image_edge") if target is not None else None,
            crop=crop,
            state_dropout=float(said.get("state_dropout_prob") or 0.0),
        )


def _embodiment(policy: Policy) -> tuple[str | None, int]:
    """Name and slot of the embodiment that is trained."""
    table = {**EMBODIMENTS, **{name: int(slot) for name, slot in policy.file("embodiment_id.json").items()}}
    asked: str | int | None = policy.settings.embodiment
    built = tuple(policy.fields.get("embodiments") or range(policy.fields["slots"]))
    if asked is None:
        asked = policy.config.get("embodiment_tag")
    if asked is None:
        asked = built[0] if len(built) == 1 else _NEW
    if isinstance(asked, str):
        if asked not in table:
            known = f"Known are {', '.join(sorted(table))}.{did_you_mean(asked, table)}"
            raise RecipeError(f"data.options.embodiment: the model knows no embodiment {asked!r}. {known}")
        name, slot = asked, table[asked]
    else:
        name, slot = None, asked
    if slot not in built:
        raise RecipeError(
            f"data.options.embodiment: slot {slot}{f' ({name})' if name else ''} is not one of those the model trains, "
            f"{', '.join(map(str, built))}. Add it to model.config.embodiments."
        )
    return name, slot


class Bounds(NamedTuple):
    """Normalisation of state and actions, which actions are relative, and how many steps of a chunk are real."""

    states: Normaliser
    actions: Normaliser
    relative: np.ndarray | None
    steps: int


def bounds(policy: Policy, robot: Robot, assets: Assets) -> Bounds:
    """The base model's statistics where it has some of this embodiment (and the recipe does not decline), else the
    dataset's.

    Raises:
        DataError: statistics are absent or of another size than the robot's numbers.
    """
    if knows(policy, assets):
        return _of_the_model(policy, robot, assets)
    horizon = policy.fields["horizon"]
    if not policy.config.get("use_relative_actions"):
        statistics = robot.statistics
        made = [_flat(policy, robot, assets, key, statistics) for key in ("state", "action")]
        return Bounds(made[0], made[1], None, horizon)
    return _relative(policy, robot, assets)


def knows(policy: Policy, assets: Assets) -> bool:
    """Whether the base model's own statistics of the embodiment are taken.

    Raises:
        DataError: the recipe asks for them, and there are none.
    """
    known = bool(assets.statistics and assets.modality)
    wanted = policy.settings.statistics
    if wanted == "policy" and not known:
        raise DataError(
            f"data.options.statistics: the policy's folder has no statistics of the embodiment {assets.name!r}. Take "
            "the dataset's (auto), or set data.options.embodiment to one it knows."
        )
    return known and wanted in ("auto", "policy")


def _flat(
    policy: Policy, robot: Robot, assets: Assets, key: str, statistics: Mapping[str, Mapping[str, Any]] | None
) -> Normaliser:
    mode = policy.settings.normalise.get("state" if key == "state" else "action") or "min_max"
    feature, size = getattr(policy.settings, key), getattr(robot, key)
    return normalise.normaliser(mode, statistics, feature, size, robot.where, clip=assets.clip, flat=0.0)


def _relative(policy: Policy, robot: Robot, assets: Assets) -> Bounds:
    """Actions that count from the state have bounds of every step; the others, and the state, quantiles."""
    statistics = robot.statistics or {}
    mask = normalise.relative_mask(robot.action_names, robot.action, policy.config.get("relative_exclude_joints") or [])
    steps = min(policy.fields["horizon"], LEARNT_STEPS)
    own = policy.relative(mask, steps, True) if policy.relative is not None else statistics.get("relative_action")
    if own is None:
        raise DataError(f"`{robot.where}` has no statistics of relative actions, which the policy was trained with.")
    action = statistics.get(policy.settings.action) or {}
    state = statistics.get(policy.settings.state) or {}
    quantiles = all("q01" in entry and "q99" in entry for entry in (action, state))
    low, high = ("q01", "q99") if quantiles else ("min", "max")
    entries = {
        "state": {"min": state.get(low), "max": state.get(high)},
        "action": {
            "min": np.where(mask, own["min"], np.asarray(action.get(low, 0.0), np.float32).reshape(-1)),
            "max": np.where(mask, own["max"], np.asarray(action.get(high, 0.0), np.float32).reshape(-1)),
        },
    }
    more = {"clip": assets.clip, "flat": 0.0}
    made = [
        normalise.normaliser("min_max", entries, key, size, robot.where, **more)  # type: ignore[arg-type]
        for key, size in (("state", robot.state), ("action", robot.action))
    ]
    return Bounds(made[0], made[1], mask, steps)


def _of_the_model(policy: Policy, robot: Robot, assets: Assets) -> Bounds:
    """Statistics of the groups that the base model knows, in its order, which has to be the dataset's."""
    where = f"statistics.json, embodiment {assets.name}"
    action = assets.modality.get("action") or {}
    configs = action.get("action_configs") or []
    relative = np.zeros(0, bool)
    lows, highs, steps = [], [], len(action.get("delta_indices") or []) or policy.fields["horizon"]
    for number, key in enumerate(action.get("modality_keys") or []):
        settings = configs[number] if number < len(configs) and isinstance(configs[number], dict) else {}
        counts = assets.relative and str(settings.get("rep", "")).lower() == "relative"
        if counts and str(settings.get("type", "")).lower() != "non_eef":
            raise Unsupported(
                f"{where}: actions of the group {key!r} are relative poses of the hand, which loong does not train on. "
                "Set data.options.statistics: dataset to train absolute actions."
            )
        entry = (assets.statistics.get("relative_action" if counts else "action") or {}).get(key) or {}
        low, high = _group(entry, assets.percentiles and not counts, f"{where}: action.{key}")
        lows.append(low)
        highs.append(high)
        relative = np.concatenate([relative, np.full(low.shape[-1], counts)])
    groups = [
        _group((assets.statistics.get("state") or {}).get(key) or {}, assets.percentiles, f"{where}: state.{key}")
        for key in (assets.modality.get("state") or {}).get("modality_keys") or []
    ]
    entries = {
        "state": {"min": _joined([low for low, _ in groups], 1), "max": _joined([high for _, high in groups], 1)},
        "action": {"min": _joined(lows, steps), "max": _joined(highs, steps)},
    }
    made = [
        normalise.normaliser("min_max", entries, key, size, where, clip=assets.clip, flat=0.0)
        for key, size in (("state", robot.state), ("action", robot.action))
    ]
    return Bounds(made[0], made[1], relative if relative.any() else None, steps)


def _group(entry: Mapping[str, Any], percentiles: bool, where: str) -> tuple[np.ndarray, np.ndarray]:
    names = ("q01", "q99") if percentiles else ("min", "max")
    if any(name not in entry for name in names):
        raise DataError(f"{where} lacks {' and '.join(names)}. Set data.options.statistics: dataset.")
    low, high = (np.atleast_1d(np.asarray(entry[name], np.float32)) for name in names)
    return low, high


def _joined(parts: list[np.ndarray], steps: int) -> np.ndarray:
    """Groups side by side: [d], or [steps, d] where any group has a row for every step."""
    if not parts:
        return np.zeros(0, np.float32)
    if any(part.ndim == 2 for part in parts):
        parts = [part[:steps] if part.ndim == 2 else np.broadcast_to(part, (steps, len(part))) for part in parts]
    return np.concatenate(parts, axis=-1)
