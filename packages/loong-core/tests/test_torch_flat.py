"""Flat buffers: gradients arrive where they belong however they are delivered, and ranks agree on what they reduce."""

from __future__ import annotations

from typing import Any

import pytest

from loong_core.testing.ranks import run_ranks


class Work:
    """Helpers of the ranks; torch is imported there."""

    @staticmethod
    def store(shapes: list[tuple[int, ...]], dtype: Any, **settings: Any) -> tuple[list[Any], Any]:
        import torch

        from loong_core.parallel.torch_flat import FlatStore

        torch.manual_seed(3)
        parameters = [torch.nn.Parameter(torch.randn(*shape).to(dtype)) for shape in shapes]
        defaults = {"sharded": False, "gradients": torch.float32, "bucket_size": 40, "overlap": True}
        decayed = {parameter for parameter in parameters if parameter.dim() > 1}
        return parameters, FlatStore(parameters, decayed=decayed, **defaults | settings)


def test_parameters_keep_their_values_and_are_aligned() -> None:
    def work(rank: int) -> bool:
        import torch

        shapes = [(3, 5), (7,), (2, 2, 2), (1,)]
        torch.manual_seed(3)
        before = [torch.randn(*shape).bfloat16() for shape in shapes]
        parameters, store = Work.store(shapes, torch.bfloat16)
        assert len(store.buckets) == 1  # alone, everything is one bucket
        assert all(torch.equal(one, two) for one, two in zip(before, parameters, strict=True))
        flat = store.buckets[0].parameters
        offsets = [(p.data_ptr() - flat.data_ptr()) // 2 for p in parameters]
        assert all(offset % 64 == 0 for offset in offsets), offsets
        # Those with weight decay come first, so that one update reaches all of them.
        assert max(offsets[0], offsets[2]) < min(offsets[1], offsets[3])
        return True

    assert run_ranks(1, work, init=True, megatron=False) == [True]


def test_gradients_add_up_over_micro_batches_and_start_anew_each_step() -> None:
    def work(rank: int) -> list[float]:
        import torch

        (one, idle), store = Work.store([(4,), (3,)], torch.float32)
        found = []
        for factors in ((1.0, 2.0), (5.0,)):
            idle.main_grad.fill_(9.0)
            store.begin()
            for index, factor in enumerate(factors):
                if index == len(factors) - 1:
                    store.expect_last()
                (one * factor).sum().backward()
                assert one.grad is None
            store.finish()
            found += [one.main_grad.sum().item() / 4, idle.main_grad.sum().item()]
        return found

    assert run_ranks(1, work, init=True, megatron=False) == [[3.0, 0.0, 5.0, 0.0]]


def test_ops_may_write_gradients_themselves() -> None:
    """The protocol of `gradient_buffer`: the first to deliver writes over garbage, later ones add."""

    def work(rank: int) -> list[float]:
        import torch

        from loong_core.parallel import gradient_buffer

        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, weight: Any, factor: float) -> Any:
                ctx.weight, ctx.factor = weight, factor
                return weight.detach() * factor

            @staticmethod
            def backward(ctx: Any, gradient: Any) -> tuple[None, None]:
                buffer, empty = gradient_buffer.buffer_to_fill(ctx.weight)
                assert buffer is not None
                values = gradient.float() * ctx.factor
                buffer.copy_(values) if empty else buffer.add_(values)
                gradient_buffer.mark_added(ctx.weight)
                return None, None

        (weight, other), store = Work.store([(6,), (5, 2)], torch.bfloat16)
        found = []
        for factors in ((2.0, 3.0), (7.0,)):
            store.begin()
            for index, factor in enumerate(factors):
                if index == len(factors) - 1:
                    store.expect_last()
                (Scaled.apply(weight, factor).sum() + other.float().sum()).backward()
            store.finish()
            found += [weight.main_grad.mean().item(), other.main_grad.mean().item()]
        assert weight.grad is None
        return found

    assert run_ranks(1, work, init=True, megatron=False) == [[5.0, 2.0, 7.0, 1.0]]


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_that_use_different_parameters_reduce_the_same(sharded: bool) -> None:
    """Each rank leaves out another parameter; buckets are complete in different orders, and reduced in one."""

    def work(rank: int) -> list[float]:
        import torch

        shapes = [(50,), (60,), (70,)]
        parameters, store = Work.store(shapes, torch.float32, sharded=sharded)
        assert len(store.buckets) == 3
        store.begin()
        store.expect_last()
        used = [p for index, p in enumerate(parameters) if index != rank]
        sum((p * (rank + 1)).sum() for p in used).backward()
        store.finish()
        sums = torch.stack([gradient.sum() for gradient in store.counted()])
        torch.distributed.all_reduce(sums)
        return (sums / torch.tensor([50.0, 60.0, 70.0])).tolist()

    # Each bucket is one parameter; of three ranks all but one use it, with factors 1, 2, 3.
    assert run_ranks(3, work, init=True, megatron=False) == [[5.0, 4.0, 3.0]] * 3


@pytest.mark.parametrize("at_once", [False, True])
def test_every_rank_gets_what_others_updated(at_once: bool) -> None:
    def work(rank: int) -> list[bool]:
        import torch

        from loong_core.parallel.adamw import Shard

        parameters, store = Work.store([(9, 7), (65,), (3, 3)], torch.bfloat16, sharded=True)
        before = [parameter.detach().clone() for parameter in parameters]

        def make(parameter: Any, gradient: Any, decayed: bool) -> Shard:
            state = {name: torch.zeros_like(gradient) for name in ("exp_avg", "exp_avg_sq")}
            return Shard(
                start=0, parameter=parameter, gradient=gradient, remainder=None, decayed=decayed, counted=True, **state
            )

        shards, updates = store.shards(make)
        for parameter, shard in shards.items():
            whole = parameter.detach().flatten()[shard.start : shard.stop]
            assert torch.equal(whole, shard.parameter) and shard.parameter.data_ptr() == whole.data_ptr()
            assert shard.decayed == (parameter.dim() > 1)
        for span in updates:
            span.parameter.add_(1.0)
            if not at_once:
                store.gather_after(span)
        if at_once:
            store.gather()
        store.gathered()
        return [torch.equal(new, old + 1.0) for new, old in zip(parameters, before, strict=True)]

    assert run_ranks(4, work, init=True, megatron=False) == [[True] * 3] * 4
