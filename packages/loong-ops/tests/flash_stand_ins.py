"""FlashAttention-4's two functions with torch inside: what tests without a card compute with, and what is asked for
before those with one may run."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from loong_core.backends import cuda
from loong_core.references.attention import attention as causal_reference
from loong_core.references.ragged_attention import ragged_attention as ragged_reference
from loong_ops import support

needs_flash = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.probe().devices == 0, reason="needs a CUDA device"),
    pytest.mark.skipif(not all(support._flash4_packages().values()), reason="needs flash-attn-4"),
    # The DSL warns its own authors while it compiles.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]


class Kernels:
    """Stands where the two functions of `flash_attn.cute.interface` stand, on the memory that they are given.

    Refused are head sizes for which the package's own gradients on Hopper are wrong: those that come to another width
    in multiples of 16, as one of its kernels takes them, than in multiples of 32, as the next one does.
    """

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def forward(self, q, k, v, *, out, softmax_scale, causal, return_lse, **lengths):
        assert return_lse
        self.calls.append({"tensors": (q, k, v, out), **lengths})
        out.copy_(self._compute(q, k, v, softmax_scale, causal, lengths))
        return out, torch.zeros(q.shape[-2], *q.shape[:-2]), None, None, None

    def backward(self, q, k, v, out, dout, lse, *, softmax_scale, causal, deterministic, dq, dk, dv, **lengths):
        self.calls.append({"tensors": (q, k, v, out, dout, dq, dk, dv), "deterministic": deterministic, **lengths})
        widths = {part.shape[-1] for part in (q, v)}
        assert all(width > 128 or -(-width // 16) * 16 == -(-width // 32) * 32 for width in widths), widths
        assert q.shape[-2] == k.shape[-2] or len(widths) == 1, "grouped heads want values as wide as keys"
        inputs = [part.detach().requires_grad_() for part in (q, k, v)]
        with torch.enable_grad():
            found = torch.autograd.grad(self._compute(*inputs, softmax_scale, causal, lengths), inputs, dout)
        for target, gradient in zip((dq, dk, dv), found, strict=True):
            target.copy_(gradient)
        return dq, dk, dv

    def _compute(self, q, k, v, scale, causal, lengths):
        if not lengths:
            assert causal
            result = causal_reference(*(part.transpose(0, 1) for part in (q, k, v)), scale=scale)
            return result.unflatten(2, (q.shape[2], -1)).transpose(0, 1)
        offsets = [lengths[f"cu_seqlens_{side}"] for side in "qk"]
        longest = tuple(lengths[f"max_seqlen_{side}"] for side in "qk")
        for found, bound, rows in zip(offsets, longest, (q, k), strict=True):
            assert found.dtype == torch.int32 and found.is_contiguous() and bound >= int(found.diff().max())
            assert rows.dim() == 3 and rows.shape[0] == int(found[-1])
        if causal:
            assert offsets[0] is offsets[1]
            return self._packed(q, k, v, scale, offsets[0])
        q = q * (scale * q.shape[-1] ** 0.5)  # the reference has a scale of its own
        return ragged_reference(q, k, v, *offsets, longest).unflatten(1, q.shape[1:])

    @staticmethod
    def _packed(q, k, v, scale, offsets):
        ends = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        parts = [causal_reference(*(part[a:b, None] for part in (q, k, v)), scale=scale)[:, 0] for a, b in ends]
        return torch.cat(parts).unflatten(1, (q.shape[1], -1))


def install(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """`flash_attn.cute.interface` replaced for one test."""
    stand_in = Kernels()
    interface = types.ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = stand_in.forward, stand_in.backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
    return stand_in
