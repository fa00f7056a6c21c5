"""Trains a byte-level BPE tokenizer on a run's own data; any text is within its reach, no token is unknown."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from loong_core.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_TURN_START, _TURN_END = "<|im_start|>", "<|im_end|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train(texts: Iterator[str], vocabulary: int, folder: Path, chat: bool = False) -> Path:
    """Train on `texts` and write `tokenizer.json` and `tokenizer_config.json`, loadable by transformers.

    `vocabulary` counts the 256 bytes and the special tokens too; too little text gives fewer tokens. `chat` adds the
    ChatML turn tokens and template. `folder` appears complete or not at all; one that is there is kept.

    Raises:
        DataError: no text, or the folder cannot be written.
    """
    if (folder / "tokenizer.json").is_file():
        return folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [END_OF_TEXT, *([_TURN_START, _TURN_END] if chat else [])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_some(texts), trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _TURN_END if chat else END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
        **({"chat_template": _CHAT_TEMPLATE} if chat else {}),
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        tokenizer.save(str(temporary / "tokenizer.json"))
        (temporary / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        temporary.rename(folder)
    except OSError as error:
        if not (folder / "tokenizer.json").is_file():
            raise DataError(f"The trained tokenizer cannot be written to `{folder}`: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _some(texts: Iterator[str]) -> Iterator[str]:
    """The same texts; an error when there are none."""
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise DataError("data.tokenizer: {train: ...} found no text in the data. Name a tokenizer folder instead.")
