"""Figures of a robot row: rates, ratios to each of the peer's settings, and how far the losses lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from report import GIB, PEAK
from vla_rows import Row

PEER = "lerobot"
Side = dict[str, Any]


def side(ms: Sequence[float], losses: Sequence[float], memory: float, work: Mapping[str, Any]) -> Side:
    """Figures of one side; `ms` and `losses` of every step, rates from the median of the timed ones."""
    timed = list(ms[work["warmup"] :])
    median = statistics.median(timed)
    per_device = work["tflop_per_step"] * 1e12 / work["world"] / (median / 1e3)
    return {
        "median_ms": median,
        "least_ms": min(timed),
        "most_ms": max(timed),
        "samples_per_second": work["batch"] / (median / 1e3),
        "mfu_989": per_device / PEAK,
        "peak_memory_gib": memory / GIB,
        "ms": list(ms),
        "loss": list(losses),
    }


def compare(result: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """Ratios to each of the peer's settings and to what was measured before; how far losses lie apart, relative to
    the peer's."""
    ours = result.get("loong") or {}
    if "median_ms" not in ours:
        return {}
    found: dict[str, Any] = {}
    for name, theirs in result.get(PEER, {}).items():
        if "median_ms" not in theirs:
            continue
        apart = [abs(a - b) / abs(b) for a, b in zip(ours["loss"], theirs["loss"], strict=True)]
        found[name] = {
            "speedup": theirs["median_ms"] / ours["median_ms"],
            "loss_difference_first_step": apart[0],
            "loss_difference_largest": max(apart),
            "loss_difference_last_step": apart[-1],
            "one_run": ours["run"] == theirs["run"],
        }
    for name, speed in row.measured.items():
        found[name] = {"speedup": ours["samples_per_second"] / speed, "samples_per_second_measured_before": speed}
    return found


COLUMNS = ("row", "side", "ms", "samples/s", "ratio", "MFU", "GiB", "first step s", "data", "loss apart")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a short table, a line for each side; `ratio` is loong's speed over that side's."""
    lines = [COLUMNS]
    for found in results:
        both = found.get("comparison") or {}
        for name, measured_side in (("loong", found.get("loong")), *found.get(PEER, {}).items()):
            if measured_side:
                lines.append(_line(found["row"], name, measured_side, both.get(name) or {}))
        for name, ratio in both.items():
            if name not in found.get(PEER, {}):
                speed = f"{ratio['samples_per_second_measured_before']:.1f}"
                lines.append((found["row"], name, "-", speed, f"{ratio['speedup']:.2f}", *["-"] * 5))
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in lines)


def _line(row: str, name: str, found: Side, ratio: Mapping[str, Any]) -> tuple[str, ...]:
    if "error" in found:
        return (row, name, "out of memory" if "out of memory" in found["error"].lower() else "failed", *["-"] * 7)

    def number(source: Mapping[str, Any], key: str, form: str) -> str:
        return "-" if source.get(key) is None else form.format(source[key])

    return (
        row,
        name,
        number(found, "median_ms", "{:.1f}"),
        number(found, "samples_per_second", "{:.1f}"),
        number(ratio, "speedup", "{:.2f}"),
        number(found, "mfu_989", "{:.1%}"),
        number(found, "peak_memory_gib", "{:.1f}"),
        number(found, "first_step_seconds", "{:.0f}"),
        number(found, "data_share", "{:.1%}"),
        number(ratio, "loss_difference_largest", "{:.1e}"),
    )


def outcome(found: Side) -> str:
    """One side in words."""
    if "error" in found:
        return "failed: " + found["error"][-2000:]
    return f"{found['median_ms']:.1f} ms, {found['samples_per_second']:.1f} samples/s, loss {found['loss'][-1]:.4f}"
