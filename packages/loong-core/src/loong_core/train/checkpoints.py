"""When a run saves, what it resumes from, and where it exports to; the formats themselves are plugins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_core.registry import resolve

if TYPE_CHECKING:
    from loong_core.train.batches import Batches
    from loong_core.train.engine import Engine
    from loong_core.train.run import Run

RESUMABLE = "native"
FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run, in the format that can resume."""

    def __init__(self, run: Run) -> None:
        self._section = run.recipe.checkpoint
        self._saved = -1
        self._store: Any = None
        if self._section.every is not None or self._section.resume not in ("auto", "never"):
            store = run.registry.get("checkpoint_formats", RESUMABLE).store
            self._store = resolve(store)(run)

    def newest(self) -> Path | None:
        """The checkpoint this run continues from; None for a fresh start."""
        if self._store is None or self._section.resume == "never":
            return None
        if isinstance(self._section.resume, Path):
            return self._section.resume
        found: Path | None = self._store.newest()
        return found

    def load(self, run: Run, engine: Engine, data: Batches, path: Path) -> None:
        """Continue from `path`: weights, optimizer, position in the data, step."""
        state = self._store.load(path, engine)
        data.load_state(state["data"])
        run.step = self._saved = state["step"]

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after this step."""
        return self._section.every is not None and step % self._section.every == 0

    def save(self, run: Run, engine: Engine, data: Batches) -> None:
        """Save, under a name that appears once the checkpoint is complete."""
        self._store.save(engine, {"step": run.step, "data": data.state()})
        self._saved = run.step

    def finish(self, run: Run, engine: Engine, data: Batches) -> None:
        """Save the last step if that is not done, and wait until everything is on disk."""
        if self._section.every is not None and self._saved != run.step:
            self.save(run, engine, data)
        if self._store is not None:
            self._store.close()

    def export(self, run: Run, engine: Engine) -> None:
        """Write the run folder's `hf/`."""
        chosen = run.registry.get("checkpoint_formats", str(run.recipe.checkpoint.export))
        resolve(chosen.save)(run.folder / "hf", run, engine)
