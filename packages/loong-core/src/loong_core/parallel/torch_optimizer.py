"""AdamW of the torch engine: over whole and sliced parameters alike, with a moving average of the masters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from loong_core.parallel.adamw import EMA, MASTER, MOMENTS, AdamW, Shard, split_dtype
from loong_core.references.adamw import split

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.parallel.torch_flat import FlatStore
    from loong_core.parallel.torch_sharded import ShardedStore
    from loong_core.recipe import OptimSection
    from loong_core.types import PrecisionPolicy

_PIECE = 1 << 24
"""Elements averaged at a time, so that masters made for it stay small."""


class TorchAdamW(AdamW):
    """AdamW over what `flat` and `sharded` hold; parameters that others have updated are sent for at the end of a step.

    `decayed` have weight decay. `ema` is the decay of the moving average, None: there is none.
    """

    def __init__(
        self,
        flat: FlatStore,
        sharded: ShardedStore | None,
        section: OptimSection,
        precision: PrecisionPolicy,
        update: Callable[..., None],
        squares: Callable[[Sequence[Tensor], str], Tensor],
        *,
        decayed: set[Any],
        trained: set[Any],
        ema: float | None,
        device: str,
    ) -> None:
        self._flat, self._ema = flat, ema
        moments: torch.dtype = getattr(torch, precision.optimizer_state)
        low = split_dtype(precision)

        def make(parameter: Tensor, gradient: Tensor, decayed: bool) -> Shard:
            return Shard(
                start=0,
                parameter=parameter,
                gradient=gradient,
                exp_avg=torch.zeros_like(parameter, dtype=moments),
                exp_avg_sq=torch.zeros_like(parameter, dtype=moments),
                remainder=torch.zeros_like(parameter, dtype=torch.int16) if parameter.dtype == low else None,
                decayed=decayed,
                counted=True,
                ema=None if ema is None else torch.zeros_like(parameter, dtype=torch.float32),
            )

        shards, updates = flat.shards(make)
        counted = flat.counted()
        if sharded is not None:
            slices = dict(sharded.shards(make, decayed))
            shards.update(slices)
            updates += slices.values()
            counted += sharded.counted()
        super().__init__(shards, updates, counted, trained, section, precision, update, squares, device)
        self.restart_average()

    @property
    def names(self) -> tuple[str, ...]:
        """What shards hold: the master weight, the moments, and the moving average where there is one."""
        return (MASTER, *MOMENTS) if self._ema is None else (MASTER, *MOMENTS, EMA)

    @torch.no_grad()
    def set_master(self, parameter: Any, values: Tensor) -> None:
        """Make flat float32 `values` the master weight of a whole `parameter`. What the parameter is rounded to does
        not depend on who holds its master."""
        exact = values.to(parameter.device)
        if parameter.dtype == torch.bfloat16:
            parameter.copy_(split(exact)[0].view(parameter.shape))
        else:
            parameter.copy_(exact.view(parameter.shape))
        shard = self.shard(parameter)
        if shard is not None:
            shard.write(MASTER, slice(None), exact[shard.start : shard.stop])

    @torch.no_grad()
    def restart_average(self) -> None:
        """Let the moving average begin at the master weights as they are now."""
        for shard in self._updates:
            if shard.ema is not None:
                shard.ema.copy_(shard.read(MASTER, slice(None)))

    def _launched(self, update: Shard) -> None:
        self._flat.gather_after(update)

    def _updated(self) -> None:
        if self._ema is not None:
            self._average(self._ema)
        # The device waits, not the host; from here on everybody may look at the parameters.
        self._flat.gathered()

    def _average(self, decay: float) -> None:
        for shard in self._updates:
            assert shard.ema is not None
            for begin in range(0, shard.ema.numel(), _PIECE):
                where = slice(begin, begin + _PIECE)
                shard.ema[where].lerp_(shard.read(MASTER, where).float(), 1.0 - decay)


def whole(pieces: Sequence[tuple[int, Tensor]], like: Tensor) -> Tensor:
    """Flat float32 `like` with `pieces` (offset, values) in their places; a piece that is all of it, where it is."""
    if len(pieces) == 1 and pieces[0][1].numel() == like.numel():
        return pieces[0][1].float().reshape(-1)
    flat = like.detach().float().flatten().clone()
    for offset, values in pieces:
        flat[offset : offset + values.numel()] = values.to(flat.device).flatten()
    return flat
