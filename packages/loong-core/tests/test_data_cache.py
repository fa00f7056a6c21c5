"""The cache: complete or absent, rebuilt when damaged, honest about bad rows."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_core.data import cache as caches
from loong_core.data.cache import Cache, build, key, open_cache
from loong_core.data.rows import BadRow, RowError
from loong_core.errors import DataError
from loong_core.types import Row


def encode(row: Row) -> list[dict[str, np.ndarray]]:
    """One sample per list in `lists`; a row with an odd number of them is refused."""
    if row.fields.get("bad"):
        raise RowError("is bad")
    samples = []
    for values in row.fields["lists"]:
        tokens = np.array(values, dtype=np.int32)
        samples.append({"tokens": tokens, "targets": np.append(tokens[1:], -100)})
    return samples


def rows(*lists: list[list[int]]) -> list[Row]:
    return [Row({"lists": values}, f"file{number % 2}", number + 1) for number, values in enumerate(lists)]


def make(folder: Path, given_rows: Any, *, skip_bad: bool = False) -> Cache:
    return build(folder, given_rows, encode, skip_bad=skip_bad, seq_len=64)


SAMPLES = st.lists(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), max_size=3), min_size=1, max_size=9)


@given(lists=SAMPLES)
@settings(deadline=None, max_examples=40)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, lists: list[list[list[int]]]) -> None:
    expected = [(values, number) for number, row in enumerate(lists) for values in row]
    folder = tmp_path_factory.mktemp("cache") / "it"
    if not expected:
        with pytest.raises(DataError, match="nothing to train on"):
            make(folder, rows(*lists))
        return
    cache = make(folder, rows(*lists))
    assert len(cache) == len(expected)
    for number, (values, row) in enumerate(expected):
        sample = cache.sample(number)
        assert sample["tokens"].tolist() == values
        assert sample["targets"].tolist() == [*values[1:], -100]
        assert cache.place(number) == f"file{row % 2}:{row + 1}"
        assert cache.origins[number, 0] == row
    assert cache.lengths.tolist() == [len(values) for values, _ in expected]
    assert cache.counted.tolist() == [len(values) - 1 for values, _ in expected]


def test_batches_do_not_change_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows(*[[[number, 1, 2]] for number in range(9)])
    first = make(tmp_path / "a", data)
    monkeypatch.setattr(caches, "_BATCH_ROWS", 2)
    assert make(tmp_path / "b", data).content == first.content
    assert make(tmp_path / "c", data[:8]).content != first.content


def test_bad_rows_are_named_up_to_twenty_with_the_total(tmp_path: Path) -> None:
    data = [Row({"bad": True}, "x.jsonl", line) for line in range(1, 31)] + [BadRow("broken JSON", "x.jsonl", 31)]
    with pytest.raises(DataError) as caught:
        make(tmp_path / "it", [*data, *rows([[1, 2]])])
    text = str(caught.value)
    assert text.startswith("31 of 32 rows cannot be used:")
    assert "x.jsonl:1: is bad" in text
    assert "x.jsonl:20: is bad" in text
    assert "x.jsonl:21" not in text
    assert "11 more" in text
    assert "data.bad_rows: skip" in text
    assert list(tmp_path.iterdir()) == []


def test_skipped_rows_are_counted_and_kept_by_name(tmp_path: Path) -> None:
    cache = make(tmp_path / "it", [BadRow("broken", "x", 1), *rows([[1, 2]])], skip_bad=True)
    assert (cache.index["bad"], cache.index["rows"], cache.bad_rows()) == (1, 2, ["x:1: broken"])
    with pytest.raises(DataError, match="none of the 1 rows can be used:\n  x:1: broken"):
        make(tmp_path / "none", [BadRow("broken", "x", 1)], skip_bad=True)


@pytest.mark.parametrize("damage", ["truncate", "remove", "index", "version"])
def test_a_damaged_cache_is_not_opened_and_is_rebuilt(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "it"
    content = make(folder, rows([[1, 2, 3]])).content
    index = folder / "index.json"
    if damage == "truncate":
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-4])
    elif damage == "remove":
        (folder / "lengths.bin").unlink()
    elif damage == "index":
        index.write_text(index.read_text()[:-20])
    else:
        index.write_text(json.dumps({**json.loads(index.read_text()), "version": 0}))
    assert open_cache(folder) is None
    assert make(folder, rows([[1, 2, 3]])).content == content
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken() -> Iterator[Row]:
        yield from rows([[1, 2]])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "it", broken())
    assert list(tmp_path.iterdir()) == []


def test_builders_of_the_same_cache_do_not_disturb_each_other(tmp_path: Path) -> None:
    gate = threading.Barrier(4)
    found: list[Cache] = []

    def work() -> None:
        gate.wait()
        found.append(make(tmp_path / "it", rows([[1, 2, 3]], [[4, 5]])))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [cache.sample(1)["tokens"].tolist() for cache in found] == [[4, 5]] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file` cannot be written.*data\.cache"):
        make(tmp_path / "file" / "it", rows([[1, 2]]))


def test_keys_depend_on_every_part() -> None:
    assert key({"a": 1, "b": Path("x")}) == key({"b": Path("x"), "a": 1})
    assert len({key({"a": 1}), key({"a": 2}), key({"b": 1})}) == 3


def test_files_are_mapped_not_read(tmp_path: Path) -> None:
    cache = make(tmp_path / "it", rows([[1, 2, 3]]))
    assert all(isinstance(column, np.memmap) and column.dtype == np.int32 for column in cache.columns.values())
