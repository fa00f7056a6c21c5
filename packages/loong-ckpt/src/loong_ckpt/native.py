"""Native checkpoints: everything a run needs to go on, under any layout, committed by one rename.

Order of a save: all ranks write into `.step-N.tmp`; rank 0 adds the small files, hashes and flushes everything, and
renames; only then `latest` moves on and old checkpoints go. A kill at any moment leaves a complete checkpoint.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_ckpt import files, manifest, ranks
from loong_ckpt.export import plan_export
from loong_ckpt.hf_folder import STATE
from loong_ckpt.native_folder import (
    ENGINE,
    LATEST,
    RECIPE,
    VERSION,
    check,
    claims,
    clean,
    complete,
    find_latest,
    read_state,
    retain,
    step_name,
    step_of,
)
from loong_ckpt.source import LAYOUT, companions, source_of
from loong_core.errors import CheckpointError, LoongError
from loong_core.recipe_load import dump

if TYPE_CHECKING:
    from loong_core.train.engine import Engine
    from loong_core.train.run import Run

__all__ = [
    "CheckpointWriter",
    "check",
    "claims",
    "find_latest",
    "find_latest_together",
    "load",
    "load_checkpoint",
    "save",
    "save_checkpoint",
]
logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------- saving
class CheckpointWriter:
    """Saves checkpoints of one run into `folder` (`checkpoints/` of the run folder unless given).

    With `async_`, hashing, flushing and the commit happen in a thread of rank 0, at most one at a time, and their error
    is raised by the next `save` or by `close`. A process does not exit before its commit is done. All methods but
    `committed` are collective.
    """

    def __init__(
        self, run: Run, engine: Engine, folder: Path | None = None, keep: int | None = None, async_: bool = False
    ) -> None:
        self._run, self._engine = run, engine
        self._folder = folder if folder is not None else run.folder / "checkpoints"
        self._keep, self._async = keep, async_
        self._companions = _companions(run)
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None
        self._committed: list[Path] = []

    def save(self, stream_state: Mapping[str, Any], step: int) -> Path:
        """Save the engine as it is after `step` optimizer steps, with the position in the data. Returns the final path.

        Raises `CheckpointError` on every rank if this save, or an earlier one in the background, failed; what was saved
        before is then intact.
        """
        self._settle()
        final = self._folder / step_name(step)
        _write_state(self._run, self._engine, final, stream_state, step, self._companions)
        if self._async and self._run.rank == 0:
            self._thread = threading.Thread(target=self._commit_quietly, args=(final,), name=f"save {final.name}")
            self._thread.start()
        elif not self._async:
            ranks.together(lambda: self._commit(final), self._run, only_main=True)
        return final

    def close(self) -> None:
        """Wait until the last save is committed."""
        self._settle()

    def committed(self) -> list[Path]:
        """Checkpoints that became durable since the last call; on rank 0, empty elsewhere."""
        found, self._committed = self._committed, []
        return found

    def _settle(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if self._async:
            ranks.agree(problem, self._run)

    def _commit_quietly(self, final: Path) -> None:
        try:
            self._commit(final)
        except BaseException as error:
            self._problem = error

    def _commit(self, final: Path) -> None:
        _commit(final)
        with files.explained("Removing old checkpoints", self._folder):
            retain(self._folder, self._keep, final)
        self._committed = [*self._committed, final]


def save_checkpoint(
    run: Run, engine: Engine, stream_state: Mapping[str, Any], step: int, folder: Path | None = None
) -> Path:
    """Save once and wait: collective. `folder` defaults to `checkpoints/` of the run folder; returns the checkpoint."""
    return CheckpointWriter(run, engine, folder, run.recipe.checkpoint.keep).save(stream_state, step)


def save(path: Path, run: Run, engine: Engine) -> None:
    """Save the engine as a checkpoint at `path` itself, without a position in the data. Collective."""
    final = Path(path)
    if run.rank == 0 and final.exists() and not claims(final):
        problem = CheckpointError(
            f"{final} exists and is no native checkpoint; it is left alone. Choose another output."
        )
    else:
        problem = None
    ranks.agree(problem, run)
    _write_state(run, engine, final, None, run.step, _companions(run))

    def finish() -> None:
        with files.explained("The checkpoint", final):
            _seal(final)

    ranks.together(finish, run, only_main=True)


def _companions(run: Run) -> dict[str, bytes]:
    """What makes a checkpoint exportable, on rank 0. Read once, early: the source may be gone when the run ends."""
    if run.rank != 0:
        return {}
    source = source_of(run)
    layout = {name: slot.dtype for name, slot in plan_export(run, source).slots.items()}
    return {LAYOUT: json.dumps(layout, indent=1).encode(), **companions(run, source)}


def _write_state(
    run: Run,
    engine: Engine,
    final: Path,
    stream_state: Mapping[str, Any] | None,
    step: int,
    others: Mapping[str, bytes],
) -> None:
    """Fill the temporary folder of `final` with everything but the manifest. No `stream_state`: weights alone."""
    temporary = files.staging(final)

    def begin() -> None:
        with files.explained("The checkpoint", final):
            final.parent.mkdir(parents=True, exist_ok=True)
            files.recover(final)
            (temporary / ENGINE).mkdir(parents=True)

    ranks.together(begin, run, only_main=True)
    ranks.together(lambda: _save_engine(engine, temporary / ENGINE, final), run)

    def describe() -> None:
        with files.explained("The checkpoint", final):
            for name, content in others.items():
                (temporary / name).write_bytes(content)
            _write_description(run, temporary, stream_state, step)

    ranks.together(describe, run, only_main=True)


def _save_engine(engine: Engine, folder: Path, final: Path) -> None:
    try:
        with files.explained("The checkpoint", final):
            engine.save_state(folder)
    except LoongError:
        raise
    except Exception as error:
        # Writers of sharded tensors wrap what the system said in errors of their own.
        free = shutil.disk_usage(final.parent).free
        raise CheckpointError(
            f"The checkpoint at {final} could not be written: {error}. What was saved before is intact. "
            f"{free / 1e9:,.2f} GB are free there; make room, or set run.dir to another disk."
        ) from error


def _write_description(run: Run, temporary: Path, stream_state: Mapping[str, Any] | None, step: int) -> None:
    recipe = dump(run.recipe)
    (temporary / RECIPE).write_text(recipe)
    state = {
        "version": VERSION,
        "step": step,
        "seed": run.recipe.run.seed,
        "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        "family": run.family.name,
        "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
        "plan": asdict(run.plan),
        "resumable": stream_state is not None,
        "data": dict(stream_state or {}),
    }
    (temporary / STATE).write_text(json.dumps(state, indent=1))


def _commit(final: Path) -> None:
    with files.explained("The checkpoint", final):
        _seal(final)
        files.write(final.parent / LATEST, f"{final.name}\n")


def _seal(final: Path) -> None:
    """Hash, flush and rename."""
    temporary = files.staging(final)
    manifest.write(temporary)
    files.sync_tree(temporary)
    files.commit(temporary, final)


# ------------------------------------------------------------------------------------------------ loading
def find_latest_together(run: Run, folder: Path | None = None) -> Path | None:
    """As `find_latest`, collectively: the ranks divide the hashing, and all of them get the same answer."""
    place = folder if folder is not None else run.folder / "checkpoints"
    ranks.together(lambda: clean(place), run, only_main=True)
    candidates = complete(place) if run.rank == 0 else []
    for _ in range(ranks.broadcast_number(len(candidates), run)):
        step = ranks.broadcast_number(step_of(candidates.pop(0)) if candidates else 0, run)
        path = place / step_name(step)
        found = check(path) or manifest.problems(path, share=(run.rank, run.world))
        try:
            ranks.agree(CheckpointError(found) if found else None, run)
        except CheckpointError as error:
            if run.rank == 0:
                logger.warning("The checkpoint %s is damaged and is passed over: %s", path, error.problems[0])
            continue
        return path
    return None


def load_checkpoint(run: Run, engine: Engine, path: Path, verify: bool = True) -> dict[str, Any]:
    """Bring the engine, its optimizer included, to the state saved at `path`. Collective; returns `state.json`.

    All hashes are compared before a byte is used, unless `verify` is False because that was just done. Raises
    `CheckpointError` on every rank.
    """
    state = _require_whole(path, run, verify)
    if not state["resumable"]:
        raise CheckpointError(
            f"{path} holds weights without a position in the data, so no run can continue from it. Start a new run "
            f"from it with model.weights, or resume from a checkpoint that a run saved."
        )
    engine.load_state(path / ENGINE)
    return state


def load(path: Path, run: Run, engine: Engine) -> None:
    """Take over the weights of a native checkpoint as the start of another run: no optimizer state, no position."""
    _require_whole(path, run, verify=True)
    engine.load_state(path / ENGINE, optimizer=False)


def _require_whole(path: Path, run: Run, verify: bool) -> dict[str, Any]:
    if not claims(path):
        found = [f"{path} is no native checkpoint: {manifest.MANIFEST} or {STATE} is absent. Give a step-... folder."]
    elif verify:
        found = check(path) or manifest.problems(path, share=(run.rank, run.world))
    else:
        found = []
    ranks.agree(CheckpointError(found) if found else None, run)
    return read_state(path)
