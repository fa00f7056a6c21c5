"""What gloo lacks: averages, scaled sums, uneven parts, lists as split sizes, against results computed by hand."""

from __future__ import annotations

from loong_core.testing.ranks import run_ranks


def test_average_and_scaled_sum():
    def reduce(rank):
        import torch
        import torch.distributed as dist

        mean = torch.full((2,), float(rank + 1))
        work = dist.all_reduce(mean, op=dist.ReduceOp.AVG, async_op=True)
        work.wait()
        scaled = torch.full((2,), float(rank + 1))
        dist.all_reduce(scaled, op=dist._make_nccl_premul_sum(0.5))
        largest = torch.full((2,), float(rank + 1))
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        part = torch.zeros(1)
        dist.reduce_scatter_tensor(part, torch.tensor([1.0, 2.0, 3.0]) * (rank + 1), op=dist.ReduceOp.AVG)
        return [mean.tolist(), scaled.tolist(), largest.tolist(), part.tolist()]

    results = run_ranks(3, reduce, init=True, megatron=False)
    for rank, (mean, scaled, largest, part) in enumerate(results):
        assert mean == [2.0, 2.0] and scaled == [3.0, 3.0] and largest == [3.0, 3.0]
        assert part == [2.0 * (rank + 1)]


def test_uneven_gather_and_scatter_keep_their_inputs():
    def exchange(rank):
        import torch
        import torch.distributed as dist

        sizes = [1, 3, 0]
        parts = [torch.zeros(size, 2) for size in sizes]
        work = dist.all_gather(parts, torch.full((sizes[rank], 2), float(rank + 1)), async_op=True)
        work.wait()
        inputs = [torch.full((size, 2), float(rank + 1)) for size in sizes]
        output = torch.zeros(sizes[rank], 2)
        dist.reduce_scatter(output, inputs)
        kept = all(bool((part == rank + 1).all()) for part in inputs)
        return [[part.tolist() for part in parts], output.tolist(), kept]

    results = run_ranks(3, exchange, init=True, megatron=False)
    for rank, (parts, output, kept) in enumerate(results):
        assert parts == [[[1.0, 1.0]], [[2.0, 2.0]] * 3, []]
        assert output == [[6.0, 6.0]] * [1, 3, 0][rank]
        assert kept


def test_split_sizes_may_be_tensors_and_nccl_groups_become_gloo():
    def exchange(rank):
        import torch
        import torch.distributed as dist

        group = dist.new_group([0, 1], backend="nccl")
        received = torch.zeros(3)
        sent = torch.arange(3.0) + 10 * rank
        counts = [torch.tensor([2, 1]), torch.tensor([1, 2])]
        theirs = torch.tensor([counts[0][rank], counts[1][rank]])
        dist.all_to_all_single(received, sent, theirs, counts[rank], group=group)
        return [received.tolist(), dist.get_backend(group)]

    assert run_ranks(2, exchange, init=True, megatron=False) == [
        [[0.0, 1.0, 10.0], "gloo"],
        [[2.0, 11.0, 12.0], "gloo"],
    ]
