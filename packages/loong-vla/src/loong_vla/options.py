"""Settings of the data source `lerobot` (`data.options`); read by checks in the parent, so no tensor library here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt


class RobotOptions(BaseModel):
    """What of a dataset is read, and how it becomes a policy's input."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    cameras: dict[str, str | None] | list[str | None] | None = None
    """The policy's cameras, in its order: a list of the dataset's features, or a mapping of the policy's names to them;
    null in place of a feature is a camera that this robot lacks. null: those of the policy's config.json, else every
    camera of the dataset."""
    state: str = "observation.state"
    """Feature with the robot's state."""
    action: str = "action"
    """Feature with the robot's actions."""
    episodes: list[NonNegativeInt] | None = None
    """Numbers of the episodes to use; null: all."""
    drop_tail: bool | None = None
    """Leave out frames whose action chunk reaches past the end of the episode; false: repeat the last action there and
    do not count it. null: as the policy's family was trained (GR00T leaves them out, Pi0.5 does not)."""
    statistics: Literal["auto", "dataset", "compute", "policy"] = "auto"
    """Where normalisation comes from: the dataset's meta folder; computed from its frames; the policy's own folder
    (statistics.json of a GR00T base model). auto: the policy's where it knows the embodiment, else the dataset's, else
    computed."""
    normalise: dict[Literal["state", "action"], Literal["quantiles", "min_max", "mean_std", "identity"]] = {}
    """How state and action are normalised, where it is not as the policy's config.json says."""
    prompt: Literal["auto", "state", "task"] = "auto"
    """Pi0.5: whether the prompt holds the state's 256 bins (auto, state) or the instruction alone (task)."""
    embodiment: str | NonNegativeInt | None = None
    """GR00T: the embodiment's name or slot. null: `embodiment_tag` of config.json."""
    augment: Literal["auto", "none", "openpi"] = "auto"
    """Changes to training images. openpi: crop, rotation and colours, drawn for every image; auto: the random crop of
    GR00T base models that were trained with it, else none."""
    wrist: list[str] = ["wrist"]
    """Cameras whose name contains one of these move with the hand: augmentation changes their colours alone."""
    tolerance: Annotated[float, Field(gt=0)] = 1e-4
    """Seconds a frame may be off the time of its row."""
    skip_quota: NonNegativeInt = 100
    """Samples that may be replaced because a frame does not decode; with one more the run stops and saves.
    A run that is resumed counts anew."""
    threads: PositiveInt | None = None
    """Threads that decode, in each process that makes batches; null: as many as the machine has cores for each rank, at
    most 16, and at most 4 in a process of its own."""
    processes: NonNegativeInt | Literal["auto"] = "auto"
    """Processes of each rank that make batches, so that the one that trains has nothing else to do; 0: threads of the
    training process. auto: 0 on a CPU, else one for every 4 cores that the machine has for each rank, 1 to 4."""
    ahead: PositiveInt = 2
    """Batches that are prepared ahead; at least one more than there are processes."""
