"""`loong data`: look at training data, check all of it, tokenise it ahead; with the code that training itself uses."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from loong_core.cli import output

app = typer.Typer(
    no_args_is_help=True,
    help="Look at training data, check it, tokenise it ahead. Example: loong data inspect data.jsonl",
)

_CODE = "loong_core.data.examine"

Target = Annotated[str, typer.Argument(help="A data file or folder, or a recipe (file or name).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides of a recipe, as data.seq_len=4096.")]
Source = Annotated[str | None, typer.Option(help="Data source of a data path. Default: told by the file names.")]
Task = Annotated[str | None, typer.Option(help="Task for a data path. Default: sft for conversations, else pretrain.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Tokenizer folder for a data path.")]
SeqLen = Annotated[int | None, typer.Option(min=1, help="Tokens per row for a data path.")]
ContactSheet = Annotated[Path | None, typer.Option(help="PNG to write: frames of every camera, for a look at them.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def inspect(
    target: Target,
    overrides: Overrides = None,
    source: Source = None,
    task: Task = None,
    tokenizer: Tokenizer = None,
    json: Json = False,
) -> None:
    """Show kind, rows and columns of data, token statistics, and what one example teaches.

    \b
    Examples:
      loong data inspect data.jsonl
      loong data inspect chats.jsonl --tokenizer models/Qwen3-0.6B
    """
    recipe, registry = _recipe(target, overrides, source=source, task=task, tokenizer=tokenizer)
    if (report := _call("report", recipe, registry, False, None)) is not None:
        _show_report(report, json)
        return
    _stop_on_problems(recipe, registry)
    found = _call("inspect", recipe, registry)
    if json:
        output.as_json(found)
        return
    kinds = ", ".join(f"{kind} ({count} files)" if count > 1 else kind for kind, count in found["kinds"].items())
    output.pairs(
        [
            ("source", found["source"]),
            ("kind", kinds or "none"),
            ("rows", f"{found['rows']:,}"),
            ("task", str(found["task"])),
            *_spread("tokens", found["tokens"]),
            *_spread("counted", found["counted"]),
            ("sampled", f"the first {found['sampled']:,} rows, {found['unusable']:,} of them unusable"),
            *([("unknown", found["unknown"])] if found["unknown"] else []),
        ]
    )
    shown = found["files"][:20]
    output.say()
    output.table(
        ("file", "kind", "rows", "broken", "columns"),
        [
            (item["file"], str(item["kind"]), f"{item['rows']:,}", str(item["bad"]), ", ".join(item["columns"]))
            for item in shown
        ],
    )
    if len(found["files"]) > len(shown):
        output.say(f"... and {len(found['files']) - len(shown):,} more files")
    if found["example"]:
        _show_example(found["example"])


@app.command()
def check(
    target: Target,
    overrides: Overrides = None,
    source: Source = None,
    task: Task = None,
    tokenizer: Tokenizer = None,
    seq_len: SeqLen = None,
    contact_sheet: ContactSheet = None,
    json: Json = False,
) -> None:
    """Read all data as training would; exit code 2 where a row, or a frame, cannot be used.

    \b
    Examples:
      loong data check recipe.yaml data.seq_len=8192
      loong data check chats.jsonl --tokenizer models/Qwen3-0.6B --seq-len 4096
      loong data check episodes --contact-sheet frames.png
    """
    recipe, registry = _recipe(target, overrides, source=source, task=task, tokenizer=tokenizer, seq_len=seq_len)
    if (report := _call("report", recipe, registry, True, contact_sheet)) is not None:
        _show_report(report, json)
        return
    with tempfile.TemporaryDirectory(prefix="loong-data-") as folder:
        found = _call("check", recipe, registry, Path(folder))
    if json:
        output.as_json(found)
    else:
        _show_check(found)
    if found["bad"]:
        raise typer.Exit(2)


@app.command()
def pack(
    target: Target,
    overrides: Overrides = None,
    source: Source = None,
    task: Task = None,
    tokenizer: Tokenizer = None,
    seq_len: SeqLen = None,
    json: Json = False,
) -> None:
    """Tokenise ahead, into the cache a run will use, and show how samples fill rows.

    \b
    Example:
      loong data pack recipe.yaml
    """
    recipe, registry = _recipe(target, overrides, source=source, task=task, tokenizer=tokenizer, seq_len=seq_len)
    with tempfile.TemporaryDirectory(prefix="loong-data-") as folder:
        found = _call("pack", recipe, registry, Path(folder))
    if json:
        output.as_json(found)
        return
    for note in found["notes"]:
        output.say(note)
    output.pairs([("cache", found["cache"]), *_packing(found["packing"])])


def _call(name: str, *arguments: Any) -> Any:
    """A function of `loong_core.data.examine`, which imports numpy and torch: only when a command runs."""
    from loong_core.registry import resolve

    return resolve(f"{_CODE}:{name}")(*arguments)


def _recipe(target: str, overrides: list[str] | None, **settings: Any) -> tuple[Any, Any]:
    from loong_core.registry import open_registry

    registry = open_registry()
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return _call("target", target, overrides or [], plain, registry), registry


def _stop_on_problems(recipe: Any, registry: Any) -> None:
    from loong_core.errors import DataError

    if problems := _call("problems", recipe, registry):
        raise DataError(problems)


def _show_report(report: dict[str, Any], json: bool) -> None:
    """What a source says of its own data; exit code 2 where it found a problem."""
    if json:
        output.as_json(report)
    else:
        output.pairs([(str(name), str(text)) for name, text in report.get("facts", ())])
        for found in report.get("tables", ()):
            output.say()
            output.table(found["columns"], [[str(cell) for cell in row] for row in found["rows"]])
        if report.get("problems"):
            output.say("\nproblems")
        for problem in report.get("problems", ()):
            output.say(f"  {problem}")
    if report.get("problems"):
        raise typer.Exit(2)


def _spread(name: str, values: dict[str, float] | None) -> list[tuple[str, str]]:
    if values is None:
        return []
    parts = [f"{values['total']:,} in all", f"mean {values['mean']:,.1f}"]
    parts += [f"{key} {values[key]:,}" for key in ("min", "median", "p95", "max")]
    return [(name, ", ".join(parts))]


def _packing(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name in ("packed", "unpacked"):
        chosen = "  <- data.pack" if (name == "packed") == found["pack"] else ""
        text = f"{found[name]['rows']:,} rows of {found['seq_len']:,}, {found[name]['efficiency']:.1%} of them tokens"
        rows.append((name, text + chosen))
    return [*rows, ("epoch", f"{found['steps_per_epoch']:,.1f} steps")]


def _show_check(found: dict[str, Any]) -> None:
    output.pairs(
        [
            ("rows", f"{found['rows']:,}, {found['bad']:,} of them bad"),
            ("samples", f"{found['samples']:,}"),
            *_spread("tokens", found["tokens"]),
            *_spread("counted", found["counted"]),
            *[(name, f"{count:,} rows") for name, count in found["counters"].items()],
            ("duplicates", f"{found['duplicates']['count']:,} samples"),
            *_packing(found["packing"]),
        ]
    )
    for first, second in found["duplicates"]["pairs"][:5]:
        output.say(f"  {second} repeats {first}")
    if found["bad"]:
        output.say("Bad rows:")
        for row in found["bad_rows"]:
            output.say(f"  {row}")
        if found["bad"] > len(found["bad_rows"]):
            output.say(f"  ... and {found['bad'] - len(found['bad_rows']):,} more")


def _show_example(example: dict[str, Any]) -> None:
    """The counted text green on a console that has colours, between angle quotes elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    coloured = console.is_terminal and not console.no_color
    output.say(f"\n{example['place']}: {'green' if coloured else 'between >> and <<'} counts in the loss")
    text = Text()
    for part, counted in example["text"]:
        if counted:
            text.append(part if coloured else f">>{part}<<", style="bold green")
        else:
            text.append(part, style="dim")
    console.print(text[:4000])
