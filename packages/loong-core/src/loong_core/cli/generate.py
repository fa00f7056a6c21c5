"""`loong generate`: one command for every kind of model; the task of the model says what follows the folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from loong_core.registry import Registry
    from loong_core.types import Task

SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}
"""Everything reaches the task's own command, `--help` included."""
TEXT = "pretrain"
"""The task whose command takes folders that no installed family claims."""


def generate(
    words: Annotated[
        list[str] | None, typer.Argument(help="A run folder or an exported model, then what its task takes.")
    ] = None,
) -> None:
    """Let a model answer: text continues a prompt, a policy acts on an observation.

    \b
    Examples:
      loong generate runs/demo "def fibonacci(n):" --max-new-tokens 60
      loong generate runs/demo --help
    """
    from loong_core.cli import output
    from loong_core.errors import UserError
    from loong_core.registry import open_registry

    registry, given = open_registry(), list(words or ())
    folder = _folder(given)
    if folder is None:
        output.say(f"{generate.__doc__}".split("\n\n")[0])
        for names, command in variants(registry).items():
            output.say(f"\nModels trained with {names}:\n")
            command.main(args=["--help"], prog_name="loong generate", standalone_mode=False)
        if given and given != ["--help"]:
            raise UserError("loong generate: name the folder of a model or a run.")
        return
    task = task_of(folder, registry)
    code = _command(task, registry).main(args=given, prog_name="loong generate", standalone_mode=False)
    if code:
        raise typer.Exit(code)


def task_of(folder: Path, registry: Registry) -> Task:
    """The task of the model in `folder`: a run's own, that of the family which claims its config.json, or text.

    Raises UserError where there is no such folder, NotFound where no task could answer.
    """
    from loong_core.errors import LoongError, UserError
    from loong_core.recipe_load import load_file
    from loong_core.validate_model import read_config

    tasks = registry.table("tasks")
    if TEXT not in tasks and not folder.is_dir():
        raise UserError(f"`{folder}` is no folder. Name that of a run, of a checkpoint, or of an exported model.")
    name: str | None = None
    try:
        if (folder / "recipe.yaml").is_file():
            name = load_file(folder / "recipe.yaml").task.name
        elif (folder / "config.json").is_file():
            name = registry.family_for(read_config(folder / "config.json")).task
    except LoongError:
        name = None
    if name is None or name not in tasks or tasks[name].generate is None:
        name = TEXT
    found: Task = registry.get("tasks", name)
    return found


def variants(registry: Registry) -> dict[str, Any]:
    """Names of tasks, separated by commas -> the click command they share."""
    shared: dict[str, list[Task]] = {}
    for task in registry.table("tasks").values():
        if task.generate is not None:
            shared.setdefault(task.generate, []).append(task)
    return {", ".join(task.name for task in tasks): _command(tasks[0], registry) for tasks in shared.values()}


def _folder(words: list[str]) -> Path | None:
    """The word that names the model: the first one that exists, else the first that is no option."""
    plain = [word for word in words if not word.startswith("-")]
    return next((Path(word) for word in plain if Path(word).is_dir()), Path(plain[0]) if plain else None)


def _command(task: Task, registry: Registry) -> Any:
    from typer.main import get_command

    from loong_core.errors import Unsupported

    if task.generate is None:
        raise Unsupported(f"loong generate: models of the task {task.name!r} cannot be asked for an answer.")
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(registry.resolve(task.generate, f"task {task.name}"))
    return get_command(app)
