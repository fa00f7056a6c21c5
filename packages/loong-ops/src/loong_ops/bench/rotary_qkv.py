"""Queries, keys and values out of the projections of Qwen3-30B-A3B and Qwen3-8B, beside plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from loong_ops.bench.passes import Call, backward, forward
from loong_ops.bench.row import Row, Thunk

SIZES = [(32768, 32, 4, 128), (8192, 32, 4, 128), (32768, 32, 8, 128)]
"""Tokens, query heads, key-value heads, head size."""

FORWARD = [{"forward_elements": 512}, {"forward_elements": 2048}]
BACKWARD = [
    {"backward_stages": 1},
    {"backward_stages": 3},
    {"backward_registers": 255, "backward_programs": 132 * 8},
    {"backward_registers": 168, "backward_programs": 132 * 12},
    {"backward_stages": 1, "backward_registers": 255, "backward_programs": 132 * 8},
    {"backward_programs": 132 * 18},
    {"backward_programs": 132 * 36},
    {"backward_elements": 512, "backward_registers": 168, "backward_programs": 132 * 6},
    {"backward_elements": 512, "backward_registers": 128, "backward_programs": 132 * 8},
]


def rows() -> list[Row]:
    """Both passes at the real sizes; variants of our own cut at the first."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for size in SIZES:
        t, h, g, d = size
        shape = f"t={t} h={h} g={g} d={d}"
        once = t * (h + 2 * g) * d * 2
        for name in ("triton", "torch"):
            make = partial(_call, name, size, {})
            yield _row(shape, name, "forward", partial(forward, make), 2 * once + t * d * 4)
            yield _row(shape, name, "backward", partial(backward, make), 3 * once + t * d * 4)
        if size is not SIZES[0]:
            continue
        for settings in FORWARD:
            make = partial(_call, "triton", size, settings)
            yield _row(shape, _named(settings), "forward", partial(forward, make), 2 * once + t * d * 4, False)
        for settings in BACKWARD:
            make = partial(_call, "triton", size, settings)
            yield _row(shape, _named(settings), "backward", partial(backward, make), 3 * once + t * d * 4, False)


def _row(shape: str, name: str, direction: str, make: Callable[[], Thunk], size: int, headline: bool = True) -> Row:
    return Row(
        op="rotary_qkv",
        shape=shape,
        name=name,
        direction=direction,
        make=make,
        bytes=float(size),
        headline=headline,
    )


def _named(settings: dict[str, int]) -> str:
    return f"triton[{','.join(f'{key.split("_")[1]}={value}' for key, value in settings.items())}]"


def _call(name: str, size: tuple[int, int, int, int], settings: dict[str, int]) -> Call:
    import torch

    from loong_core.references import rotary
    from loong_ops.rotary_qkv import Config, rotary_qkv

    t, h, g, d = size
    mixed = torch.randn(t, 1, g, h // g + 2, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    norms = [torch.randn(d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    frequencies = 1e6 ** (-torch.arange(0, d, 2, device="cuda") / d)
    angles = (torch.arange(t, device="cuda")[:, None] * frequencies).repeat(1, 2)[:, None, None]
    ours: Callable[..., Any] = partial(rotary_qkv, _config=Config(**settings))
    function: Callable[..., Any] = ours if name == "triton" else rotary.rotary_qkv
    return partial(function, mixed, angles, norms[0], norms[1], 1e-6), [mixed, *norms]
