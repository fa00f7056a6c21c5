"""The contract of a recipe folder: every recipe loads, says what it is, and plans for its own cluster on a laptop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from loong_core.plugins import load
from loong_core.recipe_load import SUFFIXES, LoadedRecipe, dump, from_mapping, load_file
from loong_core.recipe_load import load as load_recipe
from loong_core.registry import Registry
from loong_core.testing.contract import Contract
from loong_core.testing.plugin import LOWER_SNAKE
from loong_core.validate import prepare


class RecipeContract(Contract):
    """Set `folder` to the name of a recipe folder that a plugin provides, and `words` to what a user has to add to a
    recipe, by its name: a recipe that continues published weights names neither them nor their config."""

    required: ClassVar[tuple[str, ...]] = ("folder",)
    folder: ClassVar[str]
    words: ClassVar[Mapping[str, Sequence[str]]] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per recipe of the folder."""
        if "recipe" in metafunc.fixturenames:
            paths = self.paths()
            metafunc.parametrize("recipe", paths, ids=[path.stem for path in paths])

    @classmethod
    def paths(cls) -> list[Path]:
        """The recipe files, in name order."""
        folder = Registry(load()).get("recipes", cls.folder).path
        return sorted(path for path in Path(folder).iterdir() if path.suffix in SUFFIXES)

    def completed(self, recipe: Path, registry: Registry) -> LoadedRecipe:
        """The recipe with what its user has to add."""
        return load_recipe(str(recipe), self.words.get(recipe.stem, ()), registry)

    def test_folder_holds_recipes(self) -> None:
        """There is at least one, and no two differ in their ending only."""
        stems = [path.stem for path in self.paths()]
        assert stems, f"the recipe folder {self.folder} is empty"
        assert len(set(stems)) == len(stems), f"two files of one name: {stems}"

    def test_recipe_is_named_and_described(self, recipe: Path) -> None:
        """Its name is lower_snake, and its first line is a comment that says what it does."""
        assert LOWER_SNAKE.fullmatch(recipe.stem), f"{recipe.stem} is not lower_snake"
        first = recipe.read_text("utf-8").splitlines()[0]
        assert recipe.suffix == ".json" or (first.startswith("# ") and len(first) > 10), f"first line: {first!r}"

    def test_recipe_loads(self, recipe: Path) -> None:
        """Every key is known and of the right type."""
        load_recipe(str(recipe), [], Registry(load()))

    def test_recipe_names_no_place_of_its_author(self, recipe: Path) -> None:
        """Its own paths are relative, or plain examples that stand for the user's data."""
        absolute = [
            text for text in _texts(yaml.safe_load(recipe.read_text("utf-8"))) if text.startswith(("/home", "~"))
        ]
        assert not absolute, f"paths of one person's machine: {absolute}"

    def test_recipe_plans(self, recipe: Path) -> None:
        """It validates and plans for the devices it asks for, with neither those devices nor its data here."""
        registry = Registry(load())
        prepared = prepare(self.completed(recipe, registry), registry, purpose="plan")
        launch = prepared.recipe.launch
        assert prepared.plan.world == prepared.cluster.world == int(launch.devices) * launch.nodes

    def test_resolved_recipe_is_a_recipe(self, recipe: Path, tmp_path: Path) -> None:
        """What a run folder would hold loads back equal, and resolves to itself."""
        registry = Registry(load())
        first = prepare(self.completed(recipe, registry), registry, purpose="plan")
        path = tmp_path / "recipe.yaml"
        path.write_text(dump(first.recipe))
        assert load_file(path) == first.recipe == from_mapping(yaml.safe_load(path.read_text()))
        again = prepare(load_recipe(str(path), [], registry), registry, purpose="plan")
        assert again.recipe == first.recipe
        # The reasons are those of choices, and nothing is left to choose.
        assert replace(again.plan, reasons=()) == replace(first.plan, reasons=())


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []
