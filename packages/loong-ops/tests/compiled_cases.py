"""Calls of every op with Triton kernels, forward and backward, as models make them: for `compile_for_hopper`.

Widths are those of Qwen3-30B-A3B, Qwen3-8B, Pi0.5 and GR00T, and an odd one for each op. Rows are few, except where
they decide how a product is cut. Tensors are never filled: only shapes, strides, dtypes and addresses count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loong_ops import cross_entropy as cross_entropy_module
from loong_ops import quack_experts
from loong_ops.adamw import adamw
from loong_ops.cross_entropy import cross_entropy
from loong_ops.dropout import dropout_add
from loong_ops.experts import experts
from loong_ops.gated_mlp import gated_mlp
from loong_ops.gated_residual import gated_residual
from loong_ops.geglu import geglu
from loong_ops.gelu_dropout import gelu_dropout
from loong_ops.layer_norm import layer_norm, residual_layer_norm
from loong_ops.linear_cross_entropy import linear_cross_entropy
from loong_ops.modulation import ada_rms_norm, layer_norm_modulate, residual_ada_rms_norm
from loong_ops.rms_norm import residual_rms_norm, rms_norm
from loong_ops.rotary_qkv import rotary_qkv
from loong_ops.route import route
from loong_ops.scaled import launch as scaled_launch
from loong_ops.sum_of_squares import sum_of_squares
from loong_ops.sum_parts import sum_parts
from loong_ops.swiglu import swiglu

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def trained(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def passes(function: Callable[..., Any], *inputs: Any, upstream: Callable[[Tensor], Tensor] = torch.empty_like) -> None:
    """`function` of `inputs`, and the gradients of all that require one."""
    results = function(*inputs)
    results = [results] if isinstance(results, Tensor) else [part for part in results if part.requires_grad]
    leaves = [leaf for leaf in inputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    gradients = [upstream(result) for result in results]
    torch.autograd.grad(results, leaves, gradients, allow_unused=True)


# ------------------------------------------------------------------------------------------- rows
def norm(op: Callable[..., Any], rows: int, n: int, dtype: torch.dtype, frozen: bool = False, weights: int = 1) -> None:
    passes(
        partial(op, epsilon=1e-6),
        trained(rows, n, dtype=dtype),
        *(trained(n, dtype=dtype).requires_grad_(not frozen) for _ in range(weights)),
    )


def forward_norm(rows: int, n: int, dtype: torch.dtype) -> None:
    """Of a tower that is not trained."""
    x, *weights = (torch.empty(shape, dtype=dtype) for shape in ((rows, n), (n,), (n,)))
    layer_norm(x, *weights, 1e-6)


def bare_norm(rows: int, n: int, dtype: torch.dtype) -> None:
    """Without weights."""
    passes(lambda x: layer_norm(x, None, None, 1e-6), trained(rows, n, dtype=dtype))


def modulated(op: Callable[..., Any], b: int, s: int, n: int, dtype: torch.dtype, whole: bool = False) -> None:
    """`whole`: one scale for all rows and no shift, as Gemma's norm has it; else parts of one modulation."""
    x, modulation = trained(b, s, n, dtype=dtype), trained(b, 3 * n, dtype=dtype)
    if whole:
        passes(lambda x, scale: op(x, scale, None, 1e-6), x, trained(b, n, dtype=dtype))
    else:
        passes(lambda x, modulation: op(x, *modulation.chunk(3, dim=-1)[:2], 1e-6), x, modulation)


def residual(b: int, s: int, n: int, dtype: torch.dtype, stream: torch.dtype | None = None) -> None:
    parts = trained(b, s, n, dtype=stream or dtype), trained(b, s, n, dtype=dtype), trained(b, 3 * n, dtype=dtype)
    passes(lambda stream, x, modulation: gated_residual(stream, x, modulation[:, 2 * n :]), *parts)


def dropped(b: int, s: int, n: int, dtype: torch.dtype) -> None:
    passes(partial(dropout_add, rate=0.2), trained(b, s, n, dtype=dtype), trained(b, s, n, dtype=dtype))


def dropped_activation(rows: int, n: int, dtype: torch.dtype) -> None:
    passes(partial(gelu_dropout, rate=0.2), trained(rows, n, dtype=dtype))


def activation(op: Callable[[Tensor], Tensor], rows: int, f: int, dtype: torch.dtype) -> None:
    passes(op, trained(rows, 2 * f, dtype=dtype))


def mlp(kind: str, f: int, dtype: torch.dtype) -> None:
    """With few inputs: the products are torch's."""
    tensors = trained(16, 16, dtype=dtype), trained(2 * f, 16, dtype=dtype), trained(16, f, dtype=dtype)
    passes(partial(gated_mlp, activation=kind), *tensors)


# ------------------------------------------------------------------------------------------- heads
def heads(
    s: int, b: int, groups: int, queries: int, d: int, dtype: torch.dtype, *,
    normed: bool = False, frozen: bool = False, turned: int | None = None, parts_first: bool = False,
) -> None:  # fmt: skip
    """`turned`: how much of a head is rotated, all unless given. `parts_first`: a projection [s,b,3,groups,d]."""
    if parts_first:
        mixed = trained(s, b, 3, groups, d, dtype=dtype).transpose(2, 3)
    else:
        mixed = trained(s, b, groups, queries + 2, d, dtype=dtype)
    norms = [trained(d, dtype=dtype).requires_grad_(not frozen) if normed else None for _ in range(2)]
    passes(lambda *tensors: rotary_qkv(*tensors, 1e-6), mixed, torch.empty(s, 1, 1, turned or d), *norms)


# ------------------------------------------------------------------------------------------- losses
class Ranks:
    """Four ranks, of which this is the second."""

    def size(self) -> int:
        return 4

    def rank(self) -> int:
        return 1


def gathered(function: Callable[[], None]) -> None:
    """`function` where ranks exchange nothing."""
    exchange = cross_entropy_module.dist.all_gather_into_tensor
    cross_entropy_module.dist.all_gather_into_tensor = lambda *tensors, group: None
    try:
        function()
    finally:
        cross_entropy_module.dist.all_gather_into_tensor = exchange


def summed(loss: Tensor) -> Tensor:
    """The gradient of a sum: one number for all rows."""
    return loss.new_empty(()).expand(loss.shape)


def loss(rows: int, vocabulary: int, width: int, dtype: torch.dtype, group: Ranks | None = None) -> None:
    targets = torch.zeros(rows, dtype=torch.int64)
    function = partial(cross_entropy, targets=targets, vocabulary=vocabulary, group=group)
    for upstream in (torch.empty_like, summed):
        gathered(partial(passes, function, trained(rows, width, dtype=dtype), upstream=upstream))


def head(rows: int, vocabulary: int, width: int, dtype: torch.dtype, group: Ranks | None = None) -> None:
    """With few inputs: the products are torch's."""
    targets = torch.zeros(rows, dtype=torch.int64)
    function = partial(linear_cross_entropy, targets=targets, vocabulary=vocabulary, group=group)
    hidden, weight = trained(rows, 16, dtype=dtype), trained(width, 16, dtype=dtype)
    for upstream in (torch.empty_like, summed):
        gathered(partial(passes, function, hidden, weight, upstream=upstream))
    with torch.no_grad():
        gathered(lambda: function(hidden, weight))


# ------------------------------------------------------------------------------------------- experts
def routing(t: int, e: int, k: int, dtype: torch.dtype, *, normalise: bool = True, valid: bool = False) -> None:
    mask = torch.empty(t, dtype=torch.bool) if valid else None
    passes(lambda logits: route(logits, k, normalise=normalise, valid=mask)[:1], trained(t, e, dtype=dtype))


def mixture(
    t: int, e: int, k: int, n: int, f: int, dtype: torch.dtype, *,
    op: Callable[..., Tensor] = experts, first: int = 0, buffers: Sequence[tuple[torch.dtype, bool]] = (),
) -> None:  # fmt: skip
    """Without and with `buffers` of the weights' gradients: of a dtype, and empty or not."""
    hidden, up, down = (trained(*shape, dtype=dtype) for shape in ((t, n), (e, 2 * f, n), (e, n, f)))
    weights, chosen = trained(t, k, dtype=FLOAT32), torch.empty(t, k, dtype=torch.int32)
    for buffer in (None, *buffers):
        for weight in (up, down):
            if buffer is not None:
                weight.main_grad = torch.empty(weight.shape, dtype=buffer[0])  # type: ignore[attr-defined]
                weight.main_grad_empty = buffer[1]  # type: ignore[attr-defined]
        passes(partial(op, first=first), hidden, up, down, weights, chosen)


def quack_mixture(*sizes: int, first: int = 0) -> None:
    """What surrounds QuACK's products, without them."""

    def gated(hidden: Tensor, up: Tensor, rows: Any, keep: bool, tile: Any) -> tuple[Tensor, Tensor]:
        return hidden.new_empty(len(rows.token), up.shape[1]), hidden.new_empty(len(rows.token), up.shape[1] // 2)

    def d_gated(grad: Tensor, down: Tensor, gate_up: Tensor, rows: Any, needs: bool, tile: Any) -> tuple[Tensor, ...]:
        return gate_up, grad.new_empty(len(rows.token), down.shape[2]), rows.weight.new_empty(len(rows.token))

    stand_ins = {"_gated": gated, "_d_gated": d_gated, "product": lambda *_, **__: None}
    own = {name: getattr(quack_experts, name) for name in stand_ins}
    vars(quack_experts).update(stand_ins)
    try:
        mixture(*sizes, BFLOAT16, op=quack_experts.experts, first=first)
    finally:
        vars(quack_experts).update(own)


# ------------------------------------------------------------------------------------------- optimizer
def update(count: int, parameter: torch.dtype, gradient: torch.dtype, moments: torch.dtype = FLOAT32) -> None:
    tensors = [torch.empty(count, dtype=dtype) for dtype in (parameter, gradient, moments, moments)]
    remainder = torch.empty(count, dtype=torch.int16) if parameter == BFLOAT16 else None
    settings: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1, "step": 7}
    adamw(*tensors, remainder, **settings, scale=torch.ones(()))


def squares(*sizes: int, dtype: torch.dtype, start: int = 0) -> None:
    """Of gradients that each have a buffer of their own, `start` elements into it."""
    sum_of_squares([torch.empty(start + size, dtype=dtype)[start:] for size in sizes], "cpu")


def parts_summed(*shape: int, dtype: torch.dtype, own: bool = False) -> None:
    beside = torch.empty(shape[1:], dtype=dtype) if own else None
    sum_parts(torch.empty(shape, dtype=dtype), torch.empty(shape[1:], dtype=dtype), beside)


def scaled(count: int, source: torch.dtype, out: torch.dtype, add: bool) -> None:
    scaled_launch(torch.empty(count, dtype=source), torch.ones(1), torch.empty(count, dtype=out), add)


Calls = dict[str, dict[str, Callable[[], None]]]


def both(name: str, function: Callable[..., None], *sizes: Any, **settings: Any) -> dict[str, Callable[[], None]]:
    """The call in bfloat16 and in float32."""
    calls = {"bfloat16": BFLOAT16, "float32": FLOAT32}
    return {f"{name}-{word}": partial(function, *sizes, dtype, **settings) for word, dtype in calls.items()}


OPS: Calls = {
    "experts": {
        "qwen3_30b": partial(
            mixture,
            32768,
            128,
            8,
            2048,
            768,
            BFLOAT16,
            buffers=((FLOAT32, True), (FLOAT32, False), (BFLOAT16, False)),
        ),
        "few_rows": partial(mixture, 64, 16, 8, 2048, 768, BFLOAT16, first=32),
        "float32": partial(mixture, 64, 128, 8, 2048, 768, FLOAT32),
        "odd": partial(mixture, 9, 3, 2, 21, 13, BFLOAT16),
    },
    "adamw": {
        "bfloat16": partial(update, 1 << 20, BFLOAT16, FLOAT32),
        "bfloat16-gradients": partial(update, 1 << 20, BFLOAT16, BFLOAT16),
        "bfloat16-moments": partial(update, 1 << 20, BFLOAT16, BFLOAT16, BFLOAT16),
        "float32": partial(update, 1 << 20, FLOAT32, FLOAT32),
        "odd": partial(update, 1001, BFLOAT16, FLOAT32),
    },
    "cross_entropy": {
        **both("qwen3", loss, 16, 151936, 151936),
        "ranks": partial(loss, 16, 151936, 37984, BFLOAT16, Ranks()),
        "odd": partial(loss, 3, 501, 507, BFLOAT16),
    },
    "linear_cross_entropy": {
        **both("qwen3", head, 16, 151936, 151936),
        "ranks": partial(head, 16, 151936, 37984, BFLOAT16, Ranks()),
        "odd": partial(head, 3, 501, 507, BFLOAT16),
    },
    "rms_norm": {
        **both("qwen3_30b", norm, rms_norm, 16, 2048),
        "qwen3_8b": partial(norm, rms_norm, 16, 4096, BFLOAT16),
        "frozen": partial(norm, rms_norm, 16, 4096, BFLOAT16, frozen=True),
        "head": partial(norm, rms_norm, 16, 128, BFLOAT16),
        "odd": partial(norm, rms_norm, 3, 1001, BFLOAT16),
    },
    "residual_rms_norm": {
        **both("qwen3_30b", norm, residual_rms_norm, 16, 2048),
        "qwen3_8b": partial(norm, residual_rms_norm, 16, 4096, BFLOAT16),
        "frozen": partial(norm, residual_rms_norm, 16, 4096, BFLOAT16, frozen=True),
        "odd": partial(norm, residual_rms_norm, 3, 1001, BFLOAT16),
    },
    "layer_norm": {
        **both("siglip", norm, layer_norm, 16, 1152, weights=2),
        "without_bias": partial(norm, partial(layer_norm, bias=None), 16, 1024, BFLOAT16),
        "frozen": partial(forward_norm, 16, 1024, BFLOAT16),
        "bare": partial(bare_norm, 16, 1536, BFLOAT16),
        "odd": partial(norm, layer_norm, 3, 1001, BFLOAT16, weights=2),
    },
    "residual_layer_norm": {
        **both("siglip", norm, residual_layer_norm, 16, 1152, weights=2),
        "wide": partial(norm, residual_layer_norm, 16, 4096, BFLOAT16, weights=2),
        "frozen": partial(norm, residual_layer_norm, 16, 1024, BFLOAT16, frozen=True, weights=2),
        "odd": partial(norm, residual_layer_norm, 3, 1001, BFLOAT16, weights=2),
    },
    "rotary_qkv": {
        **both("qwen3_30b", heads, 16, 1, 4, 8, 128, normed=True),
        "qwen3_8b": partial(heads, 16, 2, 8, 4, 128, BFLOAT16, normed=True),
        "pi05": partial(heads, 16, 1, 1, 8, 256, BFLOAT16),
        "groot-tower": partial(heads, 4, 16, 16, 1, 64, BFLOAT16, parts_first=True),
        "groot-llm": partial(heads, 16, 2, 8, 2, 128, BFLOAT16, normed=True),
        "groot-llm-frozen": partial(heads, 16, 2, 8, 2, 128, BFLOAT16, normed=True, frozen=True),
        "equal-normed": partial(heads, 16, 2, 16, 1, 128, BFLOAT16, normed=True),
        "odd": partial(heads, 3, 2, 3, 3, 24, BFLOAT16, normed=True, turned=10),
    },
    "swiglu": {
        **both("qwen3_8b", activation, swiglu, 16, 12288),
        "qwen3_30b": partial(activation, swiglu, 16, 768, BFLOAT16),
        "odd": partial(activation, swiglu, 3, 101, BFLOAT16),
    },
    "geglu": {
        **both("pi05", activation, geglu, 16, 16384),
        "pi05-expert": partial(activation, geglu, 16, 4096, BFLOAT16),
        "odd": partial(activation, geglu, 3, 101, BFLOAT16),
    },
    "gated_mlp": {"qwen3_8b": partial(mlp, "silu", 12288, BFLOAT16), "pi05": partial(mlp, "gelu", 16384, BFLOAT16)},
    "ada_rms_norm": {
        **both("pi05-expert", modulated, ada_rms_norm, 2, 50, 1024),
        "pi05-prefix": partial(modulated, ada_rms_norm, 1, 16, 2048, BFLOAT16, whole=True),
        "odd": partial(modulated, ada_rms_norm, 3, 7, 101, BFLOAT16),
    },
    "residual_ada_rms_norm": {
        **both("pi05-expert", modulated, residual_ada_rms_norm, 2, 50, 1024),
        "pi05-prefix": partial(modulated, residual_ada_rms_norm, 1, 16, 2048, BFLOAT16, whole=True),
        "odd": partial(modulated, residual_ada_rms_norm, 3, 7, 101, BFLOAT16),
    },
    "layer_norm_modulate": {
        **both("groot", modulated, layer_norm_modulate, 2, 41, 1536),
        "odd": partial(modulated, layer_norm_modulate, 3, 7, 101, BFLOAT16, whole=True),
    },
    "gated_residual": {
        **both("pi05-expert", residual, 2, 50, 1024),
        "float32-stream": partial(residual, 2, 50, 1024, BFLOAT16, FLOAT32),
        "odd": partial(residual, 3, 7, 101, BFLOAT16),
    },
    "dropout_add": {
        **both("groot", dropped, 2, 41, 1536),
        "odd": partial(dropped, 3, 7, 101, BFLOAT16),
    },
    "gelu_dropout": {
        **both("groot", dropped_activation, 41, 6144),
        "odd": partial(dropped_activation, 3, 101, BFLOAT16),
    },
    "sum_of_squares": {
        "bfloat16": partial(squares, 1 << 20, dtype=BFLOAT16),
        "float32": partial(squares, 1 << 20, 1 << 16, dtype=FLOAT32),
        "odd": partial(squares, 1001, 7, dtype=BFLOAT16, start=3),
    },
    "sum_parts": {
        "qwen3_30b": partial(parts_summed, 4, 16384, 2048, dtype=BFLOAT16),
        "qwen3_30b_own": partial(parts_summed, 3, 16384, 2048, dtype=BFLOAT16, own=True),
        "odd": partial(parts_summed, 3, 7, 13, dtype=FLOAT32),
    },
    "scaled": {
        "written": partial(scaled, 1 << 20, FLOAT32, BFLOAT16, False),
        "added": partial(scaled, 1001, FLOAT32, FLOAT32, True),
    },
    "route": {
        "qwen3_30b": partial(routing, 16, 128, 8, FLOAT32, valid=True),
        "bfloat16": partial(routing, 16, 128, 8, BFLOAT16),
        "many": partial(routing, 16, 512, 8, FLOAT32),
        "odd": partial(routing, 3, 7, 2, FLOAT32, normalise=False, valid=True),
    },
    "quack_experts": {
        "qwen3_30b": partial(quack_mixture, 32768, 128, 8, 2048, 768),
        "odd": partial(quack_mixture, 9, 3, 2, 24, 13, first=2),
    },
}
"""Op, or a module behind one -> its calls."""

CASES: dict[str, Callable[[], None]] = {
    f"{op}-{name}": call for op, calls in OPS.items() for name, call in calls.items()
}
"""The most expensive ones first, so that processes end together."""
