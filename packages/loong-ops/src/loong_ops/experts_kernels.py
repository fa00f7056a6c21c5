"""Grouped matrix products over rows sorted by expert, with the gathers, SwiGLU and routing weights inside.

Shape legend: t tokens, k experts chosen for each token, e experts, p rows (see `permutation`), n hidden size, f size of
an expert. Row products multiply one tile of rows, all of one expert, with that expert's matrix; products for weights sum
over all rows of an expert. Hidden states are gathered by token inside the loads, so no permuted copy of them exists.
`*_DESCRIPTOR` says that an operand comes as a TMA descriptor, otherwise as a contiguous tensor, read by pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loong_ops.support import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _multiply(left, right, total):
    """total + left @ right in float32; never in TF32."""
    if INTERPRETED:
        # The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _left(source, rows, first_row, k, k_size, K: tl.constexpr, DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr):
    """[rows, K] of a left operand [., k_size]."""
    if DESCRIPTOR:
        block = source.load([first_row, k])
    else:
        columns = k + tl.arange(0, K)
        pointers = source + rows[:, None] * k_size + columns[None, :]
        block = tl.load(pointers) if EVEN else tl.load(pointers, mask=(columns < k_size)[None, :], other=0.0)
    return block


@triton.jit
def _right(
    source, expert, n, k, n_size, k_size,
    N: tl.constexpr, K: tl.constexpr, HALVES: tl.constexpr, K_FIRST: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """[K, N] of one expert's matrix, stored as [k_size, n_size] if K_FIRST, otherwise as [HALVES, n_size, k_size].

    With two halves the columns are those of the first half, then the same of the second.
    """
    if DESCRIPTOR:
        if K_FIRST:
            block = source.load([expert, k, n]).reshape(K, N)
        else:
            block = source.load([expert * HALVES, n, k]).reshape(N, K).T
    else:
        part: tl.constexpr = N // HALVES
        lanes = tl.arange(0, N)
        column = n + lanes % part
        row = k + tl.arange(0, K)
        inside = (row < k_size)[:, None] & (column < n_size)[None, :]
        matrix = source + expert.to(tl.int64) * HALVES * n_size * k_size
        if K_FIRST:
            pointers = matrix + row[:, None] * n_size + column[None, :]
        else:
            pointers = matrix + ((lanes // part) * n_size + column)[None, :] * k_size + row[:, None]
        block = tl.load(pointers, mask=inside, other=0.0)
    return block


@triton.jit
def _row_product(
    left, right, rows, first_row, expert, n, n_size, k_size,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HALVES: tl.constexpr, K_FIRST: tl.constexpr,
    LEFT_DESCRIPTOR: tl.constexpr, RIGHT_DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, k_size, K):
        a = _left(left, rows, first_row, k, k_size, K, LEFT_DESCRIPTOR, EVEN)
        b = _right(right, expert, n, k, n_size, k_size, N, K, HALVES, K_FIRST, RIGHT_DESCRIPTOR)
        total = _multiply(a, b, total)
    return total


@triton.jit
def _rows_of_tile(offsets, expert, first_row, M: tl.constexpr):
    """The tile's rows, and which of them are the expert's."""
    rows = first_row + tl.arange(0, M)
    return rows, rows < tl.load(offsets + expert + 1)


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _halves(both, M: tl.constexpr, N: tl.constexpr):
    """[M, N] -> its left and its right half; no data moves between threads."""
    return tl.split(tl.permute(tl.reshape(both, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def up_kernel(
    hidden, up, weights, order, offsets, tiles, gate_up, act, n_size, f_size,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    RIGHT_DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """gate_up [p,2f] = hidden[token] @ up[expert]^T and act [p,f] = weight * silu(gate) * value."""
    part: tl.constexpr = N // 2
    f_tiles = tl.cdiv(f_size, part)
    tile = tl.program_id(0) // f_tiles
    expert = tl.load(tiles + 2 * tile)
    if expert < 0:
        return
    first_row = tl.load(tiles + 2 * tile + 1)
    f = (tl.program_id(0) % f_tiles) * part
    rows, used = _rows_of_tile(offsets, expert, first_row, M)
    pair = tl.load(order + rows, mask=used, other=0)
    token = (pair // SLOTS).to(tl.int64)
    both = _row_product(
        hidden, up, token, 0, expert, f, f_size, n_size, M, N, K, 2, False, False, RIGHT_DESCRIPTOR, EVEN
    )
    gate, value = _halves(both, M, N)
    weight = tl.load(weights + pair, mask=used, other=0.0).to(tl.float32)
    columns = f + tl.arange(0, part)
    inside = used[:, None] & (columns < f_size)[None, :]
    start = rows.to(tl.int64)[:, None] * f_size
    out = gate_up + 2 * start + columns[None, :]
    tl.store(out, gate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(out + f_size, value.to(gate_up.dtype.element_ty), mask=inside)
    product = weight[:, None] * _silu(gate) * value
    tl.store(act + start + columns[None, :], product.to(act.dtype.element_ty), mask=inside)


@triton.jit
def row_kernel(
    left, right, offsets, tiles, out, n_size, k_size,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K_FIRST: tl.constexpr,
    LEFT_DESCRIPTOR: tl.constexpr, RIGHT_DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out [p,n] = left [p,k] @ the expert's matrix: [k,n] if K_FIRST, otherwise [n,k] transposed."""
    n_tiles = tl.cdiv(n_size, N)
    tile = tl.program_id(0) // n_tiles
    expert = tl.load(tiles + 2 * tile)
    if expert < 0:
        return
    first_row = tl.load(tiles + 2 * tile + 1)
    n = (tl.program_id(0) % n_tiles) * N
    rows, used = _rows_of_tile(offsets, expert, first_row, M)
    read = tl.where(used, rows, first_row).to(tl.int64)
    total = _row_product(
        left, right, read, first_row, expert, n, n_size, k_size,
        M, N, K, 1, K_FIRST, LEFT_DESCRIPTOR, RIGHT_DESCRIPTOR, EVEN,
    )  # fmt: skip
    columns = n + tl.arange(0, N)
    inside = used[:, None] & (columns < n_size)[None, :]
    out += rows.to(tl.int64)[:, None] * n_size + columns[None, :]
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def activation_gradient_kernel(
    gradient, down, weights, order, offsets, tiles, gate_up, act, partial, n_size, f_size,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    RIGHT_DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr, WITH_ACT: tl.constexpr, WITH_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """From gradient[token] [n]: that of gate_up, written over gate_up [p,2f]; act [p,f] once more.

    `partial` [p, tiles of f] gets the share of each tile in the gradient of the row's routing weight.
    """
    f_tiles = tl.cdiv(f_size, N)
    tile = tl.program_id(0) // f_tiles
    expert = tl.load(tiles + 2 * tile)
    if expert < 0:
        return
    first_row = tl.load(tiles + 2 * tile + 1)
    f_tile = tl.program_id(0) % f_tiles
    f = f_tile * N
    rows, used = _rows_of_tile(offsets, expert, first_row, M)
    pair = tl.load(order + rows, mask=used, other=0)
    token = (pair // SLOTS).to(tl.int64)
    slope = _row_product(
        gradient, down, token, 0, expert, f, f_size, n_size, M, N, K, 1, True, False, RIGHT_DESCRIPTOR, EVEN
    )
    weight = tl.load(weights + pair, mask=used, other=0.0).to(tl.float32)[:, None]
    columns = f + tl.arange(0, N)
    inside = used[:, None] & (columns < f_size)[None, :]
    start = rows.to(tl.int64)[:, None] * f_size
    both = gate_up + 2 * start + columns[None, :]
    gate = tl.load(both, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(both + f_size, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    if WITH_WEIGHTS:
        tl.store(partial + rows.to(tl.int64) * f_tiles + f_tile, tl.sum(slope * gate * share * value, 1), mask=used)
    if WITH_ACT:
        product = weight * gate * share * value
        tl.store(act + start + columns[None, :], product.to(act.dtype.element_ty), mask=inside)
    slope *= weight * share
    gate_slope = slope * value * (1.0 + gate * (1.0 - share))
    tl.store(both, gate_slope.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(both + f_size, (slope * gate).to(gate_up.dtype.element_ty), mask=inside)


@triton.jit
def _row_block(
    source, order, first_row, end, column, width,
    K: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr, GATHER: tl.constexpr, DESCRIPTOR: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[K, N] of rows of `source` [., width], gathered by token if GATHER; zeros from row `end` on unless WHOLE."""
    rows = first_row + tl.arange(0, K)
    if DESCRIPTOR:
        block = source.load([first_row, column])
        if not WHOLE:
            block = tl.where((rows < end)[:, None], block, 0.0)
    else:
        columns = column + tl.arange(0, N)
        if GATHER:
            pair = tl.load(order + rows) if WHOLE else tl.load(order + rows, mask=rows < end, other=0)
            index = (pair // SLOTS).to(tl.int64)
        else:
            index = rows.to(tl.int64)
        pointers = source + index[:, None] * width + columns[None, :]
        if WHOLE and EVEN:
            block = tl.load(pointers)
        elif WHOLE:
            block = tl.load(pointers, mask=(columns < width)[None, :], other=0.0)
        else:
            block = tl.load(pointers, mask=(rows < end)[:, None] & (columns < width)[None, :], other=0.0)
    return block


@triton.jit
def weight_gradient_kernel(
    left, right, order, offsets, heaviest, out, m_size, n_size,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    LEFT_GATHER: tl.constexpr, RIGHT_GATHER: tl.constexpr,
    LEFT_DESCRIPTOR: tl.constexpr, RIGHT_DESCRIPTOR: tl.constexpr,
    LEFT_EVEN: tl.constexpr, RIGHT_EVEN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """out[expert] [m,n] = sum over the expert's rows of left [.,m]^T @ right [.,n], or that added to it if ADD.

    The experts with most rows come first, so that no long one is left over at the end.
    """
    n_tiles = tl.cdiv(n_size, N)
    tiles = tl.cdiv(m_size, M) * n_tiles
    expert = tl.load(heaviest + tl.program_id(0) // tiles)
    tile = tl.program_id(0) % tiles
    m = (tile // n_tiles) * M
    n = (tile % n_tiles) * N
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    if ADD and start == end:
        return
    total = tl.zeros((M, N), tl.float32)
    whole_end = start + (end - start) // K * K
    for row in range(start, whole_end, K):
        a = _row_block(left, order, row, end, m, m_size, K, M, SLOTS, LEFT_GATHER, LEFT_DESCRIPTOR, True, LEFT_EVEN)
        b = _row_block(right, order, row, end, n, n_size, K, N, SLOTS, RIGHT_GATHER, RIGHT_DESCRIPTOR, True, RIGHT_EVEN)
        total = _multiply(a.T, b, total)
    if whole_end < end:
        row = whole_end
        a = _row_block(left, order, row, end, m, m_size, K, M, SLOTS, LEFT_GATHER, LEFT_DESCRIPTOR, False, LEFT_EVEN)
        b = _row_block(
            right, order, row, end, n, n_size, K, N, SLOTS, RIGHT_GATHER, RIGHT_DESCRIPTOR, False, RIGHT_EVEN
        )
        total = _multiply(a.T, b, total)
    m_index = m + tl.arange(0, M)
    n_index = n + tl.arange(0, N)
    inside = (m_index < m_size)[:, None] & (n_index < n_size)[None, :]
    out += expert.to(tl.int64) * m_size * n_size + m_index[:, None] * n_size + n_index[None, :]
    if ADD:
        total += tl.load(out, mask=inside, other=0.0)
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def combine_kernel(rows, position, out, n_size, SLOTS: tl.constexpr, N: tl.constexpr):
    """out[token] [n] = sum over the token's slots of rows[position], in float32."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    inside = columns < n_size
    total = tl.zeros((N,), tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(position + token * SLOTS + slot).to(tl.int64)
        part = tl.load(rows + row * n_size + columns, mask=inside & (row >= 0), other=0.0)
        total += part.to(tl.float32)
    tl.store(out + token * n_size + columns, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def routing_gradient_kernel(partial, position, out, pairs, parts, BLOCK: tl.constexpr):
    """out [pairs] = sum of the pair's row of partial [p, parts]; zero where another rank holds the expert."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(position + pair, mask=pair < pairs, other=-1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(partial + row * parts + part, mask=row >= 0, other=0.0)
    tl.store(out + pair, total.to(out.dtype.element_ty), mask=pair < pairs)
