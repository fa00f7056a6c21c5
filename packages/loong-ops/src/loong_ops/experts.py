"""The op `experts`: SwiGLU experts as grouped matrix products that keep nothing permuted and never ask the device.

Shape legend: t tokens, k experts chosen for each token, e experts held here, p rows (pairs of a token and an expert
held here, sorted by expert; see `permutation`), n hidden size, f size of an expert.
Kept for backward: the inputs, the sort and gate_up [p,2f] (SonicMoE, arXiv 2512.14080).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from loong_core.parallel.gradient_buffer import buffer_to_fill, mark_added
from loong_core.references.experts import Pairs
from loong_ops import experts_kernels as kernels
from loong_ops.permutation import Permutation, count_of, sort_by_expert
from loong_ops.support import interpreted


class Tile(NamedTuple):
    """How a product is cut: blocks of m x n of the result, in steps of k, `stages` steps in flight, `warps` a block.

    A program computes at most `group` blocks of a row of blocks, and finishes each in `parts` parts of its columns.
    With `reduce` a gradient is added to its buffer by the memory system instead of being loaded, added and stored; off
    until a measurement says that it is faster.
    """

    m: int
    n: int
    k: int
    stages: int
    warps: int
    group: int = 1
    parts: int = 1
    reduce: bool = False


class Config(NamedTuple):
    """The tile of every product of the op. The four products over rows share one m: the tiles of the sort."""

    up: Tile
    down: Tile
    activation_gradient: Tile
    hidden_gradient: Tile
    up_gradient: Tile
    down_gradient: Tile


HOPPER = Config(
    up=Tile(128, 256, 64, 3, 8, group=8, parts=4),
    down=Tile(128, 256, 64, 3, 8, group=8, parts=2),
    # Two programs fit into a processor: one finishes, which takes long here, while the other multiplies.
    activation_gradient=Tile(128, 128, 64, 3, 8, group=8, parts=8),
    hidden_gradient=Tile(128, 256, 64, 3, 8, group=8, parts=2),
    # Their rows are found through `order`, itself loaded ahead, which takes half of the stages: three are in flight.
    up_gradient=Tile(256, 128, 64, 6, 8, group=8, parts=4),
    down_gradient=Tile(128, 256, 64, 6, 8, group=8, parts=4),
)
FLOAT32 = Config(*[Tile(64, 64, 16, 2, 8)] * 6)
UNALIGNED = Config(*[Tile(64, 64, 32, 2, 8)] * 6)
BUFFERS = (torch.float32, torch.bfloat16)
"""Dtypes of gradient buffers that the kernel can write to."""
PROGRAMS = 8 * 132
"""Programs that a grid should have where the problem allows: with fewer, the last wave leaves many processors idle."""


def config_of(dtype: torch.dtype, rows: int, experts: int, n: int, f: int) -> Config:
    """The tiles for `rows` rows of n numbers over `experts` experts of size `f`."""
    if dtype == torch.float32:
        return FLOAT32
    if n % 8 or f % 8:
        # Not what TMA can read (16 bytes): every load goes through registers, which hold smaller tiles only.
        return UNALIGNED
    if rows < 64 * experts or f < 128:
        # Few rows an expert: half of a tall tile would be empty.
        return Config(*(tile._replace(m=64, n=min(tile.n, 128), warps=4) for tile in HOPPER))
    return HOPPER


def experts(
    hidden: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    chosen: Tensor,
    *,
    first: int = 0,
    pairs: Pairs = None,
    _config: Config | None = None,
) -> Tensor:
    """Every token through its experts, summed with its weights: hidden [t,n] -> [t,n] in hidden's dtype.

    up [e,2f,n], down [e,n,f], weights and chosen [t,k] are as `loong_core.references.experts.experts` says, which also
    explains `first` and `pairs`. Gradients of up and down go straight to their buffers, float32 or bfloat16,
    where they have one.
    Its backward can run once for a forward, because the gradient of gate_up takes gate_up's place.
    """
    rows = count_of(pairs, chosen)
    config = _config or config_of(hidden.dtype, rows, len(up), *down.shape[1:])
    out: Tensor = _Experts.apply(hidden, up, down, weights, chosen, first, rows, config)
    return out


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
        rows: int,
        config: Config,
    ) -> Tensor:
        ctx.parameters = up, down
        hidden, up, down, weights = (tensor.contiguous() for tensor in (hidden, up, down, weights))
        ctx.config, ctx.empty, ctx.used = config, rows == 0 or not len(up), False
        if ctx.empty:
            ctx.save_for_backward(hidden, up, down, weights)
            return torch.zeros_like(hidden)
        plan = sort_by_expert(chosen, len(up), first, rows, config.up.m)
        gate_up, act = up_product(hidden, up, weights, plan, config.up)
        out = combine(row_product(act, down, plan, config.down, k_first=False), plan, weights.shape[-1])
        ctx.tile = plan.tile
        ctx.save_for_backward(hidden, up, down, weights, gate_up, *plan[:-1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used:
            raise RuntimeError("experts: a second backward through the same forward. Run the forward again before it.")
        ctx.used = True
        hidden, up, down, weights, *rest = ctx.saved_tensors
        needs = ctx.needs_input_grad
        inputs = hidden, up, down, weights
        if ctx.empty:
            zeros = (torch.zeros_like(tensor) if need else None for tensor, need in zip(inputs, needs, strict=False))
            return (*zeros, None, None, None, None)
        gate_up, plan = rest[0], Permutation._make((*rest[1:], ctx.tile))
        found = gradients_of(inputs, ctx.parameters, plan, gate_up, gradients[0].contiguous(), needs, ctx.config)
        return (*found, None, None, None, None)


def gradients_of(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    parameters: tuple[Tensor, Tensor],
    plan: Permutation,
    gate_up: Tensor,
    gradient: Tensor,
    needs: tuple[bool, ...],
    config: Config,
    out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, up, down and weights as far as needed, from that of the result [t,n].

    `parameters` are up and down as the caller has them, who may hang a buffer on them. The gradient of gate_up goes to
    `out` [p,2f], by default into gate_up itself.
    """
    hidden, up, down, weights = inputs
    slots = weights.shape[-1]
    hidden_gradient = up_gradient = down_gradient = weights_gradient = None
    tile = config.activation_gradient
    act, partial = activation_gradient(
        gradient, down, weights, plan, gate_up, tile, with_act=needs[2], with_weights=needs[3], out=out
    )
    changed = gate_up if out is None else out
    if partial is not None:
        weights_gradient = routing_gradient(partial, plan, weights)
        del partial
    if act is not None:
        down_gradient = weight_gradient(gradient, act, "left", plan, parameters[1], slots, config.down_gradient)
        del act
    if needs[1]:
        up_gradient = weight_gradient(changed, hidden, "right", plan, parameters[0], slots, config.up_gradient)
    if needs[0]:
        row_gradient = row_product(changed, up, plan, config.hidden_gradient, k_first=True)
        hidden_gradient = combine(row_gradient, plan, slots)
    return hidden_gradient, up_gradient, down_gradient, weights_gradient


# One function for every product, as the benchmarks time them. All tensors contiguous.


def up_product(hidden: Tensor, up: Tensor, weights: Tensor, plan: Permutation, tile: Tile) -> tuple[Tensor, Tensor]:
    """gate_up [p,2f] and act [p,f], the SwiGLU of it times the routing weight."""
    rows, f, n = len(plan.order), up.shape[1] // 2, up.shape[2]
    gate_up, act = hidden.new_empty((rows, 2 * f)), hidden.new_empty((rows, f))
    n_block, k_block = min(tile.n, 2 * _power_of_2(f)), min(tile.k, _power_of_2(n))
    right = _descriptor(up.view(2 * len(up), f, n), (2, n_block // 2, k_block))
    grid, group = _grid(len(plan.tiles), triton.cdiv(f, n_block // 2), tile)
    kernels.up_kernel[grid](
        hidden, up if right is None else right, weights, plan.order, plan.tiles, gate_up, act, n, f,
        M=plan.tile, N=n_block, K=k_block, GROUP=group, PARTS=_parts(n_block // 2, tile), SLOTS=weights.shape[-1],
        RIGHT_DESCRIPTOR=right is not None, EVEN=n % k_block == 0, num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return gate_up, act


def row_product(left: Tensor, right: Tensor, plan: Permutation, tile: Tile, *, k_first: bool) -> Tensor:
    """[p,n]: each row of left [p,k] times its expert's matrix, right [e,k,n] if k_first, else [e,n,k] transposed."""
    k, n = right.shape[1:] if k_first else right.shape[:0:-1]
    out = left.new_empty((len(left), n))
    n_block, k_block = min(tile.n, _power_of_2(n)), min(tile.k, _power_of_2(k))
    rows = _descriptor(left, (plan.tile, k_block))
    matrices = _descriptor(right, (1, k_block, n_block) if k_first else (1, n_block, k_block))
    grid, group = _grid(len(plan.tiles), triton.cdiv(n, n_block), tile)
    kernels.row_kernel[grid](
        left if rows is None else rows, right if matrices is None else matrices, plan.tiles, out, n, k,
        M=plan.tile, N=n_block, K=k_block, GROUP=group, PARTS=_parts(n_block, tile), K_FIRST=k_first,
        LEFT_DESCRIPTOR=rows is not None, RIGHT_DESCRIPTOR=matrices is not None, EVEN=k % k_block == 0,
        num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out


def activation_gradient(
    gradient: Tensor,
    down: Tensor,
    weights: Tensor,
    plan: Permutation,
    gate_up: Tensor,
    tile: Tile,
    *,
    with_act: bool = True,
    with_weights: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradient of gate_up [p,2f] to `out`, by default over gate_up.

    Returns, if wanted, act [p,f] and the gradient of weights in shares [p,shares].
    """
    n, f = down.shape[1:]
    rows = len(gate_up)
    n_block, k_block = min(tile.n, _power_of_2(f)), min(tile.k, _power_of_2(n))
    parts, f_tiles = _parts(n_block, tile), triton.cdiv(f, n_block)
    act = gate_up.new_empty((rows, f)) if with_act else None
    partial = gate_up.new_empty((rows, f_tiles * parts), dtype=torch.float32) if with_weights else None
    right = _descriptor(down, (1, k_block, n_block))
    grid, group = _grid(len(plan.tiles), f_tiles, tile)
    kernels.activation_gradient_kernel[grid](
        gradient, down if right is None else right, weights, plan.order, plan.tiles, gate_up,
        gate_up if out is None else out, gate_up if act is None else act, gate_up if partial is None else partial, n, f,
        M=plan.tile, N=n_block, K=k_block, GROUP=group, PARTS=parts, SLOTS=weights.shape[-1],
        RIGHT_DESCRIPTOR=right is not None, EVEN=n % k_block == 0, WITH_ACT=with_act, WITH_WEIGHTS=with_weights,
        num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return act, partial


def weight_gradient(
    left: Tensor, right: Tensor, gathered: str, plan: Permutation, weight: Tensor, slots: int, tile: Tile
) -> Tensor | None:
    """[e,m,n]: the sum over each expert's rows of left [.,m]^T @ right [.,n], the `gathered` one of them by token.

    Returns the gradient in the dtype of `weight` [e,m,n]; None where it went into the weight's buffer.
    """
    m, n = left.shape[1], right.shape[1]
    buffer, empty = buffer_to_fill(weight)
    if buffer is not None and buffer.is_contiguous() and buffer.dtype in BUFFERS:
        out = buffer
    else:
        dtype = weight.dtype if buffer is None else torch.float32
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    direct = out is buffer
    adds = direct and not empty
    m_block, n_block = min(tile.m, _power_of_2(m)), min(tile.n, _power_of_2(n))
    rows_left = None if gathered == "left" else _descriptor(left, (tile.k, m_block))
    rows_right = None if gathered == "right" else _descriptor(right, (tile.k, n_block))
    parts = _parts(n_block, tile)
    # The interpreter has no addition through a descriptor; a sum in bfloat16 would be rounded twice.
    reduces = adds and tile.reduce and out.dtype == torch.float32 and not interpreted()
    sums = _descriptor(out, (1, m_block, n_block // parts)) if reduces else None
    grid, group = _grid(len(weight) * triton.cdiv(m, m_block), triton.cdiv(n, n_block), tile)
    kernels.weight_gradient_kernel[grid](
        left if rows_left is None else rows_left, right if rows_right is None else rows_right,
        plan.order, plan.offsets, plan.heaviest, out if sums is None else sums, m, n,
        M=m_block, N=n_block, K=tile.k, GROUP=group, PARTS=parts, SLOTS=slots,
        LEFT_GATHER=gathered == "left", LEFT_DESCRIPTOR=rows_left is not None, RIGHT_DESCRIPTOR=rows_right is not None,
        LEFT_EVEN=m % m_block == 0, RIGHT_EVEN=n % n_block == 0, ADD=adds,
        OUT_DESCRIPTOR=sums is not None, num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    if buffer is None:
        return out
    if not direct:
        (buffer.copy_ if empty else buffer.add_)(out)
    mark_added(weight)
    return None


def combine(rows: Tensor, plan: Permutation, slots: int) -> Tensor:
    """[t,n]: for every token the sum, in float32, of its rows of [p,n]."""
    n = rows.shape[1]
    tokens = len(plan.position) // slots
    out = rows.new_empty((tokens, n))
    block = min(1024, _power_of_2(n))
    kernels.combine_kernel[(tokens, triton.cdiv(n, block))](
        rows, plan.position, out, n, SLOTS=slots, N=block, num_warps=4
    )
    return out


def routing_gradient(partial: Tensor, plan: Permutation, weights: Tensor) -> Tensor:
    """The gradient of weights [t,k] from its shares [p,shares]."""
    out = torch.empty_like(weights)
    pairs = weights.numel()
    kernels.routing_gradient_kernel[(triton.cdiv(pairs, 256),)](
        partial, plan.position, out, pairs, partial.shape[1], BLOCK=256, num_warps=4
    )
    return out


def _grid(row_blocks: int, column_blocks: int, tile: Tile) -> tuple[tuple[int], int]:
    """The grid, and how many blocks of a row a program computes: as many as leave enough programs."""
    group = min(tile.group, column_blocks)
    while group > 1 and row_blocks * triton.cdiv(column_blocks, group) < PROGRAMS:
        group //= 2
    return (row_blocks * triton.cdiv(column_blocks, group),), group


def _parts(columns: int, tile: Tile) -> int:
    """Parts in which a block of so many columns is finished, none narrower than what a store writes at once."""
    return max(1, min(tile.parts, columns // 16))


def _power_of_2(size: int) -> int:
    """The smallest block that covers `size`; the tensor cores multiply at least 16 x 16 x 16."""
    return max(16, triton.next_power_of_2(size))


def _descriptor(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor | None:
    """A TMA descriptor of a contiguous tensor; None where the hardware could not read it (16-byte alignment)."""
    row = tensor.shape[-1] * tensor.element_size()
    if tensor.data_ptr() % 16 or row % 16 or tensor.numel() == 0:
        return None
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))
