"""Sample order as a pure function of seed and epoch, from the raw bits of a counter-based generator.

Only `random_raw` of Philox is used, whose stream numpy guarantees; shuffles of numpy may change between versions.
"""

from __future__ import annotations

import numpy as np

HELD_OUT_EPOCH = 2**63
"""A stream number no training epoch reaches."""


def keys(count: int, seed: int, epoch: int) -> np.ndarray:
    """`count` random uint64 numbers that depend on `seed` and `epoch` alone."""
    generator = np.random.Philox(key=np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64))
    return np.asarray(generator.random_raw(count), dtype=np.uint64).reshape(count)


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `range(count)`, int64, that depends on `seed` and `epoch` alone."""
    return np.argsort(keys(count, seed, epoch), kind="stable").astype(np.int64)


def split_held_out(documents: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the samples to train on and of those held out, each ascending.

    `documents` [samples] is the number of the source row each sample was cut from. Whole documents are held out, in
    the order of their hash, until `fraction` of the samples is reached; so no document is on both sides. Fewer than 20
    documents are too coarse for that: then single samples are held out. At least one sample ends on each side.

    Raises:
        ValueError: fewer than two samples.
    """
    count = len(documents)
    if count < 2:
        raise ValueError("one sample cannot be split into training and held-out data")
    wanted = min(count - 1, max(1, round(fraction * count)))
    names, group, sizes = np.unique(documents, return_inverse=True, return_counts=True)
    if len(names) < 20:
        group, sizes = np.arange(count), np.ones(count, dtype=np.int64)
    order = permutation(len(sizes), seed, HELD_OUT_EPOCH)
    groups = min(len(sizes) - 1, int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1)
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[order[:groups]] = True
    held = chosen[group]
    return np.flatnonzero(~held), np.flatnonzero(held)
