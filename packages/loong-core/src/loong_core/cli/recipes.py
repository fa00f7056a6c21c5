"""`loong recipes` and `loong schema`: what is shipped, and what a recipe may contain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loong_core.cli import output


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List shipped recipes, or print one.

    \b
    Examples:
      loong recipes
      loong recipes quickstart > mine.yaml
    """
    from loong_core import recipe_load
    from loong_core.registry import open_registry

    registry = open_registry()
    if name is not None:
        if json:
            output.as_json(recipe_load.to_mapping(recipe_load.load(name, [], registry).recipe))
        else:
            output.say(recipe_load.find(name, registry).read_text(encoding="utf-8").rstrip("\n"))
        return
    rows = [(full, _first_comment(path), str(path)) for full, path in recipe_load.shipped(registry).items()]
    if json:
        output.as_json([{"name": full, "summary": text, "path": path} for full, text, path in rows])
        return
    output.table(("recipe", "what it does"), [(full, text) for full, text, _ in rows])
    if failures := registry.plugins.failures():
        output.say(failures)


def schema(
    out: Annotated[Path | None, typer.Option("--out", help="Write to this file instead of the console.")] = None,
) -> None:
    """Print the JSON schema of a recipe.

    Editors use it to check YAML while you type.

    \b
    Example:
      loong schema --out recipe.schema.json
    """
    import json

    from loong_core import recipe_load
    from loong_core.errors import UserError

    text = json.dumps(recipe_load.json_schema(), indent=2)
    if out is None:
        output.say(text)
        return
    try:
        out.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}. Give --out another path.") from error


def _first_comment(path: Path) -> str:
    """The first comment of a recipe is its summary."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
    return ""
