"""Find a recipe, lay it on its base, apply overrides, check every key, and remember where each value was written.

Paths inside a recipe are relative to the working directory, as on any command line; only `base: file` is relative to
the recipe that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loong_core import recipe_yaml
from loong_core.errors import NotFound, PluginError, RecipeError
from loong_core.recipe import Recipe
from loong_core.recipe_check import check, place_of
from loong_core.recipe_yaml import Document, Key, Place, Problem, merge
from loong_core.registry import resolve
from loong_core.suggest import did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel

    from loong_core.registry import Registry

SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with the place of every key that was set. `problems` is empty unless it was read with `read`."""

    recipe: Recipe
    source: str
    places: Mapping[Key, Place]
    document: Document
    problems: tuple[Problem, ...] = ()

    def where(self, key: str) -> str:
        """`recipe.yaml:12` of a dotted key, of the nearest key above it, or the recipe's own name."""
        return str(place_of(self.places, tuple(key.split("."))) or self.source)

    @property
    def origins(self) -> dict[str, str]:
        """Dotted key -> where it was written."""
        return {recipe_yaml.dotted(key): str(place) for key, place in self.places.items()}

    def problem(self, key: str, text: str) -> str:
        """A message about a key: `recipe.yaml:12: `parallel.tp`: ...`."""
        return f"{self.where(key)}: `{key}`: {text}"


def load(argument: str, overrides: Sequence[str], registry: Registry) -> LoadedRecipe:
    """A strict recipe from a file, a run folder, or the name of a shipped recipe.

    Raises RecipeError with every problem of every level, NotFound for a recipe or base that does not exist.
    """
    loaded = read(argument, overrides, registry)
    if loaded.problems:
        raise RecipeError([str(problem) for problem in loaded.problems])
    return loaded


def read(argument: str, overrides: Sequence[str], registry: Registry) -> LoadedRecipe:
    """As `load`, but wrong keys are left at their defaults and reported in `problems`, so that checking can go on."""
    path = find(argument, registry)
    document = _with_base(path, registry)
    problems: list[Problem] = []
    for word in overrides:
        try:
            document = merge(document, _override(word))
        except RecipeError as error:
            problems.extend(Problem((), text) for text in error.problems)
    model, found = check(document, Recipe)
    recipe = cast(Recipe, model).model_copy(update={"base": None})
    ordered = sorted([*document.problems, *found], key=lambda problem: problem.place or Place(""))
    return LoadedRecipe(recipe, _shown(path), document.places, document, (*problems, *ordered))


def from_mapping(value: Mapping[str, Any]) -> Recipe:
    """A recipe from a plain mapping. Raises RecipeError as `load` does."""
    model, problems = check(Document(dict(value)), Recipe)
    if problems:
        raise RecipeError([str(problem) for problem in problems])
    return cast(Recipe, model)


def load_file(path: Path) -> Recipe:
    """A resolved recipe, as a run folder holds it (no base). Raises RecipeError as `load` does."""
    document = _parse_file(path)
    model, problems = check(document, Recipe)
    if problems or document.problems:
        raise RecipeError([str(problem) for problem in [*document.problems, *problems]])
    return cast(Recipe, model)


def to_mapping(recipe: Recipe) -> dict[str, Any]:
    """Plain values under the keys a user writes, without `base`."""
    value = recipe.model_dump(mode="json", by_alias=True)
    value.pop("base", None)
    return value


def dump(recipe: Recipe) -> str:
    """YAML that loads back equal."""
    return recipe_yaml.dump(to_mapping(recipe))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "loong recipe"}


def shipped(registry: Registry) -> dict[str, Path]:
    """Every shipped recipe: `folder:name` -> file."""
    return {
        f"{folder.name}:{file.stem}": file
        for folder in registry.table("recipes").values()
        for file in sorted(Path(folder.path).iterdir() if Path(folder.path).is_dir() else ())
        if file.suffix in SUFFIXES
    }


def find(argument: str, registry: Registry) -> Path:
    """The file behind a recipe argument. Raises NotFound with the nearest name, RecipeError for an ambiguous one."""
    path = Path(argument)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    if path.suffix in SUFFIXES or len(path.parts) > 1:
        nearby = (
            [file.name for file in path.parent.iterdir() if file.suffix in SUFFIXES] if path.parent.is_dir() else []
        )
        what = "is a folder without a recipe.yaml" if path.is_dir() else "does not exist"
        raise NotFound(
            f"The recipe {argument} {what}.{did_you_mean(path.name, nearby)} Give a YAML or JSON file, a run folder, "
            "or the name of a shipped recipe (`loong recipes` lists them)."
        )
    return _find_shipped(argument, registry)


def _find_shipped(name: str, registry: Registry) -> Path:
    recipes = shipped(registry)
    matches = {full: path for full, path in recipes.items() if name in (full, full.partition(":")[2])}
    if len(matches) == 1:
        return next(iter(matches.values()))
    if matches:
        raise RecipeError(f"The recipe name {name!r} is ambiguous. Write one of: {', '.join(sorted(matches))}.")
    short = [full.partition(":")[2] for full in recipes]
    raise NotFound(
        " ".join(
            filter(
                None,
                [
                    f"There is no recipe {name!r}: neither a file here nor a shipped one."
                    + did_you_mean(name, [*recipes, *short] if ":" in name else short),
                    f"Shipped recipes: {', '.join(sorted(recipes)) or 'none'}.",
                    registry.plugins.failures(),
                ],
            )
        )
    )


def decode_options(given: Mapping[str, Any], ref: str | None, owner: str) -> BaseModel | None:
    """`options` decoded by the pydantic model behind `ref`; None when the descriptor has no options.

    `owner` names the descriptor in messages. Raises RecipeError with every problem.
    """
    options, problems = check_options(Document({"options": dict(given)}), ("options",), ref, owner)
    if problems:
        raise RecipeError([f"{owner}: {problem}" for problem in problems])
    return options


def check_options(document: Document, key: Key, ref: str | None, owner: str) -> tuple[BaseModel | None, list[Problem]]:
    """As `decode_options`, for the value of `key` in a loaded document; problems name file and line."""
    value = document.value
    for part in key:
        value = value.get(part) if isinstance(value, dict) else None
    given = value if isinstance(value, dict) else {}
    if ref is None:
        text = f"{owner} has no options. Remove this key."
        return None, [Problem((*key, name), text, place_of(document.places, (*key, name))) for name in given]
    model = resolve(ref, owner)
    if not hasattr(model, "model_fields"):
        raise PluginError(f"The options {ref!r} of {owner} are {model!r}; they must be a pydantic model.")
    part_of = Document(given, dict(document.places), dict(document.texts))
    return check(part_of, model, key)


def _with_base(path: Path, registry: Registry) -> Document:
    document = _parse_file(path)
    base = document.value.get("base")
    if base is None:
        return document
    place = document.places[("base",)]
    if not isinstance(base, str):
        raise RecipeError(f"{place}: `base`: {base!r} is not allowed. Allowed: package:name, or a file.")
    beside = path.parent / base
    try:
        base_path = beside if beside.is_file() else _find_base(base, beside, registry)
    except (NotFound, RecipeError) as error:
        raise RecipeError([f"{place}: `base`: {text}" for text in error.problems]) from error
    under = _parse_file(base_path)
    if under.value.get("base") is not None:
        raise RecipeError(
            f"{under.places[('base',)]}: `base`: {_shown(base_path)} is itself the base of {_shown(path)}, and a base "
            f"has no base of its own. Name {under.value['base']!r} in {_shown(path)}, or copy what you need."
        )
    return merge(under, document)


def _find_base(base: str, beside: Path, registry: Registry) -> Path:
    if ":" not in base and Path(base).suffix in SUFFIXES:
        raise NotFound(f"there is no file {_shown(beside)}. Give package:name, or a file relative to this recipe.")
    return _find_shipped(base, registry)


def _parse_file(path: Path) -> Document:
    shown = _shown(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{shown}: byte {error.start} is not UTF-8. A recipe is a YAML or JSON text file.") from error
    except OSError as error:
        raise RecipeError(
            f"{shown}: it cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error
    if path.suffix == ".json":
        _check_json(text, shown)
    document = recipe_yaml.parse(text, shown)
    if document.value is None:
        document.value = {}
    if not isinstance(document.value, dict):
        kind = "a list" if isinstance(document.value, list) else f"the text {str(document.value)[:40]!r}"
        raise RecipeError(f"{shown}:1: a recipe is a mapping of sections (run, model, data, ...), and this is {kind}.")
    return document


def _check_json(text: str, shown: str) -> None:
    """YAML reads JSON, and more; a .json file has to be JSON."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{shown}:{error.lineno}: this is not valid JSON: {error.msg} (column {error.colno})."
        ) from error
    except RecursionError as error:
        raise RecipeError(f"{shown}: it is nested too deeply. Write a recipe of a few levels.") from error


def _override(word: str) -> Document:
    """`a.b=value` as a document. A mapping value is merged into what is there; null unsets."""
    name, equals, text = word.partition("=")
    shown = f"override {word!r}"
    key = tuple(name.strip().split("."))
    if word.startswith("-"):
        raise RecipeError(
            f"{shown}: there is no such option. A recipe key is overridden without dashes: optim.lr=1e-4; "
            "--help lists the options."
        )
    if not equals or not all(key):
        raise RecipeError(
            f"{shown}: this is not an override. Write key=value without spaces around `=`: optim.lr=1e-4."
        )
    if any("[" in part or part.isdigit() for part in key):
        raise RecipeError(
            f"{shown}: one item of a list cannot be set. Give the whole list: data.path=[a.jsonl,b.jsonl]."
        )
    if not text.strip():
        raise RecipeError(
            f"{shown}: the value is empty. Write {name}=null to unset it, or {name}='\"\"' for an empty text."
        )
    if key == ("base",):
        raise RecipeError(f"{shown}: `base` cannot be overridden. Name the other recipe on the command line.")
    parsed = recipe_yaml.parse(text, shown, line=False)
    value = parsed.value
    for part in reversed(key):
        value = {part: value}
    places = {key[:end]: Place(shown) for end in range(1, len(key) + 1)}
    places.update({(*key, *inner): place for inner, place in parsed.places.items()})
    texts = {(*key, *inner): raw for inner, raw in parsed.texts.items()}
    problems = [problem._replace(key=(*key, *problem.key)) for problem in parsed.problems]
    return Document(value, places, texts, problems)


def _shown(path: Path) -> str:
    """A path as a user recognises it: relative when it lies below the working directory."""
    try:
        return str(path.relative_to(Path.cwd())) if path.is_absolute() else str(path)
    except ValueError:
        return str(path)
