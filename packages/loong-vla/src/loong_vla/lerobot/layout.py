"""What a LeRobot dataset holds, read from its `meta` folder alone: versions 3.0 and 2.1 become the same few classes.

Formats as lerobot 0.6 (v3.0: many episodes a file) and lerobot 0.3 (v2.1: a file an episode) write them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loong_core.errors import DataError

if TYPE_CHECKING:
    from loong_vla.lerobot.episodes import Columns

INDEX_FEATURES = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Columns every dataset has: where a row belongs, one number a row."""

Statistics = dict[str, dict[str, np.ndarray]]
"""Feature -> statistic (`min`, `max`, `mean`, `std`, `count`, `q01` ... `q99`) -> array of the feature's shape."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One feature of `info.json`: dtype (`video`, `image`, `string` or a numpy name), shape of one row, names."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    names: Any = None
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def depth(self) -> bool:
        """Whether pixels are distances, which no policy here reads."""
        return any(bool(self.info.get(key)) for key in ("is_depth_map", "video.is_depth_map"))

    @property
    def camera(self) -> bool:
        """Whether a row is a colour image, of a video or of its own."""
        return self.dtype in ("video", "image") and not self.depth

    @property
    def numeric(self) -> bool:
        """Whether a row is an array of numbers."""
        return self.dtype == "bool" or self.dtype.startswith(("float", "int", "uint"))

    @property
    def size(self) -> int:
        """Numbers in one row."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """Where one camera's frames of an episode are: a file below the dataset's folder, and the second they begin at."""

    file: str
    start: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One episode: `length` rows, numbered `from_index` to `to_index - 1` over the whole dataset, in one data file."""

    index: int
    length: int
    tasks: tuple[str, ...]
    from_index: int
    to_index: int
    data: str
    clips: Mapping[str, Clip]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset on disk. `root` is its folder; `tasks` maps `task_index` to the instruction."""

    root: Path
    version: str
    robot_type: str | None
    fps: float
    features: Mapping[str, Feature]
    episodes: Sequence[Episode]
    tasks: Mapping[int, str]
    info: Mapping[str, Any]
    _columns: Columns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from loong_vla.lerobot.episodes import Columns

        object.__setattr__(self, "_columns", Columns(self))

    @cached_property
    def cameras(self) -> tuple[str, ...]:
        """Features that are colour images, in the order of `info.json`."""
        return tuple(name for name, feature in self.features.items() if feature.camera)

    @cached_property
    def frames(self) -> int:
        """Rows of all episodes."""
        return sum(episode.length for episode in self.episodes)

    @cached_property
    def statistics(self) -> Statistics | None:
        """The statistics the dataset brings, None without any (`statistics.compute` makes them).

        Those of version 2.1 stand by episode and are put together as lerobot does it.

        Raises:
            DataError: the file is damaged.
        """
        from loong_vla.lerobot.meta import read_statistics

        return read_statistics(self.root)

    @cached_property
    def _by_index(self) -> dict[int, Episode]:
        return {episode.index: episode for episode in self.episodes}

    def episode(self, index: int) -> Episode:
        """The episode of a number.

        Raises:
            DataError: there is none.
        """
        try:
            return self._by_index[index]
        except KeyError:
            raise DataError(f"`{self.root}` has no episode {index}; it has {len(self.episodes)} episodes.") from None

    def columns(
        self, episode: Episode | int, names: Sequence[str], start: int = 0, stop: int | None = None
    ) -> dict[str, np.ndarray]:
        """Rows `start` to `stop - 1` of an episode, read-only: [n, *shape] in the feature's dtype, [n] of a column of
        `INDEX_FEATURES`. Files are read once and their columns kept in memory. Safe in threads.

        Raises:
            DataError: a file is missing or damaged, or has not the rows the episode should have.
        """
        episode = episode if isinstance(episode, Episode) else self.episode(episode)
        return self._columns.rows(episode, names, start, episode.length if stop is None else stop)

    def images(self, episode: Episode | int, camera: str, rows: Sequence[int]) -> np.ndarray:
        """Images that stand in the data files themselves (dtype `image`), uint8 [n, height, width, 3].

        Raises:
            DataError: as of `columns`.
        """
        episode = episode if isinstance(episode, Episode) else self.episode(episode)
        return self._columns.images(episode, camera, rows)

    def task(self, episode: Episode | int, frame: int = 0) -> str:
        """The instruction at a frame of an episode.

        Raises:
            DataError: the row names a task that the dataset does not list.
        """
        episode = episode if isinstance(episode, Episode) else self.episode(episode)
        number = int(self.columns(episode, ["task_index"], frame, frame + 1)["task_index"][0])
        try:
            return self.tasks[number]
        except KeyError:
            where = f"`{self.root / episode.data}`: episode {episode.index}, frame {frame}"
            raise DataError(f"{where}: task_index {number} is in no row of the dataset's list of tasks.") from None


def open_dataset(path: str | Path) -> Dataset:
    """Read the description of a dataset: everything in `meta`, nothing else.

    Raises:
        DataError: every problem of the description.
    """
    from loong_vla.lerobot import meta

    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"`data.path` names `{root}`, which is not a folder. It should be that of a LeRobot dataset.")
    info = meta.read_info(root)
    features = {name: _feature(name, entry) for name, entry in info["features"].items()}
    new = info["codebase_version"] == "v3.0"
    episodes = (meta.episodes_v3 if new else meta.episodes_v2)(root, info, features)
    return Dataset(
        root=root,
        version=info["codebase_version"],
        robot_type=info.get("robot_type"),
        fps=float(info["fps"]),
        features=features,
        episodes=sorted(episodes, key=lambda episode: episode.index),
        tasks=(meta.tasks_v3 if new else meta.tasks_v2)(root),
        info=info,
    )


def _feature(name: str, entry: Mapping[str, Any]) -> Feature:
    info = entry.get("info") or entry.get("video_info") or {}
    info = info if isinstance(info, dict) else {}
    return Feature(name=name, dtype=entry["dtype"], shape=tuple(entry["shape"]), names=entry.get("names"), info=info)
