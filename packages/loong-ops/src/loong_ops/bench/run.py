"""Measures the rows of the bench modules, in a process of its own: the command line imports no tensor library.

Settings come as JSON on standard input (see `Settings`); the table goes to standard output line by line, the results to
a file that is complete after every row. A row that cannot run is a line with its reason, and the others go on.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from loong_core import run_folder
from loong_core.cli import output
from loong_core.errors import LoongError, NotFound
from loong_core.op_declarations import DECLARATIONS
from loong_core.suggest import nearest
from loong_ops import bench
from loong_ops.bench.row import Missing, Row

if TYPE_CHECKING:
    from loong_ops.bench.card import Card, Ceilings

LOONG = ("loong-core", "loong-ops")
LIBRARIES = (*LOONG, "torch", "triton", "transformer-engine", "flash-attn-4", "quack-kernels", "liger-kernel")
HEADER = ("ms", "TFLOP/s", "TB/s", "limit", "memory")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure: ops (none: all), only shapes that contain a text, variants too; and where results go."""

    ops: tuple[str, ...] = ()
    shape: str = ""
    everything: bool = False
    json: Path | None = None


class Result(NamedTuple):
    """A measured row. `seconds` None: it was not measured, for `reason`; `missing` says that a library is not there."""

    row: Row
    seconds: float | None = None
    memory: int = 0
    reason: str = ""
    missing: bool = False

    def record(self, limits: Ceilings) -> dict[str, Any]:
        """Plain values for the results file."""
        row, found = self.row, {}
        if self.seconds:
            found = {
                "ms": self.seconds * 1e3,
                "tflops": row.flops / self.seconds / 1e12,
                "tb_per_s": row.bytes / self.seconds / 1e12,
                "share_of_limit": limits.floor(row.flops, row.bytes) / self.seconds,
                "memory_bytes": self.memory,
            }
        names = ("op", "shape", "name", "direction", "flops", "bytes", "headline")
        status = "measured" if self.seconds else "missing" if self.missing else "failed"
        return {**{name: getattr(row, name) for name in names}, "status": status, "reason": self.reason, **found}


# ------------------------------------------------------------------------------------------------ what there is
def discover(package: ModuleType = bench) -> tuple[list[Row], list[str]]:
    """The rows of every module that has a function `rows`, and why one cannot be asked."""
    rows: list[Row] = []
    problems = []
    for module in pkgutil.iter_modules(package.__path__):
        try:
            listed = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "rows", None)
            rows += listed() if listed is not None else []
        except Exception as error:
            problems.append(f"bench module {module.name}: {_words(error)}")
    return rows, problems


def select(rows: Sequence[Row], settings: Settings) -> list[Row]:
    """The rows asked for, those of an op and shape together.

    Raises `NotFound` for an op without rows, and where no row is left.
    """
    known = list(dict.fromkeys(row.op for row in rows))
    for op in settings.ops:
        if op not in known:
            declared = "is declared but has no benchmark" if op in DECLARATIONS else "is no op with a benchmark"
            near = nearest(op, known)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise NotFound(f"{op!r} {declared}.{hint} Allowed: {', '.join(sorted(known)) or 'none'}.")
    chosen = [
        row
        for row in rows
        if (not settings.ops or row.op in settings.ops)
        and settings.shape in row.shape
        and (row.headline or settings.everything)
    ]
    if not chosen:
        shapes = sorted({row.shape for row in rows if not settings.ops or row.op in settings.ops})
        raise NotFound(f"no row has a shape with {settings.shape!r} in it. Shapes: {'; '.join(shapes) or 'none'}.")
    order = {key: place for place, key in enumerate(dict.fromkeys(map(_group, chosen)))}
    return sorted(chosen, key=lambda row: order[_group(row)])


def _group(row: Row) -> tuple[str, str, str]:
    return row.op, row.shape, row.direction


# ------------------------------------------------------------------------------------------------- measurement
def measure(row: Row, card: Card) -> Result:
    """Time one row. What goes wrong becomes the result's reason."""
    from torch import OutOfMemoryError

    thunk = None
    try:
        thunk = row.make()
        card.added(thunk)  # compiles, and fills caches that stay
        memory = card.added(thunk)
        return Result(row, card.seconds(thunk), memory)
    except (Missing, ImportError) as error:
        return Result(row, reason=f"missing: {error}", missing=True)
    except OutOfMemoryError:
        return Result(row, reason="out of memory")
    except Exception as error:
        return Result(row, reason=_words(error))
    finally:
        del thunk
        card.tidy()


def _words(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])[:300]


def measure_all(rows: Sequence[Row], card: Card) -> Iterator[Result]:
    """Time rows one after the other. An error that ends the device's work ends the list as well."""
    lost = ""
    for row in rows:
        if lost:
            yield Result(row, reason=f"not tried: {lost}")
            continue
        result = measure(row, card)
        if result.seconds is None and not result.missing and not card.works():
            lost = f"the device stopped working in {row.name}, {row.shape}, {row.direction}"
        yield result


# ------------------------------------------------------------------------------------------------------ output
class Table:
    """Prints results as they come, under a heading per op, shape and direction."""

    def __init__(self, rows: Sequence[Row], limits: Ceilings) -> None:
        self._limits = limits
        self._width = max(len(row.name) for row in rows)
        self._last: tuple[str, str, str] | None = None

    def show(self, result: Result) -> None:
        """One line."""
        if _group(result.row) != self._last:
            self._last = _group(result.row)
            output.say()
            output.say(f"{result.row.op}, {result.row.direction}: {result.row.shape}")
            output.say(self._line("", *HEADER))
        output.say(self._line(result.row.name, *self._cells(result)))

    def _line(self, name: str, *cells: str) -> str:
        # A reason is as long as it likes.
        shown = cells if len(cells) == 1 else [f"{cell:>9}" for cell in cells]
        return "  ".join([f"  {name:<{self._width}}", *shown]).rstrip()

    def _cells(self, result: Result) -> list[str]:
        if result.seconds is None:
            return [result.reason]
        row, seconds = result.row, result.seconds
        share = self._limits.floor(row.flops, row.bytes) / seconds
        return [
            f"{seconds * 1e3:.3f}",
            f"{row.flops / seconds / 1e12:.0f}" if row.flops else "",
            f"{row.bytes / seconds / 1e12:.2f}" if row.bytes else "",
            f"{share:.0%}" if share else "",
            output.memory(result.memory),
        ]


def record(facts: Mapping[str, Any], measured: Ceilings, limits: Ceilings, skipped: Sequence[str]) -> dict[str, Any]:
    """The results file without its rows."""
    versions = {name: run_folder.library_version(name) or None for name in LIBRARIES}
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **facts,
        "versions": versions,
        "git": run_folder.git_revision(Path(__file__).parent) or run_folder.git_revision(Path.cwd()),
        "measured": {"matmul_tflops": measured.flops / 1e12, "copy_tb_per_s": measured.bytes / 1e12},
        "limits": {"tflops": limits.flops / 1e12, "tb_per_s": limits.bytes / 1e12},
        "skipped": list(skipped),
        "rows": [],
    }


def run(settings: Settings, card: Card) -> int:
    """Measure and show. Exit code 1 where a headline row failed, otherwise 0; a missing library is no failure.

    Raises `NotFound` for ops and shapes that do not exist.
    """
    found, skipped = discover()
    rows = select(found, settings)
    for problem in skipped:
        output.say(f"left out: {problem}")
    facts = card.facts()
    measured = card.ceilings()
    limits = card.limits(measured)
    output.say(f"{facts['card']}, driver {facts['driver']}, CUDA {facts['cuda']}")
    output.say(f"this card now: {_speed(measured)} (bf16 product of 8192^3, copy of 2 GiB)")
    output.say(f"limit = time at {_speed(limits)}, as a share of the time taken")
    results = record(facts, measured, limits, skipped)
    table, failed = Table(rows, limits), False
    for result in measure_all(rows, card):
        table.show(result)
        failed |= result.seconds is None and not result.missing and result.row.headline
        results["rows"].append(result.record(limits))
        if settings.json is not None:
            run_folder.write(settings.json, json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


def _speed(ceilings: Ceilings) -> str:
    return f"{ceilings.flops / 1e12:.0f} TFLOP/s and {ceilings.bytes / 1e12:.2f} TB/s"


def main() -> int:
    """Settings as JSON on standard input. Exit code 0, 1 (a row failed) or 2 (the input is wrong)."""
    from loong_core.backends import cuda
    from loong_ops.bench.card import Card

    words = json.load(sys.stdin)
    target = Path(words["json"]) if words["json"] else None
    settings = Settings(ops=tuple(words["ops"]), shape=words["shape"], everything=words["everything"], json=target)
    try:
        cuda.setup(0)
        return run(settings, Card())
    except LoongError as error:
        return output.error(error)


if __name__ == "__main__":
    sys.exit(main())
