"""`loong new`: writes a package whose tests pass, from the plain text templates in `loong_core/scaffold`."""

from __future__ import annotations

import importlib.util
import keyword
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loong_core.errors import UserError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

Kind = Literal["model", "backend", "plugin"]

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
LONGEST_NAME = 40
SUFFIX = ".template"

app = typer.Typer(
    no_args_is_help=True,
    help="Write a package whose tests pass.",
)

Name = Annotated[str, typer.Argument(help="Its name in recipes: lower case letters, digits and single underscores.")]
Folder = Annotated[Path | None, typer.Option(help="Folder to write; it must not exist. Default: ./loong-<name>.")]


@app.command()
def model(name: Name, folder: Folder = None) -> None:
    """Write a model family that varies the LLaMA block.

    \b
    Example:
      loong new model acme
    """
    _report("model", name, folder)


@app.command()
def backend(name: Name, folder: Folder = None) -> None:
    """Write a hardware backend with a layer provider and an op of its own.

    \b
    Example:
      loong new backend acme_chip
    """
    _report("backend", name, folder)


@app.command()
def plugin(name: Name, folder: Folder = None) -> None:
    """Write a plugin with a data source and its options.

    \b
    Example:
      loong new plugin acme_files --folder ~/acme
    """
    _report("plugin", name, folder)


def _report(kind: Kind, name: str, folder: Path | None) -> None:
    written = create(kind, name, folder)
    typer.echo(f"Wrote {written}:")
    for path in sorted(path for path in written.rglob("*") if path.is_file()):
        typer.echo(f"  {path.relative_to(written)}")
    typer.echo(f'Next: pip install -e "{written}[testing]" && pytest {written}/tests')


def create(kind: Kind, name: str, folder: Path | None = None) -> Path:
    """Write the package and return its folder. Nothing is left behind when it cannot be written.

    Raises:
        UserError: the name is taken or malformed, or the folder exists already.
    """
    # Imported here: this module is read whenever the command line starts.
    import shutil
    import tempfile
    from importlib.resources import files

    problems = name_problems(name)
    target = (folder or Path(f"loong-{name.replace('_', '-')}")).expanduser()
    if target.exists():
        problems.append(f"{target}: exists already. Choose another folder with --folder, or remove it first.")
    if problems:
        raise UserError(problems)
    words = substitutions(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
            draft = Path(temporary) / target.name
            _write(files("loong_core") / "scaffold" / kind, draft, words)
            shutil.move(draft, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}. Choose a folder you own.") from error
    return target


def name_problems(name: str) -> list[str]:
    """Why `name` cannot name a plugin; empty when it can."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME or keyword.iskeyword(name):
        return [
            f"name = {name!r}: allowed are at most {LONGEST_NAME} lower case letters, digits and single underscores, a "
            "letter first, no Python keyword. For example: acme, acme_chip."
        ]
    from importlib.metadata import entry_points

    taken = {point.name for point in entry_points(group="loong")} | {"core"}
    if name in taken:
        return [
            f"name = {name!r}: a plugin of this name is installed (taken: {', '.join(sorted(taken))}). Choose another."
        ]
    if importlib.util.find_spec(f"loong_{name}") is not None:
        return [f"name = {name!r}: a module loong_{name} is installed already. Choose another name."]
    return []


def substitutions(name: str) -> dict[str, str]:
    """What the templates may say: `$name`, `$module`, `$dist`, `$title` (CamelCase), `$constant`, version ranges."""
    from loong_core.plugins import core_version

    major, minor = (int(part) for part in core_version().split(".")[:2])
    return {
        "name": name,
        "module": f"loong_{name}",
        "dist": f"loong-{name.replace('_', '-')}",
        "title": "".join(part.capitalize() for part in name.split("_")),
        "constant": name.upper(),
        "range": f">={major}.{minor},<{major}.{minor + 1}",
    }


def _write(source: Traversable, target: Path, words: dict[str, str]) -> None:
    """Copy a template folder; `__module__` in a folder's name and `$words` in a file are replaced."""
    from string import Template

    target.mkdir()
    for entry in source.iterdir():
        name = entry.name.replace("__module__", words["module"])
        if entry.is_dir():
            _write(entry, target / name, words)
        elif name.endswith(SUFFIX):
            text = Template(entry.read_text("utf-8")).substitute(words)
            (target / name.removesuffix(SUFFIX)).write_text(text, "utf-8")
