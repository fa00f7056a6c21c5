"""One line of the table of `loong bench ops`: what is timed, and how much work that is by formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Thunk = Callable[[], object]
"""Runs what is measured once. Everything it reads exists already."""


class Missing(Exception):
    """Raised by `Row.make` where a library that the row needs is not installed; its text says which."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """An implementation of an op at one size.

    `make` builds the inputs on the CUDA device and returns the thunk to time; nothing is allocated before it is called.
    It raises `Missing` where its library is not there. `flops` are the floating point operations of one thunk and
    `bytes` the least that it moves through the device's memory, both by formula. `direction` is "forward", "backward"
    or "both" (forward and backward). Rows that are no `headline` are variants, shown only on demand.
    """

    op: str
    shape: str
    name: str
    direction: str
    make: Callable[[], Thunk]
    flops: float = 0.0
    bytes: float = 0.0
    headline: bool = True
