"""Prompts: their text, their bins, their padding. Equality with LeRobot is in test_inputs_parity.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loong_core.errors import CheckpointError, DataError
from loong_vla.prompts import (
    IMAGE,
    PAD,
    SPECIAL,
    START,
    GrootPrompts,
    Pi05Prompts,
    bins,
    formal,
    load_tokenizer,
    pi05_prompt,
    train,
)

TASKS = ["put the square into the corner", "Fold: the T-shirt!"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(train(TASKS, 320, tmp_path_factory.mktemp("tokenizer") / "made"))


def test_bins_of_openpi() -> None:
    assert bins(np.array([-1.5, -1.0, -0.995, 0.0, 0.9999, 1.0, 3.0])) == [-1, 0, 0, 128, 255, 255, 255]


def test_pi05_sentence() -> None:
    assert pi05_prompt(" put_it\nthere ", np.array([-1.0, 0.0])) == "Task: put it there, State: 0 128;\nAction: "
    assert pi05_prompt("put_it ", None) == "put it\n"


def test_formal() -> None:
    assert formal("Fold: the T-shirt_1!") == "fold the tshirt_1"
    assert formal("") == "perform the task"


def test_pi05_tokens_are_padded_behind_and_cut(tokenizer: Any) -> None:
    prompts = Pi05Prompts(tokenizer, 40)
    tokens, mask = prompts.tokens("a", np.zeros(3))
    count = int(mask.sum())
    assert tokens.shape == mask.shape == (40,) and tokens.dtype == np.int64 and mask.dtype == bool
    assert mask[:count].all() and (tokens[count:] == SPECIAL.index(PAD)).all()
    assert tokenizer.decode(tokens[:count]) == f"{START}Task: a, State: 128 128 128;\nAction: "
    assert prompts.cut == 0
    cut, mask = prompts.tokens("word " * 40, np.zeros(3))
    assert mask.all() and prompts.cut == 1 and cut[0] == SPECIAL.index(START)


def test_groot_turn_has_a_run_of_tokens_for_every_image(tokenizer: Any) -> None:
    image = SPECIAL.index(IMAGE)
    prompts = GrootPrompts(tokenizer, image, 4, 2, TASKS)
    tokens, mask = prompts.tokens(TASKS[1], cameras=2)
    assert len(tokens) == prompts.length and prompts.length % 8 == 0 and (tokens[mask] == image).sum() == 8
    shown = "<|vision_start|>" + IMAGE * 4 + "<|vision_end|>"
    assert tokenizer.decode(tokens[mask]) == f"{START}<|im_start|>user\n{shown * 2}fold the tshirt<|im_end|>\n"
    fewer, mask = prompts.tokens(TASKS[1], cameras=1)
    assert len(fewer) == prompts.length and (fewer == image).sum() == 4
    longer, mask = prompts.tokens("word " * 200, cameras=1)
    assert len(longer) > prompts.length and len(longer) % 8 == 0 and mask.sum() > prompts.length


def test_groot_follows_the_template_of_its_tokenizer(tokenizer: Any) -> None:
    image = SPECIAL.index(IMAGE)
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for item in message.content %}"
        "{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}[{{ item.text }}]{% endif %}"
        "{% endfor %}<|im_end|>{% endfor %}"
    )
    try:
        tokens, mask = GrootPrompts(tokenizer, image, 1, 1, TASKS).tokens("Go", cameras=1)
        assert tokenizer.decode(tokens[mask]).endswith(f"{IMAGE}<|vision_end|>[go]<|im_end|>")
        tokenizer.chat_template = (
            "{% for item in messages[0].content %}{% if item.type == 'image' %}<image-1>{% else %}{{ item.text }}"
            "{% endif %}{% endfor %}"
        )
        tokens, mask = GrootPrompts(tokenizer, image, 2, 1, TASKS).tokens("Go", cameras=1)
        assert tokenizer.decode(tokens[mask]) == f"{START}<image 1><img>{IMAGE * 2}</img>go"
        tokenizer.chat_template = "{{ messages[0].role }}"
        with pytest.raises(DataError, match=r"makes 0 image tokens .* with 1 images"):
            GrootPrompts(tokenizer, image, 1, 1, TASKS)
    finally:
        tokenizer.chat_template = None


def test_training_twice_gives_the_same_and_folders_are_kept(tmp_path: Path, tokenizer: Any) -> None:
    again = load_tokenizer(train(reversed(TASKS), 320, tmp_path / "again"))
    assert again.get_vocab() == tokenizer.get_vocab() and len(again) <= 320
    assert [again.convert_ids_to_tokens(number) for number in range(len(SPECIAL))] == list(SPECIAL)
    before = (tmp_path / "again" / "tokenizer.json").read_bytes()
    train(["something else"], 300, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == before


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"`{tmp_path}` holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
