"""What a person sees: plain lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from loong_core.train import watch
from loong_core.train.watch import Watch, duration, figures, thousands


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2.0 / step,
        "grad_norm": 0.25,
        "lr": 1e-3,
        "tokens_per_second": 12_345.0,
        "step_seconds": 0.5,
        "data_seconds": 0.05,
        "memory_bytes": 3 * 2**29,
        "mfu": None,
        **changes,
    }


def piped(every: int = 1, done: int = 0, steps: int = 10) -> tuple[Watch, io.StringIO]:
    text = io.StringIO()
    return Watch("demo", done, steps, every, Console(file=text, highlight=False)), text


def test_a_line_holds_everything() -> None:
    watching, text = piped()
    watching.write(row(1))
    line = text.getvalue()
    for part in ("step  1/10", "loss 2.0000", "lr 1.00e-03", "grad 0.25", "tokens/s 12.3k", "memory 1.50 GiB",
                 "data wait 10%", "ETA"):  # fmt: skip
        assert part in line
    assert line.count("\n") == 1 and "\x1b" not in line


def test_what_is_no_text_is_told_in_samples() -> None:
    told = dict(figures(row(1, samples_per_second=13.64), None, "elements of action chunks"))
    assert told["samples/s"] == "13.6" and "tokens/s" not in told


def test_every_thins_out_but_keeps_first_last_and_evaluations() -> None:
    watching, text = piped(every=4, done=1)
    for step in range(2, 11):
        watching.write(row(step, **({"eval_loss": 3.25} if step == 7 else {})))
    watching.close()
    lines = text.getvalue().splitlines()
    assert [int(line.split("/")[0].split()[-1]) for line in lines] == [2, 4, 7, 8, 10]
    assert ["held-out 3.2500" in line for line in lines] == [False, False, True, False, False]


def test_eta_is_pace_times_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 102.0, 104.0])
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    watching, text = piped(steps=34)
    for step in (1, 2, 3, 4):
        watching.write(row(step))
    # The second step was slow (an evaluation, say): the median of 100, 2 and 2 forecasts 30 steps of 2 seconds.
    assert text.getvalue().splitlines()[-1].endswith("ETA 1:00")
    assert text.getvalue().splitlines()[0].endswith("ETA 0:16")


def test_numbers_that_are_none_or_not_numbers() -> None:
    watching, text = piped()
    watching.write(row(1, loss=float("nan"), grad_norm=float("inf"), step_seconds=0.0, memory_bytes=0, mfu=0.412))
    assert "loss nan" in text.getvalue() and "mfu 41.2%" in text.getvalue() and "memory" not in text.getvalue()


def test_a_long_line_is_not_broken_in_a_pipe() -> None:
    text = io.StringIO()
    watching = Watch("demo", 0, 10, 1, Console(file=text, highlight=False, width=20))
    watching.write(row(1, mfu=0.5, eval_loss=1.0))
    assert text.getvalue().count("\n") == 1


@pytest.mark.parametrize("width", [30, 80, 200])
def test_bar_on_a_terminal(width: int) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, highlight=False)
    watching = Watch("demo", 0, 3, 1, console)
    for step in (1, 2, 3):
        watching.write(row(step, **({"eval_loss": 2.5} if step == 2 else {})))
    watching.close()
    watching.close()
    shown = text.getvalue()
    assert "\x1b[" in shown and "held-out" in shown and "3/3" in shown
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown[shown.rindex("3/3") :])
    assert "1.50 GiB" in (joined := " ".join(last.split())) and "10%" in joined, "figures wrap, none is cut off"
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor comes back"


def test_markup_in_a_name_is_harmless() -> None:
    text = io.StringIO()
    watching = Watch("[bold]run[/]", 0, 3, 1, Console(file=text, force_terminal=True, width=120))
    watching.write(row(1))
    watching.close()
    assert "[bold]run[/]" in text.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03"), (float("inf"), "?")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (12_345, "12.3k"), (1.25e6, "1.2M"), (6.7e11, "670.0G")]
)
def test_thousands(value: float, text: str) -> None:
    assert thousands(value) == text


def test_figures_name_the_held_out_loss_only_when_there_is_one() -> None:
    assert [name for name, _ in figures(row(1), None)][:2] == ["loss", "lr"]
    assert figures(row(1), 1.5)[1] == ("held-out", "1.5000")
