"""Open-loop evaluation: at frames of held-out episodes, what a policy would do against what was recorded, in the
robot's own units. No robot moves, so errors do not add up; it tells a policy that learnt from one that did not.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from loong_core.train.report import FIGURES
from loong_vla.lerobot.source import options_of
from loong_vla.lerobot.video import FrameError
from loong_vla.policy import Observation, Policy, recorded, recorded_actions
from loong_vla.tasks import FlowOptions

if TYPE_CHECKING:
    from loong_core.train.engine import Engine
    from loong_core.train.run import Run
    from loong_vla.lerobot.layout import Dataset
    from loong_vla.lerobot.video import FrameReader
    from loong_vla.making import Part
    from loong_vla.stream import RobotStream

logger = logging.getLogger(__name__)

MOST_FIGURES = 32
"""Dimensions of an action that are drawn."""


class Moment(NamedTuple):
    """A frame of an episode."""

    episode: int
    frame: int


class OpenLoop(NamedTuple):
    """Actions at some moments: predicted and recorded [n, horizon, d], and which were recorded, bool [n, horizon]."""

    moments: Sequence[Moment]
    predicted: np.ndarray
    recorded: np.ndarray
    mask: np.ndarray

    def errors(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean squared and mean absolute error of every dimension, [d] each; NaN where nothing was recorded."""
        difference = (self.predicted - self.recorded)[self.mask]
        if not len(difference):
            nothing = np.full(self.predicted.shape[-1], np.nan)
            return nothing, nothing
        return np.square(difference).mean(0), np.abs(difference).mean(0)

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """`mse` and `mae`, the means over dimensions, and those of each dimension as `mae/<name>`."""
        squared, absolute = self.errors()
        found = {"mse": float(squared.mean()), "mae": float(absolute.mean())}
        for kind, values in (("mse", squared), ("mae", absolute)):
            found |= {f"{kind}/{name}": float(value) for name, value in zip(names, values, strict=True)}
        return found


# ---------------------------------------------------------------------------------------------------- at any time
def compare(
    policy: Policy,
    dataset: Dataset,
    reader: FrameReader,
    moments: Sequence[Moment],
    *,
    batch: int = 1,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
) -> OpenLoop:
    """Let `policy` act at `moments` of a dataset. With several ranks each takes its share, as many calls as the others.

    A moment whose images do not decode is left out. Every moment has noise of its own, whatever the shares.
    """
    size = len(policy.action_names)
    predicted = np.zeros((len(moments), policy.horizon, size))
    truth, mask = np.zeros_like(predicted), np.zeros(predicted.shape[:2])
    share = -(-len(moments) // world)
    for begin in range(0, share, batch):
        numbers = [(at * world + rank) for at in range(begin, min(begin + batch, share))]
        found = [_seen(policy, dataset, reader, moments, number) for number in numbers]
        actions = policy.act_on([item or _nothing(policy) for item in found], seed=seed, positions=numbers)
        for number, item, action in zip(numbers, found, actions, strict=True):
            if item is not None:
                known = recorded_actions(policy, dataset, *moments[number])
                predicted[number], truth[number, : len(known)], mask[number, : len(known)] = action, known, 1
    if world > 1:
        predicted, truth, mask = (_summed(array, policy.device) for array in (predicted, truth, mask))
    return OpenLoop(moments, predicted, truth, mask.astype(bool))


def _seen(
    policy: Policy, dataset: Dataset, reader: FrameReader, moments: Sequence[Moment], number: int
) -> Observation | None:
    """None beyond the last moment, and where the video does not show it."""
    if number >= len(moments):
        return None
    try:
        return recorded(policy, dataset, reader, *moments[number])
    except FrameError as error:
        logger.warning("%s The evaluation leaves this frame out.", error)
        return None


def _nothing(policy: Policy) -> Observation:
    """Something to act on, because the other ranks act too."""
    images = {name: np.zeros((*size, 3), np.uint8) for name, size in policy.cameras.items()}
    return Observation(np.zeros(policy.processing.robot.state, np.float32), images, "")


def _summed(array: np.ndarray, device: str) -> np.ndarray:
    """The sum over ranks. Everything is zero on all ranks but one, so nothing is rounded."""
    tensor = torch.from_numpy(array).to(device)
    dist.all_reduce(tensor)
    found: np.ndarray = tensor.cpu().numpy()
    return found


def along(dataset: Dataset, episode: int, stride: int, most: int) -> list[Moment]:
    """Moments of an episode from its begin on, a chunk apart."""
    length = dataset.episode(episode).length
    return [Moment(episode, frame) for frame in range(0, length, stride)][:most]


# ------------------------------------------------------------------------------------------------- while training
def evaluate(run: Run, engine: Engine, data: RobotStream) -> dict[str, float]:
    """`eval_mse`, `eval_mae` and those of every dimension, over `task.options.open_loop` frames of the held-out
    episodes; draws the first of these episodes into the run's report. Collective."""
    count = FlowOptions.model_validate(dict(run.recipe.task.options)).open_loop
    held = data.held_out
    if not count or held is None:
        return {}
    module: Any = engine.modules[0]
    policy = Policy(module, data.processing, options_of(run.recipe.data.options), device=run.device)
    moments = _moments(held, count, policy.horizon)
    with _plainly(module):
        found = compare(
            policy,
            held.dataset,
            held.reader,
            moments,
            batch=run.plan.micro_batch,
            rank=run.rank,
            world=run.world,
            seed=run.recipe.run.seed,
        )
    if run.is_main:
        draw(run.folder, found, policy.action_names, moments[0].episode)
    return {f"eval_{name}": value for name, value in found.metrics(policy.action_names).items()}


def _moments(held: Part, count: int, stride: int) -> list[Moment]:
    """The first held-out episode from begin to end, at most half of `count`; then a fair excerpt of all."""
    first, _ = held.samples.place(0)
    found = along(held.dataset, first, stride, max(1, count // 2))
    more = min(count - len(found), len(held.samples))
    return found + [Moment(*held.samples.place(held.order.sample(position))) for position in range(more)]


@contextmanager
def _plainly(module: Any) -> Iterator[None]:
    """Sampling has other shapes than training: nothing is compiled for it, and no gathered weights are left behind."""
    with torch.compiler.set_stance("force_eager"):
        yield
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()


# ----------------------------------------------------------------------------------------------------- in the report
def draw(folder: Path, found: OpenLoop, names: Sequence[str], episode: int) -> None:
    """One figure for each dimension of the actions: recorded and predicted along an episode."""
    target = folder / FIGURES
    target.mkdir(parents=True, exist_ok=True)
    _, absolute = found.errors()
    for number, name in enumerate(names[:MOST_FIGURES]):
        title = f"{name}: episode {episode}"
        note = f"open loop; mean absolute error {absolute[number]:.4g} over {len(found.moments)} held-out frames"
        content = {"title": title, "note": note, "series": _series(found, episode, number)}
        temporary = target / f".open-loop.{os.getpid()}"
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        temporary.replace(target / f"open-loop-{number:02d}.json")


def _series(found: OpenLoop, episode: int, number: int) -> list[dict[str, Any]]:
    """Lines over the frames of an episode, chunk after chunk; the predicted one breaks between them."""
    lines: dict[str, tuple[list[float], list[float | None]]] = {"recorded": ([], []), "predicted": ([], [])}
    stride = found.mask.shape[1]
    for at, moment in enumerate(found.moments):
        if moment != Moment(episode, at * stride):
            break
        count = int(found.mask[at].sum())
        for name, values in (("recorded", found.recorded), ("predicted", found.predicted)):
            x, y = lines[name]
            if x and (name == "predicted" or not count):
                x.append(moment.frame - 0.5)
                y.append(None)
            x.extend(float(frame) for frame in range(moment.frame, moment.frame + count))
            y.extend(value if math.isfinite(value) else None for value in values[at, :count, number].tolist())
    return [{"name": name, "x": x, "y": y} for name, (x, y) in lines.items()]
