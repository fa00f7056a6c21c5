"""Turn what pydantic finds, and what it cannot say, into messages: every unknown key with the nearest one, every wrong
value with what is allowed, all of a recipe together."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from loong_core.recipe_yaml import Document, Key, Place, Problem, dotted
from loong_core.suggest import nearest


def check(document: Document, model: type[BaseModel], root: Key = ()) -> tuple[BaseModel, list[Problem]]:
    """Validate `document.value` (the value of key `root`) against `model`.

    Returns the problems and a model that leaves the wrong keys at their defaults, so that checking can go on.
    """
    problems: list[Problem] = []
    walker = _Walker(document, problems)
    value = walker.mapping(document.value or {}, model, root)
    for _ in range(4):
        try:
            return model.model_validate(value), problems
        except ValidationError as error:
            bad = _bad_keys(error, value)
            reported = {problem.key for problem in problems}
            for key, missing in bad.items():
                siblings = {other[: len(root) + len(key) - 1] for other in reported}
                if not (missing and (*root, *key[:-1]) in siblings):
                    problems.append(walker.wrong_value(model, value, root, key, missing))
            for key in bad:
                _prune(value, key)
    return model(), problems


def annotation_of(model: type[BaseModel], key: Key) -> Any:
    """The annotation of a dotted key below `model`, or None where there is none."""
    annotation: Any = model
    for part in key:
        inner = _model_in(annotation)
        if inner is not None:
            fields = _fields(inner)
            if part not in fields:
                return None
            annotation = fields[part]
        elif part.isdigit():
            annotation = next((args[0] for args in map(typing.get_args, _options(annotation)) if args), None)
        else:
            return None
    return annotation


def describe(annotation: Any) -> str:
    """What a key accepts, in words: `a whole number >= 1, or auto`."""
    options = list(dict.fromkeys(_describe_one(option) for option in _options(annotation)))
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


class _Walker:
    """One pass over a raw mapping: unknown keys out, plain texts where text is wanted, obvious nonsense reported."""

    def __init__(self, document: Document, problems: list[Problem]) -> None:
        self.document = document
        self.problems = problems

    def mapping(self, value: Any, model: type[BaseModel], key: Key) -> Any:
        if not isinstance(value, dict):
            return value
        fields = _fields(model)
        result: dict[str, Any] = {}
        for name, inner in value.items():
            if name not in fields:
                self._report((*key, name), _unknown(name, (*key, name), fields, model if not key else None))
            elif inner is None and not _accepts_none(fields[name]) and _is_container(fields[name]):
                continue
            else:
                kept, good = self._value(inner, fields[name], (*key, name))
                if good:
                    result[name] = kept
        return result

    def _value(self, value: Any, annotation: Any, key: Key) -> tuple[Any, bool]:
        if isinstance(value, dict) and (inner := _model_in(annotation)) is not None:
            return self.mapping(value, inner, key), True
        if isinstance(value, list):
            return [self._text(item, annotation, (*key, str(index))) for index, item in enumerate(value)], True
        if isinstance(value, bool) and _wants(annotation, int, float) and not _wants(annotation, bool, str):
            self._report(key, f"{_show(value)} is not allowed. Allowed: {describe(annotation)}.")
            return None, False
        if isinstance(value, float) and not math.isfinite(value):
            self._report(key, f"{value} is not a finite number. Allowed: {describe(annotation)}.")
            return None, False
        return self._text(value, annotation, key), True

    def _text(self, value: Any, annotation: Any, key: Key) -> Any:
        """`run.name: 2024` means the text 2024: where only text is wanted, a number is what was written."""
        if isinstance(value, bool | int | float) and key in self.document.texts:
            kinds = {kind for option in _options(annotation) for kind in (option, *typing.get_args(option))}
            if kinds & {str, Path} and not kinds & {int, float, bool}:
                return self.document.texts[key]
        return value

    def wrong_value(self, model: type[BaseModel], value: Any, root: Key, key: Key, missing: bool) -> Problem:
        full = (*root, *key)
        annotation = annotation_of(model, key)
        allowed = f" Allowed: {describe(annotation)}." if annotation is not None else ""
        text = "this key is missing."
        if not missing:
            written = _at(self.document.value if _has(self.document.value, key) else value, key)
            text = f"{_show(written)} is not allowed."
        return Problem(full, text + allowed, place_of(self.document.places, full))

    def _report(self, key: Key, text: str) -> None:
        self.problems.append(Problem(key, text, place_of(self.document.places, key)))


def place_of(places: Mapping[Key, Place], key: Key) -> Place | None:
    """Where a key was written, or the nearest key above it that was."""
    while key and key not in places:
        key = key[:-1]
    return places.get(key)


def unknown_key(name: str, allowed: Iterable[str]) -> str:
    """`unknown key. Did you mean ...? Allowed: ...`"""
    names = list(allowed)
    close = nearest(name, names)
    hint = f" Did you mean {' or '.join(f'`{item}`' for item in close)}?" if close else ""
    return f"unknown key.{hint} Allowed: {', '.join(sorted(names)) or 'none'}."


def _unknown(name: str, key: Key, fields: Mapping[str, Any], root_model: type[BaseModel] | None) -> str:
    if "." in name:
        head, _, rest = name.partition(".")
        return f"unknown key. Dotted keys are for the command line; in a file, nest it: `{head}: {{{rest}: ...}}`."
    text = unknown_key(name, fields)
    if "Did you mean" in text:
        return text
    from loong_core.recipe import Recipe

    homes = [
        f"`{section}.{name}`"
        for section, inner in _fields(Recipe).items()
        if name in _fields(_model_in(inner) or object)
    ]
    if name in _fields(Recipe) and len(key) > 1:
        homes.append(f"`{name}` (at the top level)")
    return text.replace("unknown key.", f"unknown key. Did you mean {' or '.join(homes)}?") if homes else text


def _fields(model: Any) -> dict[str, Any]:
    """Key as written in a recipe -> annotation with its constraints."""
    fields: dict[str, Any] = {}
    for name, info in getattr(model, "model_fields", {}).items():
        metadata = tuple(item for item in info.metadata if hasattr(item, "__dict__") or hasattr(item, "__slots__"))
        annotation = typing.Annotated[(info.annotation, *metadata)] if metadata else info.annotation
        fields[info.alias or name] = annotation
    return fields


def _options(annotation: Any) -> list[Any]:
    """The members of a union, constraints kept on each."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return [option for member in typing.get_args(annotation) for option in _options(member)]
    if origin is typing.Annotated:
        inner, *metadata = typing.get_args(annotation)
        members = _options(inner)
        return [typing.Annotated[(member, *metadata)] for member in members] if len(members) == 1 else members
    return [annotation]


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _wants(annotation: Any, *kinds: type) -> bool:
    return any(_bare(option) in kinds for option in _options(annotation))


def _accepts_none(annotation: Any) -> bool:
    return any(option in (None, type(None), Any) for option in map(_bare, _options(annotation)))


def _is_container(annotation: Any) -> bool:
    return _model_in(annotation) is not None or any(
        typing.get_origin(_bare(option)) in (dict, list) for option in _options(annotation)
    )


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for option in map(_bare, _options(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _describe_one(annotation: Any) -> str:
    bare, origin = _bare(annotation), typing.get_origin(_bare(annotation))
    if bare in (None, type(None)):
        return "null"
    if origin is Literal:
        return ", ".join(str(value) for value in typing.get_args(bare))
    if origin is list:
        return f"a list (each item: {describe(typing.get_args(bare)[0])})"
    if origin is tuple:
        members = typing.get_args(bare)
        return f"a list of {len(members)} items (each: {describe(members[0])})"
    if origin is dict or bare is dict:
        return "a mapping"
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        return f"a mapping with the keys {', '.join(_fields(bare))}"
    words = {str: "text", Path: "a path", bool: "true or false", int: "a whole number", float: "a number"}
    return words.get(bare, str(getattr(bare, "__name__", bare))) + _bounds(annotation, bare)


def _bounds(annotation: Any, bare: Any) -> str:
    """` >= 1`, ` > 0 and < 1`."""
    bounds: list[str] = []
    for item in typing.get_args(annotation)[1:] if typing.get_origin(annotation) is typing.Annotated else ():
        for part in getattr(item, "metadata", None) or [item]:
            for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
                limit = getattr(part, attribute, None)
                if limit is None:
                    continue
                whole = bare is int and attribute == "gt"
                bounds.append(f">= {limit + 1}" if whole else f"{sign} {limit}")
    return f" {' and '.join(bounds)}" if bounds else ""


def _bad_keys(error: ValidationError, value: Any) -> dict[Key, bool]:
    """Keys pydantic rejects -> whether they are missing. Names of union branches are not keys; the deepest key wins."""
    found: dict[Key, bool] = {}
    for detail in error.errors(include_url=False, include_context=False):
        key: Key = ()
        current = value
        location = list(detail["loc"])
        missing = detail["type"] == "missing"
        for index, part in enumerate(location):
            if _has(current, (str(part),)):
                current, key = _at(current, (str(part),)), (*key, str(part))
            elif missing and index == len(location) - 1:
                key = (*key, str(part))
        found[key] = missing
    return {
        key: missing
        for key, missing in found.items()
        if not any(other != key and other[: len(key)] == key for other in found)
    }


def _at(value: Any, key: Key) -> Any:
    for part in key:
        value = value[int(part)] if isinstance(value, list) else value.get(part) if isinstance(value, dict) else None
    return value


def _has(value: Any, key: Key) -> bool:
    for part in key:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False
    return True


def _prune(value: Any, key: Key) -> None:
    """Remove the value at `key`, or the nearest mapping entry above it when it is absent or inside a list."""
    for end in range(len(key), 0, -1):
        parent = _at(value, key[: end - 1])
        inside_list = any(isinstance(_at(value, key[:depth]), list) for depth in range(end))
        if isinstance(parent, dict) and key[end - 1] in parent and not inside_list:
            del parent[key[end - 1]]
            return


def _show(value: Any) -> str:
    """A given value as it is best recognised, shortened."""
    if value is None:
        return "null"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


__all__ = ["annotation_of", "check", "describe", "dotted", "place_of", "unknown_key"]
