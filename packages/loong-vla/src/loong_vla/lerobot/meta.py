"""The `meta` folder of a LeRobot dataset, read without trust: paths come from templates that the dataset itself brings,
so they may use known fields only and stay inside its folder.
"""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loong_core.errors import DataError
from loong_vla.lerobot.layout import Clip, Episode, Feature, Statistics

VERSIONS = ("v3.0", "v2.1", "v2.0")

PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError)
"""What pyarrow raises for files that are missing or damaged; errors of a column it lacks are `KeyError`."""


# ---------------------------------------------------------------------------------------------------- info.json
def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"`{file}` is not readable JSON: {error}.") from None
    if not isinstance(value, dict):
        raise DataError(f"`{file}` holds a JSON {type(value).__name__}, not an object.")
    return value


def read_info(root: Path) -> dict[str, Any]:
    """`meta/info.json`, with what every reader relies on checked.

    Raises:
        DataError: every problem of it.
    """
    file = root / "meta" / "info.json"
    if not file.is_file():
        raise DataError(f"`{root}` is not a LeRobot dataset: it has no file `meta/info.json`.")
    info = _json(file)
    if problems := [f"`{file}`: {text}" for text in _info_problems(info)]:
        raise DataError(problems)
    return info


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file.

    Raises:
        DataError: a line is not a JSON object.
    """
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"`{file}` cannot be read: {error}.") from None
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"`{file}`:{line}: broken JSON: {error}.") from None
        if not isinstance(value, dict):
            raise DataError(f"`{file}`:{line}: is a JSON {type(value).__name__}, not an object.")
        yield value


def _info_problems(info: Mapping[str, Any]) -> Iterator[str]:
    version = info.get("codebase_version")
    if version not in VERSIONS:
        remedy = "lerobot's conversion scripts bring older datasets to v3.0."
        yield f"`codebase_version` is {version!r}; {', '.join(VERSIONS)} can be read. {remedy}"
        return
    fps = info.get("fps")
    if not isinstance(fps, (int, float)) or isinstance(fps, bool) or not 0 < fps < float("inf"):
        yield f"`fps` is {fps!r}, not a positive number."
    features = info.get("features")
    if not isinstance(features, dict):
        yield "`features` is not an object of features."
        features = {}
    for name, entry in features.items():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            yield f"feature `{name}` has no `dtype`."
        elif not isinstance(shape, list) or not all(type(extent) is int and extent > 0 for extent in shape):
            yield f"feature `{name}`: `shape` is {shape!r}, not a list of positive integers."
    videos = any(isinstance(entry, dict) and entry.get("dtype") == "video" for entry in features.values())
    for key in ("data_path", *(["video_path"] if videos else [])):
        if (reason := _template_problem(info.get(key))) is not None:
            yield f"`{key}` is {info.get(key)!r}: {reason}."


_TEMPLATE_FIELDS = ("chunk_index", "file_index", "episode_chunk", "episode_index", "video_key")


def _template_problem(template: Any) -> str | None:
    """Why a path template is not used: anything but plain fields could name files outside the dataset."""
    if not isinstance(template, str):
        return "a path with fields in braces is expected"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        return f"it cannot be read ({error})"
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if name not in _TEMPLATE_FIELDS or conversion or (form and not (len(form) <= 3 and form.rstrip("d").isdigit())):
            return f"the field {{{name}}} is not known; known are {', '.join(_TEMPLATE_FIELDS)}"
    return None


def _inside(template: str, **fields: Any) -> str:
    """A path below the dataset's folder.

    Raises:
        DataError: it leads out of the folder.
    """
    try:
        path = PurePosixPath(template.format(**fields))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"meta/info.json: the path {template!r} cannot be filled in: {error!r}.") from None
    if path.is_absolute() or ".." in path.parts or "\\" in str(path):
        raise DataError(f"meta/info.json: the path `{path}` leads out of the dataset's folder.")
    return str(path)


# ------------------------------------------------------------------------------------------------- version 3.0
def _table(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Some columns of a parquet file, None for all.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        with pq.ParquetFile(file) as opened:
            return opened.read(columns=columns)
    except (*PARQUET_ERRORS, KeyError) as error:
        raise DataError(f"`{file}` is not a readable parquet file: {error}.") from None


def episodes_v3(root: Path, info: Mapping[str, Any], features: Mapping[str, Feature]) -> Iterator[Episode]:
    """Episodes of the tables below `meta/episodes`; their columns of statistics are not read.

    Raises:
        DataError: a table is missing or damaged.
    """
    files = sorted((root / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DataError(f"`{root / 'meta' / 'episodes'}` holds no parquet file: the list of episodes is missing.")
    videos = [name for name, feature in features.items() if feature.dtype == "video"]
    wanted = ["episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index"]
    wanted += ["data/chunk_index", "data/file_index"]
    wanted += [f"videos/{name}/{part}" for name in videos for part in ("chunk_index", "file_index", "from_timestamp")]
    for file in files:
        try:
            present = set(pq.read_schema(file).names)
        except PARQUET_ERRORS as error:
            raise DataError(f"`{file}` is not a readable parquet file: {error}.") from None
        if missing := [name for name in wanted if name not in present and name != "tasks"]:
            raise DataError(f"`{file}` lacks the columns {', '.join(missing)}.")
        table = _table(file, [name for name in wanted if name in present])
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
        for row in range(table.num_rows):
            values = {name: column[row] for name, column in columns.items()}
            for name, value in values.items():
                numeric = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
                if name != "tasks" and not (numeric and (name.endswith("timestamp") or value == int(value))):
                    raise DataError(f"`{file}`: row {row}: {name} is {value!r}, not a number from 0.")
            yield _episode_v3(info, videos, values)


def _episode_v3(info: Mapping[str, Any], videos: Sequence[str], row: Mapping[str, Any]) -> Episode:
    place = {"chunk_index": int(row["data/chunk_index"]), "file_index": int(row["data/file_index"])}
    clips = {}
    for name in videos:
        where = {part: int(row[f"videos/{name}/{part}"]) for part in ("chunk_index", "file_index")}
        file = _inside(info["video_path"], video_key=name, **where)
        clips[name] = Clip(file=file, start=float(row[f"videos/{name}/from_timestamp"]))
    return Episode(
        index=int(row["episode_index"]),
        length=int(row["length"]),
        tasks=tuple(row.get("tasks") or ()),
        from_index=int(row["dataset_from_index"]),
        to_index=int(row["dataset_to_index"]),
        data=_inside(info["data_path"], **place),
        clips=clips,
    )


def tasks_v3(root: Path) -> dict[int, str]:
    """`task_index` -> instruction, of `meta/tasks.parquet`: a pandas table whose index is the instruction.

    Raises:
        DataError: the table is damaged.
    """
    file = root / "meta" / "tasks.parquet"
    if not file.is_file():
        return {}
    table = _table(file)
    texts = [name for name in table.column_names if _is_text(table.schema.field(name).type)]
    if "task_index" not in table.column_names or not texts:
        found = ", ".join(table.column_names) or "none"
        raise DataError(f"`{file}` needs the column task_index and one of texts; its columns are {found}.")
    column = next((name for name in ("task", "__index_level_0__") if name in texts), texts[0])
    numbers, names = table.column("task_index").to_pylist(), table.column(column).to_pylist()
    return {number: _task(file, number, name) for number, name in zip(numbers, names, strict=True)}


def _task(file: Path, number: Any, text: Any) -> str:
    if type(number) is not int:
        raise DataError(f"`{file}`: the number of task {text!r} is {number!r}, not an integer.")
    if not isinstance(text, str):
        raise DataError(f'`{file}`: task {number} has no text. Give it its instruction; an empty one is "".')
    return text


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


# ------------------------------------------------------------------------------------------------- version 2.1
def episodes_v2(root: Path, info: Mapping[str, Any], features: Mapping[str, Feature]) -> Iterator[Episode]:
    """Episodes of `meta/episodes.jsonl`; each has files of its own.

    Raises:
        DataError: the list is missing or damaged.
    """
    file, begin = root / "meta" / "episodes.jsonl", 0
    videos = [name for name, feature in features.items() if feature.dtype == "video"]
    for row in sorted(_lines(file), key=lambda row: _integer(file, row, "episode_index")):
        index, length = _integer(file, row, "episode_index"), _integer(file, row, "length")
        place = {"episode_index": index, "episode_chunk": index // int(info.get("chunks_size") or 1000)}
        clips = {name: Clip(file=_inside(info["video_path"], video_key=name, **place)) for name in videos}
        yield Episode(
            index=index,
            length=length,
            tasks=tuple(str(task) for task in row.get("tasks") or ()),
            from_index=begin,
            to_index=begin + length,
            data=_inside(info["data_path"], **place),
            clips=clips,
        )
        begin += length


def tasks_v2(root: Path) -> dict[int, str]:
    """`task_index` -> instruction, of `meta/tasks.jsonl`.

    Raises:
        DataError: a line is damaged.
    """
    file = root / "meta" / "tasks.jsonl"
    if not file.is_file():
        return {}
    numbers = [(_integer(file, row, "task_index"), row.get("task")) for row in _lines(file)]
    return {number: _task(file, number, text) for number, text in numbers}


def _integer(file: Path, row: Mapping[str, Any], key: str) -> int:
    value = row.get(key)
    if type(value) is not int or value < 0:
        raise DataError(f"`{file}`: `{key}` is {value!r}, not a number from 0: {json.dumps(row)[:120]}")
    return value


# -------------------------------------------------------------------------------------------------- statistics
def read_statistics(root: Path) -> Statistics | None:
    """`meta/stats.json`, or the episodes of `meta/episodes_stats.jsonl` put together, or None.

    Raises:
        DataError: the file is damaged.
    """
    file = root / "meta" / "stats.json"
    if file.is_file():
        return _arrays(file, _json(file))
    file = root / "meta" / "episodes_stats.jsonl"
    if not file.is_file():
        return None
    from loong_vla.lerobot.statistics import aggregate

    rows = [_arrays(file, row.get("stats")) for row in _lines(file)]
    numbers = [row.get("episode_index") for row in _lines(file)]
    if problems := [f"`{file}`: {text}." for text in _unlike(rows, numbers)]:
        raise DataError(problems)
    return aggregate(rows) if rows else None


def _unlike(rows: Sequence[Statistics], numbers: Sequence[Any]) -> Iterator[str]:
    """Statistics of an episode that are no numbers, or of another size than most episodes have."""
    sizes: dict[tuple[str, str], Counter[tuple[int, ...]]] = {}
    for row in rows:
        for name, entry in row.items():
            for key, values in entry.items():
                sizes.setdefault((name, key), Counter())[values.shape] += 1
    usual = {place: counts.most_common(1)[0][0] for place, counts in sizes.items()}
    for row, number in zip(rows, numbers, strict=True):
        for name, entry in row.items():
            for key, values in entry.items():
                if values.shape != usual[name, key]:
                    shapes = f"has shape {list(values.shape)}, in most episodes {list(usual[name, key])}"
                    yield f"episode {number}: statistics of `{name}`: `{key}` {shapes}"
                elif not np.isfinite(values).all():
                    yield f"episode {number}: statistics of `{name}`: `{key}` is not finite"


def _arrays(file: Path, value: Any) -> Statistics:
    try:
        return {
            str(name): {str(key): np.atleast_1d(np.asarray(numbers, np.float64)) for key, numbers in entry.items()}
            for name, entry in value.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"`{file}` does not hold arrays of numbers by feature and statistic: {error}.") from None
