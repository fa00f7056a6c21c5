"""Zigzag rows of context parallelism: a partition of the row, balanced, and the same cut for every tensor."""

from __future__ import annotations

import pytest
import torch

from loong_core.errors import Unsupported
from loong_core.parallel import context


@pytest.mark.parametrize(("seq_len", "size"), [(1, 1), (7, 1), (4, 2), (12, 2), (18, 3), (64, 8)])
def test_rows_partition_the_row_and_balance_the_causal_work(seq_len, size):
    parts = [context.rows(seq_len, size, rank) for rank in range(size)]
    assert torch.cat(parts).sort().values.tolist() == list(range(seq_len))
    assert torch.equal(torch.cat(parts), context.gathered_rows(seq_len, size))
    assert len({part.numel() for part in parts}) == 1
    assert len({int((part + 1).sum()) for part in parts}) == 1


def test_the_layout_is_megatrons():
    assert context.rows(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert context.rows(8, 2, 1).tolist() == [2, 3, 4, 5]


def test_megatron_cuts_a_batch_alike():
    from loong_core.testing.ranks import run_ranks

    tokens = torch.arange(24).reshape(2, 12)

    def cut(rank):
        from megatron.core import parallel_state
        from megatron.core.utils import get_batch_on_this_cp_rank

        parallel_state.initialize_model_parallel(context_parallel_size=2)
        theirs = get_batch_on_this_cp_rank({"tokens": tokens.clone()}, is_hybrid_cp=False)["tokens"]
        return [theirs.tolist(), context.slice_batch({"tokens": tokens}, 2, rank)["tokens"].tolist()]

    for theirs, ours in run_ranks(2, cut, init=True):
        assert theirs == ours


def test_slice_batch_cuts_every_tensor_and_keeps_types():
    batch = {
        "tokens": torch.arange(24).reshape(2, 12),
        "positions": torch.arange(12).expand(2, 12),
        "weights": torch.rand(2, 12, 3),
    }
    assert context.slice_batch(batch, 1, 0) is batch
    index = context.rows(12, 3, 1)
    local = context.slice_batch(batch, 3, 1)
    assert list(local) == list(batch)
    for name, tensor in local.items():
        assert torch.equal(tensor, batch[name][:, index]) and tensor.dtype == batch[name].dtype


@pytest.mark.parametrize(("seq_len", "size"), [(6, 2), (13, 2), (16, 3)])
def test_an_uneven_row_is_refused_with_numbers(seq_len, size):
    with pytest.raises(
        Unsupported, match=f"data.seq_len = {seq_len} .*parallel.cp = {2 * size}.*multiple of {2 * size}"
    ):
        context.rows(seq_len, size, 0)
