"""From a robot's observation to a policy's inputs, and from its output back to actions: one object for training,
evaluation and a server. What differs between families is decided in `families`, as data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from loong_core.errors import DataError, Unsupported
from loong_vla.images import Position, Resize
from loong_vla.normalise import Normaliser, offsets

Sample = dict[str, np.ndarray]
"""One sample's share of a batch, without the batch axis."""


class Camera(NamedTuple):
    """A camera of the policy: its name there, the dataset's feature that fills it (None: this robot lacks it), and
    whether it moves with the hand."""

    name: str
    feature: str | None
    wrist: bool = False


class Prompts(Protocol):
    """How a family puts an instruction, and perhaps the normalised state [d], into tokens and their mask."""

    def tokens(self, task: str, state: np.ndarray, cameras: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [l] and bool [l]; `cameras` is the number of images."""


class Robot(NamedTuple):
    """What must be known of a robot: the numbers of its state and actions, the names of the latter, its cameras with
    height and width, the instructions of its episodes, its statistics by feature, and where all that is from, for
    messages."""

    state: int
    action: int
    action_names: tuple[str, ...] | None
    cameras: Mapping[str, tuple[int, int]]
    tasks: tuple[str, ...]
    statistics: Mapping[str, Mapping[str, Any]] | None
    where: str


@dataclass(frozen=True, kw_only=True)
class Processing:
    """One robot with one policy.

    `horizon`, `state_size` and `action_size` are the policy's; `steps` is how many of a chunk's actions it was trained
    on (at most `horizon`). `relative` [d] says which actions count from the state. `time` makes the flow's time of a
    uniform number. `past_end` keeps the repeated last action behind an episode's end as a target, else it is zero and
    not counted; `padding_counts` counts the dimensions that fill up to `action_size`. `random_crop` says that training
    draws where `resize` crops. `state_dropout` is the share of training samples without state.
    """

    cameras: tuple[Camera, ...]
    size: tuple[int, int]
    resize: Resize
    prompts: Prompts
    states: Normaliser
    actions: Normaliser
    robot: Robot
    state_size: int
    action_size: int
    horizon: int
    steps: int
    time: Callable[[float], float]
    relative: np.ndarray | None = None
    embodiment: int = 0
    drop_tail: bool = False
    past_end: bool = True
    padding_counts: bool = False
    random_crop: bool = False
    state_dropout: float = 0.0

    # ------------------------------------------------------------------------------------------------------ inputs
    @property
    def camera_mask(self) -> np.ndarray:
        """Which of the policy's cameras this robot has, bool [c]."""
        return np.array([camera.feature is not None for camera in self.cameras])

    def image(self, image: np.ndarray, feature: str, position: Position | None = None) -> np.ndarray:
        """A camera's image uint8 [y,x,3] at the policy's size [*size,3].

        Raises:
            DataError: its proportions are not those the policy takes.
        """
        found = self.resize(image, position)
        if found.shape[:2] != self.size:
            raise DataError(
                f"`{self.robot.where}`: images of `{feature}` have {image.shape[0]} x {image.shape[1]} pixels, which "
                f"become {found.shape[0]} x {found.shape[1]}; the policy takes {self.size[0]} x {self.size[1]} from "
                "every camera. Leave the camera out in data.options.cameras."
            )
        return found

    def observe(self, state: np.ndarray, task: str, *, drop_state: bool = False) -> Sample:
        """Prompt and state [d] as the policy takes them: tokens, token_mask, state, state_mask, camera_mask,
        embodiment."""
        seen = self.states.forward(state)
        tokens, mask = self.prompts.tokens(task, seen, int(self.camera_mask.sum()))
        padded = np.zeros(self.state_size, np.float32)
        padded[: self.robot.state] = 0 if drop_state else seen
        return {
            "tokens": tokens,
            "token_mask": mask,
            "state": padded,
            "state_mask": np.arange(self.state_size) < self.robot.state,
            "camera_mask": self.camera_mask,
            "embodiment": np.array(self.embodiment),
        }

    def chunk(self, actions: np.ndarray, state: np.ndarray) -> Sample:
        """Recorded actions [n,d] from a frame on, n <= horizon of them up to the end of the episode, as a target:
        actions float32 and action_mask bool, both [horizon, action_size]."""
        recorded = min(len(actions), self.steps)
        rows = actions[np.minimum(np.arange(self.steps), len(actions) - 1)].astype(np.float32)
        if self.relative is not None:
            rows = rows - offsets(np.asarray(state, np.float32), self.relative)
        if not self.past_end:
            rows = rows[:recorded]
        found = np.zeros((self.horizon, self.action_size), np.float32)
        mask = np.zeros((self.horizon, self.action_size), bool)
        found[: len(rows), : self.robot.action] = self.actions.forward(rows)
        mask[: len(rows), : self.action_size if self.padding_counts else self.robot.action] = True
        return {"actions": found, "action_mask": mask}

    def counted(self, remaining: np.ndarray) -> np.ndarray:
        """Elements that `chunk` counts where `remaining` frames are left in the episode, this one included."""
        steps = np.full_like(remaining, self.steps) if self.past_end else np.minimum(remaining, self.steps)
        return steps * (self.action_size if self.padding_counts else self.robot.action)

    # ----------------------------------------------------------------------------------------------------- outputs
    def restore(self, actions: np.ndarray, state: np.ndarray) -> np.ndarray:
        """A policy's actions [..., horizon, action_size] in the robot's units, [..., steps, d], for raw states
        [..., s] of the frames they were asked at."""
        found = self.actions.backward(np.asarray(actions, np.float32)[..., : self.steps, : self.robot.action])
        if self.relative is not None:
            found = found + offsets(np.asarray(state, np.float32), self.relative)[..., None, :]
        return found

    def facts(self) -> dict[str, Any]:
        """What decides how a sample looks, as JSON: part of the identity of a run's data."""
        return {
            "cameras": [list(camera) for camera in self.cameras],
            "size": list(self.size),
            "steps": self.steps,
            "drop_tail": self.drop_tail,
            "count": [self.past_end, self.padding_counts],
            "state": self.states.mode,
            "action": self.actions.mode,
            "relative": None if self.relative is None else self.relative.tolist(),
            "embodiment": self.embodiment,
        }


def beta_time(alpha: float, beta: float) -> Callable[[float], float]:
    """Beta(alpha, beta) numbers of uniform ones, by the inverse of its distribution, which is a power where either
    parameter is 1.

    Raises:
        Unsupported: neither is.
    """
    if beta == 1:
        return lambda uniform: uniform ** (1 / alpha)
    if alpha == 1:
        return lambda uniform: 1 - (1 - uniform) ** (1 / beta)
    raise Unsupported(f"the flow's time is drawn from Beta({alpha}, {beta}); loong draws only where one of them is 1.")
