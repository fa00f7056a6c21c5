"""From a recipe to cached samples, through the real registry, source, task and tokenizer."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from loong_core.data import prepare as preparation
from loong_core.data.prepare import main, prepare
from loong_core.data.stream import Stream
from loong_core.errors import DataError
from loong_core.recipe import Recipe
from loong_core.recipe_load import dump
from loong_core.types import ParallelPlan


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(folder: Path, path: Any, *, task: str = "pretrain", **data: Any) -> Recipe:
    section = {"path": path, "seq_len": 16, "global_batch": 2, **data}
    return Recipe.model_validate({"run": {"dir": folder / "runs"}, "task": {"name": task}, "data": section})


def caches(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "runs" / ".cache").iterdir())


def test_token_rows_are_cached_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tmp_path, write(tmp_path / "a.jsonl", {"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}))
    first = prepare(made, tmp_path / "run")
    assert [first.train.sample(at)["tokens"].tolist() for at in range(2)] == [[1, 2, 3], [4, 5]]
    assert first.notes == ("data.path: 2 samples, 5 tokens, 3 counted, from 2 rows of 1 files",)
    assert (first.tokenizer, first.held_out) == (None, None)
    monkeypatch.setattr(preparation.caches, "build", None)
    assert prepare(made, tmp_path / "run").train.content == first.train.content
    assert len(caches(tmp_path)) == 1


@pytest.mark.parametrize("change", ["content", "seq_len", "task", "bad_rows", "options"])
def test_whatever_changes_the_samples_makes_a_new_cache(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "a.jsonl", {"input_ids": [1, 2, 3]})
    prepare(recipe(tmp_path, path), tmp_path / "run")
    changed: dict[str, Any] = {
        "seq_len": {"seq_len": 17},
        "task": {"task": "midtrain"},
        "bad_rows": {"bad_rows": "skip"},
        "options": {"options": {"rename": {"x": "y"}}},
    }.get(change, {})
    if change == "content":
        write(path, {"input_ids": [1, 2, 4]})
        os.utime(path, ns=(1, 1))
    prepare(recipe(tmp_path, path, **changed), tmp_path / "run")
    assert len(caches(tmp_path)) == 2


def test_a_trained_tokenizer_lies_in_the_run_folder_and_is_used(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("the quick brown fox " * 9)
    made = recipe(tmp_path, [tmp_path / f"{at}.txt" for at in range(3)], source="text", tokenizer={"train": 280})
    prepared = prepare(made, tmp_path / "run")
    assert prepared.tokenizer == tmp_path / "run" / "tokenizer"
    assert int(prepared.train.columns["tokens"].max()) < 280
    assert prepare(made, tmp_path / "run").train.folder == prepared.train.folder


def test_a_tokenizer_trained_on_conversations_has_a_template(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "a.jsonl", *[{"messages": talk}] * 3)
    prepared = prepare(recipe(tmp_path, path, task="sft", seq_len=64, tokenizer={"train": 260}), tmp_path / "run")
    assert prepared.train.counted.tolist() == [2, 2, 2]


def test_bad_rows_stop_or_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"input_ids": [1, 2]}, {"input_ids": []}, {"input_ids": [1] * 17})
    with path.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError) as caught:
        prepare(recipe(tmp_path, path), tmp_path / "run")
    text = str(caught.value)
    assert "3 of 4 rows cannot be used" in text
    for line, reason in ((2, "is empty"), (3, "longer than data.seq_len = 16"), (4, "broken JSON")):
        assert f"{path}:{line}: " in text
        assert reason in text
    notes = prepare(recipe(tmp_path, path, bad_rows="skip"), tmp_path / "run").notes
    assert notes[1].startswith("data.path: 3 rows were left out (data.bad_rows: skip), the first: ")


def test_held_out_data_of_its_own(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", {"input_ids": [1, 2, 3]})
    held = write(tmp_path / "b.jsonl", {"input_ids": [4, 5]})
    made = recipe(tmp_path, train, eval={"path": held})
    prepared = prepare(made, tmp_path / "run")
    assert prepared.held_out is not None
    assert prepared.held_out.sample(0)["tokens"].tolist() == [4, 5]
    stream = Stream(made, prepared, ParallelPlan(planner="test", world=1, micro_batches=2), 0)
    assert [batch["tokens"][0, :3].tolist() for batch in stream.batches(0)] == [[1, 2, 3]] * 2
    assert [batch["targets"][0, :3].tolist() for batch in stream.eval_batches(0)] == [[5, -100, -100], [-100] * 3]
    stream.close()


def test_other_ranks_wait_for_the_first_and_build_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loong_core.data import tokenizer

    (tmp_path / "a.txt").write_text("the quick brown fox " * 9)
    made = recipe(tmp_path, tmp_path / "a.txt", source="text", tokenizer={"train": 270})
    builders: list[str] = []
    found: list[str] = []

    def watched(original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            builders.append(threading.current_thread().name)
            return original(*arguments, **named)

        return call

    monkeypatch.setattr(preparation.caches, "build", watched(preparation.caches.build))
    monkeypatch.setattr(tokenizer, "train", watched(tokenizer.train))
    waiting = threading.Thread(
        target=lambda: found.append(prepare(made, tmp_path / "run", rank=1).train.content), name="other rank"
    )
    waiting.start()
    waiting.join(timeout=0.5)
    tokenizer.train(iter(["the quick brown fox "]), 270, tmp_path / "run" / "tokenizer")
    waiting.join(timeout=0.5)
    assert waiting.is_alive()
    expected = prepare(made, tmp_path / "run", rank=0).train.content
    waiting.join(timeout=60)
    assert found == [expected]
    assert set(builders) == {"MainThread"}


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="which holds no file"):
        prepare(recipe(tmp_path, tmp_path / "empty"), tmp_path / "run")
    with pytest.raises(DataError, match=r"`data\.path` is not set"):
        prepare(recipe(tmp_path, None), tmp_path / "run")


def test_the_command_ends_with_0_or_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    good = recipe(tmp_path, write(tmp_path / "a.jsonl", {"input_ids": [1, 2, 3]}))
    file.write_text(dump(good))
    assert main([str(file)]) == 0
    assert "data.path: 1 samples" in capsys.readouterr().out
    file.write_text(dump(recipe(tmp_path, write(tmp_path / "b.jsonl", {"input_ids": []}))))
    assert main([str(file)]) == 2
    assert "`input_ids` is empty" in capsys.readouterr().err
    assert main([]) == 2
