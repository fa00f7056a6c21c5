"""What the loop, the report and the checkpoints ask of training data: batches by step, wherever they come from.

`loong_core.data.stream.Stream` cuts tokenised rows; the stream of a `DataSource` makes whatever its models train on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from loong_core.train.engine import Batch


class Batches(Protocol):
    """The training and held-out batches of one data-parallel rank.

    What a step trains on is a function of the data, the seed and the step: not of the layout, nor of what was asked
    for before. `samples`, `tokens`, `flops` and `recomputed` are those of the global batch, over all ranks.
    """

    eval_count: int
    """How many held-out global batches there are; 0 without `data.eval`."""

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a 0-based step, on the CPU. Later steps may be prepared in the background."""

    def coming(self, step: int) -> list[Batch] | None:
        """What `batches` will give for a later step, if it is made already; None where it is not. Never waits, and does
        not count as asking for the step: neither `state` nor `problem` knows of it."""

    def eval_batches(self, index: int) -> list[Batch]:
        """This rank's micro-batches of held-out global batch `index`. What fills up a last batch does not count."""

    def samples(self, step: int) -> int:
        """Samples in a step's global batch."""

    def tokens(self, step: int) -> int:
        """What the loss counts in a step's global batch: tokens of text, elements of action chunks."""

    def flops(self, step: int) -> float | None:
        """Model FLOPs of the step, forward and backward; None where nobody knows."""

    def recomputed(self, step: int) -> float:
        """FLOPs among them that are done a second time to save memory; they do not count as model FLOPs."""

    def problem(self) -> str | None:
        """Why training should stop after the step that is being done, in a sentence for the user; None: go on.

        Data that fails in mid-run (more frames that do not decode than `data.options` allows) is replaced and
        counted by `batches`, which so never leaves other ranks waiting; the loop asks here after each step, saves a
        checkpoint on all ranks, and ends the run with this text.
        """

    def state(self) -> dict[str, Any]:
        """What a later process needs to continue after the last step asked for. JSON values only."""

    def load_state(self, state: Mapping[str, Any]) -> int:
        """Continue where `state` was taken; returns the next 0-based step. Raises `DataError` where the data, or a
        setting that decides what a step trains on, is not what it was."""

    def close(self) -> None:
        """Stop threads, close files."""
