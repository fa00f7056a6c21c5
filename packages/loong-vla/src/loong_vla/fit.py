"""Whether a robot dataset suits a policy, asked in the parent before training: the rules are those that training itself
keeps (`families`, `groot_assets`, `normalise`), so only here without a tokenizer and without a tensor library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loong_core.errors import DataError, UserError
from loong_core.recipe import Recipe
from loong_core.types import ModelShape
from loong_vla import normalise
from loong_vla.check import READ_ROWS, chosen, dimensions, feature_problems, stale
from loong_vla.families import Policy, cameras, needed
from loong_vla.lerobot import statistics as computing
from loong_vla.lerobot.examine import flat_dimensions
from loong_vla.lerobot.layout import Dataset, Episode, open_dataset
from loong_vla.lerobot.source import folder_of, options_of
from loong_vla.options import RobotOptions
from loong_vla.processing import Robot
from loong_vla.sequence import held_out


def fit(recipe: Recipe, shape: ModelShape, config: Mapping[str, Any]) -> list[str]:
    """Problems of the recipe's data with a model: vectors longer than its own, cameras it has and nobody maps,
    statistics that are absent or without range, a robot it does not know, episodes too short for an action chunk."""
    settings = options_of(recipe.data.options)
    named = (recipe.model.weights, config.get("base_model_path"))
    policy = Policy(
        family=shape.family,
        fields=shape.fields,
        config=config,
        tokenizer=None,
        settings=settings,
        folders=[Path(name) for name in named if name is not None and Path(name).is_dir()],
    )
    try:
        dataset = open_dataset(folder_of(recipe.data.path))
        problems = _of_dataset(dataset, chosen(dataset, settings), policy)
        if recipe.data.eval is not None and recipe.data.eval.path is not None:
            other = open_dataset(folder_of(recipe.data.eval.path))
            wrong = [*feature_problems(other, settings), *_sizes(other, policy), *_twins(dataset, other, settings)]
            problems += [f"data.eval.path: {text}" for text in wrong]
        elif recipe.data.eval is not None:
            episodes = chosen(dataset, settings)
            lengths = [item.length for item in episodes]
            held_out([item.index for item in episodes], lengths, recipe.data.eval.fraction, recipe.run.seed)
    except UserError as error:
        problems = error.problems
    return list(dict.fromkeys(problems))


def _of_dataset(dataset: Dataset, episodes: Sequence[Episode], policy: Policy) -> list[str]:
    problems = [*feature_problems(dataset, policy.settings), *_sizes(dataset, policy)]
    problems += _lengths(dataset, episodes, policy)
    if problems:
        return problems
    robot = _robot(dataset, policy.settings)
    for look in (_cameras, _embodiment):
        try:
            look(policy, robot)
        except UserError as error:
            problems += error.problems
    if not problems:
        problems += _statistics(dataset, episodes, policy, robot)
    return problems


def _sizes(dataset: Dataset, policy: Policy) -> Iterator[str]:
    for key in ("state", "action"):
        feature, most = dataset.features.get(getattr(policy.settings, key)), policy.fields.get(f"{key}_size")
        if feature is not None and most is not None and feature.size > most:
            found = f"has {feature.size} numbers (`meta/info.json`: shape {list(feature.shape)})"
            remedy = f"Choose another feature in data.options.{key}, or a model that is wider."
            yield f"`{dataset.root}`: feature `{feature.name}` {found}, {policy.family} takes at most {most}. {remedy}"


def _twins(dataset: Dataset, other: Dataset, settings: RobotOptions) -> Iterator[str]:
    """Held-out data of another robot."""
    for name in (settings.state, settings.action):
        ours, theirs = dataset.features.get(name), other.features.get(name)
        if ours is not None and theirs is not None and ours.size != theirs.size:
            yield f"`{other.root}`: feature `{name}` has {theirs.size} numbers, that of `{dataset.root}` {ours.size}."
    if missing := [name for name in dataset.cameras if name not in other.cameras]:
        yield f"`{other.root}` has no camera {', '.join(missing)}, which `{dataset.root}` has."


def _lengths(dataset: Dataset, episodes: Sequence[Episode], policy: Policy) -> Iterator[str]:
    asked, horizon = policy.settings.drop_tail, policy.fields.get("horizon")
    drop = policy.groot if asked is None else asked
    longest = max((item.length for item in episodes), default=0)
    if drop and horizon is not None and longest < horizon:
        remedy = "Set data.options.drop_tail to false, or record longer episodes."
        yield (
            f"`{dataset.root}`: no episode is as long as an action chunk of {policy.family}: {longest} rows at most, "
            f"chunks have {horizon}. {remedy}"
        )


def _robot(dataset: Dataset, settings: RobotOptions) -> Robot:
    """The dataset's robot as far as it matters before training."""
    return Robot(
        state=dataset.features[settings.state].size,
        action=dataset.features[settings.action].size,
        action_names=None,
        cameras={name: (dataset.features[name].shape[0], dataset.features[name].shape[1]) for name in dataset.cameras},
        tasks=tuple(dataset.tasks.values()),
        statistics=None,
        where=str(dataset.root),
    )


def _cameras(policy: Policy, robot: Robot) -> None:
    cameras(policy, robot)


def _embodiment(policy: Policy, robot: Robot) -> None:
    if policy.groot:
        from loong_vla.groot_assets import Assets, knows

        knows(policy, Assets.read(policy))
    elif policy.settings.embodiment is not None:
        raise DataError(f"data.options.embodiment: {policy.family} has no embodiments. Remove the key.")
    elif policy.settings.statistics == "policy":
        raise DataError(f"data.options.statistics: {policy.family} brings no statistics. Set it to auto.")


# -------------------------------------------------------------------------------------------------- statistics
def _statistics(dataset: Dataset, episodes: Sequence[Episode], policy: Policy, robot: Robot) -> Iterator[str]:
    """Statistics that cannot be had, or by which numbers that do occur would be divided by nothing."""
    if _brings_its_own(policy):
        return
    for key, names in needed(policy).items():
        feature = getattr(policy.settings, key)
        entry = _entry(dataset, episodes, policy.settings, feature, names)
        if entry is None:
            continue
        if lies := _stale(dataset, episodes, feature, entry):
            yield from lies
            continue
        missing = [name for name in names if name not in entry]
        if missing:
            remedy = "Set data.options.statistics to auto or compute, which takes them from the rows."
            lacks = f"lack {' and '.join(missing)}, by which {policy.family} normalises"
            yield f"`{dataset.root / 'meta'}`: the statistics of `{feature}` {lacks}. {remedy}"
        elif len(names) == 2 and (flat := _without_range(entry, names)):
            listed = dimensions(dataset.features[feature], flat)
            yield (
                f"`{dataset.root}`: feature `{feature}` has values that differ in {listed}, but its {names[0]} and "
                f"{names[1]} leave no range to normalise by: those values would become huge. Set "
                f"data.options.normalise, as {{{key}: {'mean_std' if 'min' in names else 'min_max'}}}."
            )


def _brings_its_own(policy: Policy) -> bool:
    """A GR00T base model with statistics of the embodiment."""
    if not policy.groot:
        return False
    from loong_vla.groot_assets import Assets, knows

    return knows(policy, Assets.read(policy))


def _entry(
    dataset: Dataset, episodes: Sequence[Episode], settings: RobotOptions, feature: str, names: Sequence[str]
) -> Mapping[str, np.ndarray] | None:
    """Statistics that training will take; None where they are computed from too many rows to do it here."""
    given = (dataset.statistics or {}).get(feature) if settings.statistics != "compute" else None
    if given is not None and (settings.statistics == "dataset" or all(name in given for name in names)):
        return given
    if settings.statistics == "dataset":
        return {}
    if sum(item.length for item in episodes) > READ_ROWS:
        return None
    return computing.compute(dataset, [feature], episodes=[item.index for item in episodes])[feature]


def _stale(dataset: Dataset, episodes: Sequence[Episode], feature: str, entry: Mapping[str, np.ndarray]) -> list[str]:
    """What is wrong with statistics of `meta` by which a number that does change never does, and so is not learnt."""
    if entry is not (dataset.statistics or {}).get(feature) or not ("min" in entry and "max" in entry):
        return []
    if not (entry["min"] == entry["max"]).any() or sum(item.length for item in episodes) > READ_ROWS:
        return []
    found = computing.compute(dataset, [feature], episodes=[item.index for item in episodes])[feature]
    return stale(dataset.features[feature], entry, found, dataset)


def _without_range(entry: Mapping[str, np.ndarray], names: Sequence[str]) -> list[int]:
    if tuple(names) == normalise.NEEDED["mean_std"]:
        return []  # a deviation of zero is that of a value that never changes
    return flat_dimensions(entry, names[0], names[1])[0]
