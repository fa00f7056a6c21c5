"""Which frame is at a position of the endless sequence of samples, and the random numbers that belong to it: functions
of seed and position alone, from the raw bits of a counter-based generator.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock

import numpy as np

from loong_core.data.order import HELD_OUT_EPOCH, permutation
from loong_core.errors import DataError


class Samples:
    """The frames of some episodes that an action chunk begins at, numbered in the order of the episodes.

    `lengths` are the episodes' rows; with a `tail`, that many last frames of each are left out.
    """

    def __init__(self, episodes: Sequence[int], lengths: Sequence[int], tail: int = 0) -> None:
        self._episodes = np.asarray(episodes, np.int64)
        self._lengths = np.asarray(lengths, np.int64)
        self._ends = np.cumsum(np.maximum(self._lengths - tail, 0))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def place(self, number: int) -> tuple[int, int]:
        """Episode and frame of a sample."""
        at = int(np.searchsorted(self._ends, number, side="right"))
        return int(self._episodes[at]), number - (int(self._ends[at - 1]) if at else 0)

    def remaining(self, numbers: Sequence[int]) -> np.ndarray:
        """Frames from each sample on to the end of its episode, the sample's included."""
        wanted = np.asarray(numbers, np.int64)
        at = np.searchsorted(self._ends, wanted, side="right")
        return self._lengths[at] - (wanted - np.where(at > 0, self._ends[at - 1], 0))

    def fingerprint(self) -> str:
        """A name that differs where episodes or their lengths do."""
        content = np.concatenate([self._episodes, self._lengths, self._ends])
        return hashlib.sha256(content.tobytes()).hexdigest()[:16]


class Order:
    """Samples in an endless sequence of epochs, each shuffled anew; without `shuffle`, in their order. Safe in
    threads."""

    def __init__(self, count: int, seed: int, shuffle: bool = True, epoch: int | None = None) -> None:
        self._count, self._seed, self._shuffle, self._fixed = count, seed, shuffle, epoch
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = Lock()

    def sample(self, position: int) -> int:
        """The number of the sample at a position. With a fixed `epoch` every epoch is that one."""
        epoch, inside = divmod(position, self._count)
        if not self._shuffle:
            return inside
        epoch = epoch if self._fixed is None else self._fixed
        with self._lock:
            found = self._epochs.get(epoch)
            if found is None:
                found = self._epochs[epoch] = permutation(self._count, self._seed, epoch)
                while len(self._epochs) > 2:
                    self._epochs.popitem(last=False)
        return int(found[inside])


class Draws:
    """Random numbers of a position: the same wherever and whenever they are asked for. `purpose` keeps streams apart.

    Only raw bits are taken from numpy, whose stream it guarantees; normal numbers are made of them by Box and Muller.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        self._seed, self._purpose = seed % 2**64, purpose

    def uniform(self, position: int, count: int, purpose: str) -> np.ndarray:
        """`count` numbers in (0, 1), float64."""
        key = np.array([self._seed, _number(f"{self._purpose} {purpose}")], dtype=np.uint64)
        counter = np.array([0, position, 0, 0], dtype=np.uint64)
        raw = np.random.Philox(key=key, counter=counter).random_raw(count)
        return (np.asarray(raw >> np.uint64(11), np.float64) + 0.5) * 2.0**-53

    def normal(self, position: int, count: int, purpose: str) -> np.ndarray:
        """`count` standard normal numbers, float32."""
        half = -(-count // 2)
        first, second = self.uniform(position, 2 * half, purpose).reshape(2, half)
        radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].astype(np.float32)


@lru_cache(256)
def _number(name: str) -> int:
    """64 bits that differ from those of other names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def held_out(episodes: Sequence[int], lengths: Sequence[int], fraction: float, seed: int) -> tuple[set[int], set[int]]:
    """Episodes to train on and episodes held out, whole ones: in the order of their hash, until `fraction` of the
    frames is reached. At least one is on either side.

    Raises:
        DataError: there are fewer than two.
    """
    if len(episodes) < 2:
        raise DataError(
            "data.eval: one episode cannot be split into training and held-out data. Name a held-out dataset in "
            "data.eval.path, or set data.eval to null."
        )
    order = permutation(len(episodes), seed, HELD_OUT_EPOCH)
    sizes = np.asarray(lengths, np.int64)[order]
    wanted = fraction * sizes.sum()
    count = min(len(episodes) - 1, int(np.searchsorted(np.cumsum(sizes), wanted)) + 1)
    chosen = {int(episodes[at]) for at in order[:count]}
    return set(map(int, episodes)) - chosen, chosen
