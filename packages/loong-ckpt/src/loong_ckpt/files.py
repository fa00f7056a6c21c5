"""Durable writing: a file or folder appears under its name complete, or not at all, also when the power fails.

Everything is written under a temporary name (it begins with a dot and ends with `.tmp` or `.old`), flushed to the
disk, and renamed. A name without these marks is therefore always complete.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from loong_core.errors import CheckpointError


def staging(final: Path) -> Path:
    """The temporary name under which the folder `final` is written."""
    return final.parent / f".{final.name}.tmp"


def retired(final: Path) -> Path:
    """The temporary name of the folder that `final` replaces."""
    return final.parent / f".{final.name}.old"


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and `folder` itself, innermost first."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def write(path: Path, content: bytes | str) -> None:
    """Put `content` at `path`; a reader sees the old content or the new."""
    temporary = staging(path)
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def fresh(folder: Path) -> None:
    """Make `folder` exist and be empty."""
    remove(folder)
    folder.mkdir(parents=True)


def remove(path: Path) -> None:
    """Remove a file, link or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a committed folder so that no moment leaves half of it under its own name."""
    temporary = staging(folder)
    remove(temporary)
    os.rename(folder, temporary)
    sync(folder.parent)
    remove(temporary)


def commit(temporary: Path, final: Path) -> None:
    """Give the complete, flushed folder `temporary` its name. What had the name before is removed afterwards.

    Between the two renames neither name exists; `recover` brings the old folder back if the process dies there.
    """
    old = retired(final)
    if final.exists():
        remove(old)
        os.rename(final, old)
    os.rename(temporary, final)
    sync(final.parent)
    remove(old)


def recover(final: Path) -> None:
    """Undo a commit of `final` that died between its two renames, and remove what it left behind."""
    old = retired(final)
    if old.exists():
        if final.exists():
            remove(old)
        else:
            os.rename(old, final)
            sync(final.parent)
    remove(staging(final))


@contextlib.contextmanager
def explained(what: str, path: Path) -> Iterator[None]:
    """Turn an operating-system error while writing at `path` into a `CheckpointError` with the remedy."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{what} at {path} failed: {error.strerror or error}{_where(error)}. What was saved before is intact. "
            f"{_remedy(error, path)}"
        ) from error


def _where(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""


def _remedy(error: OSError, path: Path) -> str:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = next((parent for parent in [path, *path.parents] if parent.is_dir()), Path("/"))
        free = shutil.disk_usage(place).free
        return f"{free / 1e9:,.2f} GB are free there: make room, lower checkpoint.keep, or set run.dir to another disk."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Make the folder writable for this user, or set run.dir to another one."
    return "Check the disk, or set run.dir to another one."
