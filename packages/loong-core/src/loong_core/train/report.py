"""report.html: one file with the course of a run, its recipe, plan and surroundings; opens anywhere, loads nothing.

Everything is read from the run folder's own public files, so a report can be written again at any time, also for a
run that failed. Every text of those files is escaped.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from loong_core.train import plot
from loong_core.train.metrics import Metrics, read
from loong_core.train.report_style import SCRIPT, STYLE
from loong_core.train.watch import duration, pace, thousands

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
FIGURES = "figures"
"""Folder of the run folder whose JSON files are drawn under "Evaluation", one chart a file."""
_COLORS = 3
_SMOOTH_FROM = 50
"""Steps from which a smoothed course is drawn over the raw one."""
_BYTES = {"parameters", "gradients", "master", "optimizer", "activations", "logits", "total"}


def write(folder: Path) -> Path:
    """Write `folder/report.html` from the run folder's files; those that are absent leave their section out.

    The file is replaced in one rename. Returns its path.
    """
    rows = read(folder / "metrics.jsonl")
    recipe_text = _text(folder / "recipe.yaml")
    target = folder / "report.html"
    page = _page(
        name=folder.resolve().name,
        rows=rows,
        recipe_text=recipe_text,
        recipe=_yaml(recipe_text),
        plan=_json(folder / "plan.json"),
        manifest=_json(folder / "manifest.json"),
        sample=_text(folder / "sample.txt"),
        figures=[chart for path in sorted((folder / FIGURES).glob("*.json")) for chart in _figure(_json(path))],
    )
    temporary = folder / f".report.html.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(page)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
    return target


# ------------------------------------------------------------------------------------------------ reading
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path) or "{}")
    except ValueError:
        return {"unreadable": path.name}
    return found if isinstance(found, dict) else {"content": found}


def _figure(found: dict[str, Any]) -> Iterator[plot.Chart]:
    """The chart that a file of `figures/` describes: `title`, `note`, and `series` with `name`, `x` and `y`, of which
    `y` may hold nulls. Nothing where it is something else."""
    try:
        series = tuple(
            plot.Series(
                name=str(line["name"]),
                x=[float(value) for value in line["x"]],
                y=[_finite(value) for value in line["y"]],
                color=number % _COLORS,
            )
            for number, line in enumerate(found["series"])
        )
    except (KeyError, TypeError, ValueError):
        return
    if series and all(len(line.x) == len(line.y) for line in series):
        yield plot.Chart(title=str(found.get("title", "")), note=str(found.get("note", "")), series=series)


def _yaml(text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


# --------------------------------------------------------------------------------------------------- page
def _page(
    *,
    name: str,
    rows: Sequence[Metrics],
    recipe_text: str,
    recipe: dict[str, Any],
    plan: dict[str, Any],
    manifest: dict[str, Any],
    sample: str,
    figures: Sequence[plot.Chart] = (),
) -> str:
    counts = str(manifest.get("counts") or "tokens")
    shown = charts(rows, counts)
    drawn = [*shown, *figures]
    data = json.dumps([plot.hover_data(chart) for chart in drawn]).replace("<", "\\u003c")
    body = [f"<h1>{escape(name)}</h1>", f'<p class="sub">{escape(_subtitle(recipe, plan, counts))}</p>']
    body.append(_tiles(rows, recipe, counts))
    if rows:
        body.append(f'<div class="charts">{"".join(_card(index, chart) for index, chart in enumerate(shown))}</div>')
    else:
        body.append("<p>No step of this run was recorded.</p>")
    if figures:
        cards = "".join(_card(len(shown) + index, chart) for index, chart in enumerate(figures))
        body.append(f'<h2>Evaluation</h2><div class="charts">{cards}</div>')
    if sample:
        body.append(f'<h2>A sample of what it writes</h2><div class="card wide"><pre>{escape(sample)}</pre></div>')
    body.append(_section("Plan", _table(plan), open_=True))
    body.append(_section("Recipe", f"<pre>{escape(recipe_text)}</pre>" if recipe_text else "", open_=False))
    body.append(_section("Environment", _table(manifest), open_=False))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} - loong</title><style>{STYLE}</style></head><body>{''.join(body)}"
        f'<script type="application/json" id="charts">{data}</script><script>{SCRIPT}</script></body></html>\n'
    )


def _subtitle(recipe: dict[str, Any], plan: dict[str, Any], counts: str) -> str:
    model, data, precision = recipe.get("model") or {}, recipe.get("data") or {}, recipe.get("precision")
    facts = [str(model["family"])] if model.get("family") else []
    if isinstance(plan.get("parameters"), int):
        facts.append(f"{thousands(plan['parameters'])} parameters")
    if data.get("global_batch") and counts != "tokens":
        facts.append(f"{data['global_batch']} samples per step")
    elif data.get("global_batch") and data.get("seq_len"):
        facts.append(f"{data['global_batch']} x {data['seq_len']} tokens per step")
    if precision:
        facts.append(str(precision))
    if isinstance(plan.get("world"), int):
        facts.append(f"{plan['world']} device{'s' if plan['world'] > 1 else ''}")
    return " \u00b7 ".join(facts)


def _tiles(rows: Sequence[Metrics], recipe: dict[str, Any], counts: str) -> str:
    tiles = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b></div>'
        for name, value in _summary(rows, recipe, counts)
    )
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _summary(rows: Sequence[Metrics], recipe: dict[str, Any], counts: str) -> Iterator[tuple[str, str]]:
    if not rows:
        return
    total = (recipe.get("run") or {}).get("steps")
    yield "steps", f"{rows[-1]['step']}" + (f" of {total}" if total else "")
    for name, key in (("last loss", "loss"), ("held-out loss", "eval_loss")):
        if values := _numbers(rows, key):
            yield name, f"{values[-1]:.4f}"
    # The first step also pays for warm-up.
    settled = rows[1:] or rows
    field, unit = pace(counts)
    if values := _numbers(settled, field):
        middle = statistics.median(values)
        yield f"median {unit}", thousands(middle) if counts == "tokens" else plot.number(middle)
    if values := _numbers(settled, "step_seconds"):
        yield "median step", f"{plot.number(statistics.median(values))} s"
    if values := _numbers(settled, "mfu"):
        yield "median MFU", f"{statistics.median(values):.1%}"
        if (again := _numbers(settled, "hfu")) and again != values:
            yield "median HFU", f"{statistics.median(again):.1%}"
    if values := _numbers(rows, "memory_bytes"):
        yield "peak memory", f"{max(values) / 2**30:.2f} GiB"
    total = "tokens" if counts == "tokens" else "samples"
    if values := _numbers(rows, total):
        yield f"{total} in all", thousands(sum(values))
    if values := _numbers(rows, "step_seconds"):
        yield "time in steps", duration(sum(values))


def _card(index: int, chart: plot.Chart) -> str:
    keyed = [series for series in chart.series if not series.faint]
    key = "".join(f'<i class="b{series.color}"></i>{escape(series.name)}' for series in keyed) if len(keyed) > 1 else ""
    note = f" <small>{escape(chart.note)}</small>" if chart.note else ""
    return (
        f'<div class="card" data-chart="{index}"><span class="key">{key}</span><h3>{escape(chart.title)}{note}</h3>'
        f'{plot.svg(chart)}<div class="tip"></div></div>'
    )


# ------------------------------------------------------------------------------------------------- charts
def charts(rows: Sequence[Metrics], counts: str = "tokens") -> list[plot.Chart]:
    """The charts of a run whose loss counts `counts`, in reading order."""
    field, unit = pace(counts)
    return [
        _loss(rows),
        plot.Chart(title="Throughput", note=unit, series=(_series(rows, field, unit),), zero=True),
        plot.Chart(
            title="Gradient norm", note="before clipping", series=(_series(rows, "grad_norm", "norm"),), zero=True
        ),
        plot.Chart(title="Learning rate", series=(_series(rows, "lr", "learning rate"),), zero=True),
        plot.Chart(
            title="Memory",
            note="fullest rank, GiB",
            unit=" GiB",
            series=(_series(rows, "memory_bytes", "memory", scale=2**-30),),
            zero=True,
        ),
        plot.Chart(
            title="Time per step",
            note="seconds",
            unit=" s",
            series=(
                _series(rows, "step_seconds", "step"),
                _series(rows, "data_seconds", "waiting for data", color=1),
            ),
            zero=True,
        ),
    ]


def _loss(rows: Sequence[Metrics]) -> plot.Chart:
    raw = _series(rows, "loss", "loss")
    series = [raw]
    if len(rows) >= _SMOOTH_FROM:
        faint = plot.Series(name="loss", x=raw.x, y=raw.y, faint=True)
        series = [faint, plot.Series(name="smoothed", x=raw.x, y=_smooth(raw.y))]
    evaluated = [row for row in rows if _finite(row.get("eval_loss")) is not None]
    if evaluated:
        held_out = _series(evaluated, "eval_loss", "held-out")
        series.append(plot.Series(name="held-out", x=held_out.x, y=held_out.y, color=1, marked=True))
    missing = sum(value is None for value in raw.y)
    note = f"{missing} step{'s' if missing > 1 else ''} without a number" if missing else ""
    return plot.Chart(title="Loss", note=note, series=tuple(series))


def _smooth(values: Sequence[float | None]) -> list[float | None]:
    """The mean over about a thirtieth of the run around each step: centred, so that it does not lag behind."""
    reach = max(2, len(values) // 60)
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    result: list[float | None] = []
    for index, value in enumerate(values):
        # As far to the left as to the right, so that the ends are not pulled to one side either.
        near = min(reach, index, len(values) - 1 - index)
        low, high = index - near, index + near + 1
        result.append(None if value is None else (sums[high] - sums[low]) / (counts[high] - counts[low]))
    return result


def _numbers(rows: Sequence[Metrics], key: str) -> list[float]:
    return [value for row in rows if (value := _finite(row.get(key))) is not None]


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _series(rows: Sequence[Metrics], key: str, name: str, color: int = 0, scale: float = 1.0) -> plot.Series:
    values = [_finite(row.get(key)) for row in rows]
    ys = [None if value is None else value * scale for value in values]
    return plot.Series(name=name, x=[row["step"] for row in rows], y=ys, color=color)


# ------------------------------------------------------------------------------------------------- tables
def _section(title: str, content: str, open_: bool) -> str:
    if not content:
        return ""
    state = " open" if open_ else ""
    return f'<details{state}><summary>{escape(title)}</summary><div class="card wide">{content}</div></details>'


def _table(content: dict[str, Any]) -> str:
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in _flat(content))
    return f"<table>{rows}</table>" if rows else ""


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        elif prefix == "memory." and key in _BYTES and isinstance(value, int):
            yield name, f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
        elif name == "stages" and isinstance(value, list):
            yield name, ", ".join(_range(layers) for layers in value)
        elif isinstance(value, list) and any(isinstance(item, str) and len(item) > 40 for item in value):
            yield name, "\n".join(_words(item) for item in value)
        else:
            yield name, _words(value)


def _range(layers: Any) -> str:
    """Consecutive layers as `0-6`."""
    return f"{layers[0]}-{layers[-1]}" if isinstance(layers, list) and layers else "none"


def _words(value: Any) -> str:
    if value is None or value == {} or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return plot.number(value)
    if isinstance(value, int):
        return f"{value:,}" if value >= 100_000 else str(value)
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    return str(value)
