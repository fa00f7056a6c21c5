"""YAML and JSON with positions and without YAML 1.1's traps: `1e-4` is a number, `no` and `on` are texts.

Scalars follow the core schema of YAML 1.2. Duplicate keys are problems. Tags are refused, so that no code can be named.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from loong_core.errors import RecipeError

Key = tuple[str, ...]
"""A path into a recipe; list items are counted from "0"."""

NODE_LIMIT = 100_000
"""Values of one file, aliases counted as often as they are used."""

_PREFIX = "tag:yaml.org,2002:"
_SCALARS: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
)


class Place(NamedTuple):
    """Where a value was written. `line` counts from 1; 0 means that `file` says it all (a command-line word)."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class Problem(NamedTuple):
    """Something wrong with `key`; `place` is where it was written, when that is known."""

    key: Key
    text: str
    place: Place | None = None

    def __str__(self) -> str:
        name = f"`{dotted(self.key)}`: " if self.key else ""
        return f"{self.place}: {name}{self.text}" if self.place else f"{name}{self.text}"


@dataclass
class Document:
    """A parsed value with the place of every key, and the text of every number and truth value as it was written."""

    value: Any
    places: dict[Key, Place] = field(default_factory=dict)
    texts: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def dotted(key: Key) -> str:
    """`("data", "path", "0")` -> `data.path[0]`."""
    text = ""
    for part in key:
        text += f"[{part}]" if part.isdigit() and text else f".{part}" if text else part
    return text


class _Loader(yaml.SafeLoader):
    """Safe loader that only composes nodes; its scalar rules are replaced below."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that this module or a YAML 1.1 reader would take for something else."""

    yaml_implicit_resolvers: dict[Any, Any] = {
        first: list(rules) for first, rules in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out."""
        return True


for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"{_PREFIX}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
    _Dumper.add_implicit_resolver(f"{_PREFIX}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_implicit_resolver(f"{_PREFIX}null", re.compile("^$"), [""])


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    """Shortest text that reads back equal, in a form that YAML 1.1 readers also take for a number."""
    text = {float("inf"): ".inf", float("-inf"): "-.inf"}.get(value, ".nan" if value != value else repr(value))
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar(f"{_PREFIX}float", text)


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Line breaks other than \\n are lost unless they are escaped, which only the double-quoted style does."""
    breaks = any(character in value for character in "\r\x85\u2028\u2029\ufeff")
    return dumper.represent_scalar(f"{_PREFIX}str", value, style='"' if breaks else None)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_text)


def parse(text: str, name: str, line: bool = True) -> Document:
    """The value of one YAML or JSON document. `name` stands for the file in places; `line=False` leaves lines out.

    Raises RecipeError when the text is no YAML; duplicate keys are collected in `Document.problems`.
    """
    try:
        if name.endswith(".json"):
            text = text.replace("\t", " ")
        root = yaml.compose(text, Loader=_Loader)
        builder = _Builder(name, line)
        value = None if root is None else builder.build(root, ())
    except yaml.YAMLError as error:
        raise RecipeError(_syntax_problem(error, name, line)) from error
    except RecursionError as error:
        raise RecipeError(f"{name}: it is nested too deeply. Write a recipe of a few levels.") from error
    return Document(value, builder.places, builder.texts, builder.problems)


def dump(value: Any) -> str:
    """YAML text that `parse` reads back equal; key order is kept."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


def _syntax_problem(error: yaml.YAMLError, name: str, line: bool) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    where = f"{name}:{mark.line + 1}" if mark is not None and line else name
    column = f" (column {mark.column + 1})" if mark is not None else ""
    around = getattr(error, "context", None)
    context = f", {around}" if around else ""
    return (
        f"{where}: this is not valid {'JSON' if name.endswith('.json') else 'YAML'}: {what}{context}{column}. "
        "Indent with spaces, close every bracket and quote, and quote text that contains `: ` or ` #`."
    )


class _Builder:
    """Turns composed nodes into plain values and remembers where each key stood."""

    def __init__(self, name: str, line: bool) -> None:
        self.name = name
        self.line = line
        self.places: dict[Key, Place] = {}
        self.texts: dict[Key, str] = {}
        self.problems: list[Problem] = []
        self._open: set[int] = set()
        self._count = 0

    def build(self, node: yaml.Node, key: Key) -> Any:
        self._count += 1
        if self._count > NODE_LIMIT:
            raise RecipeError(f"{self._place(node)}: more than {NODE_LIMIT:,} values; a recipe is small.")
        if id(node) in self._open:
            raise RecipeError(f"{self._place(node)}: `{dotted(key)}`: it contains itself. Remove the alias.")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, key)
            if isinstance(node, yaml.SequenceNode):
                return self._sequence(node, key)
            return self._scalar(node, key)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        self._check_tag(node, key, "map")
        result: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise RecipeError(f"{self._place(name_node)}: a key must be a text, not a list or a mapping.")
            name = _whole(name_node.value)
            inner = (*key, name)
            place = self._place(name_node)
            if name in result:
                text = f"this key is given twice, first at {self.places[inner]}. Remove one of the two."
                self.problems.append(Problem(inner, text, place))
            self.places[inner] = place
            result[name] = self.build(value_node, inner)
        return result

    def _sequence(self, node: yaml.SequenceNode, key: Key) -> list[Any]:
        self._check_tag(node, key, "seq")
        result = []
        for index, item in enumerate(node.value):
            inner = (*key, str(index))
            self.places[inner] = self._place(item)
            result.append(self.build(item, inner))
        return result

    def _scalar(self, node: yaml.Node, key: Key) -> Hashable:
        tag, text = node.tag.removeprefix(_PREFIX), node.value
        if tag == "null":
            return None
        if tag == "str":
            return _whole(text)
        self._check_tag(node, key, "bool", "int", "float")
        self.texts[key] = text
        try:
            if tag == "bool":
                return bool(text.lower() == "true")
            return (
                int(text.replace("_", ""), 0) if tag == "int" else float(text.replace("_", "").replace(".inf", "inf"))
            )
        except ValueError:
            return float("nan") if text.lower() == ".nan" else str(text)

    def _check_tag(self, node: yaml.Node, key: Key, *allowed: str) -> None:
        if node.tag.removeprefix(_PREFIX) not in allowed:
            raise RecipeError(
                f"{self._place(node)}: `{dotted(key)}`: the YAML tag {node.tag!r} is not allowed. "
                "Write a plain text, number, true, false, null, list or mapping."
            )

    def _place(self, node: yaml.Node) -> Place:
        return Place(self.name, node.start_mark.line + 1 if self.line else 0)


def _whole(text: str) -> str:
    """JSON writes characters beyond the basic plane as two escapes, which PyYAML leaves as two halves."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def merge(under: Document, over: Document) -> Document:
    """`over` laid on `under`: mappings are merged key by key, everything else (lists too) is replaced."""
    places, texts = dict(under.places), dict(under.texts)
    value = _merge_values(under.value or {}, over.value or {}, (), places, texts)
    for key, place in over.places.items():
        # A word on the command line sets one key; the sections around it stay where the file has them.
        if place.line or key not in places or not isinstance(_value_at(value, key), dict):
            places[key] = place
    texts.update(over.texts)
    return Document(value, places, texts, [*under.problems, *over.problems])


def _value_at(value: Any, key: Key) -> Any:
    for part in key:
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _merge_values(
    under: Mapping[str, Any], over: Mapping[str, Any], key: Key, places: dict[Key, Place], texts: dict[Key, str]
) -> dict[str, Any]:
    result = dict(under)
    for name, value in over.items():
        inner = (*key, name)
        if isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = _merge_values(result[name], value, inner, places, texts)
            continue
        for table in (places, texts):
            for stale in [known for known in table if known[: len(inner)] == inner]:
                del table[stale]
        result[name] = value
    return result
