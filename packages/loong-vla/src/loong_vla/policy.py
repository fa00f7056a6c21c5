"""A policy in use: an observation in, a chunk of actions in the robot's own units out.

The same `Processing` as in training stands between robot and model, so nothing is normalised, resized or worded in two
places. One object serves `loong generate`, the server and the evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from loong_core.errors import DataError
from loong_core.suggest import did_you_mean
from loong_vla.options import RobotOptions
from loong_vla.sequence import Draws

if TYPE_CHECKING:
    from loong_vla.lerobot.layout import Dataset
    from loong_vla.lerobot.video import FrameReader
    from loong_vla.processing import Processing

TASK = "task"
"""Key of an observation with the instruction, as in LeRobot."""
SHORTEST, LONGEST = 2, 8192
"""Pixels that a side of an image may have."""
LONGEST_TASK = 10_000
"""Characters of an instruction."""


class Observation(NamedTuple):
    """What a robot sees at one moment: its state [d], an image uint8 [y,x,3] of every camera, the instruction."""

    state: np.ndarray
    images: Mapping[str, np.ndarray]
    task: str


class Policy:
    """A model with the processing of its robot. Not safe in threads.

    `model` has `sample(batch, steps)`; `settings` name the features of an observation. Noise is drawn by `seed` and the
    number of observations so far.
    """

    def __init__(
        self,
        model: Any,
        processing: Processing,
        settings: RobotOptions | None = None,
        *,
        device: str = "cpu",
        seed: int = 0,
        family: str = "",
    ) -> None:
        self.model, self.processing, self.family = model, processing, family
        self.settings = settings or RobotOptions()
        self.device, self._draws, self._count = device, Draws(seed, "act"), 0

    # ------------------------------------------------------------------------------------------------ what it takes
    @property
    def cameras(self) -> dict[str, tuple[int, int]]:
        """The features that hold its images, and the height and width of those that it was trained on."""
        seen = [camera.feature for camera in self.processing.cameras if camera.feature is not None]
        return {name: self.processing.robot.cameras[name] for name in seen}

    @property
    def horizon(self) -> int:
        """Actions in a chunk."""
        return min(self.processing.steps, self.processing.horizon)

    @property
    def action_names(self) -> tuple[str, ...]:
        """Names of the numbers of an action."""
        robot = self.processing.robot
        return robot.action_names or tuple(f"{self.settings.action}.{number}" for number in range(robot.action))

    def observation(self, given: Mapping[str, Any]) -> Observation:
        """An observation of LeRobot's form (feature -> array, and `task`), checked. Other keys are refused.

        Raises:
            DataError: every problem of it.
        """
        state, cameras = self.settings.state, self.cameras
        known = [state, *cameras, TASK]
        problems = [
            f"the observation has `{name}`, which the policy does not take.{did_you_mean(str(name), known)}"
            for name in given
            if name not in known
        ]
        problems += [f"the observation lacks `{name}`." for name in (state, *cameras) if name not in given]
        task = given.get(TASK, "")
        if not isinstance(task, str) or len(task) > LONGEST_TASK or not _is_text(task):
            problems.append(f"`{TASK}` must be a text of at most {LONGEST_TASK} characters.")
        if state in given:
            problems += _state_problems(state, given[state], self.processing.robot.state)
        for name in cameras:
            if name in given:
                problems += _image_problems(name, given[name])
        if problems:
            raise DataError(problems)
        images = {name: np.ascontiguousarray(given[name]) for name in cameras}
        return Observation(np.asarray(given[state], np.float32), images, task)

    # ------------------------------------------------------------------------------------------------ what it does
    def act(self, observation: Mapping[str, Any], *, seed: int | None = None, steps: int | None = None) -> np.ndarray:
        """The actions for the next moments, float32 [horizon, d], in the robot's units.

        `observation` maps the state's feature to numbers [d], each camera's feature to an image uint8 [y,x,3], and
        `task` to the instruction. With a `seed` the same observation always gets the same actions. `steps` are those
        of the flow's integration (None: as config.json says).

        Raises:
            DataError: the observation is not what the policy was trained on.
        """
        return self.act_on_one(self.observation(observation), seed=seed, steps=steps)

    def act_on_one(self, observation: Observation, *, seed: int | None = None, steps: int | None = None) -> np.ndarray:
        """As `act`, for an observation that was checked."""
        found = self.act_on([observation], seed=seed, steps=steps)[0]
        if not np.isfinite(found).all():
            raise DataError("the policy's actions are not finite numbers. Its weights are damaged, or were never good.")
        return found

    def act_on(
        self,
        observations: Sequence[Observation],
        *,
        seed: int | None = None,
        positions: Sequence[int] | None = None,
        steps: int | None = None,
    ) -> np.ndarray:
        """As `act` for several observations at once: float32 [n, horizon, d]. Their noise is that of the seed at their
        `positions`, by default 0 to n - 1."""
        use, draws = self.processing, self._draws if seed is None else Draws(seed, "act")
        if positions is None:
            begin = self._count if seed is None else 0
            positions = range(begin, begin + len(observations))
        if seed is None:
            self._count += len(observations)
        noise = np.stack([draws.normal(position, use.horizon * use.action_size, "noise") for position in positions])
        batch = self._batch(observations, noise.reshape(-1, use.horizon, use.action_size))
        trained = self.model.training
        self.model.eval()
        try:
            found = self.model.sample(batch, steps).float().cpu().numpy()
        finally:
            self.model.train(trained)
        return use.restore(found, np.stack([item.state for item in observations])).astype(np.float32)

    def warm_up(self) -> None:
        """Act once on nothing, so that the first real observation is not kept waiting."""
        images = {name: np.zeros((*size, 3), np.uint8) for name, size in self.cameras.items()}
        state = np.zeros(self.processing.robot.state, np.float32)
        self.act_on([Observation(state, images, "")], seed=0)

    def _batch(self, observations: Sequence[Observation], noise: np.ndarray) -> dict[str, torch.Tensor]:
        """A robot batch without recorded actions, on the device."""
        use = self.processing
        images = np.zeros((len(observations), len(use.cameras), *use.size, 3), np.uint8)
        samples = []
        for row, item in enumerate(observations):
            for column, camera in enumerate(use.cameras):
                if camera.feature is not None:
                    images[row, column] = use.image(item.images[camera.feature], camera.feature)
            samples.append(use.observe(item.state, item.task))
        longest = max(len(sample["tokens"]) for sample in samples)
        for sample in samples:
            for name in ("tokens", "token_mask"):
                sample[name] = np.pad(sample[name], (0, longest - len(sample[name])))
        arrays = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
        arrays |= {"images": images, "noise": noise, "actions": np.zeros_like(noise)}
        arrays |= {"action_mask": np.zeros(noise.shape, bool), "time": np.ones(len(observations), np.float32)}
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if hasattr(self.model, "packing"):
            batch |= self.model.packing(batch)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def recorded(policy: Policy, dataset: Dataset, reader: FrameReader, episode: int, frame: int) -> Observation:
    """The observation of a dataset's frame.

    Raises:
        DataError: the dataset has not what the policy takes, or a frame cannot be read (`FrameError`).
    """
    found = dataset.episode(episode)
    if not 0 <= frame < found.length:
        raise DataError(f"`{dataset.root}`: episode {episode} has the frames 0 to {found.length - 1}, not {frame}.")
    name = policy.settings.state
    if missing := [feature for feature in (name, *policy.cameras) if feature not in dataset.features]:
        raise DataError(f"`{dataset.root}` lacks {', '.join(missing)}, which the policy takes.")
    given: dict[str, Any] = {camera: reader.frames(found, camera, [frame])[0] for camera in policy.cameras}
    given[name] = dataset.columns(found, [name], frame, frame + 1)[name].reshape(-1)
    return policy.observation({**given, TASK: dataset.task(found, frame)})


def recorded_actions(policy: Policy, dataset: Dataset, episode: int, frame: int) -> np.ndarray:
    """The actions that followed in the dataset, float32 [n, d], n <= horizon of them up to the end of the episode."""
    found, name = dataset.episode(episode), policy.settings.action
    stop = min(frame + policy.horizon, found.length)
    actions = dataset.columns(found, [name], frame, stop)[name].reshape(stop - frame, -1).astype(np.float32)
    if actions.shape[1] != policy.processing.robot.action:
        raise DataError(
            f"`{dataset.root}`: `{name}` has {actions.shape[1]} numbers; the policy gives "
            f"{policy.processing.robot.action}."
        )
    return actions


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: JSON can name halves of characters that cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _state_problems(name: str, value: Any, size: int) -> list[str]:
    try:
        found = np.asarray(value)
    except ValueError as error:
        return [f"`{name}` is no array of numbers: {error}."]
    if found.dtype.kind not in "fiub":
        return [f"`{name}` must hold numbers, not {found.dtype}."]
    if found.shape != (size,):
        return [f"`{name}` has the shape {list(found.shape)}, not [{size}]."]
    with np.errstate(over="ignore"):
        wrong = np.flatnonzero(~np.isfinite(found.astype(np.float32)))
    return [f"`{name}`: number {wrong[0]} is {found[wrong[0]]}, which is no finite float32."] if len(wrong) else []


def _image_problems(name: str, value: Any) -> list[str]:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8:
        return [f"`{name}` must be an array of uint8, not {getattr(value, 'dtype', type(value).__name__)}."]
    if value.ndim != 3 or value.shape[2] != 3:
        return [f"`{name}` has the shape {list(value.shape)}, not [height, width, 3]."]
    if not all(SHORTEST <= side <= LONGEST for side in value.shape[:2]):
        return [f"`{name}` has {value.shape[0]} x {value.shape[1]} pixels; sides of {SHORTEST} to {LONGEST} are taken."]
    return []


def load_policy(path: str | Path, **settings: Any) -> Policy:
    """Open a run folder, a native checkpoint or a policy's folder (`loong_vla.open_policy.open_policy`)."""
    from loong_vla.open_policy import open_policy

    return open_policy(Path(path), **settings)
