"""What commands print: aligned plain text that survives pipes, narrow consoles and ASCII, or JSON."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from loong_core.errors import LoongError, UserError


def prepare_streams() -> None:
    """A character the console cannot show becomes a `?` instead of a crash."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def say(text: str = "") -> None:
    """A line on standard output."""
    print(text, flush=True)


def warn(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def as_json(value: Any) -> None:
    """A value for machines."""
    say(json.dumps(value, indent=2, default=_plain))


def pairs(rows: Iterable[tuple[str, str]]) -> None:
    """Lines of a name and a text, texts aligned."""
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        say(f"{name:<{width}}  {text}".rstrip())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Aligned columns under a header; the last column may be as long as it likes."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[index]) for row in [list(header), *rows]) for index in range(len(header))]
    for row in [list(header), ["-" * min(width, 40) for width in widths], *rows]:
        cells = [f"{cell:<{width}}" for cell, width in zip(row[:-1], widths[:-1], strict=True)]
        say("  ".join([*cells, row[-1]]).rstrip())


def error(failure: BaseException) -> int:
    """Print a failure to standard error, without a traceback unless LOONG_DEBUG is set. Returns the exit code."""
    if os.environ.get("LOONG_DEBUG", "") not in ("", "0"):
        traceback.print_exception(failure)
    if not isinstance(failure, LoongError):
        sys.stderr.write(
            f"error: loong itself failed: {type(failure).__name__}: {failure}\n"
            "This is a fault of loong or of a plugin. LOONG_DEBUG=1 shows where; report it with `loong doctor`.\n"
        )
        return 1
    problems = failure.problems if isinstance(failure, UserError) else [str(failure)]
    if len(problems) == 1:
        sys.stderr.write(f"error: {problems[0]}\n")
    else:
        listed = "".join(f"  {number}. {text}\n" for number, text in enumerate(problems, start=1))
        sys.stderr.write(f"error: {len(problems)} problems:\n{listed}")
    return failure.exit_code


def count(number: float) -> str:
    """A large number for people: 1.50 B."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:g}"


def memory(number: float) -> str:
    """Bytes in binary units."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:g} B"


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
