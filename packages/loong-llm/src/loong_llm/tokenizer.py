"""Finds, loads and fingerprints a tokenizer folder; nothing is fetched, and no code of the folder is run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_core.errors import DataError

if TYPE_CHECKING:
    from loong_core.recipe import Recipe

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "tekken.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def folder_of(recipe: Recipe) -> Path | None:
    """The folder `data.tokenizer` names, else `model.weights` where it holds a tokenizer, else None."""
    named = recipe.data.tokenizer
    if isinstance(named, Path):
        return named
    weights = recipe.model.weights
    if weights is not None and any((weights / name).is_file() for name in _VOCABULARIES):
        return weights
    return None


def fingerprint(folder: Path | None) -> str:
    """A hash over the tokenizer files of a folder, whatever the folder is called."""
    if folder is None:
        return ""
    total = hashlib.sha256()
    templates = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for path in [folder / name for name in _FILES] + templates:
        if path.is_file():
            total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def load(folder: Path) -> Any:
    """The transformers tokenizer in `folder`.

    Raises:
        DataError: the folder does not exist, holds no tokenizer, or one that transformers cannot read.
    """
    if not folder.is_dir():
        raise DataError(f"The tokenizer folder `{folder}` does not exist. Set data.tokenizer to a folder with one.")
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise DataError(
            f"`{folder}` holds no tokenizer (looked for {', '.join(_VOCABULARIES)}). "
            "Set data.tokenizer to a folder with one, or to {train: 4096} to train one on the data."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        text = " ".join(str(error).split())
        raise DataError(
            f"The tokenizer in `{folder}` cannot be read: {type(error).__name__}: {text[:300]}. "
            "It must be one that transformers knows; tokenizers that bring code of their own are refused."
        ) from error
