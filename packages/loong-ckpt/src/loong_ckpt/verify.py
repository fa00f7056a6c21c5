"""What a checkpoint holds and whether it is whole, for people and scripts; no tensor is loaded, no torch is needed."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loong_ckpt import hf_folder, manifest, native_folder
from loong_core.errors import CheckpointError
from loong_core.registry import architecture_of
from loong_core.safetensors_header import BITS, TensorEntry


@dataclass
class Report:
    """`kind` is `hf` or `native`; `problems` make the checkpoint unusable, `notes` do not. `files` and `size` (bytes)
    count what was looked at."""

    path: Path
    kind: str
    files: int = 0
    size: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest native one of a run folder or its `checkpoints`.

    Raises `CheckpointError` if there is none.
    """
    if native_folder.claims(path) or hf_folder.claims(path):
        return path
    for folder in (path / "checkpoints", path):
        if newest := native_folder.complete(folder):
            return newest[0]
    if hf_folder.claims(path / "hf"):
        return path / "hf"
    raise CheckpointError(hf_folder.check(path) or [f"{path} is no checkpoint."])


def verify(path: Path) -> Report:
    """Compare a native checkpoint with its hashes, or a Hugging Face folder's index with its files."""
    return _verify_native(path) if native_folder.claims(path) else _verify_hf(path)


def _verify_native(path: Path) -> Report:
    report = Report(path, "native", problems=native_folder.check(path) or manifest.problems(path))
    if not report.problems:
        table = manifest.read(path)
        report.files, report.size = len(table), sum(row.size for row in table.values())
        if extra := manifest.extra_files(path):
            report.notes.append(f"Files that do not belong to it: {hf_folder.listed(extra)}.")
    return report


def _verify_hf(path: Path) -> Report:
    folder, problems = hf_folder.scan(path)
    report = Report(path, "hf", problems=hf_folder.config_problems(path) + problems)
    used = sorted(set(folder.files.values()))
    report.files, report.size = len(used), sum(file.stat().st_size for file in used)
    if (path / hf_folder.INDEX).is_file() and not report.problems:
        promised = hf_folder.read_json(path / hf_folder.INDEX).get("metadata", {}).get("total_size")
        found = sum(entry.end - entry.begin for entry in folder.tensors.values())
        if promised is not None and promised != found:
            report.notes.append(f"The index says total_size {promised:,}, the tensors have {found:,} bytes.")
    if extra := sorted(file.name for file in path.glob("*.safetensors") if file not in used):
        report.notes.append(f"Files that nothing names: {hf_folder.listed(extra)}.")
    return report


def describe(path: Path) -> dict[str, Any]:
    """A checkpoint as a JSON object. `hf`: every tensor with dtype, shape, file; `native`: state and every file."""
    if native_folder.claims(path):
        state = native_folder.read_state(path)
        files = {name: row.size for name, row in sorted(manifest.read(path).items())}
        keys = ("step", "seed", "saved", "family", "plan", "data")
        return {
            "kind": "native",
            "path": str(path),
            **{key: state.get(key) for key in keys},
            "size": sum(files.values()),
            "files": files,
        }
    folder = hf_folder.open_folder(path)
    config = hf_folder.read_json(path / hf_folder.CONFIG)
    sizes = {name: _elements(entry) for name, entry in folder.tensors.items()}
    dtypes = Counter[str]()
    for name, entry in folder.tensors.items():
        dtypes[entry.dtype] += sizes[name]
    return {
        "kind": "hf",
        "path": str(path),
        "architecture": architecture_of(config),
        "parameters": sum(sizes.values()),
        "parameters_by_dtype": dict(dtypes),
        "size": sum(entry.end - entry.begin for entry in folder.tensors.values()),
        "tensors": {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "file": folder.files[name].name}
            for name, entry in sorted(folder.tensors.items())
        },
    }


def grouped(tensors: dict[str, dict[str, Any]]) -> list[tuple[str, int, str, list[int]]]:
    """Tensors that differ in layer or expert number only, in one row: (name with `*`, count, dtype, shape)."""
    rows = Counter((re.sub(r"\d+", "*", name), row["dtype"], tuple(row["shape"])) for name, row in tensors.items())
    return [(name, count, dtype, list(shape)) for (name, dtype, shape), count in rows.items()]


def _elements(entry: TensorEntry) -> int:
    return (entry.end - entry.begin) * 8 // BITS[entry.dtype]
