"""The head and its loss without the logits: gradients are made in forward, chunk by chunk, and scaled in backward.

A chunk's logits turn into their own gradient in place, which meets the hidden states and the weight at once, so that
nothing is computed twice. That gradient is for an upstream of 1; a backward with one factor for all tokens, as that of
a sum, multiplies by it. Where tokens have factors of their own, the weight's gradient is computed again.
Shape legend: t tokens, h hidden size, v vocabulary, n ranks that share it, w rows of the weight that take part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loong_core.parallel.gradient_buffer import buffer_to_fill, mark_added
from loong_core.references.cross_entropy import IGNORED, _check_targets
from loong_ops.cross_entropy import Share, write_gradients, write_losses
from loong_ops.quack_products import LONG, Tile
from loong_ops.scaled import write_scaled

CHUNKS = (4096, 3072, 2048)
"""Tokens at a time, to choose from. Fewer make the sum over chunks of the weight's gradient, which is read and written
for each, dearer than the products themselves."""
ALIGNMENT = 64
"""Logits per row are a multiple of this, because matrix products are slow on rows that begin anywhere."""
FLOAT16_SCALE = 1024.0
"""Factor of the gradient of float16 logits: without it the softmax of 150,000 tokens lies below float16's smallest
normal number."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocabulary: int,
    group: Any = None,
    _chunk: int | None = None,
    _products: Products | None = None,
) -> Tensor:
    """Cross entropy of `hidden @ weight.T`: hidden [t,h], weight [v/n,h], targets [t] -> loss [t] in float32.

    Rank r of the n ranks of `group` (None: one) holds rows r * v/n onwards of the weight; rows from `vocabulary` on are
    padding and take no part. A target of -100 gives loss 0 and no gradient. The gradient of `hidden` is the part that
    comes from this rank's rows. It takes the memory of one chunk of logits (`_chunk` tokens, chosen by size unless
    given), and from forward to backward that of both gradients, the weight's in float32.
    Source of the gradient made in forward: Hsu et al., 2024 (Liger Kernel).

    Raises `DataError` on a CPU (elsewhere the device reports it) for other targets outside the vocabulary.
    """
    _check_targets(targets, vocabulary)
    products = _products or Products()
    tokens, size = hidden.shape
    chunk = _chunk or chunk_tokens(tokens, size, products)
    # Inside an autograd function gradients always look switched off, so it is asked here.
    wanted = torch.is_grad_enabled()
    share = Share.of(vocabulary, weight.shape[0], group)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets.contiguous(), share, chunk, wanted, products)
    return loss


class Products:
    """The three matrix products of a chunk, by torch. Shapes: hidden [c,h], weight [w,h], gradient [c,w] of the c
    tokens' logits. Results are written to memory that is given, with sums in float32."""

    def tile(self, rows: int, columns: int) -> Tile:
        """How `hidden_gradient` cuts a result of this size; cuBLAS's fastest."""
        return LONG

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        """out [c,w] = hidden @ weight.T."""
        torch.mm(hidden, weight.t(), out=out)

    def hidden_gradient(self, gradient: Tensor, weight: Tensor, out: Tensor, *, alpha: float) -> None:
        """out [c,h] = alpha * gradient @ weight."""
        _multiply(gradient, weight, out, alpha=alpha)

    def weight_gradient(self, gradient: Tensor, hidden: Tensor, out: Tensor, *, alpha: float, add: bool) -> None:
        """out [w,h] = alpha * gradient.T @ hidden, or with `add` that more than it was; `out` is float32."""
        _multiply(gradient.t(), hidden, out, beta=float(add), alpha=alpha)


def chunk_tokens(tokens: int, hidden: int, products: Products) -> int:
    """Tokens at a time: at most a tenth of all (or the fewest of `CHUNKS`), such that the gradient of a chunk's hidden
    states, the one product with few output tiles, keeps the device busy to its last tile."""

    def busy(chunk: int) -> float:
        return round(products.tile(chunk, hidden).busy(chunk, hidden), 2)

    allowed = [chunk for chunk in CHUNKS if chunk <= tokens // 10] or [min(CHUNKS)]
    return max(allowed, key=lambda chunk: (busy(chunk), chunk))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        share: Share,
        chunk: int,
        wanted: bool,
        products: Products,
    ) -> Tensor:
        rows, used = hidden.contiguous(), _used(weight, share)
        loss = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        peaks, inverses = torch.empty((2, *loss.shape), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(rows) if wanted and ctx.needs_input_grad[0] else None
        weight_gradient = None
        if wanted and ctx.needs_input_grad[1]:
            # The first chunk writes over it: zeros are needed only where there is none.
            fresh = torch.empty_like if targets.numel() else torch.zeros_like
            weight_gradient = fresh(used, dtype=torch.float32)
        scale = FLOAT16_SCALE if hidden.dtype == torch.float16 else 1.0
        for part, logits in _chunks(rows, used, chunk, products):
            place = None if hidden_gradient is None and weight_gradient is None else logits
            write_losses(logits, targets[part], share, loss[part], peaks[part], inverses[part], place, scale)
            gradient = logits[:, : used.shape[0]]
            if hidden_gradient is not None:
                products.hidden_gradient(gradient, used, hidden_gradient[part], alpha=1 / scale)
            if weight_gradient is not None:
                add = part.start > 0
                products.weight_gradient(gradient, rows[part], weight_gradient, alpha=1 / scale, add=add)
        again = None if weight_gradient is None else hidden
        ctx.save_for_backward(again, weight, targets, peaks, inverses, hidden_gradient, weight_gradient)
        ctx.share, ctx.chunk, ctx.products = share, chunk, products
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _, weight, targets, _, _, hidden_gradient, weight_gradient = ctx.saved_tensors
        factor = _factor(gradients[0], targets)
        result_hidden = result_weight = None
        if hidden_gradient is not None:
            result_hidden = torch.empty_like(hidden_gradient)
            if factor.numel() > 1:
                torch.mul(hidden_gradient, factor[:, None], out=result_hidden)
            else:
                write_scaled(hidden_gradient, factor, result_hidden)
        if weight_gradient is not None:
            target, write = buffer_to_fill(weight)
            if target is None:
                target = result_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
                write = True
            used = target[: weight_gradient.shape[0]]
            if write:
                target[used.shape[0] :].zero_()
            if factor.numel() > 1:
                _compute_again(ctx, factor, used, add=not write)
            else:
                write_scaled(weight_gradient, factor, used, add=not write)
            if result_weight is None:
                mark_added(weight)
        return result_hidden, result_weight, None, None, None, None, None


def _factor(upstream: Tensor, targets: Tensor) -> Tensor:
    """The upstream gradient [t], as [1] where it is one number for all tokens."""
    if upstream.numel() == 0:
        return upstream.new_zeros(1)
    # A stride of 0, as a sum's gradient has, tells so without a look at the device's memory.
    if upstream.numel() == 1 or upstream.stride(0) == 0:
        return upstream[:1]
    return torch.where(targets == IGNORED, 0.0, upstream)


def _compute_again(ctx: Any, factor: Tensor, target: Tensor, *, add: bool) -> None:
    """The weight's gradient [w,h] for a `factor` [t] of each token's own, added to `target` or written over it: in
    float32, rounded once."""
    hidden, weight, targets, peaks, inverses, _, _ = ctx.saved_tensors
    rows, used = hidden.contiguous(), _used(weight, ctx.share)
    direct = target.dtype == torch.float32
    total = target if direct else torch.empty_like(target, dtype=torch.float32)
    for part, logits in _chunks(rows, used, ctx.chunk, ctx.products):
        write_gradients(logits, targets[part], ctx.share, peaks[part], inverses[part], factor[part], logits)
        gradient = logits[:, : used.shape[0]]
        ctx.products.weight_gradient(gradient, rows[part], total, alpha=1.0, add=(add and direct) or part.start > 0)
    if not direct:
        (target.add_ if add else target.copy_)(total)


def _used(weight: Tensor, share: Share) -> Tensor:
    """The rows of the weight that take part, and of the padding what aligns them."""
    return weight[: -(-share.held // ALIGNMENT) * ALIGNMENT].contiguous()


def _chunks(hidden: Tensor, weight: Tensor, chunk: int, products: Products) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the tokens with their logits [tokens, w and padding], all in the same memory."""
    count, width = hidden.shape[0], weight.shape[0]
    memory = hidden.new_empty((min(chunk, count), -(-width // ALIGNMENT) * ALIGNMENT))
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        logits = memory[: part.stop - start]
        products.logits(hidden[part], weight, logits[:, :width])
        yield part, logits


def _multiply(left: Tensor, right: Tensor, result: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> None:
    """result = beta * result + alpha * left @ right, summed in float32 and rounded once, to the dtype of `result`."""
    if result.dtype == left.dtype:
        torch.addmm(result, left, right, beta=beta, alpha=alpha, out=result)
    elif result.device.type == "cuda":
        torch.addmm(result, left, right, out_dtype=result.dtype, beta=beta, alpha=alpha, out=result)
    else:  # a CPU multiplies equal dtypes only
        result.addmm_(left.to(result.dtype), right.to(result.dtype), beta=beta, alpha=alpha)
