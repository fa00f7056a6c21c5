"""Tokenised data on disk: flat int32 arrays and a JSON index in a folder that appears complete or not at all.

A folder is named by a hash of everything its contents depend on, so it is never out of date; several processes may
build the same one at the same time, and the first to finish wins. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from loong_core.data.rows import BadRow, Encoder, RowError, Sample
from loong_core.errors import DataError
from loong_core.types import Row

VERSION = 1
"""Version of the folder's layout; part of every key."""

_INDEX = "index.json"
_SHOWN_BAD_ROWS = 20
_KEPT_BAD_ROWS = 1000
_BATCH_ROWS = 256
_BATCH_CHARACTERS = 4_000_000
_REPORT_SECONDS = 10.0

logger = logging.getLogger(__name__)


def key(parts: Mapping[str, Any]) -> str:
    """The folder name for data that depends on `parts` (JSON values and paths)."""
    text = json.dumps({"version": VERSION, **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_identity(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Resolved name, size and modification time (ns) of each file."""
    stats = [(path, path.stat()) for path in files]
    return [(str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


@dataclass(frozen=True)
class Cache:
    """One cache folder, open for reading. Columns are memory-mapped; opening reads the index only."""

    folder: Path
    index: Mapping[str, Any]

    def __len__(self) -> int:
        return int(self.index["samples"])

    @property
    def content(self) -> str:
        """Hash of the samples themselves: the same for the same data whatever its files are called."""
        return str(self.index["content"])

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Every column, all samples one after another, int32 [elements]."""
        return {name: self._map(f"{name}.bin", np.int32) for name in self.index["columns"]}

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 [samples]."""
        return self._map("lengths.bin", np.int32).astype(np.int64)

    @cached_property
    def counted(self) -> np.ndarray:
        """Tokens of each sample whose target counts, int64 [samples]."""
        return self._map("counted.bin", np.int32).astype(np.int64)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each sample begins in the columns, int64 [samples + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def origins(self) -> np.ndarray:
        """Source of each sample, int32 [samples, 3]: row number, index of the file in `index["files"]`, line."""
        return self._map("origins.bin", np.int32).reshape(-1, 3)

    def sample(self, number: int) -> dict[str, np.ndarray]:
        """The columns of one sample; views of the mapped files."""
        begin, end = int(self.offsets[number]), int(self.offsets[number + 1])
        return {name: column[begin:end] for name, column in self.columns.items()}

    def place(self, number: int) -> str:
        """`file:line` of the row a sample was made from."""
        _, file, line = self.origins[number].tolist()
        name = self.index["files"][file]
        return f"{name}:{line}" if line else name

    def bad_rows(self) -> list[str]:
        """The first of the rows that were left out, `file:line: reason`."""
        return list(self.index["bad_rows"])

    def _map(self, name: str, dtype: type) -> np.ndarray:
        return np.memmap(self.folder / name, dtype=dtype, mode="r")


def open_cache(folder: Path) -> Cache | None:
    """The cache in `folder`, or None where there is none or it is damaged (index unreadable, sizes differ)."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        intact = all((folder / name).stat().st_size == size for name, size in index["sizes"].items())
        return Cache(folder, index) if intact and index["version"] == VERSION else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def build(folder: Path, rows: Iterable[Row | BadRow], encoder: Encoder, *, skip_bad: bool, seq_len: int) -> Cache:
    """Encode `rows` into a new cache at `folder`, one batch of rows in memory at a time.

    Raises:
        DataError: rows that cannot be used (unless `skip_bad`), up to 20 of them named; or no row can be.
    """
    temporary = _make_temporary(folder)
    writer = _Writer(temporary, seq_len)
    reported = time.monotonic()
    try:
        for batch in _batches(rows):
            if time.monotonic() - reported > _REPORT_SECONDS:
                reported = time.monotonic()
                logger.info("tokenising: %s rows, %s tokens so far", f"{writer.rows:,}", f"{writer.elements:,}")
            writer.add(batch, _encode(encoder, [row for row in batch if isinstance(row, Row)]))
        writer.raise_problems(skip_bad)
        writer.finish(dict(getattr(encoder, "counters", {})))
        return _commit(temporary, folder)
    except OSError as error:
        raise DataError(
            f"The cache of tokenised data cannot be written to `{folder.parent}`: {error}. "
            "Free some space, or set data.cache to another folder."
        ) from error
    finally:
        writer.close()
        shutil.rmtree(temporary, ignore_errors=True)


def _make_temporary(folder: Path) -> Path:
    """An empty folder beside `folder`; what builders of the same data that were killed a day ago left is removed."""
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        for leftover in folder.parent.glob(f".{folder.name}.*"):
            if leftover.stat().st_mtime < time.time() - 86_400:
                shutil.rmtree(leftover, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"The cache folder `{folder.parent}` cannot be written: {error.strerror}. Set data.cache to one that can."
        ) from error
    return temporary


def _commit(temporary: Path, folder: Path) -> Cache:
    """Give the finished folder its name. Whoever came first wins; a damaged folder in the way is removed."""
    for _ in range(10):
        try:
            temporary.rename(folder)
            _sync(folder.parent)
        except OSError:
            if not folder.exists():
                raise
        if cache := open_cache(folder):
            return cache
        damaged = temporary.with_name(temporary.name + ".damaged")
        with contextlib.suppress(FileNotFoundError):  # another builder may have moved it already
            folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    raise DataError(f"The cache `{folder}` cannot be put in place. Remove it, or set data.cache to another folder.")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _batches(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    batch: list[Row | BadRow] = []
    characters = 0
    for row in rows:
        batch.append(row)
        if isinstance(row, Row):
            characters += sum(len(value) for value in row.fields.values() if isinstance(value, (str, list)))
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(encoder: Encoder, rows: Sequence[Row]) -> Iterator[Sequence[Sample] | RowError]:
    together = getattr(encoder, "batch", None)
    if together is not None:
        yield from together(rows)
        return
    for row in rows:
        try:
            yield encoder(row)
        except RowError as error:
            yield error


class _Writer:
    """Appends samples to the column files and collects what the index says of them."""

    def __init__(self, folder: Path, seq_len: int) -> None:
        self.folder = folder
        self.seq_len = seq_len
        self.columns: list[str] = []
        self.handles: dict[str, IO[bytes]] = {}
        self.hashes: dict[str, Any] = {}
        self.files: dict[str, int] = {}
        self.rows = self.samples = self.elements = self.counted = self.bad = 0
        self.bad_rows: list[str] = []

    def add(self, batch: Sequence[Row | BadRow], encoded: Iterator[Sequence[Sample] | RowError]) -> None:
        samples: list[Sample] = []
        origins: list[tuple[int, int, int]] = []
        for row in batch:
            number, self.rows = self.rows, self.rows + 1
            result = RowError(row.reason) if isinstance(row, BadRow) else next(encoded)
            if isinstance(result, RowError):
                self.bad += 1
                if len(self.bad_rows) < _KEPT_BAD_ROWS:
                    self.bad_rows.append(str(BadRow(str(result), row.file, row.line)))
                continue
            file = self.files.setdefault(row.file, len(self.files))
            samples += result
            origins += [(number, file, row.line)] * len(result)
        if samples:
            self._append(samples, origins)

    def _append(self, samples: Sequence[Sample], origins: Sequence[tuple[int, int, int]]) -> None:
        self.columns = self.columns or list(samples[0])
        lengths = np.array([len(sample["tokens"]) for sample in samples], dtype=np.int32)
        assert lengths.min() > 0 and lengths.max() <= self.seq_len, "an encoder made a sample of a wrong length"
        for name in self.columns:
            self._write(f"{name}.bin", np.concatenate([sample[name] for sample in samples]))
            assert [len(sample[name]) for sample in samples] == lengths.tolist(), f"column {name} has another length"
        counted = lengths
        if "targets" in self.columns:
            counted = np.array([np.count_nonzero(sample["targets"] != -100) for sample in samples], dtype=np.int32)
        self._write("lengths.bin", lengths)
        self._write("counted.bin", counted)
        self._write("origins.bin", np.array(origins))
        self.samples += len(samples)
        self.elements += int(lengths.sum())
        self.counted += int(counted.sum())

    def _write(self, name: str, values: np.ndarray) -> None:
        if name not in self.handles:
            self.handles[name] = (self.folder / name).open("wb", buffering=1 << 20)
            self.hashes[name] = hashlib.sha256()
        data = values.astype(np.int32).tobytes()
        self.handles[name].write(data)
        self.hashes[name].update(data)

    def raise_problems(self, skip_bad: bool) -> None:
        shown = [f"  {row}" for row in self.bad_rows[:_SHOWN_BAD_ROWS]]
        if self.bad and not skip_bad:
            lines = [f"{self.bad:,} of {self.rows:,} rows cannot be used:", *shown]
            if self.bad > len(shown):
                lines.append(f"  ... and {self.bad - len(shown):,} more.")
            raise DataError("\n".join([*lines, "Correct them, or leave them out with data.bad_rows: skip."]))
        if not self.samples:
            what = f"none of the {self.rows:,} rows can be used:" if self.rows else "it holds no row."
            raise DataError("\n".join([f"There is nothing to train on in the data: {what}", *shown]))

    def finish(self, counters: Mapping[str, int]) -> None:
        for handle in self.handles.values():
            handle.flush()
            os.fsync(handle.fileno())
        content = hashlib.sha256()
        for name in sorted(set(self.handles) - {"origins.bin"}):
            content.update(name.encode() + self.hashes[name].digest())
        index = {
            "version": VERSION,
            "samples": self.samples,
            "tokens": self.elements,
            "counted": self.counted,
            "rows": self.rows,
            "bad": self.bad,
            "bad_rows": self.bad_rows,
            "counters": counters,
            "columns": self.columns,
            "files": list(self.files),
            "content": content.hexdigest(),
            "sizes": {name: (self.folder / name).stat().st_size for name in self.handles},
        }
        with (self.folder / _INDEX).open("w", encoding="utf-8") as file:
            json.dump(index, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync(self.folder)

    def close(self) -> None:
        for handle in self.handles.values():
            handle.close()
