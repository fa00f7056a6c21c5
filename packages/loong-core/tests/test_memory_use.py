"""Memory of a process, and of the fullest of two ranks."""

from __future__ import annotations

import torch

from loong_core.testing.ranks import run_ranks
from loong_core.train.memory_use import fullest_rank, used


def test_resident_size_grows_with_what_is_touched() -> None:
    before = used("cpu")
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    assert used("cpu") - before > 48 * 2**20 and block[-1] == 1


def _fullest(rank: int) -> list[int]:
    block = torch.ones((1 + 127 * rank) * 2**20, dtype=torch.uint8)
    return [used("cpu"), fullest_rank("cpu")[0], int(block[0])]


def test_every_rank_reports_the_fullest() -> None:
    first, second = run_ranks(2, _fullest, init=True)
    assert second[0] - first[0] > 64 * 2**20
    assert first[1] == second[1] >= second[0] - 8 * 2**20


def _stopping(rank: int) -> list[bool]:
    return [fullest_rank("cpu", stop=rank == 1)[1], fullest_rank("cpu")[1]]


def test_one_rank_stops_all() -> None:
    assert run_ranks(2, _stopping, init=True) == [[True, False], [True, False]]
    assert fullest_rank("cpu", stop=True)[1]
