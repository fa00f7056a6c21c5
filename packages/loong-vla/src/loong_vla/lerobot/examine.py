"""What is wrong with a dataset's files, every problem with its file and episode. `structure` opens every file and reads
its head; `rows` and `pictures` read what is inside.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loong_core.errors import DataError
from loong_vla.lerobot.layout import INDEX_FEATURES, Dataset, Episode, Feature
from loong_vla.lerobot.meta import PARQUET_ERRORS
from loong_vla.lerobot.video import Decoder, FrameError, FrameReader

SHOWN = 10
_THREADS = 8


class Problems:
    """Problems in the order found. Of one kind `SHOWN` are kept; the others are counted."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, texts: Iterable[str]) -> None:
        """Note problems of a kind; the kind ends the line that counts those left out."""
        for text in texts:
            self._counts[kind] += 1
            kept = self._texts.setdefault(kind, [])
            if len(kept) < SHOWN:
                kept.append(text)

    def texts(self) -> list[str]:
        """Everything kept, and one line for each kind of which there was more."""
        result = []
        for kind, kept in self._texts.items():
            result += kept
            if (more := self._counts[kind] - len(kept)) > 0:
                result.append(f"... and {more:,} more of this kind: {kind}.")
        return result


class CameraFile(NamedTuple):
    """What the head of a video file says."""

    file: str
    frames: int
    height: int
    width: int
    codec: str
    rate: float
    size: int


class Heads(NamedTuple):
    """What `structure` found besides problems: rows by data file, heads of videos by camera."""

    rows: Mapping[str, int]
    videos: Mapping[str, Sequence[CameraFile]]


def structure(
    dataset: Dataset, episodes: Sequence[Episode], problems: Problems, cameras: Sequence[str] | None = None
) -> Heads:
    """Compare the heads of all files with the lists in `meta`. `episodes` and `cameras` are those that will be used;
    None: all cameras."""
    problems.add("counts of meta/info.json", _counts(dataset))
    problems.add("episodes without rows", _lengths(dataset, episodes))
    problems.add("missing tasks", _tasks(dataset))
    with ThreadPoolExecutor(_THREADS) as pool:
        rows = _data_heads(dataset, episodes, problems, pool)
        videos = {
            name: _video_heads(dataset, episodes, name, problems, pool)
            for name in (dataset.cameras if cameras is None else cameras)
            if dataset.features[name].dtype == "video"
        }
    problems.add("statistics", statistics_problems(dataset))
    return Heads(rows, videos)


def _counts(dataset: Dataset) -> Iterator[str]:
    file = dataset.root / "meta" / "info.json"
    for key, found in (("total_episodes", len(dataset.episodes)), ("total_frames", dataset.frames)):
        if (said := dataset.info.get(key)) is not None and said != found:
            yield f"`{file}`: `{key}` is {said}, but the list of episodes has {found}."
    repeated = [number for number, count in Counter(item.index for item in dataset.episodes).items() if count > 1]
    if repeated:
        yield f"`{dataset.root}`: the list of episodes has episode {', '.join(map(str, repeated[:5]))} more than once."
    if not dataset.episodes:
        yield f"`{dataset.root}`: the list of episodes is empty."


def _lengths(dataset: Dataset, episodes: Sequence[Episode]) -> Iterator[str]:
    for episode in episodes:
        rows = episode.to_index - episode.from_index
        if episode.length < 1 or rows != episode.length:
            counts = f"length {episode.length}, but rows {episode.from_index} to {episode.to_index}"
            yield f"`{dataset.root}`: the list of episodes gives episode {episode.index} {counts}."


def _tasks(dataset: Dataset) -> Iterator[str]:
    if not dataset.tasks:
        name = "tasks.parquet" if dataset.version == "v3.0" else "tasks.jsonl"
        yield f"`{dataset.root / 'meta' / name}` names no task: the policy would have no instruction."


def by_file(episodes: Sequence[Episode], camera: str | None = None) -> dict[str, list[Episode]]:
    """Episodes by data file, or by the video file of a camera."""
    result: dict[str, list[Episode]] = {}
    for episode in episodes:
        result.setdefault(episode.data if camera is None else episode.clips[camera].file, []).append(episode)
    return result


def which(episodes: Sequence[Episode]) -> str:
    """Episodes in words: `episode 3`, `episodes 3, 4, 5 ...`."""
    numbers = ", ".join(str(item.index) for item in episodes[:5]) + (" ..." if len(episodes) > 5 else "")
    return f"episode{'s' if len(episodes) > 1 else ''} {numbers}"


# --------------------------------------------------------------------------------------------------- data files
def _data_heads(
    dataset: Dataset, episodes: Sequence[Episode], problems: Problems, pool: ThreadPoolExecutor
) -> dict[str, int]:
    files = by_file(episodes)
    rows = {}
    for (name, inside), head in zip(
        files.items(), pool.map(lambda name: _data_head(dataset, name), files), strict=True
    ):
        path = dataset.root / name
        if isinstance(head, str):
            problems.add("data files", [f"`{path}` {head}: it should hold {which(inside)}."])
            continue
        rows[name], schema = head
        wanted = sum(item.length for item in inside)
        if rows[name] < wanted or (dataset.version != "v3.0" and rows[name] != wanted):
            texts = f"`{path}` has {rows[name]} rows, but {which(inside)} should have {wanted} there."
            problems.add("rows of data files", [texts])
        problems.add("columns of data files", [f"`{path}`: {text}." for text in _schema_problems(dataset, schema)])
    return rows


def _data_head(dataset: Dataset, name: str) -> tuple[int, pa.Schema] | str:
    try:
        with pq.ParquetFile(dataset.root / name) as file:
            return file.metadata.num_rows, file.schema_arrow
    except FileNotFoundError:
        return "is missing"
    except PARQUET_ERRORS as error:
        return f"is not a readable parquet file ({error})"


def _schema_problems(dataset: Dataset, schema: pa.Schema) -> Iterator[str]:
    for name in dict.fromkeys([*dataset.features, *INDEX_FEATURES]):
        feature = dataset.features.get(name)
        if feature is not None and feature.dtype == "video":
            continue
        if name not in schema.names:
            yield f"it lacks the column `{name}`"
        elif feature is not None and feature.numeric and (text := _kind_problem(feature, schema.field(name).type)):
            yield f"feature `{name}` {text}, but info.json says {feature.dtype} of shape {list(feature.shape)}"


def _kind_problem(feature: Feature, kind: pa.DataType) -> str | None:
    depth, size = 0, None
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        size = kind.list_size if pa.types.is_fixed_size_list(kind) and depth == 0 else size
        kind, depth = kind.value_type, depth + 1
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return f"holds {kind}"
    expected = 0 if feature.name in INDEX_FEATURES else len(feature.shape)
    if depth != expected and not (depth == 0 and feature.size == 1):
        return f"holds {'single numbers' if depth == 0 else f'lists of depth {depth}'}"
    if size is not None and feature.shape and size != feature.shape[0]:
        return f"holds {size} numbers a row"
    return None


# ------------------------------------------------------------------------------------------------------- videos
def _video_heads(
    dataset: Dataset, episodes: Sequence[Episode], camera: str, problems: Problems, pool: ThreadPoolExecutor
) -> list[CameraFile]:
    files = by_file(episodes, camera)
    result = []
    for (name, inside), head in zip(
        files.items(), pool.map(lambda name: video_head(dataset, name), files), strict=True
    ):
        path, about = dataset.root / name, f"camera `{camera}`, {which(inside)}"
        if isinstance(head, str):
            problems.add("video files", [f"`{path}` {head}: {about}."])
            continue
        result.append(head)
        problems.add("videos shorter than their rows", _short(dataset, head, inside, camera))
        shape = dataset.features[camera].shape
        if sorted(shape) != sorted((head.height, head.width, 3)):
            found = f"its images have {head.height} x {head.width} pixels, but info.json says shape {list(shape)}"
            problems.add("image sizes", [f"`{path}`: {about}: {found}."])
    return result


def video_head(dataset: Dataset, name: str) -> CameraFile | str:
    """The head of a video file, or why there is none. Containers that do not count frames have them counted."""
    path = dataset.root / name
    try:
        decoder = Decoder(path)
    except FrameError as error:
        return str(error).removeprefix(f"`{path}` ").rstrip(".")
    try:
        stream = decoder.stream
        frames = stream.frames or len(decoder.packet_times())
        codec = stream.codec_context
        rate = float(stream.average_rate) if stream.average_rate else 0.0
        size = path.stat().st_size
        return CameraFile(name, frames, codec.height, codec.width, codec.codec.canonical_name, rate, size)
    except (FrameError, OSError) as error:
        return f"cannot be read: {error}"
    finally:
        decoder.close()


def _short(dataset: Dataset, head: CameraFile, inside: Sequence[Episode], camera: str) -> Iterator[str]:
    """Episodes whose last row has no frame, by the rate and the number of frames that the head gives."""
    rate = head.rate or dataset.fps
    for episode in inside:
        first = round(episode.clips[camera].start * rate)
        last = round((episode.clips[camera].start + (episode.length - 1) / dataset.fps) * rate)
        if last >= head.frames:
            present = max(0, math.floor((head.frames - first) * dataset.fps / rate))
            rows = f"it ends after {present} of the episode's {episode.length} rows ({head.frames} frames in the file)"
            yield f"`{dataset.root / head.file}`: episode {episode.index}, camera `{camera}`: {rows}."


# --------------------------------------------------------------------------------------------------- statistics
def statistics_problems(dataset: Dataset) -> Iterator[str]:
    """Statistics that do not belong to the features; absent ones are no problem, they can be computed."""
    try:
        statistics = dataset.statistics
    except DataError as error:
        yield from error.problems
        return
    for name, entry in (statistics or {}).items():
        feature = dataset.features.get(name)
        if feature is None or not (feature.numeric or feature.camera):
            continue
        size = 3 if feature.camera else feature.size
        for key, values in entry.items():
            if key != "count" and values.size != size:
                found = f"`{key}` has {values.size} numbers, the feature {size}"
                yield f"`{dataset.root / 'meta'}`: statistics of `{name}`: {found}."
            elif not np.isfinite(values).all():
                yield f"`{dataset.root / 'meta'}`: statistics of `{name}`: `{key}` is not finite."


def flat_dimensions(entry: Mapping[str, np.ndarray], low: str, high: str) -> tuple[list[int], list[int]]:
    """Dimensions whose range from `low` to `high` is zero: those that vary all the same, and those that never do.

    Quantiles of equal values lie up to 1e-10 apart in lerobot's definition, so a range that small is none.
    """
    size = np.maximum(1.0, np.maximum(np.abs(entry[low]), np.abs(entry[high]))).ravel()
    flat = (entry[high] - entry[low]).ravel() <= 1e-8 * size
    still = (entry["max"] - entry["min"]).ravel() == 0 if "min" in entry and "max" in entry else flat
    return np.flatnonzero(flat & ~still).tolist(), np.flatnonzero(flat & still).tolist()


# --------------------------------------------------------------------------------------------------- everything
def rows(dataset: Dataset, episodes: Sequence[Episode], problems: Problems) -> None:
    """Read every number of the episodes: shapes, gaps, times, numbers that are none, unknown tasks."""
    numeric = [name for name, feature in dataset.features.items() if feature.numeric]
    names = list(dict.fromkeys([*INDEX_FEATURES, *numeric]))

    def look(episode: Episode) -> tuple[str, list[str]]:
        try:
            columns = dataset.columns(episode, names)
        except DataError as error:
            return "rows that cannot be read", error.problems
        where = f"`{dataset.root / episode.data}`: episode {episode.index}"
        return "rows", [f"{where}{text}." for text in _row_problems(dataset, episode, columns)]

    seen: set[str] = set()
    with ThreadPoolExecutor(_THREADS) as pool:
        for kind, texts in pool.map(look, episodes):
            problems.add(kind, [text for text in texts if text not in seen])
            seen.update(texts)


def _row_problems(dataset: Dataset, episode: Episode, columns: Mapping[str, np.ndarray]) -> Iterator[str]:
    frames = np.arange(episode.length)
    for name, values in columns.items():
        if values.dtype.kind == "f":
            bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
            if len(bad):
                yield f", frame {bad[0]}: `{name}` is not a finite number ({len(bad)} such frames)"
    for name, wanted in (("frame_index", frames), ("index", episode.from_index + frames)):
        if len(bad := np.flatnonzero(columns[name] != wanted)):
            at = int(bad[0])
            expected = f"where {wanted[at]} is expected ({len(bad)} such frames)"
            yield f", frame {at}: `{name}` is {columns[name][at]} {expected}"
    off = np.abs(columns["timestamp"].astype(np.float64) - frames / dataset.fps)
    if off.max() > 0.5 / dataset.fps:
        at = int(off.argmax())
        rate = f"which is not that of frame {at} at {dataset.fps:g} frames a second"
        yield f", frame {at}: `timestamp` is {columns['timestamp'][at]:.4f} s, {rate}"
    unknown = sorted(set(columns["task_index"].tolist()) - set(dataset.tasks))
    if unknown:
        yield f": `task_index` {', '.join(map(str, unknown[:5]))} is in no row of the list of tasks"


def pictures(
    dataset: Dataset, episodes: Sequence[Episode], heads: Heads, problems: Problems, tolerance: float, every: bool
) -> dict[str, int]:
    """Look for a frame at the time of every row, and decode all of them or, without `every`, each episode's first and
    last. Files without a head are left out. Returns how many were decoded, by camera."""
    opened = {camera: _openable(heads, camera, episodes) for camera in dataset.cameras}
    jobs = [(camera, episode) for camera, inside in opened.items() for episode in inside]
    decoded: Counter[str] = Counter()

    def look(job: tuple[str, Episode]) -> tuple[list[str], int]:
        camera, episode = job
        wanted = list(range(episode.length)) if every else sorted({0, episode.length - 1})
        failures: list[str] = []
        for first in range(0, len(wanted), 16):
            part = wanted[first : first + 16]
            try:
                reader.frames(episode, camera, part)
            except (DataError, IndexError):
                failures += filter(None, (_failure(reader, episode, camera, number) for number in part))
        texts = [f"{failures[0].rstrip('.')} ({len(failures)} such frames)."] if failures else []
        return texts, len(wanted) - len(failures)

    def gaps(item: tuple[str, list[Episode]], camera: str) -> list[str]:
        return _gaps(dataset, camera, *item, tolerance)

    with FrameReader(dataset, tolerance) as reader, ThreadPoolExecutor(_THREADS) as pool:
        for name in dataset.cameras:
            if not every and dataset.features[name].dtype == "video":
                for texts in pool.map(gaps, by_file(opened[name], name).items(), repeat(name)):
                    problems.add("rows without a frame", texts)
        for (camera, _), (texts, count) in zip(jobs, pool.map(look, jobs), strict=True):
            problems.add("frames that cannot be decoded", texts)
            decoded[camera] += count
    return dict(decoded)


def _openable(heads: Heads, camera: str, episodes: Sequence[Episode]) -> list[Episode]:
    """Episodes whose rows, and whose frames of this camera, lie in files that could be opened."""
    readable = [episode for episode in episodes if episode.data in heads.rows]
    if camera not in heads.videos:  # its images lie in the tables
        return readable
    files = {head.file for head in heads.videos[camera]}
    return [episode for episode in readable if episode.clips[camera].file in files]


def _failure(reader: FrameReader, episode: Episode, camera: str, number: int) -> str | None:
    try:
        reader.frames(episode, camera, [number])
    except (DataError, IndexError) as error:
        return str(error)
    return None


def _gaps(dataset: Dataset, camera: str, name: str, inside: Sequence[Episode], tolerance: float) -> list[str]:
    """Rows at whose time the file has no packet, one text an episode."""
    try:
        decoder = Decoder(dataset.root / name)
        try:
            times = decoder.packet_times()
        finally:
            decoder.close()
    except FrameError as error:
        return [str(error)]
    result = []
    for episode in inside:
        try:
            rows = dataset.columns(episode, ["timestamp"])["timestamp"]
        except DataError:
            continue
        wanted = episode.clips[camera].start + rows.astype(np.float64)
        missing = np.flatnonzero(_distance(times, wanted) >= tolerance)
        if len(missing):
            text = f"no frame at {wanted[missing[0]]:.4f} s, the time of row {missing[0]} ({len(missing)} such rows)"
            result.append(f"`{dataset.root / name}`: episode {episode.index}, camera `{camera}`: {text}.")
    return result


def _distance(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Seconds from each wanted time to the nearest of the ascending `times`."""
    if not len(times):
        return np.full(len(wanted), np.inf)
    after = np.searchsorted(times, wanted)
    before, behind = times[np.maximum(after - 1, 0)], times[np.minimum(after, len(times) - 1)]
    return np.minimum(np.abs(wanted - before), np.abs(behind - wanted))
