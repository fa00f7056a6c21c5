"""Batches as a pure function of the step: every rank computes which rows are its own, nothing is communicated."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loong_core.data.cache import Cache
from loong_core.data.order import permutation, split_held_out
from loong_core.data.pack import Rows, best_fit, next_fit, one_per_row
from loong_core.errors import DataError

if TYPE_CHECKING:
    from loong_core.data.prepare import PreparedData
    from loong_core.recipe import Recipe
    from loong_core.train.engine import Batch
    from loong_core.types import ParallelPlan

_AHEAD = 2
_PADDING = {"targets": -100}


class Layout:
    """The rows of every epoch: which samples of `cache` stand in row `i` of epoch `e`.

    Epochs follow one another in one endless sequence of rows. `subset` are the samples that take part.
    """

    def __init__(self, cache: Cache, subset: np.ndarray, *, seq_len: int, pack: bool, shuffle: bool, seed: int) -> None:
        self.cache, self.subset = cache, subset
        self.seq_len, self.pack, self.shuffle, self.seed = seq_len, pack, shuffle, seed
        self.lengths = cache.lengths[subset]
        self.full = bool((self.lengths == seq_len).all())
        self._lock = threading.RLock()
        self._epochs: OrderedDict[int, tuple[np.ndarray, Rows]] = OrderedDict()
        self._first, self._starts = 0, [0]

    def epoch(self, epoch: int) -> tuple[np.ndarray, Rows]:
        """Sample numbers in the order of the epoch, and their rows. The last few epochs are kept."""
        with self._lock:
            if epoch not in self._epochs:
                order = self.subset
                lengths = self.lengths
                if self.shuffle:
                    shuffled = permutation(len(order), self.seed, epoch)
                    order, lengths = order[shuffled], lengths[shuffled]
                if not self.pack or self.full:
                    rows = one_per_row(len(order))
                else:
                    rows = (best_fit if self.shuffle else next_fit)(lengths, self.seq_len)
                self._epochs[epoch] = (order, rows)
                while len(self._epochs) > 2:
                    self._epochs.popitem(last=False)
            return self._epochs[epoch]

    @property
    def _constant(self) -> bool:
        """Whether every epoch has equally many rows, so that positions need no packing of earlier epochs."""
        return not (self.pack and self.shuffle) or self.full

    def locate(self, position: int) -> tuple[int, int]:
        """Epoch and row in it of a position in the endless sequence."""
        if self._constant:
            return divmod(position, len(self.epoch(0)[1]))
        with self._lock:
            if position < self._starts[0]:
                self._first, self._starts = 0, [0]
            while True:
                last = self._first + len(self._starts) - 1
                at = bisect_right(self._starts, position) - 1
                if at < len(self._starts) - 1:
                    return self._first + at, position - self._starts[at]
                rows = len(self.epoch(last)[1])
                if position < self._starts[-1] + rows:
                    return last, position - self._starts[-1]
                self._starts.append(self._starts[-1] + rows)

    def anchor(self, position: int) -> dict[str, int]:
        """Where the epoch of `position` begins; with it a later process need not pack the epochs before."""
        epoch, row = self.locate(position)
        return {"epoch": epoch, "first_row": position - row}

    def set_anchor(self, anchor: Mapping[str, int]) -> None:
        """The reverse of `anchor`."""
        if not self._constant:
            with self._lock:
                self._first, self._starts = int(anchor["epoch"]), [int(anchor["first_row"])]

    def row(self, position: int) -> np.ndarray:
        """Numbers of the samples in the row at a position."""
        epoch, row = self.locate(position)
        order, rows = self.epoch(epoch)
        return order[rows.items[rows.starts[row] : rows.starts[row + 1]]]

    def arrays(self, positions: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows at `positions` as arrays [rows, seq_len]: the columns, `positions` and, unless every sample of the
        data fills a row, `segments`."""
        shape = (len(positions), self.seq_len)
        arrays = {name: np.full(shape, _PADDING.get(name, 0), dtype=np.int64) for name in self.cache.columns}
        place = np.zeros(shape, dtype=np.int64)
        segments = np.full(shape, -1, dtype=np.int64)
        for at, position in enumerate(positions):
            begin = 0
            for number, sample in enumerate(self.row(position).tolist()):
                for name, values in self.cache.sample(sample).items():
                    arrays[name][at, begin : begin + len(values)] = values
                end = begin + len(values)
                place[at, begin:end] = np.arange(end - begin)
                segments[at, begin:end] = number
                begin = end
        arrays["positions"] = place
        if not self.full:
            arrays["segments"] = segments
        return arrays


class Stream:
    """The training and held-out batches of one data-parallel rank.

    Row `i` of global batch `step` is the row at position `step * global_batch + i` of the endless sequence of epochs.
    Micro-batch `m` of rank `r` holds rows `(m * dp + r) * micro_batch` to `... + micro_batch - 1`. So what a step
    trains on does not depend on how it is cut.
    """

    def __init__(self, recipe: Recipe, prepared: PreparedData, plan: ParallelPlan, dp_rank: int) -> None:
        data = recipe.data
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
        self._identity = {
            "data": prepared.train.content,
            "seed": recipe.run.seed,
            "seq_len": data.seq_len,
            "pack": data.pack,
            "shuffle": data.shuffle,
            "global_batch": data.global_batch,
            "held_out": data.eval.fraction if data.eval is not None and data.eval.path is None else None,
        }
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._ahead: dict[int, Future[list[Batch]]] = {}

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

    def eval_batches(self, index: int) -> list[Batch]:
        """This rank's micro-batches of held-out global batch `index`; there are `eval_count` different ones.

        Where the held-out rows do not fill the last global batch, earlier rows stand in with targets that do not count,
        so that batches 0 to `eval_count - 1` count every held-out token once. Further indices begin again.
        """
        assert self.held_out is not None, "the recipe has no data.eval"
        return self._make(self.held_out, index % self.eval_count, once=True)

    def samples(self, step: int) -> int:
        """Samples in a step's global batch, over all ranks."""
        return sum(len(self.layout.row(position)) for position in self._positions(step))

    def tokens(self, step: int) -> int:
        """Tokens that are not padding in a step's global batch, over all ranks."""
        lengths = self.layout.cache.lengths
        return sum(int(lengths[self.layout.row(position)].sum()) for position in self._positions(step))

    def state(self) -> dict[str, Any]:
        """What a later process needs to continue after the last step asked for. JSON values only."""
        position = self._step * self.global_batch
        return {**self._identity, "step": self._step, "anchor": self.layout.anchor(position)}

    def load_state(self, state: Mapping[str, Any]) -> int:
        """Continue where `state` was taken; returns the next 0-based step.

        Raises:
            DataError: the data, or a setting that decides what a step trains on, is not what it was.
        """
        changed = [
            f"  {_IDENTITY_NAMES[name]}: was {state.get(name)!r}, is {value!r}"
            for name, value in self._identity.items()
            if state.get(name) != value
        ]
        if changed:
            raise DataError(
                "The run cannot continue on this data: samples would be repeated or left out. What differs:",
                changed,
                "Restore it, or start a new run from the checkpoint's weights (model.weights) under another run.name.",
            )
        self.layout.set_anchor(state["anchor"])
        self._step = int(state["step"])
        return self._step

    def close(self) -> None:
        """Stop the background thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _positions(self, step: int) -> range:
        return range(step * self.global_batch, (step + 1) * self.global_batch)

    def _make(self, layout: Layout, step: int, once: bool = False) -> list[Batch]:
        plan, begin = self._plan, step * self.global_batch
        rows = len(layout.epoch(0)[1])
        batches = []
        for number in range(plan.micro_batches):
            first = begin + (number * plan.dp + self._rank) * plan.micro_batch
            positions = range(first, first + plan.micro_batch)
            arrays = layout.arrays(positions)
            if once:
                arrays["targets"][[at for at, position in enumerate(positions) if position >= rows]] = -100
            batches.append({name: torch.from_numpy(values) for name, values in arrays.items()})
        return batches


_IDENTITY_NAMES = {
    "data": "contents of the data (after tokenisation)",
    "seed": "run.seed",
    "seq_len": "data.seq_len",
    "pack": "data.pack",
    "shuffle": "data.shuffle",
    "global_batch": "data.global_batch",
    "held_out": "data.eval.fraction",
}
