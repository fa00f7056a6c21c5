"""A Hugging Face folder seen from outside: files, index, headers. No tensor is read, no torch is needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loong_core.errors import CheckpointError
from loong_core.safetensors_header import TensorEntry, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STATE = "state.json"
"""File that only native checkpoints have; they keep a config.json too, for exports."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHOWN = 8
"""Names that a message lists before it only counts."""


@dataclass(frozen=True)
class HFFolder:
    """The tensors of a folder: `tensors[name]` is what the header says, `files[name]` the file that holds it."""

    path: Path
    tensors: dict[str, TensorEntry]
    files: dict[str, Path]


def claims(path: Path) -> bool:
    """Whether `path` looks like a Hugging Face model folder (a config.json, whatever its weights)."""
    return (path / CONFIG).is_file() and not (path / STATE).is_file()


def check(path: Path) -> list[str]:
    """Everything that is wrong with the folder and can be told from names, sizes and headers. Torch-free."""
    problems = config_problems(path)
    if path.is_dir():
        problems += scan(path)[1]
    return problems


def open_folder(path: Path) -> HFFolder:
    """The folder's tensors; `CheckpointError` with every problem of `check` if there is one."""
    problems = config_problems(path)
    folder = None
    if path.is_dir():
        folder, weights = scan(path)
        problems += weights
    if problems or folder is None:
        raise CheckpointError(problems)
    return folder


def scan(path: Path) -> tuple[HFFolder, list[str]]:
    """Tensors of the folder's safetensors files and the problems found, index against files."""
    found = HFFolder(path, {}, {})
    if (path / INDEX).is_file():
        weight_map, problems = _weight_map(path / INDEX)
    elif (path / SINGLE).is_file():
        weight_map, problems = None, []
    else:
        return found, [_no_weights(path)]
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    for name in names:
        file = path / name
        if not file.is_file():
            count = sum(owner == name for owner in (weight_map or {}).values())
            problems.append(f"{path / INDEX} names {name} for {count} tensors, but that file is absent. Copy it there.")
            continue
        try:
            header = read_header(file)
        except CheckpointError as error:
            problems.extend(error.problems)
            continue
        problems += _differences(path, name, header, weight_map)
        found.tensors.update(header)
        found.files.update(dict.fromkeys(header, file))
    return found, problems


def listed(names: Sequence[str]) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def read_json(path: Path) -> Any:
    """A JSON file's content; `CheckpointError` naming the file otherwise."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Copy or download it again.") from error


def config_problems(path: Path) -> list[str]:
    """What is wrong with the folder itself and its config.json."""
    if not path.exists():
        return [f"{path}: this folder does not exist."]
    if not path.is_dir():
        return [f"{path}: a folder is needed (with config.json and safetensors files), this is a file."]
    if not (path / CONFIG).is_file():
        return [f"{path}: there is no {CONFIG}. Point to the folder that holds {CONFIG} and the safetensors files."]
    try:
        config = read_json(path / CONFIG)
    except CheckpointError as error:
        return error.problems
    return [] if isinstance(config, dict) else [f"{path / CONFIG}: a JSON object is needed, this is something else."]


def _weight_map(index: Path) -> tuple[dict[str, str], list[str]]:
    try:
        content = read_json(index)
    except CheckpointError as error:
        return {}, error.problems
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        return {}, [f"{index}: it has no `weight_map` of tensor names to files."]
    problems, safe = [], {}
    for tensor, file in weight_map.items():
        if isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors"):
            safe[tensor] = file
        else:
            problems.append(
                f"{index}: {tensor!r} points to {file!r}; the name of a safetensors file next to it is needed."
            )
    return safe, problems[:SHOWN]


def _differences(path: Path, file: str, header: dict[str, TensorEntry], weight_map: dict[str, str] | None) -> list[str]:
    """Names the index promises and the file lacks, and the reverse."""
    if weight_map is None:
        return []
    promised = {name for name, owner in weight_map.items() if owner == file}
    problems = []
    if absent := sorted(promised - header.keys()):
        problems.append(f"{path / file} lacks tensors that {INDEX} promises: {listed(absent)}.")
    if extra := sorted(header.keys() - promised):
        problems.append(f"{path / file} holds tensors that {INDEX} does not list: {listed(extra)}.")
    return problems


def _no_weights(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return (
            f"{path}: the weights are pickle files ({listed(pickles)}), which can run code when opened; loong reads "
            f"safetensors only. Convert once, on a machine where you trust them: load the model with transformers and "
            f"call save_pretrained(folder), which writes safetensors."
        )
    others = [name for name in names if name.endswith(".safetensors")]
    found = f" Found {listed(others)}, which neither of the two names." if others else ""
    return f"{path}: there are no weights. Expected {SINGLE}, or {INDEX} with the files it names.{found}"
