"""`loong data` through the command line: what it prints and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loong_core.cli import run
from loong_core.data.tokenizer import train

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "it"
    return str(train(iter(["hello hi there"] * 3), 300, folder, chat=True))


def loong(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run(["data", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_inspect_shows_kind_columns_and_the_mask(capsys: pytest.CaptureFixture[str], tokenizer: str) -> None:
    write(Path("a.jsonl"), {**CHAT, "extra": 1}, CHAT)
    code, out, _ = loong(capsys, "inspect", "a.jsonl", "--tokenizer", tokenizer)
    assert code == 0
    for part in ("messages", "extra", "sft", "a.jsonl:1", ">>hello<|im_end|><<", "<|im_start|>user\nhi<|im_end|>"):
        assert part in out


def test_inspect_without_a_tokenizer_still_tells_the_kind(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("a.jsonl"), CHAT)
    code, out, _ = loong(capsys, "inspect", "a.jsonl", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["kinds"], found["rows"], found["tokens"]) == ({"messages": 1}, 1, None)
    assert "there is no tokenizer" in found["unknown"]


def test_inspect_counts_rows_that_cannot_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("a.jsonl"), {"input_ids": [1, 2, 3]}, {"input_ids": [4]}, {"input_ids": "x"})
    found = json.loads(loong(capsys, "inspect", "a.jsonl", "--json")[1])
    assert (found["unusable"], found["tokens"]["total"], found["counted"]["total"]) == (1, 4, 2)
    assert found["example"]["text"] == [["1 ", False], ["2 3 ", True]]


def test_check_names_bad_rows_duplicates_and_packing(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}, {"input_ids": [1, 2, 3]}, {"input_ids": []}]
    write(Path("a.jsonl"), *rows)
    code, out, _ = loong(capsys, "check", "a.jsonl", "--seq-len", "5", "--json")
    found = json.loads(out)
    assert code == 2
    assert found["bad_rows"] == ["a.jsonl:4: `input_ids` is empty"]
    assert found["duplicates"] == {"count": 1, "pairs": [["a.jsonl:1", "a.jsonl:3"]]}
    assert found["packing"]["packed"]["rows"] == 2
    assert found["packing"]["unpacked"] == {"rows": 3, "efficiency": 8 / 15}
    code, out, _ = loong(capsys, "check", "a.jsonl", "--seq-len", "5")
    assert code == 2
    assert "a.jsonl:4: `input_ids` is empty" in out
    write(Path("a.jsonl"), *rows[:2])
    assert loong(capsys, "check", "a.jsonl")[0] == 0
    assert [path.name for path in Path().iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "absent.jsonl"], "`data.path` names `absent.jsonl`, which does not exist"),
        (["check", "empty.jsonl"], "is an empty file"),
        (["check", "odd.jsonl"], "the keys are `prompt`"),
        (["check", "good.jsonl", "data.seq_len=3"], "nothing to override"),
        (["check", "good.jsonl", "--seq-len", "2"], "longer than data.seq_len = 2"),
        (["pack", "good.jsonl", "--seq-len", "2"], "1 of 1 rows cannot be used"),
        (["check", "recipe.yaml", "--seq-len", "2"], "--seq-len would be ignored"),
        (["check", "recipe.yaml", "data.sequence=2"], "data.sequence"),
    ],
)
def test_wrong_input_ends_with_2(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    Path("empty.jsonl").touch()
    write(Path("odd.jsonl"), {"prompt": "x"})
    write(Path("good.jsonl"), {"input_ids": [1, 2, 3]})
    Path("recipe.yaml").write_text("data: {path: good.jsonl}\ntask: {name: pretrain}\n")
    code, out, err = loong(capsys, *words)
    assert code == 2
    assert message in out + err


def test_pack_fills_the_cache_that_a_run_uses(capsys: pytest.CaptureFixture[str]) -> None:
    from loong_core.data.prepare import prepare
    from loong_core.recipe_load import load
    from loong_core.registry import open_registry

    write(Path("a.jsonl"), {"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]})
    Path("recipe.yaml").write_text("data: {path: a.jsonl, seq_len: 8}\ntask: {name: pretrain}\n")
    code, out, _ = loong(capsys, "pack", "recipe.yaml", "--json")
    found = json.loads(out)
    assert (code, found["samples"], found["packing"]["packed"]["rows"]) == (0, 2, 1)
    registry = open_registry()
    used = prepare(load("recipe.yaml", [], registry).recipe, Path("run"), registry=registry).train.folder
    assert used == Path(found["cache"])
    code, out, _ = loong(capsys, "pack", "recipe.yaml")
    assert "62.5% of them tokens  <- data.pack" in out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, loong_core.cli.data; "
        "sys.exit(bool({'torch', 'numpy', 'pyarrow', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
