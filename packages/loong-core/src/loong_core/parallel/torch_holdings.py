"""What this rank holds of each parameter a model lists, whole or sliced: the one view that exports and checkpoints use.

Everything is a range of a flattened parameter. Several listed parameters may lie in one trained tensor (`owner`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from loong_core.parallel.adamw import EMA
from loong_core.parallel.torch_optimizer import whole
from loong_core.references.adamw import split
from loong_core.train.engine import LocalParameter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loong_core.parallel.adamw import Shard
    from loong_core.parallel.torch_optimizer import TorchAdamW
    from loong_core.parallel.torch_options import TorchOptions
    from loong_core.parallel.torch_sharded import ShardedStore
    from loong_core.types import ParameterSpec


class Record(NamedTuple):
    """A listed parameter: what lies in `trained` from element `offset` on, and was of `dtype` when it was listed."""

    spec: ParameterSpec
    trained: Any
    offset: int
    dtype: torch.dtype
    inside: bool
    """Whether other parameters lie in `trained` too."""

    @property
    def end(self) -> int:
        """Where it ends in `trained`."""
        return self.offset + self.spec.size


class Part(NamedTuple):
    """A range of a listed parameter that this rank holds: `begin` elements into it, as slice `where` of what holds it.

    Ranks `copies[0]` of `copies[1]` hold the same.
    """

    begin: int
    where: slice
    copies: tuple[int, int]

    @property
    def size(self) -> int:
        """Elements."""
        return int(self.where.stop - self.where.start)


class Holdings:
    """The parameters of `module`; before `settle` as the model lists them, from then on as recorded there."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        self._settled: dict[str, Record] | None = None
        self._trainer: TorchAdamW | None = None
        self._sharded: ShardedStore | None = None
        self._average = False
        self._divided = False

    # ------------------------------------------------------------------------------------------------- listing
    def settle(self) -> None:
        """Remember what the model lists: once parameters are sliced it can no longer tell."""
        self._settled = self.records()

    def lay_out(self, trainer: TorchAdamW, sharded: ShardedStore | None, options: TorchOptions) -> None:
        """What holds parameters and state from now on."""
        self._trainer, self._sharded = trainer, sharded
        self._average = options.export == "ema"
        self._divided = options.shard != "none"

    def records(self) -> dict[str, Record]:
        """Every listed parameter by role."""
        if self._settled is not None:
            return self._settled
        found = {}
        for parameter in self._module.local_parameters():
            spec, inside = parameter.spec, parameter.owner is not None
            found[spec.role] = Record(spec, parameter.trained, parameter.offset, parameter.tensor.dtype, inside)
        return found

    def parameters(self) -> Iterator[LocalParameter]:
        """What this rank holds of every parameter."""
        for record in self.records().values():
            yield self.local(record)

    def local(self, record: Record) -> LocalParameter:
        """The whole parameter, or its rows on this rank."""
        shape, tensor = record.spec.shape, record.trained
        if self._sharded is not None and tensor in self._sharded.slices:
            held = self._sharded.slices[tensor]
            where = self.values(record).where
            values = held.values[where].view(-1, *shape[1:]) if where.stop > where.start else held.values[:0]
            if held.gradient is not None:
                values.main_grad = held.gradient[where].view(values.shape)  # type: ignore[attr-defined]
            return LocalParameter(record.spec, values)
        if not record.inside:
            return LocalParameter(record.spec, tensor)
        view = tensor.detach().view(-1)[record.offset : record.end].view(shape)
        return LocalParameter(record.spec, view, owner=tensor, offset=record.offset)

    def take_exact(self) -> dict[Any, Tensor]:
        """Float32 values that were rounded into whole parameters, flat, by trained tensor; handed out once."""
        pieces: dict[Any, list[tuple[int, Tensor]]] = {}
        for record in self.records().values():
            if self._sharded is not None and record.trained in self._sharded.slices:
                continue
            exact = self.local(record).take_exact()
            if exact is not None:
                pieces.setdefault(record.trained, []).append((record.offset, exact))
        return {trained: whole(found, trained) for trained, found in pieces.items()}

    # -------------------------------------------------------------------------------------------------- ranges
    def values(self, record: Record) -> Part:
        """The range of the parameter itself that is here."""
        if self._sharded is not None and record.trained in self._sharded.slices:
            held = self._sharded.slices[record.trained]
            return _overlap(record, held.start, held.values.numel(), self._sharded.replica)
        return _overlap(record, 0, record.trained.numel(), (dist.get_rank(), dist.get_world_size()))

    def state(self, record: Record) -> tuple[Shard | None, Part] | None:
        """The shard of the optimizer that holds some of the parameter, and which range; None where it is not trained
        (or there is no optimizer). Ranks without any of it have an empty range."""
        if self._trainer is None or not self._trainer.trains(record.trained):
            return None
        shard = self._trainer.shard(record.trained)
        if shard is None:
            return None, Part(0, slice(0, 0), (0, 1))
        copies = (0, 1) if self._divided else (dist.get_rank(), dist.get_world_size())
        if self._sharded is not None and record.trained in self._sharded.slices:
            copies = self._sharded.replica
        return shard, _overlap(record, shard.start, shard.parameter.numel(), copies)

    def flat(self, record: Record) -> Tensor:
        """What `values` is a range of."""
        if self._sharded is not None and record.trained in self._sharded.slices:
            return self._sharded.slices[record.trained].values
        values: Tensor = record.trained.detach().view(-1)
        return values

    # ---------------------------------------------------------------------------------------------- full tensors
    @torch.no_grad()
    def gather(self, role: str) -> Tensor | None:
        """The full parameter on rank 0, None elsewhere; collective. Its moving average, in float32, if that is what
        is exported."""
        record = self.records()[role]
        state = self.state(record)
        if self._average and state is not None:
            shard, part = state
            held = None if shard is None else shard.read(EMA, part.where)
            return self._assembled(record, part, held)
        sliced = self._sharded is not None and record.trained in self._sharded.slices
        if not sliced:
            return self.local(record).tensor.detach() if dist.get_rank() == 0 else None
        part = self.values(record)
        full = self._assembled(record, part, self.flat(record)[part.where])
        if full is None or full.dtype == record.dtype:
            return full
        return split(full)[0].view(full.shape) if record.dtype == torch.bfloat16 else full.to(record.dtype)

    def _assembled(self, record: Record, part: Part, values: Tensor | None) -> Tensor | None:
        """The full tensor in float32 on rank 0, of ranges that one copy of the model holds."""
        device = record.trained.device if self._sharded is None else self._sharded.device
        full = torch.zeros(record.spec.size, dtype=torch.float32, device=device)
        if values is not None and part.copies[0] == 0:
            full[part.begin : part.begin + part.size] = values.float()
        dist.reduce(full, dst=0)
        return full.view(record.spec.shape) if dist.get_rank() == 0 else None


def _overlap(record: Record, start: int, size: int, copies: tuple[int, int]) -> Part:
    first, last = max(start, record.offset), min(start + size, record.end)
    if first >= last:
        return Part(0, slice(0, 0), copies)
    return Part(first - record.offset, slice(first - start, last - start), copies)
