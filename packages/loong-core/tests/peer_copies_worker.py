"""One rank of test_peer_copies.py, under torch.distributed.run: copies beside collectives, with ranks held up."""

from __future__ import annotations

import os
import random
import sys
from typing import Any

import torch
import torch.distributed as dist

from loong_core.parallel import peer_copies, transport
from loong_core.references.sum_parts import sum_parts

ROUNDS = 60


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    group = dist.group.WORLD
    copies, collectives = transport.between(group, "copies", sum_parts), transport.Collectives(group)
    common, own = random.Random(3), random.Random(rank)
    generator = torch.Generator(device="cuda").manual_seed(rank)
    for number in range(ROUNDS):
        # Sizes grow and shrink, so that slots are made anew in between; pieces are on their way at the same time.
        dtype = common.choice([torch.bfloat16, torch.float32, torch.int32])
        pieces, rows = common.randint(1, 4), common.choice([1, 7, 300, 5000])
        columns = common.choice([1, 33, 512])
        sent = [
            torch.randn(rows, columns, generator=generator, device="cuda").mul(100).to(dtype) for _ in range(pieces)
        ]
        rooms = [piece.new_empty((ranks, *piece.shape)) if own.random() < 0.5 else None for piece in sent]
        arriving = [copies.gather(piece, room) for piece, room in zip(sent, rooms, strict=True)]
        _hold_up(own)
        leaving, sums = [], []
        for piece, (everyones, handle) in zip(sent, arriving, strict=True):
            exact, there = collectives.gather(piece)
            there.wait()
            handle.wait()
            assert torch.equal(everyones, exact), (number, rank)
            if dtype != torch.int32:
                sums.append((torch.empty_like(piece), exact.float().flatten(0, 1) * (rank + 1)))
                leaving.append(copies.scatter(sums[-1][1].to(dtype), sums[-1][0]))
                _hold_up(own)
        for handle, (found, everyones) in zip(leaving, sums, strict=True):
            handle.wait()
            exact = torch.empty(rows, columns, device="cuda")
            collectives.scatter(everyones.to(dtype).float(), exact).wait()
            torch.testing.assert_close(
                found.float(), exact.to(dtype).float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3
            )
    _turns(rank, ranks, group, common, own, generator)
    torch.cuda.synchronize()
    assert peer_copies.shared_bytes() > 0
    print(f"rank {rank} of {ranks}: {ROUNDS} rounds equal")
    dist.destroy_process_group()


def _turns(
    rank: int, ranks: int, group: Any, common: random.Random, own: random.Random, generator: torch.Generator
) -> None:
    """What is put together where others read it, each pair added up after the next was sent."""
    copies = transport.between(group, "copies", sum_parts, transport.Cargo("gradients", urgent=False, ahead=2))
    collectives = transport.Collectives(group)
    before: list[tuple[torch.Tensor, torch.Tensor, transport.Handle]] = []
    for _ in range(ROUNDS):
        shapes = [(common.choice([1, 7, 3000]), common.choice([1, 33, 512])) for _ in range(common.randint(1, 2))]
        like = [torch.empty(ranks * rows, columns, device="cuda") for rows, columns in shapes]
        leaving = []
        outboxes = copies.outboxes(like, torch.float32)
        for outbox in outboxes:
            outbox.normal_(generator=generator)
            _hold_up(own)
        for outbox, (rows, columns) in zip(outboxes, shapes, strict=True):
            exact, found = torch.empty(2, rows, columns, device="cuda")
            collectives.scatter(outbox, exact).wait()
            leaving.append((found, exact, copies.scatter(outbox, found)))
        for found, exact, handle in before:
            handle.wait()
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
        before = leaving
    for found, exact, handle in before:
        handle.wait()
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def _hold_up(own: random.Random) -> None:
    """Some of the time this rank's device is busy, or its host, for up to 20 ms."""
    if own.random() < 0.3:
        torch.cuda._sleep(own.randint(1, 30_000_000))
    if own.random() < 0.1:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
