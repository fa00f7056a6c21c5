"""The sort of rows by expert, against a stable sort of torch."""

from __future__ import annotations

import pytest
import torch

from loong_core.backends import cuda
from loong_ops.permutation import BLOCK, sort_by_expert

DEVICE = "cuda" if cuda.probe().devices else "cpu"


def check(chosen, experts, first, rows, tile):
    plan = sort_by_expert(chosen.to(DEVICE), experts, first, rows, tile)
    plan = plan._replace(**{name: part.cpu() for name, part in plan._asdict().items() if name != "tile"})
    local = chosen.flatten() - first
    held = ((local >= 0) & (local < experts)).nonzero().squeeze(1)
    order = held[local[held].argsort(stable=True)]
    counts = torch.bincount(local[held], minlength=experts)
    assert plan.order[: len(order)].tolist() == order.tolist()
    assert plan.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    assert plan.position[order].tolist() == list(range(len(order)))
    assert set(plan.position.tolist()) <= {-1, *range(len(order))}
    assert (plan.position == -1).sum() == chosen.numel() - len(order)
    assert plan.heaviest.tolist() == sorted(range(experts), key=lambda expert: (-int(counts[expert]), expert))
    expected = [
        [expert, start, min(start + tile, end)]
        for expert, (begin, end) in enumerate(zip(plan.offsets.tolist(), plan.offsets.tolist()[1:], strict=False))
        for start in range(begin, end, tile)
    ]
    expected.append([-1, len(order), min(len(order) + tile, rows)])
    tiles = plan.tiles.tolist()
    assert tiles[: len(expected)] == expected
    assert all(expert == -1 and first == last for expert, first, last in tiles[len(expected) :])


@pytest.mark.parametrize("pairs", [1, 7, BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("experts", [1, 3, 8])
def test_it_is_a_stable_sort(pairs, experts):
    chosen = torch.randint(0, experts, (pairs, 1), generator=torch.Generator().manual_seed(pairs))
    check(chosen, experts, 0, pairs, 16)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_experts_held_elsewhere_leave_rows_unused(kind):
    chosen = torch.randint(0, 9, (50, 3), generator=torch.Generator().manual_seed(0)).to(kind)
    held = int(((chosen >= 4) & (chosen < 7)).sum())
    check(chosen, 3, 4, 150, 16)
    check(chosen, 3, 4, held, 16)


def test_one_expert_takes_all():
    check(torch.full((40, 2), 2), 5, 0, 80, 16)


def test_no_expert_is_held_here():
    check(torch.zeros(9, 2, dtype=torch.int64), 4, 3, 18, 16)


@pytest.mark.gpu
def test_more_blocks_than_one_running_sum_holds():
    check(torch.randint(0, 128, (32768, 8), generator=torch.Generator().manual_seed(1)), 128, 0, 262144, 128)
