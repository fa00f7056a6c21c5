"""Row kinds to samples: shifted targets, long rows, and a reason for every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_core.data.rows import RowError
from loong_core.data.tokenizer import train
from loong_core.errors import DataError
from loong_core.recipe import Recipe
from loong_core.types import Row
from loong_llm import data
from loong_llm.data import TextEncoder, vocabulary_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "it"
    return train(iter(["the quick brown fox jumps over the lazy dog"] * 5), 300, folder, chat=True)


def encoder(task: str = "pretrain", *, seq_len: int = 64, source: str = "jsonl", **more: Any) -> TextEncoder:
    recipe = {
        "task": {"name": task, "options": more.pop("options", {})},
        "data": {"seq_len": seq_len, "source": source, "tokenizer": more.pop("tokenizer", None)},
        "model": more,
    }
    result = getattr(data, task)(Recipe.model_validate(recipe))
    assert isinstance(result, TextEncoder)
    return result


def row(line: int = 1, file: str = "a.jsonl", **fields: Any) -> Row:
    return Row(fields, file, line)


def lists(samples: Any) -> list[tuple[list[int], list[int]]]:
    return [(sample["tokens"].tolist(), sample["targets"].tolist()) for sample in samples]


def test_labels_are_shifted_as_transformers_does() -> None:
    assert lists(encoder()(row(input_ids=[5, 6, 7]))) == [([5, 6, 7], [6, 7, -100])]
    found = encoder("sft")(row(input_ids=[5, 6, 7, 8], labels=[-100, -100, 7, 8]))
    assert lists(found) == [([5, 6, 7, 8], [-100, 7, 8, -100])]
    assert all(values.dtype == np.int32 for sample in found for values in sample.values())


def test_hidden_padding_is_cut_off() -> None:
    found = encoder()(row(input_ids=[0, 5, 6, 7, 0], attention_mask=[0, 1, 1, 1, 0]))
    assert lists(found) == [([5, 6, 7], [6, 7, -100])]
    for mask in ([1, 0, 1], [0, 0, 0], [1, 1]):
        with pytest.raises(RowError, match="attention_mask"):
            encoder()(row(input_ids=[1, 2, 3], attention_mask=mask))


def test_the_loss_is_that_of_transformers() -> None:
    import torch
    from torch.nn.functional import cross_entropy
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    labels = [-100, 3, 4, -100, 1, 2]
    logits = torch.randn(1, 6, 11)
    (sample,) = encoder()(row(input_ids=[1, 3, 4, 0, 1, 2], labels=labels))
    ours = cross_entropy(logits[0], torch.tensor(sample["targets"]).long(), ignore_index=-100)
    torch.testing.assert_close(ours, ForCausalLMLoss(logits, torch.tensor([labels]), vocab_size=11))


def test_text_gets_the_end_of_text_token(tokenizer: Path) -> None:
    made = encoder(tokenizer=tokenizer)
    end = made.tokenizer.eos_token_id
    ((tokens, targets),) = lists(made(row(text="the fox")))
    assert tokens == [*made.tokenizer("the fox")["input_ids"], end]
    assert targets == [*tokens[1:], -100]
    ((without, _),) = lists(encoder(tokenizer=tokenizer, options={"end_of_text": False})(row(text="the fox")))
    assert without == tokens[:-1]


def test_a_batch_is_the_same_as_row_by_row(tokenizer: Path) -> None:
    made = encoder("midtrain", tokenizer=tokenizer, seq_len=128)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [row(text="one"), row(file="b", messages=talk), row(file="c", input_ids=[1, 2]), row(text="four")]
    together = [lists(samples) for samples in made.batch(rows)]
    assert together == [lists(made(item)) for item in rows]
    assert all(targets[:-1] == tokens[1:] for samples in together for tokens, targets in samples)


@given(length=st.integers(2, 60), seq_len=st.integers(2, 20))
@settings(deadline=None)
def test_pieces_of_a_long_document_continue_across_the_cut(length: int, seq_len: int) -> None:
    made = encoder(seq_len=seq_len, source="text")
    samples = lists(made(row(input_ids=list(range(length)))))
    pairs = [pair for tokens, targets in samples for pair in zip(tokens, targets, strict=True)]
    assert [pair for pair in pairs if pair[1] != -100] == [(at, at + 1) for at in range(length - 1)]
    assert all(len(tokens) <= seq_len for tokens, _ in samples)
    assert [len(tokens) for tokens, _ in samples[:-1]] == [seq_len] * (len(samples) - 1)


def test_a_last_piece_with_nothing_to_predict_is_left_out() -> None:
    assert lists(encoder(seq_len=2, source="text")(row(input_ids=[1, 2, 3]))) == [([1, 2], [2, 3])]


def test_long_rows_of_a_table_are_errors_unless_asked_otherwise() -> None:
    ids = {"input_ids": [1, 2, 3, 4, 5]}
    with pytest.raises(RowError, match=r"is 5 tokens, longer than data\.seq_len = 3; task\.options\.long_rows"):
        encoder(seq_len=3)(row(**ids))
    cut = encoder(seq_len=3, options={"long_rows": "truncate"})
    assert lists(cut(row(**ids))) == [([1, 2, 3], [2, 3, -100])]
    assert cut.counters == {"truncated": 1}
    split = encoder(seq_len=3, options={"long_rows": "split"})
    assert lists(split(row(**ids))) == [([1, 2, 3], [2, 3, 4]), ([4, 5], [5, -100])]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"input_ids": []}, "`input_ids` is empty"),
        ({"input_ids": "12"}, "`input_ids` is of type str"),
        ({"input_ids": [1.5, 2]}, "not a list of whole numbers"),
        ({"input_ids": [True, False]}, "not a list of whole numbers"),
        ({"input_ids": [1, True]}, "not a list of whole numbers"),
        ({"input_ids": [[1], [2]]}, "not a list of whole numbers"),
        ({"input_ids": [[1], [2, 3]]}, "not a list of whole numbers"),
        ({"input_ids": [1, None]}, "not a list of whole numbers"),
        ({"input_ids": [1, 2**40]}, "no token id"),
        ({"input_ids": [1, 2**80]}, "not a list of whole numbers"),
        ({"input_ids": [1, -1]}, "token id -1 is outside"),
        ({"input_ids": [1, 131]}, "token id 131 is outside the model's vocabulary; allowed: 0 to 130"),
        ({"input_ids": [1, 2], "labels": [1, 131]}, "label 131 is outside.*or -100"),
        ({"input_ids": [1, 2], "labels": [1]}, "`labels` has 1 entries, `input_ids` has 2"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "no token that counts"),
        ({"input_ids": [7]}, "is a single token"),
        ({"text": "  "}, "`text` is empty"),
        ({"text": 5}, "`text` is of type int"),
        ({"other": 1}, "no known row shape: the keys are `other`"),
    ],
)
def test_unusable_rows_have_a_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        encoder(config={"vocab_size": 131})(row(**fields))


def test_the_kind_of_a_file_is_told_by_its_first_rows() -> None:
    made = encoder()
    results = made.batch([row(other=1), row(input_ids=[1, 2]), row(text="x"), row(file="b", input_ids=[3, 4])])
    assert [isinstance(item, RowError) for item in results] == [True, False, True, False]
    assert str(results[2]) == "`input_ids` is missing; the keys are `text`"


def test_a_task_refuses_the_rows_of_another_with_the_remedy(tokenizer: Path) -> None:
    talk = [{"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match=r"a\.jsonl:3: the rows are of kind `messages`.*task\.name: sft"):
        encoder(tokenizer=tokenizer)(row(3, messages=talk))
    with pytest.raises(DataError, match=r"kind `text`.*task\.name: pretrain"):
        encoder("sft", tokenizer=tokenizer)(row(text="x"))


def test_text_without_a_tokenizer_says_how_to_get_one() -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer.*train: 4096"):
        encoder()(row(text="x"))


def test_tokenizer_folders_that_hold_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        encoder(tokenizer=tmp_path / "absent")(row(text="x"))
    with pytest.raises(DataError, match="holds no tokenizer"):
        encoder(tokenizer=tmp_path)(row(text="x"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        encoder(tokenizer=tmp_path)(row(text="x"))


CHATS = {
    "messages": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "yo"}]},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    "alpaca": {"instruction": "hi", "input": "", "output": "yo"},
}


@pytest.mark.parametrize("name", CHATS)
def test_every_way_to_write_a_conversation_gives_the_same_sample(name: str, tokenizer: Path) -> None:
    made = encoder("sft", tokenizer=tokenizer)
    assert lists(made(row(**CHATS[name]))) == lists(made(row(file="b", **CHATS["messages"])))
    said = [text for text, counted in made.explain(row(**CHATS[name])) if counted]
    assert said == ["yo<|im_end|>"]
    assert "".join(text for text, _ in made.explain(row(**CHATS[name]))).startswith("<|im_start|>user\nhi<|im_end|>")


def test_system_prompts_input_and_history(tokenizer: Path) -> None:
    made = encoder("sft", tokenizer=tokenizer, seq_len=200)
    alpaca = row(instruction="sum", input="1 2", output="3", system="Count.", history=[["a", "b"]])
    text = made.explain(alpaca)
    assert [part for part, counted in text if counted] == ["b<|im_end|>", "3<|im_end|>"]
    assert "".join(part for part, _ in text) == (
        "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nsum\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )
    last = encoder("sft", tokenizer=tokenizer, seq_len=200, options={"turns": "last"})
    assert [part for part, counted in last.explain(alpaca) if counted] == ["3<|im_end|>"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": []}, "`messages` is empty"),
        ({"messages": "hi"}, "of type str, not a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "the assistant says nothing; the roles are user"),
        ({"messages": [{"content": "a"}]}, r"`messages\[0\]` is not an object with `role`"),
        ({"messages": [{"role": "assistant", "content": 5}]}, r"`messages\[0\].content` is of type int"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "is empty, and the assistant says it"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "'alien'; allowed: human"),
        ({"conversations": [["human", "a"]]}, "not an object with `from`"),
        ({"instruction": "a"}, "`output` is missing; the keys are `instruction`"),
        ({"instruction": "a", "output": ""}, "`output` is empty"),
        ({"instruction": 1, "output": "b"}, "`instruction` is of type int"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, r"`history\[0\]` is not a pair"),
        ({**CHATS["messages"], "tools": "{"}, "`tools` is broken JSON"),
        ({**CHATS["messages"], "tools": [1]}, "`tools` is not a list of objects"),
    ],
)
def test_malformed_conversations_have_a_reason(fields: dict[str, Any], reason: str, tokenizer: Path) -> None:
    with pytest.raises(RowError, match=reason):
        encoder("sft", tokenizer=tokenizer)(row(**fields))


def test_the_vocabulary_is_that_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 77}))

    def of(**model: Any) -> int | None:
        return vocabulary_of(Recipe.model_validate({"model": model}))

    assert of(weights=tmp_path) == 77
    assert of(weights=tmp_path, config={"vocab_size": 99}) == 99
    assert of(config=str(tmp_path)) == of(config=str(tmp_path / "config.json")) == 77
    assert of(config={"text_config": {"vocab_size": 55}}) == 55
    assert of(family="qwen3", config="qwen3-0.6b") == 151936
    assert of() is None


def test_the_fingerprint_follows_tokenizer_and_template(tokenizer: Path, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("a")
    made = [
        encoder("sft").fingerprint,
        encoder("sft", tokenizer=tokenizer).fingerprint,
        encoder("sft", tokenizer=tokenizer, options={"chat_template": template}).fingerprint,
    ]
    template.write_text("b")
    made.append(encoder("sft", tokenizer=tokenizer, options={"chat_template": template}).fingerprint)
    assert len(set(made)) == 4
