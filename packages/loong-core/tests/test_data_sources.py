"""Sources: rows with their places, and quick checks that name what is wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from loong_core.data import sources
from loong_core.data.rows import BadRow, kind_of, texts
from loong_core.data.sources import SOURCES, files
from loong_core.errors import DataError
from loong_core.registry import resolve
from loong_core.types import DataSource, Row

BY_NAME = {source.name: source for source in SOURCES}


def read(name: str, path: Any, **options: Any) -> list[Any]:
    return list(resolve(BY_NAME[name].reader)(path, options))


def check(name: str, path: Any, **options: Any) -> list[str]:
    return list(resolve(BY_NAME[name].check)(path, options))


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_text_reads_folders_recursively_and_sorted(tmp_path: Path) -> None:
    write(tmp_path / "b.md", "two")
    write(tmp_path / "a" / "z.txt", "one")
    write(tmp_path / "a" / ".hidden.txt", "no")
    write(tmp_path / "__pycache__" / "x.txt", "no")
    (tmp_path / "blank.txt").write_text(" \n")
    rows = read("text", tmp_path)
    assert [(row.fields["text"], row.line) for row in rows] == [("one\n", 0), ("two\n", 0)]
    assert [Path(row.file).name for row in read("text", tmp_path, suffixes=[".md"])] == ["b.md"]
    assert [row.fields["text"] for row in read("text", [tmp_path / "b.md", tmp_path / "a"])] == ["two\n", "one\n"]


def test_text_names_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1") * 2)
    (row,) = read("text", tmp_path / "latin.txt")
    assert isinstance(row, BadRow)
    assert str(row).endswith("latin.txt: is not UTF-8 text (byte 1)")
    assert "is not UTF-8 text (byte 1)" in check("text", tmp_path)[0]


def test_text_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read("text", tmp_path)[0].fields == {"text": "hello"}


@pytest.mark.parametrize("name", ["text", "jsonl", "parquet"])
def test_missing_and_empty_paths(name: str, tmp_path: Path) -> None:
    suffix = {"text": "txt", "jsonl": "jsonl", "parquet": "parquet"}[name]
    missing, folder, empty = tmp_path / "absent", tmp_path / "folder", tmp_path / f"empty.{suffix}"
    folder.mkdir()
    empty.touch()
    assert check(name, None) == ["`data.path` is not set. Name a file, a folder, or a list of them."]
    assert check(name, missing) == [f"`data.path` names `{missing}`, which does not exist."]
    assert f"names the folder `{folder}`, which holds no file" in check(name, folder)[0]
    assert f"names `{empty}`, which is an empty file" in check(name, empty)[0]
    assert len(check(name, [missing, folder])) == 2
    with pytest.raises(DataError, match="does not exist"):
        read(name, missing)


def test_jsonl_rows_and_broken_rows_have_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x"}', "", '{"text": ', "[1]", '{"input_ids": [1]}')
    path.write_bytes(path.read_bytes() + b'{"text": "\xff"}\n')
    rows = read("jsonl", path)
    assert [row.line for row in rows] == [1, 3, 4, 5, 6]
    assert [isinstance(row, BadRow) for row in rows] == [False, True, True, False, True]
    assert "broken JSON: Expecting value at column" in rows[1].reason
    assert rows[2].reason == "is a JSON list, not an object"
    assert "not UTF-8" in rows[4].reason
    assert check("jsonl", path) == []


@pytest.mark.parametrize("array", [False, True])
def test_half_of_a_character_is_no_text(tmp_path: Path, array: bool) -> None:
    lines = [
        r'{"text": "a \ud83d\ude00 whole one"}',
        r'{"messages": [{"content": "half \uD800 of one"}]}',
        r'{"text": "\\ud800"}',
    ]
    content = "[" + ",\n".join(lines) + "]" if array else "\n".join(lines)
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    rows = read("jsonl", tmp_path / "a.jsonl")
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False]
    assert rows[1].line == 2 and r'holds "\ud800", half of a character' in rows[1].reason


def test_jsonl_reads_one_json_array_and_gzip(tmp_path: Path) -> None:
    records = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    rows = read("jsonl", tmp_path / "a.json")
    assert [row.fields for row in rows] == records
    assert [row.line for row in rows] == [2, 6]
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "x"}\n')
    assert read("jsonl", tmp_path / "b.jsonl.gz")[0].fields == {"text": "x"}
    (tmp_path / "c.json").write_text('[{"text": "x"}, {"text"', encoding="utf-8")
    assert [isinstance(row, BadRow) for row in read("jsonl", tmp_path / "c.json")] == [False, True]


def test_jsonl_of_an_unknown_shape_names_the_keys_and_what_is_allowed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "x", "completion": "y"}')
    (problem,) = check("jsonl", path)
    for part in (f"`{path}`:1", "`prompt`, `completion`", "`messages`", "`input_ids`", "data.options.rename"):
        assert part in problem
    assert check("jsonl", path, rename={"prompt": "text"}) == []
    assert check("jsonl", path, shape="any") == []
    assert read("jsonl", path, rename={"prompt": "text"})[0].fields == {"text": "x", "completion": "y"}


def test_jsonl_that_is_no_json(tmp_path: Path) -> None:
    assert "is not JSON lines" in check("jsonl", write(tmp_path / "a.jsonl", "hello", "world"))[0]


def test_parquet_has_the_columns_of_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"input_ids": [[1, 2], [3]], "labels": [[-100, 2], None]})
    pyarrow.parquet.write_table(table, path)
    rows = read("parquet", tmp_path)
    assert [(row.fields, row.line) for row in rows] == [
        ({"input_ids": [1, 2], "labels": [-100, 2]}, 1),
        ({"input_ids": [3]}, 2),
    ]
    assert check("parquet", path) == []
    pyarrow.parquet.write_table(pyarrow.table({"other": [1]}), path)
    assert "the keys are `other`" in check("parquet", path)[0]
    path.write_bytes(path.read_bytes()[:-9])
    assert "not a readable parquet file" in check("parquet", path)[0]
    assert isinstance(read("parquet", path)[0], BadRow)


def test_the_library_of_python_is_text_that_is_always_there() -> None:
    rows = read("python_library", None)
    assert len(rows) > 300
    assert any(row.file.endswith("json/decoder.py") for row in rows)
    assert not any("/test/" in row.file or "site-packages" in row.file for row in rows)
    assert "has no meaning" in check("python_library", Path("x"))[0]


def test_kinds_are_told_by_the_most_specific_key() -> None:
    assert kind_of({"text": "a", "input_ids": [1]}) == "input_ids"
    assert kind_of({"text": "a", "messages": []}) == "messages"
    assert kind_of({"messages": None, "text": "a"}) == "text"
    assert kind_of({"other": 1}) is None


def test_texts_of_every_kind() -> None:
    assert list(texts({"text": "a"})) == ["a"]
    assert list(texts({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]})) == [
        "a"
    ]
    assert list(texts({"conversations": [{"from": "gpt", "value": "a"}]})) == ["a"]
    assert list(texts({"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]]})) == [
        "a",
        "b",
        "c",
        "d",
    ]
    assert list(texts({"input_ids": [1]})) == []


def test_files_of_a_source_that_does_not_list_them(tmp_path: Path) -> None:
    path = write(tmp_path / "x.bin", "data")
    foreign = DataSource(name="foreign", reader="a:b", check="a:b")
    assert files(foreign, tmp_path, {}) == [path]
    assert isinstance(Row({}, "x", 1), Row)


def test_options_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="suffix"):
        sources.text_files(tmp_path, {"suffix": ".txt"})
