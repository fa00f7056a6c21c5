"""Native checkpoints seen from outside: which exist, which is the newest that is whole. Needs no torch.

`checkpoints/step-00000500/` holds `engine/` (sharded tensors), `state.json` (step, seed, position in the data, plan),
`recipe.yaml`, config.json and tokenizer (so that it can be exported without the run), and `manifest.json`. A folder of
that name is complete: it got its name last. `latest` is a text file for people and scripts; loong itself looks at the
folders.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loong_ckpt import files, manifest
from loong_ckpt.hf_folder import STATE, read_json
from loong_core.errors import CheckpointError

VERSION = 1
ENGINE = "engine"
RECIPE = "recipe.yaml"
LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.(step-\d{8,})\.(tmp|old)")
logger = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def claims(path: Path) -> bool:
    """Whether `path` is a native checkpoint."""
    return (path / manifest.MANIFEST).is_file() and (path / STATE).is_file()


def check(path: Path) -> list[str]:
    """What is wrong, as far as names and sizes tell; hashes are compared before anything is loaded."""
    try:
        read_state(path)
    except CheckpointError as error:
        return error.problems
    return manifest.problems(path, hashed=False)


def read_state(path: Path) -> dict[str, Any]:
    """`state.json`: step, seed, saved (time, UTC), data, plan, recipe_sha256. Raises `CheckpointError`."""
    state = read_json(path / STATE)
    if not isinstance(state, dict) or not isinstance(state.get("step"), int) or not isinstance(state.get("saved"), str):
        raise CheckpointError(f"{path / STATE} is not the state of a loong checkpoint. The checkpoint is damaged.")
    if state.get("version") != VERSION:
        raise CheckpointError(
            f"{path / STATE} has version {state.get('version')!r}; this loong-ckpt reads {VERSION}. Use a newer one."
        )
    return state


def complete(folder: Path, damaged_last: bool = False) -> list[Path]:
    """The committed checkpoints in `folder`, the one saved last first; their tensors are not verified.

    Those whose age cannot be trusted come first, to be reported, or last, to be removed before others.
    """
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    unknown = "" if damaged_last else "~"
    return sorted(found, key=lambda path: (_saved(path) or unknown, step_of(path)), reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def _saved(path: Path) -> str | None:
    """When it was saved: after a restart from an earlier step, the later save is the newer one. None if damaged."""
    try:
        promised = manifest.read(path).get(STATE)
        if promised is None or manifest.hash_file(path / STATE) != promised:
            return None
        return str(read_state(path)["saved"])
    except (CheckpointError, OSError):
        return None


def verified(
    folder: Path, problems: Callable[[Path], list[str]], report: Callable[[str], None] = logger.warning
) -> Iterator[Path]:
    """The checkpoints in `folder` in which `problems` finds nothing, newest first; damaged ones are reported."""
    for path in complete(folder):
        found = problems(path)
        if not found:
            yield path
        else:
            more = f" (and {len(found) - 1} more problems)" if len(found) > 1 else ""
            report(f"The checkpoint {path} is damaged and is passed over: {found[0]}{more}")


def find_latest(folder: Path, report: Callable[[str], None] = logger.warning) -> Path | None:
    """The newest checkpoint in `folder` whose files all match their hashes, or None.

    Damaged ones are reported and passed over, never removed. Leftovers of interrupted saves are cleaned away, so call
    this only while nothing is being saved there.
    """
    clean(folder)
    return next(verified(folder, lambda path: check(path) or manifest.problems(path), report), None)


def clean(folder: Path) -> None:
    """Finish or undo what an interrupted save or removal left under temporary names."""
    if not folder.is_dir():
        return
    with files.explained("Cleaning up after an interrupted save", folder):
        for path in sorted(folder.iterdir()):
            if match := _TEMPORARY.fullmatch(path.name):
                files.recover(folder / match[1])
            elif path.name == files.staging(folder / LATEST).name:
                files.remove(path)


def retain(folder: Path, keep: int | None, newest: Path) -> list[Path]:
    """Remove all but the `keep` checkpoints saved last, never `newest`. Returns what was removed."""
    if keep is None:
        return []
    others = [path for path in complete(folder, damaged_last=True) if path.name != newest.name]
    surplus = others[max(0, keep - 1) :]
    for path in surplus:
        files.discard(path)
    return surplus
