"""The hashes of a checkpoint's files: what was meant to be on the disk, to be compared with what is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from loong_ckpt import files
from loong_ckpt.hf_folder import read_json
from loong_core.errors import CheckpointError

MANIFEST = "manifest.json"
VERSION = 1
CHUNK_BYTES = 4_000_000
THREADS = 4


class FileHash(NamedTuple):
    """Size in bytes and SHA-256 in hexadecimal of one file."""

    size: int
    sha256: str


def write(folder: Path) -> None:
    """Hash every file below `folder`, flush each to the disk, and write `manifest.json` into it."""
    names = sorted(_names(folder))
    hashes = _in_threads(lambda name: hash_file(folder / name, flush=True), names)
    content = {
        "version": VERSION,
        "files": {
            name: {"size": found.size, "sha256": found.sha256} for name, found in zip(names, hashes, strict=True)
        },
    }
    files.write(folder / MANIFEST, json.dumps(content, indent=1))


def read(folder: Path) -> dict[str, FileHash]:
    """The files that belong to the checkpoint in `folder`. Raises `CheckpointError` if its manifest is unusable."""
    path = folder / MANIFEST
    content = read_json(path)
    try:
        if content["version"] != VERSION:
            raise CheckpointError(
                f"{path} has version {content['version']!r}; this loong-ckpt reads version {VERSION}. Use a newer one."
            )
        table = {str(name): FileHash(int(row["size"]), str(row["sha256"])) for name, row in content["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a manifest of loong ({error!r}). The checkpoint is damaged.") from error
    for name in table:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{path} names {name!r}, which lies outside the checkpoint. It is not from loong.")
    return table


def problems(folder: Path, hashed: bool = True, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What differs between the manifest and the files.

    `hashed=False` compares sizes only. `share=(part, parts)` looks at every `parts`-th file, so that several ranks
    divide the reading.
    """
    try:
        table = read(folder)
    except CheckpointError as error:
        return error.problems
    part, parts = share
    rows = sorted(table.items())[part::parts]
    return [text for text in _in_threads(lambda row: _difference(folder / row[0], row[1], hashed), rows) if text]


def extra_files(folder: Path) -> list[str]:
    """Files below `folder` that its manifest does not know; harmless, but not ours."""
    return sorted(set(_names(folder)) - read(folder).keys())


def _names(folder: Path) -> Iterable[str]:
    for root, _, names in os.walk(folder):
        for name in names:
            relative = Path(root, name).relative_to(folder).as_posix()
            if relative != MANIFEST:
                yield relative


def hash_file(path: Path, flush: bool = False) -> FileHash:
    """Size and SHA-256 of a file, which is flushed to the disk first if asked."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
        if flush:
            os.fsync(file.fileno())
    return FileHash(size, digest.hexdigest())


def _difference(path: Path, promised: FileHash, hashed: bool) -> str:
    try:
        size = path.stat().st_size
        if path.is_symlink() or not path.is_file():
            return f"{path}: a plain file is expected."
        if size != promised.size:
            return f"{path}: {size:,} bytes, {promised.size:,} were written."
        if hashed and hash_file(path) != promised:
            return f"{path}: its content changed since it was written (SHA-256 differs)."
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})."
    return ""


def _in_threads[Item, Result](function: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """`function` over `items` in order; hashing releases the interpreter's lock."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        return list(pool.map(function, items))
