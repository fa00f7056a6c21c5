"""Small LeRobot datasets with something to learn in them, written from nothing: an arm wanders, a square in every image
stands where its first two joints are, and the action is where the arm goes next.

Both versions, with real MP4 files, and everything in `meta` that lerobot reads; for tests and first steps.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loong_vla.lerobot.layout import Dataset, Statistics, open_dataset
from loong_vla.lerobot.statistics import Levels, aggregate, as_json, describe

TASKS = ("put the square into the corner", "push the square to the wall", "hold the square still")
CAMERAS: Mapping[str, tuple[int, int]] = {"observation.images.front": (64, 64), "observation.images.wrist": (64, 64)}
_ENCODERS = {"h264": ("libx264", "mpeg4"), "hevc": ("libx265",), "av1": ("libsvtav1",), "mpeg4": ("mpeg4",)}
_CODEC_OPTIONS = {
    "libx264": {"crf": "23", "preset": "veryfast"},
    "libx265": {"crf": "23", "preset": "ultrafast", "x265-params": "log-level=none"},
    "libsvtav1": {"crf": "30", "preset": "12"},
    "mpeg4": {"qscale": "3"},
}
_COLOURS = ((220, 60, 40), (40, 190, 80), (60, 90, 230))


class _Plan(NamedTuple):
    """The settings of `generate`, complete."""

    root: Path
    version: str
    lengths: tuple[int, ...]
    fps: int
    cameras: Mapping[str, tuple[int, int]]
    state: int
    action: int
    seed: int
    codec: str
    tasks: tuple[str, ...]
    per_file: int
    images: bool
    keyframes: int

    def place(self, episode: int) -> dict[str, int]:
        """Numbers that the path templates ask for."""
        if self.version == "v3.0":
            return {"chunk_index": 0, "file_index": episode // self.per_file}
        return {"episode_chunk": episode // 1000, "episode_index": episode}


class _Episode(NamedTuple):
    """One episode as numbers: every array has a row a frame."""

    number: int
    task: int
    begin: int
    state: np.ndarray
    action: np.ndarray


def generate(
    path: str | Path,
    version: Literal["v3.0", "v2.1"] = "v3.0",
    episodes: int = 2,
    frames: int | Sequence[int] = 20,
    fps: int = 10,
    cameras: Mapping[str, tuple[int, int]] = CAMERAS,
    state: int = 8,
    action: int = 7,
    seed: int = 0,
    codec: str = "h264",
    *,
    tasks: Sequence[str] = TASKS[:2],
    episodes_per_file: int | None = None,
    images: bool = False,
    keyframes: int = 2,
    statistics: bool = True,
) -> Dataset:
    """Write a dataset into the new or empty folder `path` and open it.

    `frames` is the length of every episode, or one for each; `cameras` are (height, width) by feature; `codec` is
    h264 (MPEG-4 part 2 where PyAV has no encoder of it), hevc, av1 or mpeg4, with a key frame every `keyframes` frames.
    `episodes_per_file` cuts the files of v3.0 (None: one file). `images` puts PNGs into the tables in place of videos.
    What is written depends on the arguments alone.

    Raises:
        ValueError: the folder is not empty, or there is no encoder of `codec`.
    """
    root = Path(path)
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty")
    lengths = (frames,) * episodes if isinstance(frames, int) else tuple(frames)
    plan = _Plan(
        root=root,
        version=version,
        lengths=lengths,
        fps=fps,
        cameras=cameras,
        state=state,
        action=action,
        seed=seed,
        codec=_encoder(codec),
        tasks=tuple(tasks),
        per_file=episodes_per_file or len(lengths),
        images=images,
        keyframes=keyframes,
    )
    written = list(_episodes(plan))
    pixels = _write_videos(plan, written) if not images else {}
    tables = [_table(plan, episode) for episode in written]
    _write_tables(plan, tables)
    parts = [_statistics(plan, episode, pixels) for episode in written] if statistics else None
    (_write_meta_v3 if version == "v3.0" else _write_meta_v2)(plan, written, parts)
    return open_dataset(root)


# ------------------------------------------------------------------------------------------------------ content
def _episodes(plan: _Plan) -> Iterator[_Episode]:
    begin = 0
    mixing = np.random.default_rng([plan.seed, 1 << 31]).normal(size=(plan.state, plan.action)) / plan.state**0.5
    for index, length in enumerate(plan.lengths):
        random = np.random.default_rng([plan.seed, index])
        time = np.arange(length + 1)[:, None] / plan.fps
        speed, phase = random.uniform(0.2, 0.6, plan.state), random.uniform(0, 2 * np.pi, plan.state)
        path = np.sin(2 * np.pi * speed * time + phase) * random.uniform(0.5, 1.0, plan.state)
        path += random.normal(scale=0.01, size=path.shape)
        action = path[1:] @ mixing
        action[:, -1] = action[:, -1] > 0  # a gripper is open or closed
        yield _Episode(
            number=index,
            task=index % len(plan.tasks),
            begin=begin,
            state=path[:-1].astype(np.float32),
            action=action.astype(np.float32),
        )
        begin += length


def _images(plan: _Plan, episode: _Episode, camera: int) -> Iterator[np.ndarray]:
    """Images of one camera, uint8 [height, width, 3]: a shaded wall, and a square at the first two joints' position."""
    height, width = list(plan.cameras.values())[camera]
    rows, columns = np.mgrid[0:height, 0:width]
    wall = np.stack([rows * 120 // height, columns * 120 // width, np.full_like(rows, 40 + 30 * camera)], axis=-1)
    side = max(2, min(height, width) // 5)
    joints = episode.state[:, [0, min(1, plan.state - 1)]]
    for first, second in (joints + 1) / 2:
        top = int(np.clip(first, 0, 1) * (height - side))
        left = int(np.clip(second, 0, 1) * (width - side))
        image = wall.astype(np.uint8)
        image[top : top + side, left : left + side] = _COLOURS[episode.task % len(_COLOURS)]
        yield image


# ------------------------------------------------------------------------------------------------------- videos
def _encoder(codec: str) -> str:
    for name in _ENCODERS.get(codec, ()):
        with contextlib.suppress(av.codec.codec.UnknownCodecError):
            av.codec.Codec(name, "w")
            return name
    raise ValueError(f"no encoder of {codec!r}; known are {', '.join(_ENCODERS)}")


def _write_videos(plan: _Plan, episodes: Sequence[_Episode]) -> dict[tuple[int, str], list[np.ndarray]]:
    """Encode every camera; returns the images, for statistics of what went in."""
    pixels: dict[tuple[int, str], list[np.ndarray]] = {}
    for number, camera in enumerate(plan.cameras):
        files: dict[Path, list[_Episode]] = {}
        for episode in episodes:
            place = plan.place(episode.number)
            files.setdefault(plan.root / _video_path(plan).format(video_key=camera, **place), []).append(episode)
        for file, inside in files.items():
            for episode in inside:
                pixels[episode.number, camera] = list(_images(plan, episode, number))
            _encode(file, [image for episode in inside for image in pixels[episode.number, camera]], plan)
    return pixels


def _encode(file: Path, images: Sequence[np.ndarray], plan: _Plan) -> None:
    """Write images as a constant-rate MP4."""
    file.parent.mkdir(parents=True, exist_ok=True)
    height, width = images[0].shape[:2]
    with av.open(str(file), "w", format="mp4") as container:
        options = {"g": str(plan.keyframes), **_CODEC_OPTIONS[plan.codec]}
        stream = container.add_stream(plan.codec, rate=Fraction(plan.fps), options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        stream.codec_context.thread_count = 1
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


# ------------------------------------------------------------------------------------------------------- tables
def _data_path(plan: _Plan) -> str:
    if plan.version == "v3.0":
        return "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    return "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"


def _video_path(plan: _Plan) -> str:
    if plan.version == "v3.0":
        return "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    return "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


def _numbers(plan: _Plan, episode: _Episode) -> dict[str, np.ndarray]:
    length = len(episode.state)
    frame = np.arange(length, dtype=np.int64)
    return {
        "observation.state": episode.state,
        "action": episode.action,
        "timestamp": (frame / plan.fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full(length, episode.number, np.int64),
        "index": episode.begin + frame,
        "task_index": np.full(length, episode.task, np.int64),
    }


def _table(plan: _Plan, episode: _Episode) -> pa.Table:
    columns: dict[str, Any] = {}
    for number, camera in enumerate(plan.cameras if plan.images else ()):
        cells = [{"bytes": _png(image), "path": None} for image in _images(plan, episode, number)]
        columns[camera] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    for name, values in _numbers(plan, episode).items():
        scalar = values.ndim == 1 or values.shape[1] == 1
        columns[name] = pa.array(values.reshape(-1)) if scalar else pa.array(list(values), pa.list_(pa.float32()))
    return pa.table(columns)


def _png(image: np.ndarray) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()


def _write_tables(plan: _Plan, tables: Sequence[pa.Table]) -> None:
    files: dict[Path, list[pa.Table]] = {}
    for episode, table in enumerate(tables):
        files.setdefault(plan.root / _data_path(plan).format(**plan.place(episode)), []).append(table)
    for file, inside in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(file, inside[0].schema, compression="snappy") as writer:
            for table in inside:  # a row group an episode, as lerobot's recorder leaves them
                writer.write_table(table)


# --------------------------------------------------------------------------------------------------------- meta
def _statistics(plan: _Plan, episode: _Episode, pixels: Mapping[tuple[int, str], list[np.ndarray]]) -> Statistics:
    result = {name: describe(values) for name, values in _numbers(plan, episode).items()}
    for number, camera in enumerate(plan.cameras):
        levels = Levels()
        for image in pixels.get((episode.number, camera)) or _images(plan, episode, number):
            levels.add(image)
        result[camera] = levels.describe()
    return result


def _features(plan: _Plan) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, (height, width) in plan.cameras.items():
        entry: dict[str, Any] = {"dtype": "image" if plan.images else "video", "shape": [height, width, 3]}
        entry["names"] = ["height", "width", "channels"]
        if not plan.images:
            codec = av.codec.Codec(plan.codec, "w").canonical_name
            pixels = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            video = {"height": height, "width": width, "codec": codec, "pix_fmt": pixels, "fps": plan.fps}
            entry["info"] = {f"video.{key}": value for key, value in video.items()}
            entry["info"] |= {"video.channels": 3, "is_depth_map": False, "has_audio": False}
        result[name] = entry
    for name, size in (("observation.state", plan.state), ("action", plan.action)):
        names = [f"joint_{number}" for number in range(size)]
        if name == "action":
            names[-1] = "gripper"
        result[name] = {"dtype": "float32", "shape": [size], "names": names}
    for name in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        result[name] = {"dtype": "float32" if name == "timestamp" else "int64", "shape": [1], "names": None}
    return result


def _info(plan: _Plan) -> dict[str, Any]:
    common = {
        "codebase_version": plan.version,
        "robot_type": "generated",
        "total_episodes": len(plan.lengths),
        "total_frames": sum(plan.lengths),
        "total_tasks": len(plan.tasks),
        "chunks_size": 1000,
        "fps": plan.fps,
        "splits": {"train": f"0:{len(plan.lengths)}"},
        "data_path": _data_path(plan),
        "video_path": None if plan.images else _video_path(plan),
        "features": _features(plan),
    }
    if plan.version == "v3.0":
        return {**common, "data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
    videos = 0 if plan.images else len(plan.lengths) * len(plan.cameras)
    return {**common, "total_chunks": 1, "total_videos": videos}


def _write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=4), encoding="utf-8")


def _write_meta_v3(plan: _Plan, episodes: Sequence[_Episode], parts: Sequence[Statistics] | None) -> None:
    meta = plan.root / "meta"
    _write_json(meta / "info.json", _info(plan))
    rows = []
    for episode in episodes:
        length, place = len(episode.state), plan.place(episode.number)
        row: dict[str, Any] = {"episode_index": episode.number, "tasks": [plan.tasks[episode.task]], "length": length}
        row |= {f"data/{key}": value for key, value in place.items()}
        row |= {"dataset_from_index": episode.begin, "dataset_to_index": episode.begin + length}
        first = episodes[place["file_index"] * plan.per_file].begin
        for camera in () if plan.images else plan.cameras:
            row |= {f"videos/{camera}/{key}": value for key, value in place.items()}
            row[f"videos/{camera}/from_timestamp"] = (episode.begin - first) / plan.fps
            row[f"videos/{camera}/to_timestamp"] = (episode.begin - first + length) / plan.fps
        for name, entry in (as_json(parts[episode.number]) if parts else {}).items():
            row |= {f"stats/{name}/{key}": value for key, value in entry.items()}
        rows.append({**row, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
    file = meta / "episodes" / "chunk-000" / "file-000.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)
    pq.write_table(_task_table(plan.tasks), meta / "tasks.parquet")
    if parts:
        _write_json(meta / "stats.json", as_json(aggregate(parts)))


def _task_table(tasks: Sequence[str]) -> pa.Table:
    """As pandas writes a frame whose index is named `task`: its readers look for that note in the schema."""
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_kind, "metadata": None}
        for name, (kind, numpy_kind) in kinds.items()
    ]
    note = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.2.0"}
    return table.replace_schema_metadata({"pandas": json.dumps(note)})


def _write_meta_v2(plan: _Plan, episodes: Sequence[_Episode], parts: Sequence[Statistics] | None) -> None:
    meta = plan.root / "meta"
    _write_json(meta / "info.json", _info(plan))
    lines = [
        {"episode_index": item.number, "tasks": [plan.tasks[item.task]], "length": len(item.state)} for item in episodes
    ]
    _write_lines(meta / "episodes.jsonl", lines)
    _write_lines(meta / "tasks.jsonl", [{"task_index": n, "task": text} for n, text in enumerate(plan.tasks)])
    if parts:
        stats = [{"episode_index": n, "stats": as_json(_without_quantiles(part))} for n, part in enumerate(parts)]
        _write_lines(meta / "episodes_stats.jsonl", stats)


def _without_quantiles(part: Statistics) -> Statistics:
    """Version 2.1 knew none."""
    known = ("min", "max", "mean", "std", "count")
    return {name: {key: entry[key] for key in known} for name, entry in part.items()}


def _write_lines(file: Path, values: Sequence[Any]) -> None:
    file.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
