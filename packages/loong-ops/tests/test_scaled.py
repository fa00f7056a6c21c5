"""A tensor times one number: the kernel beside torch, on a device or under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from loong_ops.scaled import launch, write_scaled
from loong_ops.support import interpreted

DEVICE = "cpu" if interpreted() else "cuda"


@pytest.mark.parametrize("count", [1, 4096, 10_007])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("source", "out"), [("float32", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_the_kernel_is_torchs_product(source: str, out: str, add: bool, count: int) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(count, generator=generator).to(getattr(torch, source)).to(DEVICE)
    before = torch.randn(count, generator=generator).to(getattr(torch, out)).to(DEVICE)
    factor = torch.tensor([0.3], device=DEVICE)
    found = before.clone() if add else torch.full_like(before, float("nan"))
    launch(values, factor, found, add)
    exact = values.double() * factor.double() + (before.double() if add else 0.0)
    # The interpreter truncates where a device rounds.
    limit = 8e-3 if out == "bfloat16" else 1e-6
    torch.testing.assert_close(found.double(), exact, rtol=limit, atol=1e-7)


@pytest.mark.parametrize("add", [False, True])
def test_what_the_kernel_does_not_take_is_torchs(add: bool) -> None:
    source = torch.arange(6.0).view(2, 3)
    out = torch.ones(3, 2).t()
    write_scaled(source, torch.tensor([2.0]), out, add=add)
    assert torch.equal(out, source * 2 + (1 if add else 0))
    write_scaled(source[:0], torch.tensor([2.0]), out[:0], add=add)
