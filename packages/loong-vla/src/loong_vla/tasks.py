"""The robot task: a policy's velocity field is pulled towards the straight way between noise and recorded actions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from loong_core.train.engine import LossSum
from loong_core.types import Task

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.parallel.build import LossContext
    from loong_core.train.engine import Batch

Count = Literal["auto", "recorded", "dimensions", "everything"]


class FlowOptions(BaseModel):
    """Options of `flow_matching`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    count: Count = "auto"
    """Which elements of an action chunk the loss is a mean over. recorded: the robot's own dimensions, up to the end of
    the episode; dimensions: also behind it, where the last action stands repeated; everything: also the dimensions that
    fill up to the policy's size, which are zero (OpenPI). auto: as LeRobot trains the family: dimensions for Pi0.5,
    recorded for GR00T."""
    open_loop: NonNegativeInt = 64
    """Frames of held-out episodes at which an evaluation compares predicted chunks of actions with recorded ones, in
    the robot's units; 0: none."""


def loss(output: Tensor, batch: Batch, context: LossContext) -> LossSum:
    """Summed squared error of the velocity `output` [b,h,a] against the model's target where the batch's `action_mask`
    [b,h,a] counts it, in float32. Source: Lipman et al., 2022 (arXiv 2210.02747)."""
    mask = batch["action_mask"]
    error = (output.float() - context.model.target(batch)).square()
    return LossSum((error * mask).sum(), mask.sum())


TASKS: tuple[Task, ...] = (
    Task(
        name="flow_matching",
        loss="loong_vla.tasks:loss",
        options="loong_vla.tasks:FlowOptions",
        evaluate="loong_vla.evaluate:evaluate",
        generate="loong_vla.generate:generate",
        counts="action elements",
        summary="Action chunks by flow matching on robot episodes.",
    ),
)
"""The robot tasks."""
