"""The `loong` command line. `loong --help` imports no tensor library and no pydantic: commands import when called."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from loong_core.cli import output
from loong_core.errors import LoongError

if TYPE_CHECKING:
    from loong_core.registry import Registry

OVERRIDES = {"ignore_unknown_options": True}
"""Lets `--optim.lr=1` reach the recipe reader, which explains overrides better than a parser of options can."""


def build(registry: Registry) -> typer.Typer:
    """The command line with the commands of all plugins."""
    from loong_core.cli import doctor, generate, models, plan, plugins, recipes, train

    app = typer.Typer(
        name="loong",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Train large models from one recipe, on any machine. Example: loong train quickstart",
    )
    app.callback()(_version_option)
    app.command("train", context_settings=OVERRIDES)(train.train)
    app.command("plan", context_settings=OVERRIDES)(plan.plan)
    app.command("doctor")(doctor.doctor)
    app.command("plugins")(plugins.plugins)
    app.command("models")(models.models)
    app.command("recipes")(recipes.recipes)
    app.command("schema")(recipes.schema)
    app.command("generate", context_settings=generate.SETTINGS)(generate.generate)
    for name in ("data", "new"):
        if importlib.util.find_spec(f"loong_core.cli.{name}") is not None:
            app.add_typer(importlib.import_module(f"loong_core.cli.{name}").app, name=name)
    registry.add_commands(app)
    return app


def run(words: Sequence[str]) -> int:
    """Run the command line on `words` and return its exit code: 0, 1 (the run failed), 2 (the input is wrong)."""
    output.prepare_streams()
    from loong_core.registry import open_registry

    try:
        build(open_registry())(args=list(words), prog_name="loong")
    except SystemExit as leaving:
        code: Any = leaving.code
        return code if isinstance(code, int) else int(code is not None)
    except (LoongError, Exception) as failure:
        return output.error(failure)
    return 0


def main() -> None:
    """The `loong` script."""
    sys.exit(run(sys.argv[1:]))


def _show_version(wanted: bool) -> None:
    if wanted:
        from loong_core.plugins import core_version

        output.say(f"loong-core {core_version()}")
        raise typer.Exit


def _version_option(
    version: bool = typer.Option(False, "--version", help="Show the version.", callback=_show_version, is_eager=True),
) -> None:
    """Train large models from one recipe, on any machine. Example: loong train quickstart"""
