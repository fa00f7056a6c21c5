"""Grouped matrix products over rows sorted by expert, with the gathers, SwiGLU and routing weights inside.

Shape legend: t tokens, k experts chosen for each token, e experts, p rows (see `permutation`), n hidden size, f size of
an expert. Row products multiply a tile of rows, all of one expert, with that expert's matrix; products for weights sum
over all rows of an expert. Hidden states are gathered by token inside the loads, so no permuted copy of them exists.
`*_DESCRIPTOR` says that an operand comes as a TMA descriptor, otherwise as a contiguous tensor, read by pointers.

A program computes GROUP tiles of columns, one after the other, in one flattened loop: the loads of the next tile run
while the last one is finished and stored.
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
def _tile_of_rows(tiles, tile):
    """Expert, first row and the row after the last."""
    return tl.load(tiles + 3 * tile), tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    """[M, N] -> its left and its right half; no data moves between threads."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _parts(x, M: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr):
    """[M, N] -> its columns in COUNT parts, a power of two. Finishing one after the other needs fewer registers."""
    if COUNT == 1:
        parts = (x,)
    else:
        left, right = _halves(x, M, N)
        parts = _parts(left, M, N // 2, COUNT // 2) + _parts(right, M, N // 2, COUNT // 2)
    return parts


@triton.jit
def _store(out, rows, end, column, width, block, N: tl.constexpr):
    """Write block [rows, N] to `out` [., width] from `column` on, without the rows from `end` on."""
    columns = column + tl.arange(0, N)
    pointers = out + rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(pointers, block.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (columns < width)[None, :])


@triton.jit
def _store_or_add(out, expert, rows, row_count, column, width, block, N: tl.constexpr, ADD: tl.constexpr):
    """As `_store`, into one expert's matrix [row_count, width]; onto what is there if ADD."""
    matrix = out + expert.to(tl.int64) * row_count * width
    if ADD:
        columns = column + tl.arange(0, N)
        inside = (rows < row_count)[:, None] & (columns < width)[None, :]
        block += tl.load(matrix + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)
    _store(matrix, rows, row_count, column, width, block, N)


@triton.jit
def up_kernel(
    hidden, up, weights, order, tiles, gate_up, act, n_size, f_size,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
    RIGHT_DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """gate_up [p,2f] = hidden[token] @ up[expert]^T and act [p,f] = weight * silu(gate) * value."""
    half: tl.constexpr = N // 2
    part: tl.constexpr = half // PARTS
    f_tiles = tl.cdiv(f_size, half)
    groups = tl.cdiv(f_tiles, GROUP)
    expert, first_row, end = _tile_of_rows(tiles, tl.program_id(0) // groups)
    if expert < 0:
        return
    group = (tl.program_id(0) % groups) * GROUP
    rows = first_row + tl.arange(0, M)
    pair = tl.load(order + rows, mask=rows < end, other=0)
    token = (pair // SLOTS).to(tl.int64)
    weight = tl.load(weights + pair, mask=rows < end, other=0.0).to(tl.float32)[:, None]
    for f_tile in tl.range(group, tl.minimum(group + GROUP, f_tiles), flatten=True):
        f = f_tile * half
        both = tl.zeros((M, N), tl.float32)
        for k in range(0, n_size, K):
            a = _left(hidden, token, 0, k, n_size, K, False, EVEN)
            b = _right(up, expert, f, k, f_size, n_size, N, K, 2, False, RIGHT_DESCRIPTOR)
            both = _multiply(a, b, both)
        gate, value = _halves(both, M, N)
        gates, values = _parts(gate, M, half, PARTS), _parts(value, M, half, PARTS)
        for i in tl.static_range(PARTS):
            gate, value, column = gates[i], values[i], f + i * part
            # The gate's and the value's columns of a row lie f apart: two rows of a tensor [2p,f].
            _store(gate_up, 2 * rows, 2 * end, column, f_size, gate, part)
            _store(gate_up, 2 * rows + 1, 2 * end, column, f_size, value, part)
            _store(act, rows, end, column, f_size, weight * gate * tl.sigmoid(gate) * value, part)


@triton.jit
def row_kernel(
    left, right, tiles, out, n_size, k_size,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, K_FIRST: tl.constexpr,
    LEFT_DESCRIPTOR: tl.constexpr, RIGHT_DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out [p,n] = left [p,k] @ the expert's matrix: [k,n] if K_FIRST, otherwise [n,k] transposed."""
    part: tl.constexpr = N // PARTS
    n_tiles = tl.cdiv(n_size, N)
    groups = tl.cdiv(n_tiles, GROUP)
    expert, first_row, end = _tile_of_rows(tiles, tl.program_id(0) // groups)
    if expert < 0:
        return
    group = (tl.program_id(0) % groups) * GROUP
    rows = first_row + tl.arange(0, M)
    read = tl.minimum(rows, end - 1).to(tl.int64)
    for n_tile in tl.range(group, tl.minimum(group + GROUP, n_tiles), flatten=True):
        n = n_tile * N
        total = tl.zeros((M, N), tl.float32)
        for k in range(0, k_size, K):
            a = _left(left, read, first_row, k, k_size, K, LEFT_DESCRIPTOR, EVEN)
            b = _right(right, expert, n, k, n_size, k_size, N, K, 1, K_FIRST, RIGHT_DESCRIPTOR)
            total = _multiply(a, b, total)
        parts = _parts(total, M, N, PARTS)
        for i in tl.static_range(PARTS):
            _store(out, rows, end, n + i * part, n_size, parts[i], part)


@triton.jit
def _clear(gate_up, act, first_row, end, group, groups, f_size, M: tl.constexpr, N: tl.constexpr, ACT: tl.constexpr):
    """Zeros in the rows `first_row` to `end` that no expert uses, because TMA loads of the last expert reach them."""
    rows = first_row + tl.arange(0, M)
    if first_row < end:
        for f in range(group * N, f_size, groups * N):
            _store(gate_up, 2 * rows, 2 * end, f, f_size, tl.zeros((M, N), tl.float32), N)
            _store(gate_up, 2 * rows + 1, 2 * end, f, f_size, tl.zeros((M, N), tl.float32), N)
            if ACT:
                _store(act, rows, end, f, f_size, tl.zeros((M, N), tl.float32), N)


@triton.jit
def _activation_gradient(
    slope, weight, gate_up, out, act, partial, rows, end, column, f_size, share_index, shares,
    N: tl.constexpr, WITH_ACT: tl.constexpr, WITH_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """One part of the columns, from slope = gradient @ down: see `activation_gradient_kernel`."""
    columns = column + tl.arange(0, N)
    inside = (rows < end)[:, None] & (columns < f_size)[None, :]
    place = rows.to(tl.int64)[:, None] * (2 * f_size) + columns[None, :]
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(gate_up + place + f_size, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    product = gate * sigmoid * value
    if WITH_WEIGHTS:
        pointers = partial + rows.to(tl.int64) * shares + share_index
        tl.store(pointers, tl.sum(slope * product, 1), mask=rows < end)
    if WITH_ACT:
        _store(act, rows, end, column, f_size, weight * product, N)
    slope *= weight * sigmoid
    gate_slope = slope * value * (1.0 + gate * (1.0 - sigmoid))
    tl.store(out + place, gate_slope.to(out.dtype.element_ty), mask=inside)
    tl.store(out + place + f_size, (slope * gate).to(out.dtype.element_ty), mask=inside)


@triton.jit
def activation_gradient_kernel(
    gradient, down, weights, order, tiles, gate_up, out, act, partial, n_size, f_size,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
    RIGHT_DESCRIPTOR: tl.constexpr, EVEN: tl.constexpr, WITH_ACT: tl.constexpr, WITH_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """From gradient[token] [n]: that of gate_up in `out` [p,2f], which may be gate_up itself; act [p,f] once more.

    `partial` [p, tiles of f * PARTS] gets each part's share of the gradient of the row's routing weight.
    """
    part: tl.constexpr = N // PARTS
    f_tiles = tl.cdiv(f_size, N)
    groups = tl.cdiv(f_tiles, GROUP)
    expert, first_row, end = _tile_of_rows(tiles, tl.program_id(0) // groups)
    group = tl.program_id(0) % groups
    if expert < 0:
        _clear(out, act, first_row, end, group, groups, f_size, M, part, WITH_ACT)
        return
    rows = first_row + tl.arange(0, M)
    pair = tl.load(order + rows, mask=rows < end, other=0)
    token = (pair // SLOTS).to(tl.int64)
    weight = tl.load(weights + pair, mask=rows < end, other=0.0).to(tl.float32)[:, None]
    for f_tile in tl.range(group * GROUP, tl.minimum((group + 1) * GROUP, f_tiles), flatten=True):
        f = f_tile * N
        slope = tl.zeros((M, N), tl.float32)
        for k in range(0, n_size, K):
            a = _left(gradient, token, 0, k, n_size, K, False, EVEN)
            b = _right(down, expert, f, k, f_size, n_size, N, K, 1, True, RIGHT_DESCRIPTOR)
            slope = _multiply(a, b, slope)
        slopes = _parts(slope, M, N, PARTS)
        for i in tl.static_range(PARTS):
            _activation_gradient(
                slopes[i], weight, gate_up, out, act, partial, rows, end, f + i * part, f_size,
                f_tile * PARTS + i, f_tiles * PARTS, part, WITH_ACT, WITH_WEIGHTS,
            )  # fmt: skip


@triton.jit
def _row_block(
    source, order, first_row, end, column, width,
    K: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr, GATHER: tl.constexpr, DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """[K, N] of rows of `source` [., width], gathered by token if GATHER, with zeros from row `end` on.

    A descriptor cannot stop at `end`: it loads what follows, which is finite and meets the other operand's zeros.
    """
    if DESCRIPTOR:
        block = source.load([first_row, column])
    else:
        rows = first_row + tl.arange(0, K)
        columns = column + tl.arange(0, N)
        used = (rows < end)[:, None]
        index = rows.to(tl.int64)
        if GATHER:
            index = (tl.load(order + rows, mask=rows < end, other=0) // SLOTS).to(tl.int64)
        pointers = source + index[:, None] * width + columns[None, :]
        block = tl.load(pointers, mask=used if EVEN else used & (columns < width)[None, :], other=0.0)
    return block


@triton.jit
def weight_gradient_kernel(
    left, right, order, offsets, heaviest, out, m_size, n_size,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
    LEFT_GATHER: tl.constexpr, LEFT_DESCRIPTOR: tl.constexpr, RIGHT_DESCRIPTOR: tl.constexpr,
    LEFT_EVEN: tl.constexpr, RIGHT_EVEN: tl.constexpr, ADD: tl.constexpr, OUT_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """out[expert] [m,n] = sum over the expert's rows of left [.,m]^T @ right [.,n], or that added to it if ADD.

    Either left or right is gathered by token. The experts with most rows come first, so that none of them starts when
    the others are done. A descriptor of `out` adds in the memory system, without a load: once to each element in a
    launch, so that the sum is the same every time.
    """
    part: tl.constexpr = N // PARTS
    n_tiles = tl.cdiv(n_size, N)
    groups = tl.cdiv(n_tiles, GROUP)
    programs = tl.cdiv(m_size, M) * groups
    expert = tl.load(heaviest + tl.program_id(0) // programs)
    program = tl.program_id(0) % programs
    m = (program // groups) * M
    group = (program % groups) * GROUP
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    if ADD and start == end:
        return
    m_rows = m + tl.arange(0, M)
    for n_tile in tl.range(group, tl.minimum(group + GROUP, n_tiles), flatten=True):
        n = n_tile * N
        total = tl.zeros((M, N), tl.float32)
        for row in range(start, end, K):
            a = _row_block(left, order, row, end, m, m_size, K, M, SLOTS, LEFT_GATHER, LEFT_DESCRIPTOR, LEFT_EVEN)
            b = _row_block(
                right, order, row, end, n, n_size, K, N, SLOTS, not LEFT_GATHER, RIGHT_DESCRIPTOR, RIGHT_EVEN
            )
            total = _multiply(a.T, b, total)
        parts = _parts(total, M, N, PARTS)
        for i in tl.static_range(PARTS):
            column = n + i * part
            if OUT_DESCRIPTOR:
                out.atomic_add([expert, m, column], parts[i].reshape(1, M, part))
            else:
                _store_or_add(out, expert, m_rows, m_size, column, n_size, parts[i], part, ADD)


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
def routing_gradient_kernel(partial, position, out, pairs, shares, BLOCK: tl.constexpr):
    """out [pairs] = sum of the pair's row of partial [p, shares]; zero where another rank holds the expert."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(position + pair, mask=pair < pairs, other=-1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for share in range(shares):
        total += tl.load(partial + row * shares + share, mask=row >= 0, other=0.0)
    tl.store(out + pair, total.to(out.dtype.element_ty), mask=pair < pairs)
