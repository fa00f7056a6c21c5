"""AdamW over flat ranges of parameters, in one pass; `ShardedAdamW` takes them from megatron-core's gradient buffers.

There every rank updates its range of each bucket. Not megatron-core's `DistributedOptimizer`: that updates float32
copies and copies them back, clips by a pass of its own over all gradients, and keeps master weights as remainders only
through Transformer Engine's FusedAdam, so never on a CPU. What is needed of it is little: which range of a parameter
belongs to which rank. Of megatron-core 0.19 this uses what the buffers of its data-parallel wrapper show every
optimizer: buckets, their data, where parameters lie in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from loong_core.errors import Unsupported
from loong_core.parallel.fetch import Fetched
from loong_core.references.adamw import join, split

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.recipe import OptimSection
    from loong_core.types import PrecisionPolicy

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"
EMA = "ema"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The range of one flattened trained tensor that this rank updates, and the optimizer's state for it.

    All tensors are flat and equally long; `parameter` and `gradient` are views of the engine's buffers. The range
    begins `start` elements into the trained tensor. With `remainder` (int16) the master weight is what the two join to;
    without, it is `parameter`. `ema` (float32) is a moving average of it.
    """

    start: int
    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    remainder: Tensor | None
    decayed: bool
    counted: bool
    """Whether its gradient is part of the norm: no other rank counts the same elements."""
    ema: Tensor | None = None

    @property
    def stop(self) -> int:
        """The end of the range in the trained tensor."""
        return self.start + self.parameter.numel()

    def read(self, name: str, where: slice) -> Tensor:
        """Part of a moment, or of the master weight in float32; `where` counts from the shard's own beginning."""
        if name != MASTER:
            return self._state(name)[where]
        if self.remainder is None:
            return self.parameter[where]
        return join(self.parameter[where], self.remainder[where])

    def write(self, name: str, where: slice, values: Tensor) -> None:
        """The reverse. A master weight sets the parameter too: to the nearest number of its dtype."""
        if name != MASTER:
            self._state(name)[where].copy_(values)
            return
        if self.remainder is None:
            self.parameter[where].copy_(values)
            return
        rounded, low = split(values.float())
        self.parameter[where].copy_(rounded)
        self.remainder[where].copy_(low)

    def _state(self, name: str) -> Tensor:
        found = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, EMA: self.ema}[name]
        assert found is not None, name
        return found


class AdamW:
    """AdamW with clipping by the global norm over `shards`, by the tensor that autograd knows.

    `updates` are what is updated at a time: the shards themselves, or longer ranges that hold several. `counted` are
    the gradients that this rank adds to the norm, so that all ranks together add each element once; `trained` is
    everything that is updated here or on another rank. `update` is the op `adamw`, `squares` the op `sum_of_squares`.
    bfloat16 parameters whose policy asks for float32 masters keep those as two bytes more each; parameters of the
    policy's `master` dtype are their own masters. Raises `Unsupported` for any other pair. There is no weight decay on
    biases and norms.
    """

    def __init__(
        self,
        shards: Mapping[Tensor, Shard],
        updates: Sequence[Shard],
        counted: Sequence[Tensor],
        trained: set[Tensor],
        section: OptimSection,
        precision: PrecisionPolicy,
        update: Callable[..., None],
        squares: Callable[[Sequence[Tensor], str], Tensor],
        device: str,
    ) -> None:
        self.steps = 0
        self._shards, self._updates, self._counted, self._trained = shards, updates, counted, trained
        self._section = section
        self._update, self._squares = update, squares
        self._device = device
        self._split = split_dtype(precision)
        self._measured: tuple[Tensor, Fetched] | None = None

    # ------------------------------------------------------------------------------------------ its state
    def trains(self, parameter: Tensor) -> bool:
        """Whether `parameter` is updated, here or on another rank of its replicas."""
        return parameter in self._trained

    def shard(self, parameter: Tensor) -> Shard | None:
        """What this rank updates of `parameter`; None where that is nothing."""
        return self._shards.get(parameter)

    def state_names(self, parameter: Tensor) -> list[str]:
        """What shards of `parameter` can `read` and `write`, the same on every rank."""
        return [*MOMENTS, MASTER] if parameter.dtype == self._split else list(MOMENTS)

    def shards(self) -> list[Shard]:
        """Everything this rank updates."""
        return list(self._shards.values())

    def take_parameters(self) -> None:
        """Make the parameters, as they are now, the master weights."""
        for shard in self._shards.values():
            if shard.remainder is not None:
                shard.remainder.zero_()

    # ------------------------------------------------------------------------------------------ its step
    @torch.no_grad()
    def step(self, lr: float, gradient_scale: Tensor) -> float:
        """One update at learning rate `lr`; returns the global norm of the gradients before clipping.

        The gradients are what the buffers hold times `gradient_scale`, a scalar tensor. The only wait for the device is
        the one for the norm: while the device updates, the host goes on to the next step. A norm that is not finite
        leaves parameters and state as they are, on every rank.
        """
        section = self._section
        if self._measured is None:
            self.measure(gradient_scale)
        assert self._measured is not None
        (norm, fetched), self._measured = self._measured, None
        limit = math.inf if section.clip is None else section.clip
        clipped = (limit / (norm + 1e-6)).clamp(max=1.0) * gradient_scale
        scale = torch.where(norm.isfinite(), clipped, math.nan)
        for shard in self._updates:
            self._update(
                shard.parameter,
                shard.gradient,
                shard.exp_avg,
                shard.exp_avg_sq,
                shard.remainder,
                lr=lr,
                betas=section.betas,
                eps=section.eps,
                decay=section.weight_decay if shard.decayed else 0.0,
                step=self.steps + 1,
                scale=scale,
            )
            self._launched(shard)
        self._updated()
        found = float(fetched.get())
        self.steps += math.isfinite(found)
        return found

    @torch.no_grad()
    def measure(self, gradient_scale: Tensor) -> None:
        """Have the device work on the norm that the next `step` needs. For engines that wait for the losses first."""
        norm = self._norm() * gradient_scale
        self._measured = norm, Fetched(norm)

    def _launched(self, update: Shard) -> None:
        """Called once one of the updates is launched."""

    def _updated(self) -> None:
        """Called once every update is launched, before the wait for the norm."""

    def _norm(self) -> Tensor:
        """Of what the buffers of all ranks hold, every element once: a float32 scalar tensor, the same on all ranks."""
        squared = self._squares(self._counted, self._device)
        dist.all_reduce(squared)
        return squared.sqrt()


class ShardedAdamW(AdamW):
    """AdamW over what `chunks` train, megatron-core's data-parallel wrappers.

    `counts` tells whether a parameter's gradient is part of the norm on this rank.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        section: OptimSection,
        precision: PrecisionPolicy,
        update: Callable[..., None],
        squares: Callable[[Sequence[Tensor], str], Tensor],
        counts: Callable[[Tensor], bool],
        device: str,
    ) -> None:
        self._chunks = chunks
        self._split = split_dtype(precision)
        self._moments: torch.dtype = getattr(torch, precision.optimizer_state)
        trained = {trained for chunk in chunks for buffer in _buffers(chunk) for trained in buffer.params}
        shards = {trained: shard for chunk in chunks for trained, shard in self._cut(chunk, counts)}
        self._overlaps = bool(chunks) and chunks[0].ddp_config.overlap_param_gather
        self._last = {id(last): chunk for chunk in chunks if (last := self._last_of(chunk, shards)) is not None}
        self._gathering: set[int] = set()
        counted = [shard.gradient for shard in shards.values() if shard.counted]
        super().__init__(shards, list(shards.values()), counted, trained, section, precision, update, squares, device)

    def _cut(self, chunk: Any, counts: Callable[[Tensor], bool]) -> Iterator[tuple[Tensor, Shard]]:
        """This rank's ranges, in the order of the buffers: bucket by bucket, where every rank holds an equal part."""
        names = {parameter: name for name, parameter in chunk.module.named_parameters()}
        for buffer in _buffers(chunk):
            rank, size = buffer.data_parallel_group.rank(), buffer.data_parallel_group.size()
            for bucket in buffer.buckets:
                width = bucket.grad_data.numel() // size
                for trained in bucket.params_list:
                    begin, end = bucket.param_to_index[trained]
                    first, last = max(begin, rank * width), min(end, (rank + 1) * width)
                    if first < last:
                        ranges = first - begin, bucket.param_data[first:last], bucket.grad_data[first:last]
                        decayed = trained.dim() > 1 and not names[trained].endswith(".bias")
                        yield trained, self._shard(*ranges, decayed=decayed, counted=counts(trained))

    def _shard(self, start: int, parameter: Tensor, gradient: Tensor, *, decayed: bool, counted: bool) -> Shard:
        return Shard(
            start=start,
            parameter=parameter,
            gradient=gradient,
            exp_avg=torch.zeros_like(parameter, dtype=self._moments),
            exp_avg_sq=torch.zeros_like(parameter, dtype=self._moments),
            remainder=torch.zeros_like(parameter, dtype=torch.int16) if parameter.dtype == self._split else None,
            decayed=decayed,
            counted=counted,
        )

    @staticmethod
    def _last_of(chunk: Any, shards: Mapping[Tensor, Shard]) -> Shard | None:
        """The last update of this rank in the dense part of a chunk."""
        trained = (
            parameter for buffer in chunk.buffers for bucket in buffer.buckets for parameter in bucket.params_list
        )
        return next((shards[parameter] for parameter in reversed(list(trained)) if parameter in shards), None)

    def _launched(self, update: Shard) -> None:
        """Gather the dense part of a chunk, which is read first, beside the updates of its experts."""
        if self._overlaps and (chunk := self._last.get(id(update))) is not None:
            self._gather(self._chunks[: self._chunks.index(chunk) + 1])

    def _updated(self) -> None:
        if not self._overlaps:
            for chunk in self._chunks:
                chunk.start_param_sync()
            return
        self._gather(self._chunks)
        for chunk in self._chunks:
            for group in reversed(chunk.expert_parallel_bucket_groups):
                group.start_param_sync()
        self._gathering.clear()

    def _gather(self, chunks: Sequence[Any]) -> None:
        """Begin to gather the dense parts of `chunks`, unless that was done: in one order on all ranks, also on those
        that update nothing of a chunk. What is read first goes first; buckets are in reverse order."""
        for chunk in chunks:
            if id(chunk) not in self._gathering:
                self._gathering.add(id(chunk))
                for group in reversed(chunk.bucket_groups):
                    group.start_param_sync()


def _buffers(chunk: Any) -> list[Any]:
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def split_dtype(precision: PrecisionPolicy) -> torch.dtype | None:
    """The dtype of parameters whose master weights are kept as remainders. Others (under a policy with bfloat16
    parameters a module may ask for float32) are their own masters."""
    if precision.master == precision.parameters:
        return None
    if (precision.parameters, precision.master) == ("bfloat16", "float32"):
        return torch.bfloat16
    raise Unsupported(
        f"precision {precision.name}: AdamW keeps float32 master weights of bfloat16 parameters, or masters of the "
        f"parameters' own dtype; not {precision.master} of {precision.parameters}."
    )
