"""Columns of a dataset's parquet files as numpy arrays, each file read once and kept: a million rows of 32 numbers are
122 MiB, little beside the videos. A row's place comes from the file's own `episode_index`, not from counting.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loong_core.errors import DataError
from loong_vla.lerobot.layout import INDEX_FEATURES, Dataset, Episode, Feature
from loong_vla.lerobot.meta import PARQUET_ERRORS

_KEPT_GROUPS = 16


class Columns:
    """The data files of a dataset, opened when first asked for. Safe in threads."""

    def __init__(self, dataset: Dataset) -> None:
        self._root, self._features = dataset.root, dataset.features
        self._files: dict[str, DataFile] = {}
        self._lock = Lock()

    def file(self, name: str) -> DataFile:
        """A data file by its path below the dataset's folder."""
        with self._lock:
            if name not in self._files:
                self._files[name] = DataFile(self._root / name, self._features)
            return self._files[name]

    def rows(self, episode: Episode, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        """See `Dataset.columns`."""
        file = self.file(episode.data)
        first = file.first_row(episode)
        if not 0 <= start <= stop <= episode.length:
            raise IndexError(f"rows {start} to {stop} of episode {episode.index}, which has {episode.length}")
        return {name: values[first + start : first + stop] for name, values in file.columns(names).items()}

    def images(self, episode: Episode, camera: str, rows: Sequence[int]) -> np.ndarray:
        """See `Dataset.images`."""
        file = self.file(episode.data)
        first = file.first_row(episode)
        return np.stack([file.image(camera, first + row) for row in rows])


class DataFile:
    """One parquet file: numbers by column, and where each episode's rows are."""

    def __init__(self, path: Path, features: Mapping[str, Feature]) -> None:
        self.path = path
        self._features = features
        self._lock = Lock()
        self._columns: dict[str, np.ndarray] = {}
        self._runs: dict[int, tuple[int, int]] | None = None
        self._groups: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()

    def first_row(self, episode: Episode) -> int:
        """The row an episode begins at.

        Raises:
            DataError: its rows are not there, not all there, or not together.
        """
        found = self.runs().get(episode.index)
        if found is None:
            raise DataError(f"`{self.path}` holds no row of episode {episode.index}, which should be there.")
        first, count = found
        if count != episode.length:
            listed = f"the list of episodes says {episode.length}"
            raise DataError(f"`{self.path}`: episode {episode.index} has {count} rows in one place; {listed}.")
        return first

    def runs(self) -> dict[int, tuple[int, int]]:
        """Episode -> its first row and the number of rows in its longest run."""
        if self._runs is None:
            index = self.columns(["episode_index"])["episode_index"]
            starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1)) if len(index) else np.zeros(0, np.int64)
            runs: dict[int, tuple[int, int]] = {}
            for first, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(index)], strict=True):
                number = int(index[first])
                if number not in runs or runs[number][1] < stop - first:
                    runs[number] = (first, stop - first)
            self._runs = runs
        return self._runs

    def columns(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Whole columns, [rows, *shape], read from the disk on first use.

        Raises:
            DataError: the file or a column is missing or damaged, or rows have another shape than the feature.
        """
        with self._lock:
            wanted = [name for name in names if name not in self._columns]
            if wanted:
                self._read(wanted)
            return {name: self._columns[name] for name in names}

    def _read(self, names: Sequence[str]) -> None:
        try:
            with pq.ParquetFile(self.path) as file:
                present = set(file.schema_arrow.names)
                if missing := [name for name in names if name not in present]:
                    raise DataError(f"`{self.path}` lacks the columns {', '.join(missing)}.")
                table = file.read(columns=list(names))
        except FileNotFoundError:
            raise DataError(f"`{self.path}` is missing.") from None
        except PARQUET_ERRORS as error:
            raise DataError(f"`{self.path}` is not a readable parquet file: {error}.") from None
        problems = []
        for name in names:
            try:
                values = _numbers(table.column(name), name, self._features.get(name))
            except _RowProblem as problem:
                problems.append(self._placed(name, problem, table))
                continue
            values.flags.writeable = False
            self._columns[name] = values
        if problems:
            raise DataError(problems)

    def _placed(self, name: str, problem: _RowProblem, table: pa.Table) -> str:
        where = f"`{self.path}`"
        index = self._columns.get("episode_index")
        if index is None and name != "episode_index":
            try:
                column = pq.read_table(self.path, columns=["episode_index"]).column("episode_index")
                index = _numbers(column, "episode_index", self._features.get("episode_index"))
            except (*PARQUET_ERRORS, KeyError, _RowProblem):
                index = None
        if problem.row is None:
            return f"{where}: feature `{name}`: {problem.reason}."
        if index is None:
            return f"{where}: row {problem.row}: feature `{name}`: {problem.reason}."
        number = int(index[problem.row])
        frame = problem.row - int(np.flatnonzero(index == number)[0])
        return f"{where}: episode {number}, frame {frame}: feature `{name}`: {problem.reason}."

    def image(self, camera: str, row: int) -> np.ndarray:
        """The image that stands in a row, uint8 [height, width, 3].

        Raises:
            DataError: there is none, or it cannot be decoded.
        """
        value = self._image_cell(camera, row)
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise DataError(f"`{self.path}`: row {row}: `{camera}` holds no image.")
        return decode_image(content, f"`{self.path}`: row {row}: `{camera}`")

    def _image_cell(self, camera: str, row: int) -> Any:
        with self._lock:
            try:
                with pq.ParquetFile(self.path) as file:
                    group, inside = _row_group(file, row)
                    column = self._groups.get((camera, group))
                    if column is None:
                        column = file.read_row_group(group, columns=[camera]).column(camera)
            except (*PARQUET_ERRORS, KeyError) as error:
                raise DataError(f"`{self.path}` is not a readable parquet file: {error}.") from None
            self._groups[camera, group] = column
            self._groups.move_to_end((camera, group))
            if len(self._groups) > _KEPT_GROUPS:
                self._groups.popitem(last=False)
            return column[inside].as_py()


def _row_group(file: pq.ParquetFile, row: int) -> tuple[int, int]:
    for group in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < count:
            return group, row
        row -= count
    raise ValueError(f"it has no row {row}")


def decode_image(content: bytes, where: str) -> np.ndarray:
    """A PNG, JPEG or other image file in memory, turned as its EXIF says, uint8 [height, width, 3].

    Raises:
        DataError: it is not one, or its size is that of a decompression bomb.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(content)) as opened:
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} is not a readable image: {error}.") from None


class _RowProblem(Exception):
    """A column, or one row of it (from 0 in the file), is not what the feature says."""

    def __init__(self, reason: str, row: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.row = reason, row


def _numbers(column: pa.ChunkedArray, name: str, feature: Feature | None) -> np.ndarray:
    """A column as an array [rows, *shape], or [rows] for the columns of `INDEX_FEATURES` and unknown ones.

    Lists may be of fixed or free length and nested, as the several writers of these files leave them.
    """
    shape = () if feature is None or name in INDEX_FEATURES else feature.shape
    rows = len(column)
    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # a column of no row
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    per_row = 1
    for extent in shape:
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        _refuse_nulls(values, per_row)
        if not _is_list(values.type):
            break
        lengths = _lengths(values)
        if len(wrong := np.flatnonzero(lengths != extent)):
            found = f"{lengths[wrong[0]]} numbers where info.json says {extent} (shape {list(shape)})"
            raise _RowProblem(f"has {found}", int(wrong[0]) // per_row)
        values = values.flatten()
        per_row *= extent
    _refuse_nulls(values, per_row)
    if _is_list(values.type):
        raise _RowProblem(f"holds lists where info.json says shape {list(shape) or [1]}")
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_boolean(values.type)):
        raise _RowProblem(f"holds {values.type}, not numbers")
    if shape and per_row != int(np.prod(shape)) and int(np.prod(shape)) != 1:
        raise _RowProblem(f"holds 1 number a row where info.json says shape {list(shape)}")
    array = values.to_numpy(zero_copy_only=False)
    if feature is not None and feature.numeric and array.dtype != np.dtype(feature.dtype):
        array = array.astype(feature.dtype)
    return array.reshape(rows, *shape)


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _lengths(values: Any) -> np.ndarray:
    if pa.types.is_fixed_size_list(values.type):
        return np.full(len(values), values.type.list_size)
    return np.diff(values.offsets.to_numpy())


def _refuse_nulls(values: pa.Array, per_row: int) -> None:
    if values.null_count:
        row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0]) // per_row
        raise _RowProblem("has no value", row)
