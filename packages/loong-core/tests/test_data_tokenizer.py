"""A trained tokenizer writes every text and is loadable by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loong_core.data.tokenizer import train
from loong_core.errors import DataError

TEXT = "for number in range(10):\n    print(number)\n"


def test_round_trip_of_any_text(tmp_path: Path) -> None:
    folder = train(iter([TEXT] * 20), 300, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= 300
    assert tokenizer.eos_token == "<|endoftext|>"
    for text in (TEXT, "né 你好 \x00\t 🙂", " leading and trailing "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(TEXT)["input_ids"]) < len(TEXT) / 2


def test_chat_tokens_and_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(train(iter([TEXT]), 280, tmp_path / "tokenizer", chat=True))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, flag in zip(found["input_ids"], found["assistant_masks"], strict=True) if flag]
    assert tokenizer.decode(said) == "b<|im_end|>"


def test_a_tokenizer_that_is_there_is_kept_and_leaves_no_rest(tmp_path: Path) -> None:
    folder = train(iter([TEXT]), 270, tmp_path / "run" / "tokenizer")
    before = (folder / "tokenizer.json").read_bytes()
    train(iter(["other"]), 290, folder)
    assert (folder / "tokenizer.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["tokenizer"]


def test_the_same_text_gives_the_same_tokenizer(tmp_path: Path) -> None:
    texts = [f"{TEXT} {number}" for number in range(50)]
    folders = [train(iter(texts), 400, tmp_path / name) for name in ("a", "b")]
    assert len({(folder / "tokenizer.json").read_bytes() for folder in folders}) == 1


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no text"):
        train(iter([]), 300, tmp_path / "tokenizer")
    assert list(tmp_path.iterdir()) == []
