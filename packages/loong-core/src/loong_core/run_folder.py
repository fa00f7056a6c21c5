"""The run folder before the run: whose is it, may we write there, and the records that describe what will happen."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_core import recipe_load
from loong_core.errors import RecipeError, RunError, UserError
from loong_core.recipe import Recipe

if TYPE_CHECKING:
    from loong_core.registry import Registry
    from loong_core.validate import Prepared

RECIPE, PLAN, MANIFEST = "recipe.yaml", "plan.json", "manifest.json"
TOKENIZER = "tokenizer"
PACE = ("threads", "processes", "ahead", "tolerance", "skip_quota")
"""Options of data sources that say how data is read, never what is trained on. A run that its `skip_quota` ended
continues with a larger one."""
_IDENTITY = ("model", "task", "data", "precision", "run.seed")
_MAY_CHANGE = ("data.micro_batch", "data.eval", "data.cache", *(f"data.options.{name}" for name in PACE))
LIBRARIES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "flash-attn-4",
    "quack-kernels",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "av",
)


def folder_of(recipe: Recipe) -> Path:
    """`run.dir / run.name`."""
    return recipe.run.dir / recipe.run.name


def name_problem(name: str) -> str:
    """What is wrong with `run.name`: it becomes one folder."""
    if name in ("", ".", "..") or any(character in name for character in '/\\\0:*?"<>|') or name != name.strip():
        return f"{name!r} cannot be the name of a folder. Allowed: letters, digits, `-`, `_`, `.`; paths go to run.dir."
    return ""


def problems(recipe: Recipe, comparable: bool = True) -> list[str]:
    """Why this run may not use its folder: not writable, or another run lives there. `comparable`: model and task are
    known by name and paths are absolute, as in the recipe the folder may hold."""
    folder = folder_of(recipe)
    if problem := _unwritable(folder):
        return [problem]
    if not folder.is_dir() or not any(folder.iterdir()):
        return []
    if not (folder / RECIPE).is_file():
        return [f"run.name: the folder {folder} holds files that are no run. Choose another run.name, or remove them."]
    try:
        saved = recipe_load.load_file(folder / RECIPE)
    except RecipeError as error:
        return [f"run.name: {folder} holds a run whose recipe cannot be read ({error}). Choose another run.name."]
    if comparable and (different := differences(saved, recipe)):
        return [
            f"run.name: the folder {folder} holds another run; they differ in {', '.join(different)}. Choose another "
            f"run.name, or remove the folder if that run is not needed."
        ]
    if comparable and recipe.checkpoint.resume == "never":
        return [
            f"run.name: the folder {folder} holds this run already, and checkpoint.resume is never. Set "
            "checkpoint.resume=auto to continue it, choose another run.name, or remove the folder."
        ]
    return []


def differences(saved: Recipe, recipe: Recipe) -> list[str]:
    """Keys that make two resolved recipes different runs, with both values. Length, layout, hardware, learning rate,
    reporting and saving may change between the parts of one run."""
    before, now = (_flat(_absolute(recipe_load.to_mapping(item))) for item in (saved, recipe))
    changed = [
        key
        for key in sorted({*before, *now})
        if _under(key, _IDENTITY) and not _under(key, _MAY_CHANGE) and before.get(key) != now.get(key)
    ]
    return [f"{key} ({_short(before.get(key))} there, {_short(now.get(key))} now)" for key in changed]


def create(prepared: Prepared, registry: Registry) -> Path:
    """Make the folder and write recipe.yaml, plan.json and manifest.json, each atomically. Returns the folder."""
    folder = folder_of(prepared.recipe)
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        write(folder / PLAN, json.dumps(plan_record(prepared), indent=1))
        write(folder / MANIFEST, json.dumps(manifest(prepared, registry), indent=1))
        write(folder / RECIPE, recipe_load.dump(prepared.recipe))
    except OSError as error:
        raise UserError(
            f"run.dir: {error.filename or folder} cannot be written: {error.strerror}. Choose another run.dir."
        ) from error
    return folder


def discard(folder: Path) -> None:
    """Take back what `create` and the data step wrote into a folder that was new, when no worker was started.

    Otherwise the corrected recipe would be refused as another run. Files of anybody else, and logs with text, stay.
    """
    for name in (RECIPE, PLAN, MANIFEST):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob(f"*{TOKENIZER}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    for path in sorted((folder / "logs").glob("*")):
        if path.is_file() and not path.stat().st_size:
            path.unlink()
    for path in (folder / "logs", folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def write(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename: readers see the old or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def wait_for(prepared: Prepared, seconds: float = 600.0) -> Path:
    """The folder once rank 0 has written this very recipe there; for the other ranks of a world others launched."""
    folder, text = folder_of(prepared.recipe), recipe_load.dump(prepared.recipe)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if (folder / RECIPE).read_text(encoding="utf-8") == text:
                return folder
        except OSError:
            pass
        time.sleep(0.1)
    raise RunError(
        f"Rank 0 has not written {folder / RECIPE} within {seconds:.0f} s. All ranks must see the same run.dir: put it "
        "on a file system that all machines share."
    )


def plan_record(prepared: Prepared) -> dict[str, Any]:
    """plan.json: the layout, its estimates, the cluster it was made for, and the ops with reasons."""
    shape = prepared.shape
    return {
        **_plain(asdict(prepared.plan)),
        "model": {
            "family": prepared.family.name,
            "layers": shape.layers,
            "hidden": shape.hidden,
            "vocabulary": shape.vocabulary,
            "active_parameters": shape.active_parameters,
        },
        "cluster": _plain(asdict(prepared.cluster)),
        "precision": prepared.precision.name,
        "ops": {choice.op: {"name": choice.name, "reason": choice.reason} for choice in prepared.ops.values()},
    }


def manifest(prepared: Prepared, registry: Registry) -> dict[str, Any]:
    """manifest.json: everything one needs to know to say what ran."""
    plugins = registry.plugins
    dists = {info.dist: info.version for info in plugins.working if info.version}
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "packages": {name: text for name, text in sorted(dists.items())},
        "plugins": [{"name": info.name, "dist": info.dist, "version": info.version} for info in plugins.working],
        "broken_plugins": {name: info.reason() for name, info in plugins.infos.items() if info.error is not None},
        "libraries": {name: text for name in LIBRARIES if (text := library_version(name))},
        "python": platform.python_version(),
        "hardware": {
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            **_plain(asdict(prepared.cluster)),
        },
        "ops": {choice.op: {"name": choice.name, "reason": choice.reason} for choice in prepared.ops.values()},
        "choices": list(prepared.notes),
        "git": git_revision(Path.cwd()),
        "counts": prepared.task.counts,
        "seeds": {"run": prepared.recipe.run.seed},
    }


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Commit of the working directory and whether it has changes; None outside a repository."""
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        changed = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "changed": changed}


def _git(folder: Path, *words: str) -> str:
    result = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    return result.stdout.strip()


def library_version(name: str) -> str:
    """Version of an installed distribution; empty when it is absent."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _unwritable(folder: Path) -> str:
    """The nearest existing folder above decides; it is not created for the check."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return f"run.dir: {existing} is a file, so {folder} cannot be a folder. Choose another run.dir."
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"run.dir: {existing} is not writable. Choose a run.dir where you may write, or change its permissions."
    try:
        read_only = bool(os.statvfs(existing).f_flag & os.ST_RDONLY)
    except (AttributeError, OSError):
        read_only = False
    virtual = any(existing.resolve().is_relative_to(root) for root in ("/proc", "/sys"))
    if read_only or virtual:
        return f"run.dir: {existing} lies on a file system that cannot be written. Choose another run.dir."
    return ""


def _absolute(value: Mapping[str, Any]) -> dict[str, Any]:
    """Paths of a resolved recipe are absolute already; older or hand-written ones may not be."""
    result = json.loads(json.dumps(value))
    for section, name in (("model", "weights"), ("data", "path"), ("data", "tokenizer")):
        given = result[section][name]
        if isinstance(given, str):
            result[section][name] = str(Path(given).absolute())
        elif isinstance(given, list):
            result[section][name] = [str(Path(item).absolute()) for item in given]
    return dict(result)


def _flat(value: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        full = f"{key}.{name}" if key else name
        if isinstance(inner, dict):
            flat.update(_flat(inner, full))  # an empty mapping says no more than an absent one
        else:
            flat[full] = inner
    return flat


def _under(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    """Dataclass fields as JSON knows them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
