"""The head's loss at the sizes of Qwen3, forward and backward with the weight's gradient added to a float32 buffer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from loong_ops.bench.row import Missing, Row, Thunk

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY = 151936
SIZES = ((32768, 2048), (32768, 4096), (8192, 2048), (4096, 2048))
"""Tokens and hidden size."""
CHUNKS = (1024, 2048, 3072, 4096, 4224, 6144, 8192)
CONFIGS = (
    (4096, 4, 1), (4096, 8, 1), (8192, 8, 1), (8192, 16, 1), (16384, 16, 1), (16384, 32, 1), (32768, 32, 1),
    (8192, 8, 3), (8192, 16, 3), (16384, 16, 2), (16384, 16, 3), (16384, 32, 3), (32768, 32, 2),
)  # fmt: skip
"""Columns at a time, warps and stages of the cross entropy's kernel."""


def rows() -> list[Row]:
    """The fused loss beside the plain pair and Liger; then its kernel, on the logits of a chunk; then both swept."""
    return [*_losses(), *_cross_entropy()]


# ------------------------------------------------------------------------------------------- the whole
def _losses() -> Iterator[Row]:
    losses: dict[str, Callable[..., Tensor]] = {
        **FUSED, "reference": _reference, "torch": _torch, "liger": _liger,
    }  # fmt: skip
    for tokens, hidden in SIZES:
        for name, loss in losses.items():
            yield _row(tokens, hidden, name, loss)
        for name, loss in FUSED.items():
            yield _row(tokens, hidden, name, loss, direction="forward")
            # A factor of each token's own: the weight's gradient is computed again, two products more.
            yield _row(tokens, hidden, f"{name}[own factors]", loss, uniform=False, headline=False)
            for chunk in CHUNKS:
                if chunk <= tokens:
                    yield _row(tokens, hidden, f"{name}[chunk {chunk}]", partial(loss, chunk=chunk), headline=False)


def _row(tokens: int, hidden: int, name: str, loss: Callable[..., Tensor], **others: Any) -> Row:
    direction = others.get("direction", "both")
    products = 3 if direction == "both" else 1
    return Row(
        op="linear_cross_entropy",
        shape=f"t={tokens} h={hidden} v={VOCABULARY}",
        name=name,
        direction=direction,
        make=partial(_step, tokens, hidden, loss, direction == "both", others.get("uniform", True)),
        flops=products * 2.0 * tokens * hidden * VOCABULARY,
        # The weight is read; backward reads its buffer and writes it.
        bytes=(10.0 if direction == "both" else 2.0) * VOCABULARY * hidden,
        headline=others.get("headline", True),
    )


def _step(tokens: int, hidden: int, loss: Callable[..., Tensor], backward: bool, uniform: bool) -> Thunk:
    import torch

    states = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(VOCABULARY, hidden, device="cuda") * 0.02).bfloat16().requires_grad_()
    buffer = torch.zeros(VOCABULARY, hidden, device="cuda")
    targets = torch.randint(0, VOCABULARY, (tokens,), device="cuda")
    factors = torch.rand(tokens, device="cuda")
    if getattr(loss, "func", loss) in FUSED.values():
        weight.main_grad = buffer  # type: ignore[attr-defined]
    loss(states[:1], weight, targets[:1])  # where a library is missing it shows here
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return loss(states, weight, targets)

        return forward

    def step() -> None:
        total = loss(states, weight, targets)
        total = total.sum() if uniform else (total * factors).sum()
        _, gradient = torch.autograd.grad(total, (states, weight), allow_unused=True)
        if gradient is not None:
            buffer.add_(gradient)

    return step


def _fused(states: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    from loong_ops.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(states, weight, targets, vocabulary=VOCABULARY, _chunk=chunk)


def _quack(states: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> Tensor:
    from loong_ops.quack_linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(states, weight, targets, vocabulary=VOCABULARY, _chunk=chunk)


FUSED: dict[str, Callable[..., Tensor]] = {"triton": _fused, "quack": _quack}
"""Ours, which know the weight's buffer."""


def _reference(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from loong_core.references.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(states, weight, targets, vocabulary=VOCABULARY)


def _torch(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.cross_entropy(functional.linear(states, weight), targets, reduction="none")


def _liger(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    import torch

    try:
        liger = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    except ImportError as error:
        raise Missing(f"Liger: {error}") from error
    # bias, class weights, ignored target, z loss, smoothing, reduction, soft cap, keep the z loss, sum in
    settings = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)
    found: Tensor = liger.LigerFusedLinearCrossEntropyFunction.apply(states, weight, targets, *settings)[0]
    return found


# ------------------------------------------------------------------------------------------- the kernel
def _cross_entropy() -> Iterator[Row]:
    tokens = 8192
    for name, maker in {"triton": _op, "reference": _op_reference, "torch": _op_torch}.items():
        yield Row(
            op="cross_entropy",
            shape=f"t={tokens} v={VOCABULARY}",
            name=name,
            direction="both",
            make=partial(_op_step, tokens, maker),
            bytes=3 * 2.0 * tokens * VOCABULARY,
        )
    for block, warps, stages in CONFIGS:
        for count in (2048, 3072):
            yield Row(
                op="cross_entropy",
                shape=f"t={count} v={VOCABULARY} in place",
                name=f"triton[{block},w{warps},s{stages}]",
                direction="both",
                make=partial(_kernel, count, block, warps, stages),
                bytes=2 * 2.0 * count * VOCABULARY,
                headline=False,
            )


def _op_step(tokens: int, loss: Callable[..., Tensor]) -> Thunk:
    import torch

    logits = torch.randn(tokens, VOCABULARY, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (tokens,), device="cuda")
    return lambda: torch.autograd.grad(loss(logits, targets).sum(), logits)


def _op(logits: Tensor, targets: Tensor) -> Tensor:
    from loong_ops.cross_entropy import cross_entropy

    return cross_entropy(logits, targets, vocabulary=VOCABULARY)


def _op_reference(logits: Tensor, targets: Tensor) -> Tensor:
    from loong_core.references.cross_entropy import cross_entropy

    return cross_entropy(logits, targets, vocabulary=VOCABULARY)


def _op_torch(logits: Tensor, targets: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.cross_entropy(logits, targets, reduction="none")


def _kernel(tokens: int, block: int, warps: int, stages: int) -> Thunk:
    """Loss and gradient in one launch, which writes over the logits: the time does not depend on what they are."""
    import torch

    from loong_ops.cross_entropy import Share, write_losses

    logits = torch.randn(tokens, VOCABULARY, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, VOCABULARY, (tokens,), device="cuda")
    loss, peaks, inverses = torch.empty(3, tokens, device="cuda")
    share = Share.of(VOCABULARY, VOCABULARY, None)

    def launch() -> None:
        with _configured(block, warps, stages):
            write_losses(logits, targets, share, loss, peaks, inverses, logits)

    return launch


@contextmanager
def _configured(block: int, warps: int, stages: int) -> Iterator[None]:
    from loong_ops import cross_entropy as module

    before = module.BLOCK, module.WARPS, module.STAGES
    module.BLOCK, module.WARPS, module.STAGES = block, warps, stages
    try:
        yield
    finally:
        module.BLOCK, module.WARPS, module.STAGES = before
