"""What loong-vla offers; the only file of the package with hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loong_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from loong_core.types import RecipeFolder


@hookimpl
def loong_recipes() -> Iterable[RecipeFolder]:
    """The recipes of this package."""
    from loong_core.types import RecipeFolder

    return [RecipeFolder(name="loong_vla", path=Path(__file__).parent / "recipes")]
