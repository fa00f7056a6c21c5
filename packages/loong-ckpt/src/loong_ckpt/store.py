"""The checkpoints of one run, as the training loop sees them: newest, load, save, close."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_ckpt import native

if TYPE_CHECKING:
    from loong_core.train.engine import Engine
    from loong_core.train.run import Run


class Store:
    """`checkpoints/` of the run folder; see `loong_core.types.CheckpointFormat`. Every method is collective."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._writer: native.CheckpointWriter | None = None
        self._verified: Path | None = None

    def newest(self) -> Path | None:
        """The newest complete checkpoint, its hashes compared; damaged ones are named and passed over."""
        self._verified = native.find_latest_together(self._run)
        return self._verified

    def load(self, path: Path, engine: Engine) -> dict[str, Any]:
        """Restore the engine and return what was saved beside it: `step`, `data`."""
        return native.load_checkpoint(self._run, engine, path, verify=path != self._verified)

    def save(self, engine: Engine, state: dict[str, Any]) -> None:
        """Save under `step-<number>`; with `checkpoint.async` the commit happens in the background."""
        section = self._run.recipe.checkpoint
        if self._writer is None:
            self._writer = native.CheckpointWriter(self._run, engine, keep=section.keep, async_=section.async_)
        self._writer.save(state["data"], state["step"])
        self._announce()

    def close(self) -> None:
        """Wait until the last save is durable."""
        if self._writer is not None:
            self._writer.close()
            self._announce()

    def _announce(self) -> None:
        assert self._writer is not None
        for path in self._writer.committed():
            self._run.registry.events.checkpoint_saved(self._run, path)
