"""Logging: everything into one file per rank, and only what a person must see on the console of rank 0.

Python warnings and records of libraries go to the file, never through the progress bar.
"""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path
from typing import TextIO

logger = logging.getLogger("loong")
"""The logger of loong's own messages."""

_FILE_ONLY = "loong_file_only"
_seen: set[str] = set()
_lock = threading.Lock()
_handlers: list[logging.Handler] = []


class _Console(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is now: a progress bar replaces it while it draws."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.WARNING)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the console handler follows sys.stderr")

    def filter(self, record: logging.LogRecord) -> bool:
        """Only loong's own messages, and plugins' (`loong_*` loggers), that are not meant for the file alone."""
        ours = record.name == "loong" or record.name.startswith(("loong.", "loong_"))
        return ours and not getattr(record, _FILE_ONLY, False)


def start(folder: Path, rank: int, level: int = logging.INFO) -> Path:
    """Log this process into `folder/logs/rank-<rank>.log` (appending), and warnings of rank 0 to the console.

    Returns the file. A second call replaces what the first set up.
    """
    stop()
    path = folder / "logs" / f"rank-{rank:04d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    _attach(file)
    if rank == 0:
        console = _Console()
        console.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        _attach(console)
    logging.getLogger().setLevel(level)
    logging.captureWarnings(True)
    return path


def _attach(handler: logging.Handler) -> None:
    _handlers.append(handler)
    logging.getLogger().addHandler(handler)


def stop() -> None:
    """Undo `start`: close the file, give the root logger its handlers back, forget what was said once."""
    if _handlers:
        logging.captureWarnings(False)
    for handler in _handlers:
        logging.getLogger().removeHandler(handler)
        handler.close()
    _handlers.clear()
    with _lock:
        _seen.clear()


def once(message: str, level: int = logging.WARNING) -> bool:
    """Log `message` unless this process already did; returns whether it was logged."""
    with _lock:
        if message in _seen:
            return False
        _seen.add(message)
    logger.log(level, message)
    return True


def failure(error: BaseException) -> None:
    """Write an error with its traceback to the file; the console gets its own, shorter text."""
    logger.error("%s: %s", type(error).__name__, error, exc_info=error, extra={_FILE_ONLY: True})
