"""The update of one parameter of the real size, beside what other libraries have."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from loong_ops.bench.row import Missing, Row, Thunk

if TYPE_CHECKING:
    from torch import Tensor

SIZES = {"a layer's 128 up-projections": 128 * 2 * 768 * 2048, "a head": 151936 * 2048, "a norm": 2048}
SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1, "step": 10}
SWEEP = [(512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8), (4096, 8)]


def rows() -> list[Row]:
    """Ours, the reference, Transformer Engine and torch's fused AdamW; and our block sizes."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for what, count in SIZES.items():
        makers = {"triton": _fused, "torch": _reference, "transformer_engine": _transformer_engine, "fused": _torch}
        for name, maker in makers.items():
            # torch's own keeps float32 masters and leaves it to the caller to copy them into the parameters.
            size = 34 if name == "fused" else 28
            yield _row(f"n={count} ({what})", name, partial(maker, count), size * count)
        for block, warps in SWEEP:
            make = partial(_fused, count, {"BLOCK": block, "num_warps": warps})
            yield _row(f"n={count} ({what})", f"triton[{block},w{warps}]", make, 28 * count, headline=False)
        yield _row(f"n={count} ({what}), bfloat16 gradient", "triton", partial(_fused, count, narrow=True), 26 * count)


def _row(shape: str, name: str, make: Any, size: int, headline: bool = True) -> Row:
    return Row(op="adamw", shape=shape, name=name, direction="forward", make=make, bytes=float(size), headline=headline)


def _tensors(count: int, narrow: bool = False) -> list[Tensor]:
    """Parameter, gradient (`narrow`: in bfloat16), moments and remainder."""
    import torch

    parameter = torch.randn(count, device="cuda").bfloat16()
    gradient = torch.randn(count, device="cuda", dtype=torch.bfloat16 if narrow else torch.float32)
    moments = [torch.zeros(count, device="cuda"), torch.zeros(count, device="cuda")]
    return [parameter, gradient, *moments, torch.zeros(count, device="cuda", dtype=torch.int16)]


def _fused(count: int, config: dict[str, int] | None = None, narrow: bool = False) -> Thunk:
    import torch

    from loong_ops.adamw import adamw

    scale = torch.ones((), device="cuda")
    return partial(adamw, *_tensors(count, narrow), **SETTINGS, scale=scale, _config=config)


def _reference(count: int) -> Thunk:
    import torch

    from loong_core.references.adamw import adamw

    return partial(adamw, *_tensors(count), **SETTINGS, scale=torch.ones((), device="cuda"))


def _transformer_engine(count: int) -> Thunk:
    try:
        from transformer_engine.pytorch.optimizers import FusedAdam
    except ImportError as error:
        raise Missing(f"Transformer Engine: {error}") from error
    parameter, gradient, *_ = _tensors(count)
    optimizer = FusedAdam(
        [parameter],
        lr=SETTINGS["lr"],
        betas=SETTINGS["betas"],
        eps=SETTINGS["eps"],
        weight_decay=SETTINGS["decay"],
        master_weights=True,
        use_decoupled_grad=True,
        store_param_remainders=True,
    )
    parameter.decoupled_grad = gradient  # type: ignore[attr-defined]
    return optimizer.step  # type: ignore[no-any-return]


def _torch(count: int) -> Thunk:
    import torch

    parameter, gradient, *_ = _tensors(count)
    master = parameter.float()
    master.grad = gradient
    optimizer = torch.optim.AdamW(
        [master], lr=SETTINGS["lr"], betas=SETTINGS["betas"], eps=SETTINGS["eps"], weight_decay=0.1, fused=True
    )

    def step() -> None:
        optimizer.step()
        with torch.no_grad():
            parameter.copy_(master)

    return step
