"""What loong-vla offers; the only file of the package with hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loong_core.hookspecs import hookimpl

if TYPE_CHECKING:
    import typer

    from loong_core.types import DataSource, ModelFamily, RecipeFolder, Task


@hookimpl
def loong_model_families() -> Iterable[ModelFamily]:
    """Pi0.5 and GR00T."""
    from loong_vla.models.groot import GROOT_N17
    from loong_vla.models.groot_n16 import GROOT_N16
    from loong_vla.models.pi05 import PI05

    return [PI05, GROOT_N17, GROOT_N16]


@hookimpl
def loong_tasks() -> Iterable[Task]:
    """Flow matching on action chunks."""
    from loong_vla.tasks import TASKS

    return TASKS


@hookimpl
def loong_data_sources() -> Iterable[DataSource]:
    """LeRobot datasets."""
    from loong_vla.lerobot.source import SOURCE

    return [SOURCE]


@hookimpl
def loong_recipes() -> Iterable[RecipeFolder]:
    """The recipes of this package."""
    from loong_core.types import RecipeFolder

    return [RecipeFolder(name="loong_vla", path=Path(__file__).parent / "recipes")]


@hookimpl
def loong_cli_commands(group: typer.Typer) -> None:
    """`loong serve`."""
    from loong_vla.cli import serve

    group.command("serve")(serve)
