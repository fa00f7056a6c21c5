"""Which samples stand in which row of which epoch: a pure function of the position in one endless sequence of rows."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from loong_core.data.cache import Cache
from loong_core.data.order import permutation
from loong_core.data.pack import Rows, best_fit, next_fit, one_per_row

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

    def arrays(self, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Rows, given as numbers of samples, as arrays [rows, seq_len]: the columns, `positions` and, unless every
        sample of the data fills a row, `segments`."""
        shape = (len(rows), self.seq_len)
        arrays = {name: np.full(shape, _PADDING.get(name, 0), dtype=np.int64) for name in self.cache.columns}
        place = np.zeros(shape, dtype=np.int64)
        segments = np.full(shape, -1, dtype=np.int64)
        for at, row in enumerate(rows):
            begin = 0
            for number, sample in enumerate(row.tolist()):
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
