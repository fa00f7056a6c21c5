"""The reference update is torch's AdamW, and a master weight survives being kept as a bfloat16 and 16 bits."""

from __future__ import annotations

import pytest
import torch

from loong_core.references.adamw import adamw, join, split
from loong_core.testing import AdamWContract

ONE = torch.ones(())


class TestReference(AdamWContract):
    implementation = "torch"


def same_bits(one, other):
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_every_kind_of_float32_comes_back_exactly():
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32)
    signs_and_exponents = torch.arange(512, dtype=torch.int64) << 23
    lows = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF, 0x17FFF, 0x18000, 0x18001, 0x7FFFFF])
    edges = (signs_and_exponents[:, None] + lows).flatten().to(torch.int32)
    for bits in (random, edges):
        master = bits.view(torch.float32)
        rounded, remainder = split(master)
        assert (rounded.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
        assert same_bits(join(rounded, remainder), master)


def test_every_pair_that_an_update_can_leave_is_the_split_of_what_it_joins_to():
    parameter = torch.arange(-(2**15), 2**15, 7, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    remainder = torch.arange(-(2**15), 2**15, 7, dtype=torch.int32).to(torch.int16).flip(0)
    rounded, low = split(join(parameter, remainder))
    assert torch.equal(rounded.view(torch.int16), parameter.view(torch.int16)) and torch.equal(low, remainder)


def test_the_parameter_is_the_nearest_bfloat16():
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32)
    master = bits.view(torch.float32)
    master = master[master.isfinite()]
    rounded, remainder = split(master)
    halves = remainder == -(2**15)
    assert torch.equal(rounded[~halves], master[~halves].bfloat16())
    # Between two neighbours torch takes the even one, `split` the larger one.
    away = torch.tensor([1.0 + 2**-8, -1.0 - 2**-8])
    assert split(away)[0].tolist() == [1.0 + 2**-7, -1.0 - 2**-7]


def test_split_takes_views():
    master = torch.randn(6, 4).t()
    rounded, remainder = split(master)
    assert torch.equal(join(rounded, remainder), master)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_torchs_adamw_bit_for_bit(dtype):
    torch.manual_seed(0)
    theirs = torch.randn(50, 7, dtype=dtype, requires_grad=True)
    ours, moments = theirs.detach().clone(), [torch.zeros(50, 7, dtype=dtype) for _ in range(2)]
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for step in range(1, 6):
        theirs.grad = torch.randn_like(theirs)
        adamw(
            ours, theirs.grad, *moments, None,
            lr=1e-2, betas=(0.9, 0.95), eps=1e-8, decay=0.1, step=step, scale=ONE.to(dtype),
        )  # fmt: skip
        optimizer.step()
        assert torch.equal(ours, theirs)


def test_slices_do_not_show(monkeypatch):
    torch.manual_seed(0)
    start = torch.randn(100)
    results = []
    for size in (7, 1000):
        monkeypatch.setattr("loong_core.references.adamw._SLICE", size)
        rounded, remainder = split(start)
        tensors = [rounded, torch.cos(start), torch.zeros(100), torch.zeros(100), remainder]
        adamw(*tensors, lr=0.1, betas=(0.9, 0.95), eps=1e-8, decay=0.1, step=1, scale=ONE)
        results.append(tensors)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
