"""YAML as people mean it, with the place of every key."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_core.errors import RecipeError
from loong_core.recipe_yaml import Place, dotted, dump, merge, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-2.5e+3", -2500.0), ("+3", 3), ("1_000", 1000),
        ("0x10", 16), ("0o17", 15), ("017", "017"), ("no", "no"), ("on", "on"), ("yes", "yes"), ("True", True),
        ("false", False), ("null", None), ("~", None), ("", None), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"),
        ("'1'", "1"), (".inf", math.inf), ("-.inf", -math.inf), ("1.2.3", "1.2.3"), ("e5", "e5"), ("-", "-"),
        ("1e", "1e"), ("[a, 1e-3]", ["a", 1e-3]), ("{a: {b: no}}", {"a": {"b": "no"}}), ("0", 0), ("-0", 0),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    if text == "-":
        text = "'-'"
    found = parse(text, "x.yaml").value
    assert found == value
    assert type(found) is type(value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=12), VALUES, max_size=4))
def test_dump_reads_back_equal(value: dict[str, Any]) -> None:
    assert parse(dump(value), "x.yaml").value == value


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=12), VALUES, max_size=4))
def test_json_is_read_as_json_reads_it(value: dict[str, Any]) -> None:
    text = json.dumps(value, allow_nan=True)
    if "Infinity" not in text:
        for layout in (None, 1, "\t"):
            assert parse(json.dumps(value, indent=layout), "x.json").value == json.loads(text)


@pytest.mark.parametrize(
    "text", ["no", "on", "1e-4", "1e5", "null", "1_0", "0o7", "12:30", "", "true", "~", "017", "=", "<<"]
)
def test_texts_survive_other_readers_too(text: str) -> None:
    written = dump({"name": text})
    assert parse(written, "x.yaml").value == {"name": text}
    assert yaml.safe_load(written) == {"name": text}


@settings(deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_exact_for_other_readers_too(value: float) -> None:
    assert yaml.safe_load(dump([value])) == [value]


def test_places() -> None:
    document = parse("a: 1\nb:\n  c: [x,\n    y]\n", "r.yaml")
    assert document.places[("a",)] == Place("r.yaml", 1)
    assert str(document.places[("b", "c")]) == "r.yaml:3"
    assert str(document.places[("b", "c", "1")]) == "r.yaml:4"
    assert dotted(("b", "c", "1")) == "b.c[1]"


def test_duplicate_keys_name_both_lines() -> None:
    (problem,) = parse("a:\n  b: 1\n  c: 2\n  b: 3\n", "r.yaml").problems
    assert str(problem) == "r.yaml:4: `a.b`: this key is given twice, first at r.yaml:2. Remove one of the two."


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: [1, 2", ["r.yaml:1", "not valid YAML"]),
        ("a: 1\n\tb: 2", ["r.yaml:2", "not valid YAML"]),
        ("a: b: c", ["r.yaml:1"]),
        ("a: 1\n---\nb: 2", ["single document"]),
        ("a: !!python/object/apply:os.system ['true']", ["r.yaml:1", "tag"]),
        ("a: !mine 3", ["r.yaml:1", "!mine"]),
        ("? [a]\n: 1", ["a key must be a text"]),
        ("a: &x [*x]", ["contains itself"]),
        ("a: \x00", ["not valid YAML"]),
        ("[" * 5000 + "]" * 5000, ["nested too deeply"]),
    ],
)
def test_what_is_refused(text: str, parts: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        parse(text, "r.yaml")
    for part in parts:
        assert part in str(error.value)


def test_an_alias_bomb_is_refused_quickly() -> None:
    text = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    with pytest.raises(RecipeError, match="a recipe is small"):
        parse(text, "r.yaml")


def test_merge_replaces_lists_and_scalars_and_merges_mappings() -> None:
    under = parse("a: {b: 1, c: [1, 2, 3]}\nd: {e: 1}\n", "base.yaml")
    over = parse("a:\n  c: [9]\n  x: 2\nd: null\n", "r.yaml")
    merged = merge(under, over)
    assert merged.value == {"a": {"b": 1, "c": [9], "x": 2}, "d": None}
    assert str(merged.places[("a", "b")]) == "base.yaml:1"
    assert str(merged.places[("a", "c")]) == "r.yaml:2"
    assert ("a", "c", "2") not in merged.places
    assert ("d", "e") not in merged.places
