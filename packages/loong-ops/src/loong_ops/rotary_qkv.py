"""The op `rotary_qkv`: cut, norm and rotate all heads of a projection in one pass, and back again in one.

A head lies in registers as its two halves, so that a rotation is four multiplications and no exchange between lanes.
Shape legend: s rows, b batch, h query heads, g key-value heads, w = h/g + 2 heads of a group, d head size, r rotated
part of it. A token is one (row, sample), of which there are s*b.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loong_ops.weight_gradient import delivered


class Config(NamedTuple):
    """How a pass is cut: elements of a group's queries that one warp takes, and for backward the most programs, groups
    loaded ahead and registers of a thread.

    For 8 queries of 128 the compiler takes 230 registers in backward where it may; 208 do without spilling and let 9
    programs share a multiprocessor instead of 8.
    """

    forward_elements: int = 1024
    backward_elements: int = 1024
    backward_programs: int = 132 * 9
    backward_stages: int = 2
    backward_registers: int = 208


def rotary_qkv(
    mixed: Tensor,
    angles: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    epsilon: float,
    *,
    _config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """mixed [s,b,g,w,d], angles [s,b,1,r] in radians -> query [s,b,h,d], key [s,b,g,d], value [s,b,g,d].

    As `loong_core.references.rotary.rotary_qkv`, with all arithmetic in float32 and one rounding at the end. Kept for
    backward: `angles`, and `mixed` where heads are normed.
    """
    result: tuple[Tensor, Tensor, Tensor] = _RotaryQkv.apply(
        mixed, angles, query_norm, key_norm, epsilon, _config or Config()
    )
    return result


class _RotaryQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        angles: Tensor,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        epsilon: float,
        config: Config,
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, b, g, width, d = mixed.shape
        queries, rotated = width - 2, angles.shape[-1]
        mixed = _rows_contiguous(mixed)
        angles = _rows_contiguous(angles.float()).expand(s, b, 1, rotated)
        query = mixed.new_empty(s, b, g * queries, d)
        key, value = mixed.new_empty(s, b, g, d), mixed.new_empty(s, b, g, d)
        if s * b:
            _forward_kernel[(s * b,)](
                mixed,
                angles,
                _contiguous(query_norm),
                _contiguous(key_norm),
                query,
                key,
                value,
                b,
                g,
                *mixed.stride()[:4],
                *angles.stride()[:2],
                epsilon,
                queries,
                d,
                rotated,
                g if queries == 1 else 0,
                num_warps=_warps(g if queries == 1 else queries, d, config.forward_elements),
            )
        normed = query_norm is not None or key_norm is not None
        ctx.save_for_backward(mixed if normed else None, angles, query_norm, key_norm)
        ctx.shape, ctx.epsilon, ctx.config = mixed.shape, epsilon, config
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mixed, angles, query_norm, key_norm = ctx.saved_tensors
        wants_mixed, _, wants_query_norm, wants_key_norm = ctx.needs_input_grad[:4]
        s, b, g, width, d = ctx.shape
        d_query, d_key, d_value = (_rows_contiguous(gradient) for gradient in gradients)
        # Always written, though seldom not wanted: a frozen projection below trained norms.
        d_mixed = d_query.new_empty(ctx.shape)
        programs = min(s * b, ctx.config.backward_programs)
        partial = angles.new_empty(programs, 2, d)
        if programs:
            source = d_mixed if mixed is None else mixed  # without norms nothing is read from it
            _backward_kernel[(programs,)](
                source,
                angles,
                _contiguous(query_norm),
                _contiguous(key_norm),
                d_query,
                d_key,
                d_value,
                d_mixed,
                partial,
                s * b,
                b,
                g,
                *source.stride()[:4],
                *angles.stride()[:2],
                *d_query.stride()[:3],
                *d_key.stride()[:3],
                *d_value.stride()[:3],
                ctx.epsilon,
                wants_query_norm,
                wants_key_norm,
                width - 2,
                d,
                angles.shape[-1],
                ctx.config.backward_stages,
                num_warps=_warps(width - 2, d, ctx.config.backward_elements),
                maxnreg=ctx.config.backward_registers,
            )
        d_query_norm = delivered(query_norm, partial[:, 0].sum(0)) if wants_query_norm else None
        d_key_norm = delivered(key_norm, partial[:, 1].sum(0)) if wants_key_norm else None
        return d_mixed if wants_mixed else None, None, d_query_norm, d_key_norm, None, None


def _warps(queries: int, size: int, elements: int) -> int:
    """Warps for the queries of one group, of `elements` each: one for 8 queries of 128."""
    held = triton.next_power_of_2(queries) * triton.next_power_of_2(size)
    return max(1, min(8, held // elements))


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """`tensor` with the elements of its last dim side by side; the other strides may be anything."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


@triton.constexpr_function
def _padded(size: int) -> int:
    """The least power of two that holds `size`: what a block of a kernel may measure."""
    return triton.next_power_of_2(max(size, 1))


@triton.jit
def _load(pointer, stride, count: tl.constexpr, size: tl.constexpr, rotated: tl.constexpr):
    """`count` heads in float32, zero beyond: first halves and second halves of what turns, then the rest."""
    heads = tl.arange(0, _padded(count))[:, None]
    columns = tl.arange(0, _padded(rotated // 2))[None, :]
    place = pointer + heads * stride + columns
    inside = (heads < count) & (columns < rotated // 2)
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + rotated // 2, mask=inside, other=0.0).to(tl.float32)
    if size > rotated:
        tail = tl.arange(0, _padded(size - rotated))[None, :]
        inside = (heads < count) & (tail < size - rotated)
        rest = tl.load(pointer + heads * stride + rotated + tail, mask=inside, other=0.0).to(tl.float32)
    else:
        rest = tl.zeros([_padded(count), 1], tl.float32)
    return first, second, rest


@triton.jit
def _store(pointer, first, second, rest, count: tl.constexpr, size: tl.constexpr, rotated: tl.constexpr):
    """The inverse of `_load` for heads side by side, rounded to what `pointer` points to."""
    heads = tl.arange(0, _padded(count))[:, None]
    columns = tl.arange(0, _padded(rotated // 2))[None, :]
    place = pointer + heads * size + columns
    inside = (heads < count) & (columns < rotated // 2)
    tl.store(place, first.to(pointer.dtype.element_ty), mask=inside)
    tl.store(place + rotated // 2, second.to(pointer.dtype.element_ty), mask=inside)
    if size > rotated:
        tail = tl.arange(0, _padded(size - rotated))[None, :]
        inside = (heads < count) & (tail < size - rotated)
        tl.store(pointer + heads * size + rotated + tail, rest.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _mean(first, second, rest, size: tl.constexpr, rotated: tl.constexpr):
    """The mean over each head: [heads,1]."""
    total = tl.sum(first + second, axis=1)
    if size > rotated:
        total += tl.sum(rest, axis=1)
    return (total / size)[:, None]


@triton.jit
def _turn(angles, rotated: tl.constexpr):
    """Cosine and sine of a token's angles: [1,r/2] twice. Not the approximate ones, as positions reach millions."""
    columns = tl.arange(0, _padded(rotated // 2))[None, :]
    angle = tl.load(angles + columns, mask=columns < rotated // 2, other=0.0)
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _heads_forward(
    source,
    stride,
    norm,
    target,
    cos,
    sin,
    epsilon,
    count: tl.constexpr,
    size: tl.constexpr,
    rotated: tl.constexpr,
):
    """Norm `count` heads of one token, unless `norm` is None, and turn them."""
    first, second, rest = _load(source, stride, count, size, rotated)
    if norm is not None:
        scale = tl.rsqrt(_mean(first * first, second * second, rest * rest, size, rotated) + epsilon)
        first_weight, second_weight, rest_weight = _load(norm, 0, 1, size, rotated)
        first, second, rest = first * scale * first_weight, second * scale * second_weight, rest * scale * rest_weight
    _store(target, first * cos - second * sin, second * cos + first * sin, rest, count, size, rotated)


@triton.jit
def _forward_kernel(
    mixed,
    angles,
    query_norm,
    key_norm,
    query,
    key,
    value,
    batch,
    groups,
    mixed_s,
    mixed_b,
    mixed_g,
    mixed_w,
    angles_s,
    angles_b,
    epsilon,
    queries: tl.constexpr,
    size: tl.constexpr,
    rotated: tl.constexpr,
    together: tl.constexpr,
):
    """One token a program, so that its sines serve all of its heads. Groups of one query each would be many small
    loads, one after the other: `together` of them are taken at once (0: group by group)."""
    token = tl.program_id(0).to(tl.int64)
    row, sample = token // batch, token % batch
    cos, sin = _turn(angles + row * angles_s + sample * angles_b, rotated)
    if together > 0:
        heads, place = mixed + row * mixed_s + sample * mixed_b, token * together * size
        _heads_forward(heads, mixed_g, query_norm, query + place, cos, sin, epsilon, together, size, rotated)
        _heads_forward(heads + mixed_w, mixed_g, key_norm, key + place, cos, sin, epsilon, together, size, rotated)
        first, second, rest = _load(heads + 2 * mixed_w, mixed_g, together, size, rotated)
        _store(value + place, first, second, rest, together, size, rotated)
    else:
        for group in range(groups):
            heads = mixed + row * mixed_s + sample * mixed_b + group * mixed_g
            place = token * groups + group
            target = query + place * queries * size
            _heads_forward(heads, mixed_w, query_norm, target, cos, sin, epsilon, queries, size, rotated)
            heads += queries * mixed_w
            _heads_forward(heads, 0, key_norm, key + place * size, cos, sin, epsilon, 1, size, rotated)
            first, second, rest = _load(heads + mixed_w, 0, 1, size, rotated)
            _store(value + place * size, first, second, rest, 1, size, rotated)


@triton.jit
def _heads_backward(
    upstream,
    upstream_stride,
    source,
    source_stride,
    norm,
    target,
    cos,
    sin,
    epsilon,
    first_sum,
    second_sum,
    rest_sum,
    wants_norm: tl.constexpr,
    count: tl.constexpr,
    size: tl.constexpr,
    rotated: tl.constexpr,
):
    """Turn the gradient of `count` heads of one token back; returns the sums of d_norm with what these heads add."""
    first_up, second_up, rest = _load(upstream, upstream_stride, count, size, rotated)
    first, second = first_up * cos + second_up * sin, second_up * cos - first_up * sin
    if norm is not None:
        first_x, second_x, rest_x = _load(source, source_stride, count, size, rotated)
        scale = tl.rsqrt(_mean(first_x * first_x, second_x * second_x, rest_x * rest_x, size, rotated) + epsilon)
        first_x, second_x, rest_x = first_x * scale, second_x * scale, rest_x * scale
        if wants_norm:
            first_sum += first * first_x
            second_sum += second * second_x
            rest_sum += rest * rest_x
        first_weight, second_weight, rest_weight = _load(norm, 0, 1, size, rotated)
        first, second, rest = first * first_weight, second * second_weight, rest * rest_weight
        mean = _mean(first * first_x, second * second_x, rest * rest_x, size, rotated)
        first, second = scale * (first - first_x * mean), scale * (second - second_x * mean)
        rest = scale * (rest - rest_x * mean)
    _store(target, first, second, rest, count, size, rotated)
    return first_sum, second_sum, rest_sum


@triton.jit
def _zeros(count: tl.constexpr, size: tl.constexpr, rotated: tl.constexpr):
    """Blocks as `_load` gives them."""
    half = tl.zeros([_padded(count), _padded(rotated // 2)], tl.float32)
    return half, half, tl.zeros([_padded(count), _padded(size - rotated)], tl.float32)


@triton.jit
def _store_sum(pointer, first, second, rest, size: tl.constexpr, rotated: tl.constexpr):
    """Sums over heads as one row [d]."""
    first, second, rest = tl.sum(first, 0)[None, :], tl.sum(second, 0)[None, :], tl.sum(rest, 0)[None, :]
    _store(pointer, first, second, rest, 1, size, rotated)


# fmt: off
@triton.jit
def _backward_kernel(
    mixed, angles, query_norm, key_norm, d_query, d_key, d_value, d_mixed, partial, tokens, batch, groups,
    mixed_s, mixed_b, mixed_g, mixed_w, angles_s, angles_b,
    query_s, query_b, query_h, key_s, key_b, key_h, value_s, value_b, value_h, epsilon,
    wants_query_norm: tl.constexpr, wants_key_norm: tl.constexpr,
    queries: tl.constexpr, size: tl.constexpr, rotated: tl.constexpr, stages: tl.constexpr,
):
    """Every n-th token whole; what they add to the norms' gradients is one row of `partial` [programs,2,d]."""
    program = tl.program_id(0)
    first_q, second_q, rest_q = _zeros(queries, size, rotated)
    first_k, second_k, rest_k = _zeros(1, size, rotated)
    for index in range(program, tokens, tl.num_programs(0)):
        token = tl.cast(index, tl.int64)
        row, sample = token // batch, token % batch
        cos, sin = _turn(angles + row * angles_s + sample * angles_b, rotated)
        for group in tl.range(groups, num_stages=stages):
            source = mixed + row * mixed_s + sample * mixed_b + group * mixed_g
            target = d_mixed + (token * groups + group) * (queries + 2) * size
            upstream = d_query + row * query_s + sample * query_b + group * queries * query_h
            first_q, second_q, rest_q = _heads_backward(
                upstream, query_h, source, mixed_w, query_norm, target, cos, sin, epsilon,
                first_q, second_q, rest_q, wants_query_norm, queries, size, rotated,
            )
            source += queries * mixed_w
            target += queries * size
            upstream = d_key + row * key_s + sample * key_b + group * key_h
            first_k, second_k, rest_k = _heads_backward(
                upstream, 0, source, 0, key_norm, target, cos, sin, epsilon,
                first_k, second_k, rest_k, wants_key_norm, 1, size, rotated,
            )
            upstream = d_value + row * value_s + sample * value_b + group * value_h
            first, second, rest = _load(upstream, 0, 1, size, rotated)
            _store(target + size, first, second, rest, 1, size, rotated)
    if wants_query_norm:
        _store_sum(partial + program * 2 * size, first_q, second_q, rest_q, size, rotated)
    if wants_key_norm:
        _store_sum(partial + (program * 2 + 1) * size, first_k, second_k, rest_k, size, rotated)
# fmt: on
