"""Robot episodes as batches: every sample is a function of the seed and its position in an endless sequence, whichever
rank, process or thread makes it, whatever was asked for before.

Steps are made ahead, by `loong_vla.making`: in processes of their own (`loong_vla.children`) or in threads. Past a
quota of samples that were replaced the run is asked to stop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from loong_core.errors import DataError
from loong_vla.flops import Fields, Seen, repeated, training
from loong_vla.making import TRIES, Cut, Made, Maker, Part, Skipped

if TYPE_CHECKING:
    from loong_core.train.engine import Batch
    from loong_core.train.run import Run
    from loong_vla.children import Children
    from loong_vla.options import RobotOptions

logger = logging.getLogger(__name__)

__all__ = ["Cut", "Part", "RobotStream", "stream"]


class RobotStream:
    """The `loong_core.train.batches.Batches` of one data-parallel replica.

    `processing` turns observations into inputs and outputs into actions; an evaluation may use it. Held-out batches are
    made in this process: the device waits for them anyway.
    """

    def __init__(
        self,
        maker: Maker,
        train: Part,
        held_out: Part | None,
        *,
        settings: RobotOptions,
        eval_batches: int = 0,
        recompute: bool = False,
        identity: Mapping[str, Any] | None = None,
        children: Children | None = None,
    ) -> None:
        self.processing, self.train, self.held_out = maker.processing, train, held_out
        self._maker, self._cut, self._settings, self._children = maker, maker.cut, settings, children
        self._identity, self._step, self._recompute = dict(identity or {}), 0, recompute
        self._last: tuple[int, Made] | None = None
        self.eval_count = 0
        if held_out is not None:
            self.eval_count = min(eval_batches, -(-len(held_out.samples) // self._cut.samples))
        self.skipped: list[Skipped] = []
        self._makers = ThreadPoolExecutor(settings.ahead, thread_name_prefix="data")
        self._ahead: dict[int, Future[Made]] = {}

    # ----------------------------------------------------------------------------------------------------- batches
    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a 0-based step. The steps after it are prepared in the background.

        Raises:
            LoongError: the data cannot be used, or a process that makes batches ended.
        """
        ready = self._children is not None and self._children.ready
        # One more than there are processes: each has something to do while the step before waits to be taken.
        count = max(self._settings.ahead, len(self._children) + 1 if self._children is not None and ready else 0)
        wanted = range(step, step + 1 + count)
        for old in [number for number in self._ahead if number not in wanted]:
            self._ahead.pop(old).cancel()
        for number in wanted:
            if number not in self._ahead:
                self._ahead[number] = self._ask(number, ready)
        made = self._ahead.pop(step).result()
        # The step before is let go here and no earlier. Its memory may be written again as soon as nobody refers to it,
        # but the device fetches from it without waiting, maybe a step ahead (`coming`): that is over when the engine
        # reported that step's loss, which a device computes from the batch, and so before the loop asked for this one.
        self._last = (step, made)
        self._step = step + 1
        self._report(made.skipped)
        return made.batches

    def coming(self, step: int) -> list[Batch] | None:
        """The micro-batches of a later step, if they are made already. What is wrong with it, `batches` will say."""
        future = self._ahead.get(step)
        good = future is not None and future.done() and not future.cancelled() and future.exception() is None
        return future.result().batches if future is not None and good else None

    def _ask(self, step: int, ready: bool) -> Future[Made]:
        if self._children is not None and ready:
            return self._children.ask(step)
        return self._makers.submit(self._maker.make, self.train, step)

    def eval_batches(self, index: int) -> list[Batch]:
        """This rank's micro-batches of held-out global batch `index`, the same every time it is asked for; samples that
        fill up the last one do not count. Indices from `eval_count` on begin again."""
        assert self.held_out is not None, "the recipe has no data.eval"
        made = self._maker.make(self.held_out, index % self.eval_count)
        self._report(made.skipped)
        return made.batches

    def problem(self) -> str | None:
        """Too many samples were replaced, or none was found to replace one."""
        if found := next((item for item in self.skipped if item.last), None):
            return (
                f"{TRIES} samples in a row could not be decoded; the last was frame {found.frame} of {found.reason} "
                "`loong data check` says what is wrong with the dataset."
            )
        if len(self.skipped) <= self._settings.skip_quota:
            return None
        last, quota = self.skipped[-1], self._settings.skip_quota
        return (
            f"{len(self.skipped)} samples could not be decoded, more than data.options.skip_quota: {quota} allows; the "
            f"last was frame {last.frame} of {last.reason} `loong data check` finds them all; leave their episodes out "
            "in data.options.episodes."
        )

    def _report(self, skipped: Sequence[Skipped]) -> None:
        for item in skipped:
            self.skipped.append(item)
            place = "Nothing takes its place" if item.last else "Another sample takes its place"
            logger.warning("frame %d of %s %s (%d so far).", item.frame, item.reason, place, len(self.skipped))

    # ------------------------------------------------------------------------------------------------------ counts
    def samples(self, step: int) -> int:
        """Samples in a step's global batch, over all ranks."""
        return self._cut.samples

    def tokens(self, step: int) -> int:
        """Elements of action chunks that the loss counts in a step's global batch."""
        begin = step * self._cut.samples
        numbers = [self.train.order.sample(position) for position in range(begin, begin + self._cut.samples)]
        return int(self.processing.counted(self.train.samples.remaining(numbers)).sum())

    def flops(self, step: int) -> float | None:
        """Model FLOPs of the step last asked for, by formula; this replica's samples stand for those of all."""
        return self._work(training, step)

    def recomputed(self, step: int) -> float:
        """FLOPs of the step last asked for that `parallel.recompute` does a second time, by the same formula."""
        return (self._work(repeated, step) or 0.0) if self._recompute else 0.0

    def _work(self, formula: Callable[[Fields, Seen], float], step: int) -> float | None:
        if self._last is None or self._last[0] != step or not self._maker.fields:
            return None
        return formula(self._maker.fields, self._last[1].seen) * self._cut.samples

    # ------------------------------------------------------------------------------------------------------- state
    def state(self) -> dict[str, Any]:
        """What a later process needs to continue after the last step asked for: its number, and what must not
        change."""
        return {**self._identity, "step": self._step}

    def load_state(self, state: Mapping[str, Any]) -> int:
        """Continue where `state` was taken; returns the next 0-based step.

        Raises:
            DataError: the data, or a setting that decides what a step trains on, is not what it was.
        """
        changed = [
            f"  {name.replace('_', ' ')}: was {state.get(name)!r}, is {value!r}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if changed:
            text = "The run cannot continue on this data: samples would be repeated or left out. What differs:"
            remedy = (
                "Restore it, or start a new run from the checkpoint's weights (model.weights) under another run.name."
            )
            raise DataError("\n".join([text, *changed, remedy]))
        self._step = int(state["step"])
        return self._step

    def close(self) -> None:
        """End processes, stop threads, close files."""
        if self._children is not None:
            self._children.close()
        self._makers.shutdown(wait=True, cancel_futures=True)
        self._maker.close()
        for part in (self.train, self.held_out):
            if part is not None:
                part.reader.close()


def stream(run: Run, replica: int) -> RobotStream:
    """The batches of a run's replica: the function behind `DataSource.stream`."""
    from loong_vla.open_stream import open_stream

    return open_stream(run, replica)
