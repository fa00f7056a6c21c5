"""The op `experts` on QuACK's Hopper GEMMs: the same sums as the Triton kernels, with the tiles of a CuTe library.

Six products of variable size, one launch for all experts each, follow SonicMoE (arXiv 2512.14080): the rows of tokens
are gathered inside the first product of either direction, SwiGLU and its gradient are epilogues, and the gradients of
weights are added into their buffers by the store. Nothing that is permuted is kept for backward but the
projected rows `gate_up`.

Shape legend: t tokens, k experts chosen for each token, e experts held here, n hidden size, f size of an expert, p rows
(pairs of a token and an expert, sorted by expert; `offsets` [e+1] says where each expert starts).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from loong_core.parallel import gradient_buffer
from loong_core.references.experts import Pairs
from loong_ops.permutation import count_of, sort_by_expert
from loong_ops.quack_products import ALIGNMENT, Tile, config, fits, needs_bfloat16, plain, product
from loong_ops.weight_gradient import weight_gradient

TILES: Mapping[str, Tile] = {
    "up": Tile(128, 192, pingpong=True),
    "down": Tile(128, 192, pingpong=True),
    "d_act": Tile(128, 128, pingpong=True),
    "d_hidden": Tile(256, 128),
    "d_down": Tile(256, 192),
    "d_up": Tile(128, 192, pingpong=True),
}
"""Product -> tile: the fastest of `bench/quack_experts.py` on an H200 with 32,768 tokens, n = 2048, f = 768, 8 of 128
experts: 763, 775, 509, 769, 589 and 605 TFLOP/s (docs/performance.md). The last two write; where they add to what other
micro-batches left, they take 5 to 8 % longer."""


def experts(
    hidden: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    chosen: Tensor,
    *,
    first: int = 0,
    pairs: Pairs = None,
    _tiles: Mapping[str, Tile] | None = None,
) -> Tensor:
    """As `loong_core.references.experts.experts`, in bfloat16 on a Hopper card.

    hidden [t,n], up [e,2f,n], down [e,n,f], weights and chosen [t,k] -> [t,n]. Products sum in float32; `gate_up`, the
    activation and every expert's result are rounded to bfloat16. The host waits for nothing but `pairs`, once the rows
    are being sorted. Sizes that are no multiple of 8 are padded, which copies the weights. Raises `Unsupported` for
    other dtypes.
    """
    needs_bfloat16("experts", "triton", hidden=hidden, up=up, down=down)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, up, down, weights))
    settings = (first, pairs, keep, _tiles or TILES)
    size, inner = down.shape[1:]
    if fits(size, inner):
        result: Tensor = _Experts.apply(hidden, up, down, weights, chosen, *settings)
        return result
    n, f = -size % ALIGNMENT, -inner % ALIGNMENT
    up = functional.pad(up.unflatten(1, (2, inner)), (0, n, 0, f)).flatten(1, 2)
    down = functional.pad(down, (0, f, 0, n))
    hidden = functional.pad(hidden, (0, n))
    result = _Experts.apply(hidden, up, down, weights, chosen, *settings)
    return result[:, :size]


GRANULE = 2048
"""Numbers of rows, where only some of the experts are held here, are rounded up to a multiple of this."""


class Rows(NamedTuple):
    """The sorted rows as the products want them: int32 token [p], float32 weight [p], and the permutation's own."""

    token: Tensor
    weight: Tensor
    position: Tensor
    offsets: Tensor

    def only(self, rows: int) -> Rows:
        """The same with room for so many rows; those behind are not used."""
        return self._replace(token=self.token[:rows], weight=self.weight[:rows])


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        up: Tensor,
        down: Tensor,
        weights: Tensor,
        chosen: Tensor,
        first: int,
        pairs: Pairs,
        keep: bool,
        tiles: Mapping[str, Tile],
    ) -> Tensor:
        # Sorted before the host may have to wait for the number of rows: the device has work meanwhile.
        sorted_rows = _sorted_rows(weights, chosen, len(up), first) if chosen.numel() else None
        rows = _room(count_of(pairs, chosen), chosen.numel())
        ctx.tiles, ctx.empty = tiles, sorted_rows is None or hidden.numel() == 0 or rows == 0
        if sorted_rows is None or ctx.empty:
            ctx.save_for_backward(hidden, up, down, weights)
            return torch.zeros_like(hidden)
        hidden_rows = plain(hidden)
        sorted_rows = sorted_rows.only(rows)
        gate_up, act = _gated(hidden_rows, plain(up), sorted_rows, keep, tiles["up"])
        result = hidden.new_empty(rows, hidden.shape[1])
        product(act, plain(down), result, tiles["down"], cu_seqlens_m=sorted_rows.offsets)
        if keep:
            ctx.save_for_backward(hidden_rows, up, down, weights, gate_up, *sorted_rows)
        return _sum_of_rows(result, sorted_rows.position, weights.contiguous(), len(hidden))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.empty:
            return (*_no_gradients(ctx), None, None, None, None, None)
        hidden, up, down, weights, gate_up, *parts = ctx.saved_tensors
        rows, grad, tiles = Rows(*parts), grad.contiguous(), ctx.tiles
        needs_hidden, needs_up, needs_down, needs_weights = ctx.needs_input_grad[:4]
        d_gate_up, act, d_weight = _d_gated(grad, plain(down), gate_up, rows, needs_weights, tiles["d_act"])
        del gate_up
        d_down = d_up = d_hidden = d_weights = None
        if d_weight is not None:
            d_weights = _by_pair(d_weight, rows.position, weights)
        if needs_down:
            d_down = _weight_gradient(down, grad, act, rows, tiles["d_down"], alternating=False)
        del act
        if needs_up:
            d_up = _weight_gradient(up, hidden, d_gate_up, rows, tiles["d_up"], alternating=True)
        if needs_hidden:
            result = hidden.new_empty(len(rows.token), hidden.shape[1])
            product(
                d_gate_up, plain(up).mT, result, tiles["d_hidden"],
                cu_seqlens_m=rows.offsets, concat_layout=("B",),
            )  # fmt: skip
            d_hidden = _sum_of_rows(result, rows.position, None, len(hidden))
        return d_hidden, d_up, d_down, d_weights, None, None, None, None, None


# ------------------------------------------------------------------------------------------------ the six products
def _gated(hidden: Tensor, up: Tensor, rows: Rows, keep: bool, tile: Tile) -> tuple[Tensor | None, Tensor]:
    """hidden[token] @ up^T with alternating columns [p,2f] (None unless kept), and silu(gate) * value of it [p,f]."""
    from quack.gemm_interface import gemm_gated

    gate_up, act = gemm_gated(
        hidden,
        up.mT,
        activation="swiglu",
        cu_seqlens_m=rows.offsets,
        A_idx=rows.token,
        store_preact=keep,
        config=config(tile),
        tuned=False,
        concat_layout=("B",),
    )
    return gate_up, act


def _d_gated(
    grad: Tensor, down: Tensor, gate_up: Tensor, rows: Rows, needs_weights: bool, tile: Tile
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of `gate_up` [p,2f], weight * activation [p,f], and the gradient of the row's weight [p]."""
    from quack.gemm_interface import gemm_dgated

    found = gemm_dgated(
        grad,
        down,
        gate_up,
        activation="swiglu",
        colvec_scale=rows.weight,
        colvec_reduce=needs_weights,
        cu_seqlens_m=rows.offsets,
        A_idx=rows.token,
        dynamic_scheduler=False,
        config=config(tile),
        tuned=False,
    )
    return found[0], found[1], found[2] if needs_weights else None


def _weight_gradient(
    weight: Tensor, gathered: Tensor, rows_grad: Tensor, rows: Rows, tile: Tile, *, alternating: bool
) -> Tensor | None:
    """gathered[token]^T @ rows_grad for every expert: into the weight's buffer where it has one.

    gathered [t,n] and rows_grad [p,c] give [e,n,c]; `alternating`: c = 2f alternates, and the weight is [e,2f,n].
    """

    def write(target: Tensor, add: bool) -> None:
        product(
            gathered.t(),
            rows_grad.t(),
            target.mT if alternating else target,
            tile,
            cu_seqlens_k=rows.offsets,
            A_idx=rows.token,
            add_to_output=add,
            concat_layout=("out",) if alternating else None,
        )

    return weight_gradient(weight, write)


# ------------------------------------------------------------------------------------------------- rows and tokens
def _room(rows: int, most: int) -> int:
    """Rows to make room for. QuACK keeps a plan of each call under the shapes of its tensors, for ever: with another
    number in every call it would plan anew each time, for half a millisecond, and its memory would grow."""
    return min(-(-rows // GRANULE) * GRANULE, most)


def _sorted_rows(weights: Tensor, chosen: Tensor, held: int, first: int) -> Rows:
    """Those of the experts held here, with room for all pairs."""
    rows = chosen.numel()
    permutation = sort_by_expert(chosen, held, first, rows, 128)
    token = torch.empty(rows, dtype=torch.int32, device=chosen.device)
    weight = torch.empty(rows, dtype=torch.float32, device=chosen.device)
    _rows_kernel[(triton.cdiv(rows, 1024),)](
        permutation.order, permutation.offsets, weights.contiguous(), token, weight,
        rows, chosen.shape[1], held, BLOCK=1024,
    )  # fmt: skip
    return Rows(token, weight, permutation.position, permutation.offsets)


@triton.jit
def _rows_kernel(order, offsets, weights, token, weight, rows, slots, held, BLOCK: tl.constexpr):
    """Token and weight of every row; unused rows get token 0 and weight 0, as what they would read is not written."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = row < tl.minimum(rows, tl.load(offsets + held))
    pair = tl.load(order + row, mask=used, other=0)
    tl.store(token + row, pair // slots, mask=row < rows)
    tl.store(weight + row, tl.load(weights + pair, mask=used, other=0).to(tl.float32), mask=row < rows)


def _sum_of_rows(rows: Tensor, position: Tensor, weights: Tensor | None, tokens: int) -> Tensor:
    """The sum of every token's rows [p,n] -> [t,n], times `weights` [t,k] where given: in float32, slot after slot."""
    size, slots = rows.shape[1], position.numel() // tokens
    out = rows.new_empty(tokens, size)
    block = min(1024, triton.next_power_of_2(size))
    _sum_kernel[(tokens, triton.cdiv(size, block))](
        rows, position, weights, out, size, SLOTS=slots, BLOCK=block, num_warps=4
    )
    return out


@triton.jit
def _sum_kernel(rows, position, weights, out, size, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(position + token * SLOTS + slot).to(tl.int64)
        value = tl.load(rows + row * size + column, mask=(row >= 0) & (column < size), other=0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + token * SLOTS + slot).to(tl.float32)
        total += value
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=column < size)


def _by_pair(row_grad: Tensor, position: Tensor, weights: Tensor) -> Tensor:
    """The gradient of every row's weight [p] where `weights` [t,k] has it; zero where the expert is held elsewhere."""
    out = torch.empty_like(weights, memory_format=torch.contiguous_format)
    pairs = out.numel()
    _by_pair_kernel[(triton.cdiv(pairs, 1024),)](row_grad, position, out, pairs, BLOCK=1024)
    return out


@triton.jit
def _by_pair_kernel(row_grad, position, out, pairs, BLOCK: tl.constexpr):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(position + pair, mask=pair < pairs, other=-1)
    value = tl.load(row_grad + row, mask=row >= 0, other=0)
    tl.store(out + pair, value.to(out.dtype.element_ty), mask=pair < pairs)


def _no_gradients(ctx: Any) -> list[Tensor | None]:
    """Zeros for the inputs that want a gradient; a weight with a buffer only says that nothing is missing in it."""
    found: list[Tensor | None] = []
    for needed, tensor in zip(ctx.needs_input_grad[:4], ctx.saved_tensors, strict=True):
        found.append(torch.zeros_like(tensor) if needed else None)
        if needed and gradient_buffer.buffer_of(tensor) is not None:
            gradient_buffer.mark_added(tensor)
            found[-1] = None
    return found
