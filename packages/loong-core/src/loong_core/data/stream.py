"""Batches as a pure function of the step: every rank computes which rows are its own, nothing is communicated."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from loong_core.data.balance import balance
from loong_core.data.layout import Layout
from loong_core.data.order import permutation, split_held_out
from loong_core.errors import DataError

if TYPE_CHECKING:
    from loong_core.data.prepare import PreparedData
    from loong_core.recipe import Recipe
    from loong_core.train.engine import Batch
    from loong_core.types import ModelShape, ParallelPlan

_AHEAD = 2


class Content(NamedTuple):
    """What a global batch holds over all ranks: its samples, their tokens, and the sum of their squared lengths."""

    samples: int
    tokens: int
    squares: int


class Stream:
    """The training and held-out batches of one data-parallel rank.

    Global batch `step` holds the rows at positions `step * global_batch` and following of the endless sequence of
    epochs. With `data.balance` its samples have moved between them (`rows`), a function of the global batch alone.
    Micro-batch `m` of rank `r` holds rows `(m * dp + r) * micro_batch` to `... + micro_batch - 1`. So what a step
    trains on does not depend on how it is cut.
    """

    def __init__(
        self, recipe: Recipe, prepared: PreparedData, plan: ParallelPlan, dp_rank: int, shape: ModelShape | None = None
    ) -> None:
        data = recipe.data
        self._shape = shape
        self.global_batch = plan.dp * plan.micro_batch * plan.micro_batches
        assert self.global_batch == data.global_batch, "the plan does not cut data.global_batch"
        self._plan, self._rank, self._step = plan, dp_rank, 0
        settings: dict[str, Any] = {"seq_len": data.seq_len, "pack": data.pack, "seed": recipe.run.seed}
        everything = np.arange(len(prepared.train), dtype=np.int64)
        held_cache, held = prepared.held_out, None
        if held_cache is not None:
            held = np.arange(len(held_cache), dtype=np.int64)
        elif data.eval is not None:
            held_cache = prepared.train
            try:
                everything, held = split_held_out(held_cache.origins[:, 0], data.eval.fraction, recipe.run.seed)
            except ValueError as error:
                remedy = "Name held-out data in data.eval.path, or set data.eval to null."
                raise DataError(f"data.eval: {error}. {remedy}") from None
        self.layout = Layout(prepared.train, everything, shuffle=data.shuffle, **settings)
        self.held_out: Layout | None = None
        self.eval_count = 0
        if data.eval is not None and held_cache is not None and held is not None:
            if data.shuffle:  # a fair excerpt where not all of it is used, the same in every evaluation
                held = held[permutation(len(held), recipe.run.seed, 2**63 + 1)]
            self.held_out = Layout(held_cache, held, shuffle=False, **settings)
            rows = len(self.held_out.epoch(0)[1])
            self.eval_count = min(data.eval.batches, -(-rows // self.global_batch))
        self._balance = data.balance and data.pack and not self.layout.full and self.global_batch > 1
        self._identity = {
            "data": prepared.train.content,
            "seed": recipe.run.seed,
            "seq_len": data.seq_len,
            "pack": data.pack,
            "shuffle": data.shuffle,
            "global_batch": data.global_batch,
            "balance": self._balance,
            "held_out": data.eval.fraction if data.eval is not None and data.eval.path is None else None,
        }
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead: dict[int, Future[list[Batch]]] = {}

    def rows(self, step: int) -> list[np.ndarray]:
        """Numbers of the samples in each row of a step's global batch, over all ranks."""
        return self._rows(self.layout, step)

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """A step's global batch, over all ranks: arrays [rows, seq_len], see `Layout.arrays`."""
        return self.layout.arrays(self.rows(step))

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a 0-based step. The steps after it are prepared in the background."""
        future = self._ahead.pop(step, None)
        result = future.result() if future is not None else self._make(self.layout, step)
        self._step = step + 1
        wanted = range(step + 1, step + 1 + _AHEAD)
        for old in [number for number in self._ahead if number not in wanted]:
            self._ahead.pop(old).cancel()
        for number in wanted:
            if number not in self._ahead:
                self._ahead[number] = self._thread.submit(self._make, self.layout, number)
        return result

    def coming(self, step: int) -> list[Batch] | None:
        """The micro-batches of a later step, if they are made already. What is wrong with it, `batches` will say."""
        future = self._ahead.get(step)
        good = future is not None and future.done() and not future.cancelled() and future.exception() is None
        return future.result() if future is not None and good else None

    def eval_batches(self, index: int) -> list[Batch]:
        """This rank's micro-batches of held-out global batch `index`; there are `eval_count` different ones.

        Where the held-out rows do not fill the last global batch, earlier rows stand in with targets that do not count,
        so that batches 0 to `eval_count - 1` count every held-out token once. Further indices begin again.
        """
        assert self.held_out is not None, "the recipe has no data.eval"
        return self._make(self.held_out, index % self.eval_count, once=True)

    def content(self, step: int) -> Content:
        """What a step's global batch holds, padding left out."""
        # Balancing keeps the samples of a step, so nobody waits here for it.
        rows = [self.layout.row(position) for position in self._positions(step)]
        lengths = self.layout.cache.lengths[np.concatenate(rows)].astype(np.int64)
        return Content(len(lengths), int(lengths.sum()), int((lengths**2).sum()))

    def samples(self, step: int) -> int:
        """Samples in a step's global batch, over all ranks."""
        return self.content(step).samples

    def tokens(self, step: int) -> int:
        """Tokens that are not padding in a step's global batch, over all ranks."""
        return self.content(step).tokens

    def flops(self, step: int) -> float | None:
        """Model FLOPs of the step by `ModelShape.train_flops`: padding is no work, and samples of a packed row do not
        see each other. None where no model is known."""
        content = self.content(step)
        context = content.squares / max(content.tokens, 1)
        return None if self._shape is None else self._shape.train_flops(content.tokens, context)

    def recomputed(self, step: int) -> float:
        """FLOPs that the plan's recomputation adds."""
        content = self.content(step)
        context = content.squares / max(content.tokens, 1)
        recompute = self._plan.recompute
        return 0.0 if self._shape is None else self._shape.recomputed_flops(content.tokens, context, recompute)

    def problem(self) -> str | None:
        """Rows are checked before the run, so nothing goes wrong in mid-run."""
        return None

    def state(self) -> dict[str, Any]:
        """What a later process needs to continue after the last step asked for. JSON values only."""
        position = self._step * self.global_batch
        return {**self._identity, "step": self._step, "anchor": self.layout.anchor(position)}

    def load_state(self, state: Mapping[str, Any]) -> int:
        """Continue where `state` was taken; returns the next 0-based step.

        Raises:
            DataError: the data, or a setting that decides what a step trains on, is not what it was.
        """
        was = {"balance": False, **state}  # older checkpoints do not name it
        changed = [
            f"  {_IDENTITY_NAMES[name]}: was {was.get(name)!r}, is {value!r}"
            for name, value in self._identity.items()
            if was.get(name) != value
        ]
        if changed:
            text = (
                "The run cannot continue on this data: samples would be repeated, left out or put into other rows. "
                "What differs:"
            )
            remedy = (
                "Restore it, or start a new run from the checkpoint's weights (model.weights) under another run.name."
            )
            raise DataError("\n".join([text, *changed, remedy]))
        self.layout.set_anchor(state["anchor"])
        self._step = int(state["step"])
        return self._step

    def close(self) -> None:
        """Stop the background thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _positions(self, step: int) -> range:
        return range(step * self.global_batch, (step + 1) * self.global_batch)

    def _rows(self, layout: Layout, step: int) -> list[np.ndarray]:
        rows = [layout.row(position) for position in self._positions(step)]
        # Held-out rows stay where they are: those that stand in for missing ones are known by their position.
        if not self._balance or layout is not self.layout:
            return rows
        samples = np.concatenate(rows)
        return [samples[items] for items in balance([layout.cache.lengths[row] for row in rows], layout.seq_len)]

    def _make(self, layout: Layout, step: int, once: bool = False) -> list[Batch]:
        plan, rows = self._plan, self._rows(layout, step)
        real = len(layout.epoch(0)[1]) - step * self.global_batch
        batches = []
        for number in range(plan.micro_batches):
            first = (number * plan.dp + self._rank) * plan.micro_batch
            arrays = layout.arrays(rows[first : first + plan.micro_batch])
            if once:
                arrays["targets"][max(real - first, 0) :] = -100
            batches.append({name: torch.from_numpy(values) for name, values in arrays.items()})
        return batches


_IDENTITY_NAMES = {
    "data": "contents of the data (after tokenisation)",
    "seed": "run.seed",
    "seq_len": "data.seq_len",
    "pack": "data.pack",
    "shuffle": "data.shuffle",
    "global_batch": "data.global_batch",
    "balance": "data.balance (where it has an effect)",
    "held_out": "data.eval.fraction",
}
