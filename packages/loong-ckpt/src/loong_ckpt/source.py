"""What an export takes over from where a run started: config.json, tokenizer, and the names and dtypes of tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_ckpt.hf_folder import CONFIG, STATE, open_folder, read_json
from loong_ckpt.manifest import MANIFEST
from loong_ckpt.native_folder import RECIPE
from loong_core.registry import resolve
from loong_core.validate_model import OWN_KEYS

if TYPE_CHECKING:
    from loong_core.train.run import Run

LAYOUT = "layout.json"
"""File of a native checkpoint: names and dtypes of the tensors an export shall have. Together with config.json and the
tokenizer, which lie next to it, it makes the checkpoint exportable anywhere."""
GENERATION = "generation_config.json"
_OF_TRANSFORMERS = ("architectures", "model_type", "dtype", "torch_dtype", "transformers_version")
"""Keys of a config.json that describe a file and no model."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Source:
    """`folder` holds config.json and tokenizer; `layout` maps the tensor names of the checkpoint to their dtypes,
    in the names of the safetensors format, and is None where the run began with random weights."""

    folder: Path
    layout: dict[str, str] | None


def source_of(run: Run) -> Source | None:
    """Where the run's first weights came from; None for random weights."""
    weights = run.recipe.model.weights
    if weights is None:
        return None
    if (weights / STATE).is_file():
        layout = weights / LAYOUT
        return Source(weights, read_json(layout) if layout.is_file() else None)
    return Source(weights, {name: entry.dtype for name, entry in open_folder(weights).tensors.items()})


def companions(run: Run, source: Source | None) -> dict[str, bytes]:
    """The files of an exported folder that are not weights, by name."""
    files = {}
    tokenizer = _tokenizer_folder(run)
    if source is not None and (source.folder / GENERATION).is_file():
        files[GENERATION] = (source.folder / GENERATION).read_bytes()
    place = tokenizer if tokenizer is not None else source.folder if source is not None else None
    if place is not None:
        files |= {name: (place / name).read_bytes() for name in TOKENIZER_FILES if (place / name).is_file()}
    files[CONFIG] = _config(run, source, tokenizer)
    if run.family.sidecars is None:
        return files
    found: dict[str, bytes] = resolve(run.family.sidecars)(run, {**_saved_beside(source), **files})
    assert all(Path(name).name == name for name in found), f"{run.family.name}: sidecars are files of one folder"
    written = json.loads(found[CONFIG])
    if own := {key: value for key, value in run.config.items() if key not in written and key not in _OF_TRANSFORMERS}:
        found[OWN_KEYS] = (json.dumps(own, indent=2, sort_keys=True) + "\n").encode()
    return found


def _saved_beside(source: Source | None) -> dict[str, bytes]:
    """What a native checkpoint keeps for its export: everything but what it needs itself."""
    if source is None or not (source.folder / STATE).is_file():
        return {}
    own = {STATE, LAYOUT, RECIPE, MANIFEST}
    return {path.name: path.read_bytes() for path in source.folder.iterdir() if path.is_file() and path.name not in own}


def _tokenizer_folder(run: Run) -> Path | None:
    """The tokenizer the run itself names or trained; None: the one of its first weights."""
    named = run.recipe.data.tokenizer
    if isinstance(named, Path):
        return named
    trained = run.folder / "tokenizer"
    return trained if named is not None and trained.is_dir() else None


def _config(run: Run, source: Source | None, tokenizer: Path | None) -> bytes:
    """config.json: byte for byte the source's, unless the recipe overrides keys; otherwise made from `run.config`."""
    if source is not None and not run.recipe.model.config:
        return (source.folder / CONFIG).read_bytes()
    given = run.recipe.model.config
    # transformers takes a null for what some keys are, and fails: a recipe that says null means none.
    removed = {key for key, value in given.items() if value is None} if isinstance(given, dict) else set()
    config: dict[str, Any] = {key: value for key, value in run.config.items() if key not in removed}
    if source is None:
        config.pop("torch_dtype", None)
        config["dtype"] = run.precision.parameters
        config.setdefault("model_type", run.family.name)
        config.setdefault("architectures", list(run.family.hf_architectures[:1]))
        for key, value in special_tokens(tokenizer).items():
            config.setdefault(key, value)
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def special_tokens(tokenizer: Path | None) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id`, `pad_token_id` of a tokenizer folder, as far as it defines them."""
    if tokenizer is None or not (tokenizer / "tokenizer_config.json").is_file():
        return {}
    settings = read_json(tokenizer / "tokenizer_config.json")
    table = read_json(tokenizer / "tokenizer.json") if (tokenizer / "tokenizer.json").is_file() else {}
    numbers = {row["content"]: row["id"] for row in table.get("added_tokens", [])}
    found = {}
    for kind in ("bos", "eos", "pad"):
        token = settings.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in numbers:
            found[f"{kind}_token_id"] = numbers[text]
    return found
