"""Readers of text, jsonl and parquet: plain rows with the place each came from, and quick checks that read little."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict

from loong_core.data.rows import BadRow, kind_of, unknown_shape
from loong_core.errors import DataError
from loong_core.types import DataSource, Row

Paths = Path | str | Sequence[Path | str] | None
_PROBED_ROWS = 20
_PROBED_BYTES = 1 << 16


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TextOptions(_Options):
    suffixes: list[str] | None = None
    """File name endings to read from folders, as `[.txt, .md]`; null: every file that is not hidden."""


class TableOptions(_Options):
    rename: dict[str, str] = {}
    """Columns to rename, old name -> new name, before the shape of a row is looked at."""
    shape: Literal["auto", "any"] = "auto"
    """auto: rows must have a shape the text tasks know; any: leave that to the task."""


def _options[Options: _Options](kind: type[Options], given: Any) -> Options:
    return given if isinstance(given, kind) else kind.model_validate(dict(given or {}))


def _roots(paths: Paths) -> list[Path]:
    if paths is None:
        raise DataError("`data.path` is not set. Name a file, a folder, or a list of them.")
    return [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]


def _walk(paths: Paths, suffixes: Sequence[str] | None) -> list[Path]:
    """Named files as they are; files of named folders recursively, sorted, hidden ones and caches left out."""
    found: list[Path] = []
    for root in _roots(paths):
        if root.is_dir():
            for path in sorted(root.rglob("*")):
                inner = path.relative_to(root).parts
                hidden = any(part.startswith(".") or part == "__pycache__" for part in inner)
                if not hidden and path.is_file() and (suffixes is None or path.name.endswith(tuple(suffixes))):
                    found.append(path)
        elif root.exists():
            found.append(root)
        else:
            raise DataError(f"`data.path` names `{root}`, which does not exist.")
    return found


def _find(paths: Paths, suffixes: Sequence[str] | None) -> tuple[list[Path], list[str]]:
    """Files of every root, and one problem for each root that is missing, unreadable or empty."""
    try:
        roots = _roots(paths)
    except DataError as error:
        return [], error.problems
    files: list[Path] = []
    problems: list[str] = []
    for root in roots:
        try:
            inside = _walk(root, suffixes)
        except (DataError, OSError) as error:
            problems.append(str(error))
            continue
        if not inside:
            wanted = f" with a name ending in {', '.join(suffixes)}" if suffixes else ""
            problems.append(f"`data.path` names the folder `{root}`, which holds no file{wanted}.")
        elif all(path.stat().st_size == 0 for path in inside):
            what = "file" if root.is_file() else "folder of empty files"
            problems.append(f"`data.path` names `{root}`, which is an empty {what}.")
        files.extend(inside)
    return files, problems


# ------------------------------------------------------------------------------------------------------ text
def text_files(paths: Paths, options: Any = None) -> list[Path]:
    """Files the `text` source reads, in order."""
    return _walk(paths, _options(TextOptions, options).suffixes)


def read_text(paths: Paths, options: Any = None) -> Iterator[Row | BadRow]:
    """One row `{"text": ...}` per file. Blank files inside a folder are passed over: they hold no document."""
    named = {Path(root) for root in _roots(paths)}
    for path in text_files(paths, options):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            yield BadRow(f"is not UTF-8 text (byte {error.start})", str(path), 0)
            continue
        except OSError as error:
            yield BadRow(f"cannot be read: {error.strerror}", str(path), 0)
            continue
        if text.strip():
            yield Row({"text": text}, str(path), 0)
        elif path in named:
            yield BadRow("is empty", str(path), 0)


def check_text(paths: Paths, options: Any = None) -> list[str]:
    """Missing and empty files and folders, and files that do not begin as UTF-8 text."""
    files, problems = _find(paths, _options(TextOptions, options).suffixes)
    for path in files[:_PROBED_ROWS]:
        problems += _encoding(path)
    return problems


def _encoding(path: Path) -> list[str]:
    try:
        with _open(path) as file:
            head = file.read(_PROBED_BYTES)
    except (OSError, EOFError) as error:
        return [f"`{path}` cannot be read: {error}."]
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or len(head) < _PROBED_BYTES:
            return [f"`{path}` is not UTF-8 text (byte {error.start}). Convert it to UTF-8, or name other files."]
    return []


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


# ------------------------------------------------------------------------- the Python standard library as text
def library_files(paths: Paths = None, options: Any = None) -> list[Path]:
    """Python files of the running interpreter's standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
    return [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]


def read_library(paths: Paths = None, options: Any = None) -> Iterator[Row | BadRow]:
    """One row `{"text": ...}` per module of the standard library; `data.path` is not used."""
    for path in library_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield Row({"text": text}, str(path), 0)


def check_library(paths: Paths = None, options: Any = None) -> list[str]:
    """An interpreter without library sources, or a `data.path` that would be ignored."""
    if paths is not None:
        return ["`data.path` has no meaning for data.source: python_library. Leave it out, or use data.source: text."]
    if not library_files():
        return ["This Python has no library sources on disk. Name other text: data.source: text with data.path."]
    return []


# ----------------------------------------------------------------------------------------------------- jsonl
_JSONL_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".ndjson")


def jsonl_files(paths: Paths, options: Any = None) -> list[Path]:
    """Files the `jsonl` source reads, in order."""
    return _walk(paths, _JSONL_SUFFIXES)


def read_jsonl(paths: Paths, options: Any = None) -> Iterator[Row | BadRow]:
    """One row per line; blank lines are passed over. A file that is one JSON array gives a row per element."""
    settings = _options(TableOptions, options)
    for path in jsonl_files(paths, settings):
        try:
            yield from _renamed(_json_rows(path), settings)
        except (OSError, EOFError) as error:
            yield BadRow(f"cannot be read: {error}", str(path), 0)


def _json_rows(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        first = True
        for line, content in enumerate(file, start=1):
            stripped = (content.removeprefix(b"\xef\xbb\xbf") if line == 1 else content).strip()
            if not stripped:
                continue
            if first and stripped.startswith(b"["):
                yield from _array_rows(path)
                return
            first = False
            yield _json_row(stripped, str(path), line)


def _json_row(content: bytes, file: str, line: int) -> Row | BadRow:
    try:
        text = content.decode("utf-8")
        fields = json.loads(text)
    except UnicodeDecodeError as error:
        return BadRow(f"is not UTF-8 text (byte {error.start} of the line)", file, line)
    except json.JSONDecodeError as error:
        return BadRow(f"broken JSON: {error.msg} at column {error.colno}", file, line)
    except RecursionError:
        return BadRow("broken JSON: nested too deeply", file, line)
    return _row(fields, text, file, line)


def _row(fields: Any, text: str, file: str, line: int) -> Row | BadRow:
    """A record that `text` described."""
    if not isinstance(fields, dict):
        return BadRow(f"is a JSON {type(fields).__name__}, not an object", file, line)
    if _SURROGATE.search(text):
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = json.dumps(error.object[error.start])
            return BadRow(f"holds {half}, half of a character, which no tokenizer can read", file, line)
    return Row(fields, file, line)


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON writes half of a character; two of them may be a whole one."""


def _array_rows(path: Path) -> Iterator[Row | BadRow]:
    with _open(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield BadRow(f"is not UTF-8 text (byte {error.start})", str(path), 0)
        return
    decoder, at, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if at < len(text) and text[at] == "]":
            return
        begin = at
        try:
            fields, at = decoder.raw_decode(text, begin)
        except (json.JSONDecodeError, RecursionError) as error:
            yield BadRow(f"broken JSON array: {error}; the rest of the file cannot be read", str(path), line)
            return
        yield _row(fields, text[begin:at], str(path), line)


def _renamed(rows: Iterator[Row | BadRow], settings: TableOptions) -> Iterator[Row | BadRow]:
    names = settings.rename
    for row in rows:
        if names and isinstance(row, Row):
            yield row._replace(fields={names.get(key, key): value for key, value in row.fields.items()})
        else:
            yield row


def check_jsonl(paths: Paths, options: Any = None) -> list[str]:
    """Missing, empty and unreadable files, and files whose first rows have a shape nobody knows."""
    settings = _options(TableOptions, options)
    files, problems = _find(paths, _JSONL_SUFFIXES)
    for path in files:
        if path.stat().st_size == 0:
            continue
        try:
            head = list(itertools.islice(_renamed(_json_rows(path), settings), _PROBED_ROWS))
        except (OSError, EOFError) as error:
            problems.append(f"`{path}` cannot be read: {error}.")
            continue
        rows = [row for row in head if isinstance(row, Row)]
        if not head:
            problems.append(f"`{path}` holds no row.")
        elif not rows:
            problems.append(f"`{path}` is not JSON lines, one object a line: {head[0]}")
        elif settings.shape == "auto" and all(kind_of(row.fields) is None for row in rows):
            problems.append(f"`{path}`:{rows[0].line}: {unknown_shape(list(rows[0].fields))}.")
    return problems


# --------------------------------------------------------------------------------------------------- parquet
_PARQUET_SUFFIXES = (".parquet",)


def parquet_files(paths: Paths, options: Any = None) -> list[Path]:
    """Files the `parquet` source reads, in order."""
    return _walk(paths, _PARQUET_SUFFIXES)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("data.source: parquet needs the package pyarrow, which is not installed.") from error
    return pyarrow.parquet


def read_parquet(paths: Paths, options: Any = None) -> Iterator[Row | BadRow]:
    """One row per record; `line` is its number in the file. Columns as in jsonl; nulls count as absent."""
    settings, parquet = _options(TableOptions, options), _parquet()
    for path in parquet_files(paths, settings):
        yield from _renamed(_parquet_rows(parquet, path), settings)


def _parquet_rows(parquet: Any, path: Path) -> Iterator[Row | BadRow]:
    line = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    line += 1
                    present = {key: value for key, value in fields.items() if value is not None}
                    yield Row(present, str(path), line)
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        yield BadRow(f"broken parquet after row {line}: {error}", str(path), line + 1)


def check_parquet(paths: Paths, options: Any = None) -> list[str]:
    """Missing, empty and broken files, and schemas of a shape nobody knows."""
    settings = _options(TableOptions, options)
    files, problems = _find(paths, _PARQUET_SUFFIXES)
    try:
        parquet = _parquet()
    except DataError as error:
        return [*problems, *error.problems]
    for path in files:
        try:
            with parquet.ParquetFile(path) as file:
                rows, names = file.metadata.num_rows, list(file.schema_arrow.names)
        except (OSError, ValueError) as error:
            problems.append(f"`{path}` is not a readable parquet file: {error}.")
            continue
        names = [settings.rename.get(name, name) for name in names]
        if rows == 0:
            problems.append(f"`{path}` holds no row.")
        elif settings.shape == "auto" and kind_of(dict.fromkeys(names, True)) is None:
            problems.append(f"`{path}`: {unknown_shape(names)}.")
    return problems


def files(source: DataSource, paths: Paths, options: Mapping[str, Any]) -> list[Path]:
    """Files a source reads: by its own account (`DataSource.files`), else every file below `paths`."""
    if source.files is None:
        return _walk(paths, None)
    from loong_core.registry import resolve

    return list(resolve(source.files)(paths, options))


def _source(name: str, functions: str, options: str | None, summary: str) -> DataSource:
    here = "loong_core.data.sources"
    return DataSource(
        name=name,
        reader=f"{here}:read_{functions}",
        check=f"{here}:check_{functions}",
        files=f"{here}:{functions}_files",
        options=options and f"{here}:{options}",
        summary=summary,
    )


SOURCES: tuple[DataSource, ...] = (
    _source("text", "text", "TextOptions", "Text files, or folders of them: one document per file."),
    _source("jsonl", "jsonl", "TableOptions", "JSON lines: text, token ids, or conversations."),
    _source("parquet", "parquet", "TableOptions", "Parquet files with the columns of jsonl."),
    _source("python_library", "library", None, "Source and docstrings of the Python standard library."),
)
"""The core's own data sources."""
