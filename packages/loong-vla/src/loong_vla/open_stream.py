"""Opens a run's robot data: dataset, statistics, tokenizer, held-out episodes, and the policy they are made for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from loong_core.errors import DataError, RecipeError
from loong_core.recipe import Recipe, TrainTokenizer
from loong_core.recipe_load import to_mapping
from loong_vla import groot_packing, packing, prompts
from loong_vla.check import chosen, feature_problems
from loong_vla.children import Children, division
from loong_vla.families import Policy, needed, processing
from loong_vla.lerobot import statistics as computing
from loong_vla.lerobot.layout import Dataset, Episode, open_dataset
from loong_vla.lerobot.source import folder_of, options_of
from loong_vla.lerobot.video import FrameReader
from loong_vla.making import Cut, Maker, Part
from loong_vla.normalise import NEEDED, relative_statistics
from loong_vla.options import RobotOptions
from loong_vla.processing import Processing, Robot
from loong_vla.sequence import Draws, Order, Samples, held_out
from loong_vla.stream import RobotStream
from loong_vla.tasks import FlowOptions

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.train.engine import Batch
    from loong_core.train.run import Run

logger = logging.getLogger(__name__)

STATISTICS = "statistics.json"
"""File of the run folder with the statistics that training normalises by."""


class Known(NamedTuple):
    """Statistics that were found before: those of state and action by feature, and those of relative actions. Where
    nothing is known they are filled in, so that they are computed once for all processes of a rank."""

    statistics: dict[str, Mapping[str, Any]]
    relative: dict[str, Any]

    def plain(self) -> list[Any]:
        """As JSON that gives the same numbers back."""
        return [{name: _plain(entry) for name, entry in self.statistics.items()}, _plain(self.relative)]

    @classmethod
    def of(cls, plain: Sequence[Any]) -> Known:
        """From what `plain` gave."""
        return cls({name: _arrays(entry) for name, entry in plain[0].items()}, _arrays(plain[1]))


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: [np.asarray(value).dtype.str, np.asarray(value).tolist()] for key, value in entry.items()}


def _arrays(entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {key: np.array(values, dtype=kind) for key, (kind, values) in entry.items()}


class Opened(NamedTuple):
    """A run's data: what makes the batches of a replica, of what, and what must not change."""

    maker: Maker
    train: Part
    held_out: Part | None
    identity: dict[str, Any]


def open_stream(run: Run, replica: int) -> RobotStream:
    """See `loong_vla.stream.stream`.

    Raises:
        UserError: the data, its statistics, cameras or tokenizer do not suit the policy.
    """
    settings = options_of(run.recipe.data.options)
    pinned = run.device.startswith("cuda")
    processes, threads = division(settings, run.device, run.cluster.devices_per_node)
    children = None
    if processes:  # at once: their imports take seconds
        children = Children(processes, run.folder / "logs", f"{replica:04d}", run.device if pinned else None)
    try:
        known = Known({}, {})
        mine = division(settings.model_copy(update={"processes": 0}), run.device, run.cluster.devices_per_node).threads
        opened = open_data(run, replica, mine, known, pinned=pinned)
        if children is not None:
            children.begin(facts_of(run, replica, threads, known, opened.identity))
    except BaseException:
        if children is not None:
            children.close()
        raise
    stream = RobotStream(
        opened.maker,
        opened.train,
        opened.held_out,
        settings=settings,
        eval_batches=run.recipe.data.eval.batches if run.recipe.data.eval is not None else 0,
        recompute=run.plan.recompute == "full",
        identity=opened.identity,
        children=children,
    )
    if run.is_main:
        _say(stream.processing, opened.train, opened.held_out)
        if processes:
            logger.info("robot data: %d processes make batches, with %d threads each", processes, threads)
        save_statistics(run.folder, stream.processing, settings)
    return stream


def open_data(run: Run, replica: int, threads: int, known: Known, *, pinned: bool = False) -> Opened:
    """What `open_stream` makes batches of; `threads` decode.

    Raises:
        UserError: as there.
    """
    data, settings = run.recipe.data, options_of(run.recipe.data.options)
    dataset = open_dataset(folder_of(data.path))
    episodes = chosen(dataset, settings)
    other, held = None, []
    if data.eval is not None and data.eval.path is not None:
        other = open_dataset(folder_of(data.eval.path))
        held = list(other.episodes)
    elif data.eval is not None:
        numbers, lengths = [item.index for item in episodes], [item.length for item in episodes]
        kept, left = held_out(numbers, lengths, data.eval.fraction, run.recipe.run.seed)
        other, held = dataset, [item for item in episodes if item.index in left]
        episodes = [item for item in episodes if item.index in kept]
    use = processing_of(run, dataset, episodes, settings, known)
    seed, cut = run.recipe.run.seed, Cut(run.plan.dp, run.plan.micro_batches, run.plan.micro_batch)

    def part(source: Dataset, items: Sequence[Episode], name: str) -> Part:
        reader = FrameReader(source, settings.tolerance, max(32, 2 * threads))
        samples = samples_of(source, items, use)
        fixed = None if name == "train" else 2**63 + 1  # a fair excerpt, the same in every evaluation
        order = Order(len(samples), seed, data.shuffle, fixed)
        draws = Draws(seed, name)
        return Part(dataset=source, samples=samples, order=order, draws=draws, reader=reader, once=fixed is not None)

    train = part(dataset, episodes, "train")
    evaluation = part(other, held, "held out") if other is not None else None
    identity = {
        "dataset": f"{dataset.version}, {dataset.fps:g} frames a second",
        "episodes": train.samples.fingerprint(),
        "seed": seed,
        "shuffle": data.shuffle,
        "global_batch": cut.samples,
        **use.facts(),
    }
    maker = Maker(
        use,
        cut,
        replica,
        settings=settings,
        threads=threads,
        pinned=pinned,
        fields=run.shape.fields,
        pack=packer(run),
    )
    return Opened(maker, train, evaluation, json.loads(json.dumps(identity)))


def facts_of(run: Run, replica: int, threads: int, known: Known, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What another process has to know to open the same data, as JSON: see `run_of` and `loong_vla.child`."""
    return {
        "recipe": to_mapping(run.recipe),
        "folder": str(run.folder),
        "family": run.family.name,
        "config": run.config,
        "fields": dict(run.shape.fields),
        "plan": {name: getattr(run.plan, name) for name in ("dp", "micro_batches", "micro_batch")},
        "replica": replica,
        "threads": threads,
        "known": known.plain(),
        "identity": identity,
    }


def run_of(facts: Mapping[str, Any]) -> Any:
    """As much of a run as `open_data` looks at, from `facts_of`."""
    return SimpleNamespace(
        recipe=Recipe.model_validate(facts["recipe"]),
        folder=Path(facts["folder"]),
        family=SimpleNamespace(name=facts["family"]),
        config=facts["config"],
        shape=SimpleNamespace(fields=facts["fields"]),
        plan=SimpleNamespace(**facts["plan"]),
    )


def packer(run: Run) -> Callable[[Batch], dict[str, Tensor]]:
    """What the run's model computes of a batch on the CPU, as its `packing` does."""
    fields = run.shape.fields
    if run.family.name.startswith("groot"):
        return lambda batch: groot_packing.pack(batch, fields)
    return lambda batch: packing.pack(batch, fields["image_tokens"], skip_padding=fields["skip_padding"])


def samples_of(dataset: Dataset, episodes: Sequence[Episode], use: Processing) -> Samples:
    """The frames that action chunks begin at.

    Raises:
        DataError: there are none.
    """
    tail = use.steps - 1 if use.drop_tail else 0
    samples = Samples([item.index for item in episodes], [item.length for item in episodes], tail)
    if not len(samples):
        longest = max((item.length for item in episodes), default=0)
        raise DataError(
            f"`{dataset.root}`: no episode is as long as an action chunk of {tail + 1} frames (the longest has "
            f"{longest}), and data.options.drop_tail leaves out chunks that are cut. Set it to false, or record longer "
            "episodes."
        )
    return samples


def _say(use: Processing, train: Part, held: Part | None) -> None:
    seen = ", ".join(f"{camera.name} = {camera.feature or 'absent'}" for camera in use.cameras)
    logger.info("robot data: %d samples to train on; cameras: %s", len(train.samples), seen)
    if held is not None:
        logger.info("robot data: %d samples held out", len(held.samples))
    for key, found in (("state", use.states), ("action", use.actions)):
        if still := found.zero_range():
            numbers = ", ".join(map(str, still))
            logger.warning("%s %s never changes by its statistics and is left out of what is learnt.", key, numbers)


# ------------------------------------------------------------------------------------------------------- the policy
def processing_of(
    run: Run,
    dataset: Dataset,
    episodes: Sequence[Episode] | None = None,
    settings: RobotOptions | None = None,
    known: Known | None = None,
) -> Processing:
    """How the episodes of a dataset (None: all) become inputs of the run's policy. Also for evaluation and sidecars."""
    known = Known({}, {}) if known is None else known
    settings = options_of(run.recipe.data.options) if settings is None else settings
    if problems := list(feature_problems(dataset, settings)):
        raise DataError(problems)
    episodes = list(dataset.episodes) if episodes is None else episodes

    def relative(mask: np.ndarray, steps: int, by_step: bool) -> Mapping[str, Any]:
        if not known.relative:
            pairs = list(_pairs(dataset, episodes, settings))
            known.relative.update(relative_statistics(pairs, mask, steps, by_step=by_step))
        return known.relative

    policy = Policy(
        family=run.family.name,
        fields=run.shape.fields,
        config=run.config,
        tokenizer=tokenizer_of(run, dataset),
        settings=settings,
        folders=folders_of(run),
        count=FlowOptions.model_validate(dict(run.recipe.task.options)).count,
        relative=relative,
    )
    if not known.statistics:
        known.statistics.update(statistics_of(dataset, episodes, settings, needed(policy)))
    return processing(policy, robot_of(dataset, settings, known.statistics))


def folders_of(run: Run) -> list[Path]:
    """Folders that may hold a policy's further files: that of its weights, and that of the base model it names."""
    named = (run.recipe.model.weights, run.config.get("base_model_path"))
    return [Path(name) for name in named if name is not None and Path(name).is_dir()]


def _pairs(dataset: Dataset, episodes: Sequence[Episode], settings: RobotOptions) -> Any:
    for episode in episodes:
        columns = dataset.columns(episode, [settings.state, settings.action])
        yield columns[settings.state].reshape(episode.length, -1), columns[settings.action].reshape(episode.length, -1)


def robot_of(
    dataset: Dataset, settings: RobotOptions, statistics: Mapping[str, Mapping[str, Any]] | None = None
) -> Robot:
    """A dataset's robot, with these statistics."""
    state, action = dataset.features[settings.state], dataset.features[settings.action]
    names = action.names
    if isinstance(names, Mapping):
        names = next((value for value in names.values() if isinstance(value, (list, tuple))), None)
    return Robot(
        state=state.size,
        action=action.size,
        action_names=tuple(map(str, names)) if isinstance(names, (list, tuple)) and len(names) == action.size else None,
        cameras={name: _pixels(dataset.features[name].shape) for name in dataset.cameras},
        tasks=tuple(dict.fromkeys(dataset.tasks.values())),
        statistics=statistics,
        where=str(dataset.root),
    )


def _pixels(shape: Sequence[int]) -> tuple[int, int]:
    """Height and width of an image feature, whose channels come last or first."""
    channels_first = len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3)
    return (shape[1], shape[2]) if channels_first else (shape[0], shape[1])


def statistics_of(
    dataset: Dataset, episodes: Sequence[Episode], settings: RobotOptions, wanted: Mapping[str, Sequence[str]]
) -> dict[str, Mapping[str, Any]]:
    """Statistics of state and action: the dataset's, or computed where it has not those `wanted` of `state` and
    `action` (or where the recipe asks for it)."""
    names = {getattr(settings, key): keys for key, keys in wanted.items()}
    given = dataset.statistics if settings.statistics != "compute" else None
    complete = given is not None and all(key in given.get(name, {}) for name, keys in names.items() for key in keys)
    if given is not None and (complete or settings.statistics == "dataset"):
        return {name: given[name] for name in names if name in given}
    if settings.statistics == "dataset":
        return {}
    if settings.statistics != "compute":
        logger.info("computing statistics of %s: the dataset has none that are complete", ", ".join(names))
    return dict(computing.compute(dataset, list(names), episodes=[item.index for item in episodes]))


def save_statistics(folder: Path, use: Processing, settings: RobotOptions) -> None:
    """Leave the statistics a run normalises by in its folder. Of actions that count from the state these are others
    than the dataset's, so of them only what is used is kept."""
    found = {name: dict(entry) for name, entry in (use.robot.statistics or {}).items()}
    if use.relative is not None:
        found.pop(settings.action, None)
    for feature, way in ((settings.state, use.states), (settings.action, use.actions)):
        found.setdefault(feature, {}).update(zip(NEEDED[way.mode], (way.low, way.high), strict=False))
    plain = {name: {key: np.asarray(value).tolist() for key, value in entry.items()} for name, entry in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATISTICS).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def tokenizer_of(run: Run, dataset: Dataset) -> Any:
    """The tokenizer that the recipe names or asks to be trained on the instructions, or that of the weights.

    Raises:
        UserError: there is none.
    """
    named = run.recipe.data.tokenizer
    if isinstance(named, TrainTokenizer):
        return prompts.load_tokenizer(prompts.train(dataset.tasks.values(), named.train, run.folder / "tokenizer"))
    folder = named or run.recipe.model.weights
    if folder is None:
        raise RecipeError(
            "data.tokenizer is not set, and there are no model.weights to take it from. Name the folder of the "
            "policy's tokenizer, or train one for a policy that begins from nothing: {train: 320}."
        )
    return prompts.load_tokenizer(folder)
