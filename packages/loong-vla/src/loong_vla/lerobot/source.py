"""The data source `lerobot` as data: its settings, what it recognises, which files it reads. Imports neither numpy nor
pyarrow until a function is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from loong_core.errors import DataError
from loong_core.types import DataSource


class LeRobotOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    cameras: dict[str, str | None] = {}
    """Camera of the policy -> camera of the dataset, in the policy's order; null: the policy has it, the dataset has
    not. Empty: the dataset's cameras under their own names."""
    unused_cameras: list[str] = []
    """Cameras of the dataset that the policy is not to see; one that is neither here nor in `cameras` is an error."""
    state: str = "observation.state"
    """Feature that is the robot's state."""
    action: str = "action"
    """Feature that is predicted."""
    embodiment: str | int | None = None
    """Robot of a policy that knows several, by name or number; null: the one its config.json names."""
    statistics: Literal["auto", "compute"] = "auto"
    """auto: those of the dataset, computed where they are absent or lack what the policy needs; compute: always."""
    zero_range: Literal["refuse", "keep"] = "refuse"
    """What to do with a dimension whose values differ while the range to normalise by is zero (a gripper that hardly
    ever moves); keep: subtract the centre and do not scale."""
    tolerance: float = Field(default=1e-4, gt=0)
    """Seconds by which a frame may miss the time of its row."""
    skip_samples: int = Field(default=100, ge=0)
    """Samples that may be skipped, all ranks and steps together, because a frame cannot be decoded; one more ends the
    run with a checkpoint."""
    threads: int = Field(default=4, ge=1)
    """Threads of each rank that decode and resize frames."""
    ahead: int = Field(default=4, ge=1)
    """Steps whose batches are prepared ahead."""
    decoders: int = Field(default=32, ge=1)
    """Video files each rank keeps open."""

    def mapping(self, cameras: Sequence[str]) -> dict[str, str | None]:
        """Camera of the policy -> camera of a dataset that has `cameras`."""
        unused = set(self.unused_cameras)
        return dict(self.cameras) or {name: name for name in cameras if name not in unused}


def options_of(given: Any) -> LeRobotOptions:
    """Options as the source's model, from it or from what a recipe holds."""
    return given if isinstance(given, LeRobotOptions) else LeRobotOptions.model_validate(dict(given or {}))


def folder_of(path: Path | str | Sequence[Path | str] | None) -> Path:
    """The one folder that `data.path` names.

    Raises:
        DataError: it names none, or several.
    """
    paths = [path] if isinstance(path, (str, Path)) else list(path or ())
    if len(paths) != 1:
        found = "is not set" if not paths else f"names {len(paths)} datasets"
        raise DataError(f"`data.path` {found}. Name the folder of one LeRobot dataset (the one with `meta/info.json`).")
    return Path(paths[0]).expanduser()


def claims(path: Path) -> bool:
    """Whether a folder is a LeRobot dataset."""
    return (path / "meta" / "info.json").is_file()


def files(path: Any, options: Any = None) -> list[Path]:
    """Every file of the dataset that training reads, in order.

    Raises:
        DataError: the dataset's description is missing or damaged.
    """
    from loong_vla.lerobot.layout import open_dataset

    dataset = open_dataset(folder_of(path))
    names = [episode.data for episode in dataset.episodes]
    cameras: Mapping[str, Any] = dict.fromkeys(dataset.cameras)
    names += [clip.file for item in dataset.episodes for name, clip in item.clips.items() if name in cameras]
    meta = sorted(item for item in (dataset.root / "meta").rglob("*") if item.is_file())
    return [*meta, *(dataset.root / name for name in dict.fromkeys(names))]


SOURCE = DataSource(
    name="lerobot",
    check="loong_vla.check:check",
    files="loong_vla.lerobot.source:files",
    options="loong_vla.lerobot.source:LeRobotOptions",
    stream="loong_vla.stream:stream",
    fit="loong_vla.check:fit",
    report="loong_vla.check:report",
    claims="loong_vla.lerobot.source:claims",
    summary="A LeRobot dataset, v3.0 or v2.1: episodes of robot states, actions and camera videos.",
)
