"""The data source `lerobot` as data: what it recognises, which files it reads. Imports neither numpy nor pyarrow until
a function is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_core.errors import DataError
from loong_core.types import DataSource

if TYPE_CHECKING:
    from loong_vla.options import RobotOptions


def options_of(given: Any) -> RobotOptions:
    """Options as the source's model, from it or from what a recipe holds."""
    from loong_vla.options import RobotOptions

    return given if isinstance(given, RobotOptions) else RobotOptions.model_validate(dict(given or {}))


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
    options="loong_vla.options:RobotOptions",
    stream="loong_vla.stream:stream",
    fit="loong_vla.fit:fit",
    report="loong_vla.check:report",
    claims="loong_vla.lerobot.source:claims",
    remedy="Mend it, leave episodes out with data.options.episodes, or choose another dataset.",
    summary="A LeRobot dataset, v3.0 or v2.1: episodes of robot states, actions and camera videos.",
)
