"""What a group's transport gathers and sums, on gloo; on GPUs that copy from each other in test_peer_copies.py."""

from __future__ import annotations

import pytest

from loong_core.testing.ranks import run_ranks


@pytest.mark.parametrize("name", ["auto", "collectives"])
def test_gloo_gathers_and_sums(name: str) -> None:
    def work(rank: int) -> bool:
        import torch
        import torch.distributed as dist

        from loong_core.parallel import transport
        from loong_core.references.sum_parts import sum_parts

        carrier = transport.between(dist.group.WORLD, name, sum_parts)
        assert carrier is transport.between(dist.group.WORLD, name, sum_parts)
        mine = torch.arange(10.0).reshape(2, 5).t() + 100 * rank  # not contiguous
        everyones, handle = carrier.gather(mine)
        handle.wait()
        for other in range(3):
            torch.testing.assert_close(everyones[other], mine + 100 * (other - rank), rtol=0, atol=0)
        assert [box.shape for box in carrier.outboxes([mine, everyones], torch.int32)] == [mine.shape, everyones.shape]
        summed = torch.empty(5, 2)
        carrier.scatter(everyones.flatten(0, 1) * (rank + 1), summed).wait()
        torch.testing.assert_close(summed, everyones[rank] * 6, rtol=0, atol=0)
        return True

    assert all(run_ranks(3, work, init=True, megatron=False))


def test_copies_that_cannot_be_are_refused() -> None:
    def work(rank: int) -> str:
        import torch.distributed as dist

        from loong_core.errors import Unsupported
        from loong_core.parallel import transport
        from loong_core.references.sum_parts import sum_parts

        with pytest.raises(Unsupported) as refused:
            transport.between(dist.group.WORLD, "copies", sum_parts)
        return str(refused.value)

    (text,) = run_ranks(1, work, init=True, megatron=False)
    assert "parallel.options.exchange: copies" in text
    assert "CUDA" in text
    assert "auto" in text
