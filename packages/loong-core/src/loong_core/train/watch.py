"""The console view of a run: a live bar on a terminal, one plain line per report in a pipe. Rank 0 only."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from typing import TYPE_CHECKING

from rich.console import Console
from rich.console import Group as Lines
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from loong_core.train.metrics import Metrics

_WINDOW = 50
"""Steps whose median pace makes the forecast."""


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` under an hour; `?` when unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def thousands(value: float) -> str:
    """A number in three or four characters: `950`, `12.3k`, `1.2M`."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def pace(counts: str) -> tuple[str, str]:
    """The field of a row that says how fast a run is, and its unit: text is counted in tokens, the rest in samples."""
    return ("tokens_per_second", "tokens/s") if counts == "tokens" else ("samples_per_second", "samples/s")


def figures(row: Metrics, held_out: float | None, counts: str = "tokens") -> list[tuple[str, str]]:
    """The numbers of a step as a person reads them: (name, value), most interesting first."""
    field, unit = pace(counts)
    result = [("loss", f"{row['loss']:.4f}")]
    if held_out is not None:
        result.append(("held-out", f"{held_out:.4f}"))
    seconds = row["step_seconds"]
    waiting = row["data_seconds"] / seconds if seconds > 0 else 0.0
    result += [
        ("lr", f"{row['lr']:.2e}"),
        ("grad", f"{row['grad_norm']:.2f}"),
        (unit, thousands(row[field]) if row[field] >= 100 or counts == "tokens" else f"{row[field]:.1f}"),
    ]
    if row.get("mfu") is not None:
        result.append(("mfu", f"{row['mfu']:.1%}"))
    if row["memory_bytes"]:
        result.append(("memory", f"{row['memory_bytes'] / 2**30:.2f} GiB"))
    result.append(("data wait", f"{waiting:.0%}"))
    return result


class Watch:
    """A sink that shows progress to a person.

    `every` thins out the plain lines; the bar shows every step. The first step, the last, and steps with a held-out
    loss always get their line. `counts` is what the task's loss counts.
    """

    def __init__(
        self,
        name: str,
        done: int,
        steps: int,
        every: int = 1,
        console: Console | None = None,
        counts: str = "tokens",
    ) -> None:
        self._counts = counts
        self._console = console or Console(highlight=False)
        self._name, self._first, self._steps, self._every = name, done + 1, steps, every
        self._pace: deque[float] = deque(maxlen=_WINDOW)
        self._last_time: float | None = None
        self._held_out: float | None = None
        self._live: Live | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.percentage:>3.0f} %"),
                TextColumn("ETA {task.fields[eta]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._progress.add_task(name, total=steps, completed=done, eta="?")
            self._live = Live(self._progress, console=self._console, refresh_per_second=4)
            self._live.start()

    def write(self, row: Metrics) -> None:
        """Show a step. The forecast counts everything between steps, evaluation and saving too."""
        now = time.monotonic()
        if self._last_time is not None:
            self._pace.append(now - self._last_time)
        self._last_time = now
        evaluated = row.get("eval_loss") is not None
        if evaluated:
            self._held_out = row["eval_loss"]
        if self._live is not None:
            self._draw(row, evaluated)
        elif evaluated or row["step"] % self._every == 0 or row["step"] in (self._first, self._steps):
            self._line(row, evaluated)

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        console = self._console if self._live is None else self._live.console
        console.print(text, markup=False, soft_wrap=True)
        console.file.flush()

    def _eta(self, row: Metrics) -> str:
        pace = statistics.median(self._pace) if self._pace else row["step_seconds"]
        return duration(pace * (self._steps - row["step"]))

    def _line(self, row: Metrics, evaluated: bool) -> None:
        parts = [f"{name} {value}" for name, value in self._figures(row, evaluated)]
        width = len(str(self._steps))
        text = f"step {row['step']:>{width}}/{self._steps}  {'  '.join(parts)}  ETA {self._eta(row)}"
        self._console.print(text, markup=False, soft_wrap=True)
        self._console.file.flush()

    def _figures(self, row: Metrics, held_out: bool) -> list[tuple[str, str]]:
        return figures(row, self._held_out if held_out else None, self._counts)

    def _draw(self, row: Metrics, evaluated: bool) -> None:
        assert self._live is not None
        self._progress.update(self._task, completed=row["step"], eta=self._eta(row))
        text = Text(overflow="fold")
        for name, value in self._figures(row, True):
            text.append(f"{name} ", style="dim").append(value, style="bold").append("   ")
        self._live.update(Lines(self._progress, text))
        if evaluated:
            self._live.console.print(f"step {row['step']}  held-out loss {row['eval_loss']:.4f}", markup=False)

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None
