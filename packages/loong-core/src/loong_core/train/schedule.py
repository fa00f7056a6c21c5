"""The learning rate as a pure function of the step: no state to save, nothing that depends on the number of ranks."""

from __future__ import annotations

import math

from loong_core.recipe import OptimSection

DECAY_SHARE = 0.1
"""Share of all steps over which `wsd` (warm-up, stable, decay; Hu et al. 2024, MiniCPM) goes down."""


def learning_rate(optim: OptimSection, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (the first is 1) of `steps`.

    Warm-up is linear and reaches `optim.lr` at step `optim.warmup`. `constant` stays there. `cosine` and `linear` then
    go to `optim.min_lr`, which the last step gets; `wsd` does so, linearly, over the last tenth of all steps (less
    if warm-up is still going on).
    """
    if step <= optim.warmup:
        return optim.lr * step / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    start = optim.warmup
    if optim.schedule == "wsd":
        start = max(start, steps - math.ceil(steps * DECAY_SHARE))
        if step <= start:
            return optim.lr
    if step >= steps:
        return optim.min_lr
    progress = (step - start) / (steps - start)
    share = 0.5 * (1.0 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1.0 - progress
    return optim.min_lr + (optim.lr - optim.min_lr) * share
