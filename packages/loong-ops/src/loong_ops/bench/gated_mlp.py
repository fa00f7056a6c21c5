"""The dense SwiGLU layer of Qwen3-8B: the op `gated_mlp`, its products one by one, and layers of separate kernels.

Shape legend: t tokens, n hidden size, f inner size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from loong_ops.bench.linear import check_quack
from loong_ops.bench.row import Row, Thunk
from loong_ops.quack_products import LARGE, LONG, Tile

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, HIDDEN, INNER = 32768, 4096, 12288
SHAPE = f"t={TOKENS} n={HIDDEN} f={INNER}"

_TURNS = (Tile(128, 192, pingpong=True), Tile(128, 128, pingpong=True))
VARIANTS: Mapping[str, tuple[Tile, ...]] = {
    "up": (LARGE, LONG, Tile(256, 128), *_TURNS),
    "down": (LARGE, LONG),
    "d_act": (*_TURNS, Tile(256, 128), LARGE, LONG),
    "d_x": (LARGE, LONG, *_TURNS),
    "d_down": (LARGE, LONG),
    "d_up": (LARGE, LONG, *_TURNS),
}
"""Product -> tiles worth a look."""
WIDE = frozenset({"up", "d_x", "d_up"})
"""Products with 2f; the others have f."""


def rows() -> list[Row]:
    """The layer forward and backward, then every product with every tile."""
    layers = {"quack": _quack, "triton": _apart, "torch": _torch}
    tensors, weights = TOKENS * (2 * HIDDEN + 3 * INNER), 3 * HIDDEN * INNER
    whole = [
        Row(
            op="gated_mlp",
            shape=SHAPE,
            name=name,
            direction=direction,
            make=partial(_layer, layer, direction),
            flops=products * 2.0 * TOKENS * weights,
            bytes=moved,
        )
        for direction, products, moved in (
            ("forward", 1, 2.0 * (tensors + weights)),
            ("backward", 2, 2.0 * (tensors + TOKENS * (HIDDEN + 2 * INNER) + weights) + 8.0 * weights),
        )
        for name, layer in layers.items()
    ]
    return whole + [_product_row(kind, tile) for kind, tiles in VARIANTS.items() for tile in tiles]


def _product_row(kind: str, tile: Tile) -> Row:
    inner = INNER * (2 if kind in WIDE else 1)
    more = {"up": INNER, "d_act": 4 * INNER}.get(
        kind, 0
    )  # the activation; or that, the projected rows and their gradient
    weights = HIDDEN * inner * (8.0 if kind in ("d_down", "d_up") else 2.0)
    return Row(
        op="gated_mlp",
        shape=f"{kind}: {SHAPE}",
        name=f"quack[{tile}]",
        direction="forward" if kind in ("up", "down") else "backward",
        make=partial(product, kind, tile),
        flops=2.0 * TOKENS * HIDDEN * inner,
        bytes=2.0 * TOKENS * (HIDDEN + inner + more) + weights,
        headline=False,
    )


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x [t,n], up [2f,n] and down [n,f] in bfloat16."""
    import torch

    torch.manual_seed(0)
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    return make(TOKENS, HIDDEN), make(2 * INNER, HIDDEN) * HIDDEN**-0.5, make(HIDDEN, INNER) * INNER**-0.5


def product(kind: str, tile: Tile) -> Thunk:
    """One product on inputs of its own; weights' gradients are added to their buffers."""
    check_quack()
    import torch

    from loong_ops import quack_mlp
    from loong_ops.quack_products import product as multiply

    x, up, down = _inputs()
    wide, narrow = (torch.randn(TOKENS, size, device="cuda", dtype=torch.bfloat16) for size in (2 * INNER, INNER))
    out = torch.empty_like(x)
    buffer = torch.zeros(up.shape if kind == "d_up" else down.shape, device="cuda")
    thunks: dict[str, Thunk] = {
        "up": lambda: quack_mlp._gated(x, up, True, tile),
        "down": lambda: multiply(narrow, down, out, tile),
        "d_act": lambda: quack_mlp._d_gated(x, down, wide, tile),
        "d_x": lambda: quack_mlp._d_inputs(wide, up, tile),
        "d_down": lambda: quack_mlp._outer(x, narrow, tile, False, buffer, True),
        "d_up": lambda: quack_mlp._outer(x, wide, tile, True, buffer, True),
    }
    return thunks[kind]


def _layer(layer: Any, direction: str) -> Thunk:
    """Forward, keeping what backward needs, or backward alone, into float32 buffers where the layer knows them."""
    import torch

    x, *weights = _inputs()
    for tensor in (x, *weights):
        tensor.requires_grad_()
    for weight in weights:
        weight.main_grad = torch.zeros(weight.shape, device="cuda")  # type: ignore[attr-defined]
    if direction == "forward":
        return lambda: layer(x, *weights)
    result = layer(x, *weights)
    gradient = torch.randn_like(result)

    def backward() -> None:
        for tensor in (x, *weights):
            tensor.grad = None  # otherwise autograd would add to it, which is not the op's work
        result.backward(gradient, retain_graph=True)

    return backward


def _quack(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    check_quack()
    from loong_ops.quack_mlp import gated_mlp

    return gated_mlp(x, up, down)


def _apart(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """cuBLAS's products, the activation by Triton."""
    import torch

    from loong_ops.swiglu import swiglu

    return torch.nn.functional.linear(swiglu(torch.nn.functional.linear(x, up)), down)


def _torch(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    from loong_core.references.mlp import gated_mlp

    return gated_mlp(x, up, down)
