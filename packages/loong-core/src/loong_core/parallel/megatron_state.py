"""Sharded state of the megatron engine: named by role, cut along the parameter's own axis, independent of any layout.

megatron-core's own sharded state dicts name tensors after modules and optimizers, which differ between layouts (one
optimizer or two with experts, layer numbers per stage), and with torch's AdamW loading them fails or miscounts steps
(`docs/log/`). A parameter here is its role, so a checkpoint saved under TP2 x PP2 or EP2 loads anywhere. Storage,
deduplication and resharding are megatron-core's `dist_checkpointing`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

from loong_core.errors import CheckpointError
from loong_core.parallel.adamw import MASTER
from loong_core.parallel.metadata_guard import require_harmless
from loong_core.references.adamw import split

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.parallel.adamw import ShardedAdamW
    from loong_core.parallel.megatron import MegatronEngine
    from loong_core.train.engine import LocalParameter

STEP_FILE = "optimizer_step.json"


def save(folder: Path, engine: MegatronEngine, optimizer: ShardedAdamW | None) -> None:
    """Write weights, master weights where they differ, and moments. Every tensor is written by one rank only, and
    the ranks of a replica group share the work."""
    tensors: dict[str, ShardedTensor] = {}
    owners = _Owners(engine)
    for parameter in engine.state_parameters():
        owned = owners.owns(parameter)
        weight = parameter.tensor.detach()
        if owned:
            _put(tensors, engine, parameter, "weight", weight)
        part = _optimizer_part(optimizer, parameter)
        if part is None:
            continue
        for name in part.names:
            group = engine.replica_group(parameter)
            full = _assembled(part.read(name), part.start, weight, group, owners.owner(parameter))
            if owned:
                # Moments are written from where they are; a device has no room for all masters in full.
                _put(tensors, engine, parameter, name, full.cpu() if name == MASTER else full)
    if torch.device(engine.device).type == "cpu":
        # megatron's writer passes results through a manager process, spawned by default: that imports the main module
        # again, seconds on every rank. A fork is safe where no device context is copied.
        get_write_results_queue("fork")
    dist_checkpointing.save(tensors, str(folder), async_strategy="mcore", validate_access_integrity=True)
    if dist.get_rank() == 0:
        (folder / STEP_FILE).write_text(json.dumps({"step": 0 if optimizer is None else optimizer.steps}))
    dist.barrier()


def load(folder: Path, engine: MegatronEngine, optimizer: ShardedAdamW | None) -> None:
    """Read what `save` wrote. Each rank reads the parts of its own parameters; `optimizer=None` reads weights alone."""
    require_harmless(folder)
    parameters = engine.state_parameters()
    wanted: dict[str, ShardedTensor] = {}
    plans: list[tuple[LocalParameter, dict[str, Tensor], _Part | None]] = []
    for parameter in parameters:
        part = _optimizer_part(optimizer, parameter)
        names = ["weight"] if part is None else ["weight", *part.names]
        buffers = {}
        for name in names:
            dtype = parameter.tensor.dtype if name == "weight" else torch.float32
            # In host memory: beside weights, gradients and state a device has no room for them a second time.
            buffers[name] = torch.zeros(parameter.tensor.shape, dtype=dtype)
            _put(wanted, engine, parameter, name, buffers[name])
        plans.append((parameter, buffers, part))
    try:
        loaded = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    except (OSError, KeyError, ValueError, RuntimeError, dist_checkpointing.core.CheckpointingException) as error:
        raise CheckpointError(f"{folder}: the sharded state cannot be read under this layout: {error}") from error
    with torch.no_grad():
        for parameter, buffers, part in plans:
            for name in buffers:
                _take(loaded, engine, parameter, name, buffers[name])
            parameter.tensor.copy_(buffers.pop("weight"))
            if part is not None:
                part.write(buffers)
    if optimizer is not None:
        step_file = folder / STEP_FILE
        optimizer.steps = json.loads(step_file.read_text())["step"] if step_file.is_file() else 0


def set_masters(engine: MegatronEngine, optimizer: ShardedAdamW) -> None:
    """Give master weights the exact float32 values that were rounded into the parameters (`LocalParameter.assign`).

    Masters on the grid of bfloat16 would all wait until updates add up to half a step of that grid: training with a
    small learning rate starts late.
    """
    with torch.no_grad():
        for parameter in engine.state_parameters():
            exact = parameter.take_exact()
            part = None if exact is None else _optimizer_part(optimizer, parameter)
            if exact is not None and part is not None and MASTER in part.names:
                part.write({MASTER: exact})


# ------------------------------------------------------------------------------------- naming and cutting
def _pieces(engine: MegatronEngine, parameter: LocalParameter, tensor: Tensor) -> list[Tensor]:
    """The local tensor as the blocks that tensor parallelism cuts separately (views)."""
    spec = parameter.spec
    if spec.axis is None or spec.blocks == 1:
        return [tensor]
    return list(tensor.chunk(spec.blocks, spec.axis))


def _key(parameter: LocalParameter, name: str, block: int) -> str:
    return f"{name}/{parameter.spec.role}" + (f"#{block}" if parameter.spec.blocks > 1 else "")


def _put(
    tensors: dict[str, ShardedTensor], engine: MegatronEngine, parameter: LocalParameter, name: str, tensor: Tensor
) -> None:
    group = engine.tensor_group(parameter)
    offsets = [] if parameter.spec.axis is None else [(parameter.spec.axis, group.rank(), group.size())]
    for block, piece in enumerate(_pieces(engine, parameter, tensor)):
        key = _key(parameter, name, block)
        # A vocabulary is padded to a multiple of tp, so its extent may differ between layouts.
        tensors[key] = ShardedTensor.from_rank_offsets(
            key, piece.contiguous(), *offsets, replica_id=0, allow_shape_mismatch=parameter.spec.padded
        )


def _take(loaded: dict[str, Any], engine: MegatronEngine, parameter: LocalParameter, name: str, into: Tensor) -> None:
    for block, piece in enumerate(_pieces(engine, parameter, into)):
        piece.copy_(loaded[_key(parameter, name, block)])


class _Owners:
    """Which replica writes a parameter: they take turns, so that the state is spread over their memory and disks."""

    def __init__(self, engine: MegatronEngine) -> None:
        self._engine = engine
        self._tied_stage = engine.groups.pp.rank() == 0
        self._turn = {_identity(p): index for index, p in enumerate(engine.state_parameters())}

    def owner(self, parameter: LocalParameter) -> int:
        """Rank within the replica group."""
        return self._turn[_identity(parameter)] % self._engine.replica_group(parameter).size()

    def owns(self, parameter: LocalParameter) -> bool:
        """Whether this rank writes it."""
        engine, spec = self._engine, parameter.spec
        if spec.axis is None and engine.tensor_group(parameter).rank() != 0:
            return False
        if spec.role == "embed" and not self._tied_stage:
            return False
        return engine.replica_group(parameter).rank() == self.owner(parameter)


def _identity(parameter: LocalParameter) -> tuple[int, int]:
    return id(parameter.trained), parameter.offset


# ------------------------------------------------------------------------------------------ the optimizer
def _optimizer_part(optimizer: ShardedAdamW | None, parameter: LocalParameter) -> _Part | None:
    """This rank's piece of a parameter's optimizer state; None where the parameter is frozen or there is none."""
    if optimizer is None or not optimizer.trains(parameter.trained):
        return None
    return _Part(optimizer, parameter)


class _Part:
    """The range of a flattened parameter whose master weight and moments live on this rank (it may be empty)."""

    def __init__(self, optimizer: ShardedAdamW, parameter: LocalParameter) -> None:
        self.names = optimizer.state_names(parameter.trained)
        self.start = 0
        self._parameter = parameter
        self._shard = optimizer.shard(parameter.trained)
        self._range = slice(0, 0)
        if self._shard is not None:
            first = max(self._shard.start, parameter.offset)
            last = min(self._shard.stop, parameter.offset + parameter.tensor.numel())
            if first < last:
                self.start = first - parameter.offset
                self._range = slice(first - self._shard.start, last - self._shard.start)

    def read(self, name: str) -> Tensor:
        """What this rank holds of a moment or master weight, flat and in float32; nothing where it holds none."""
        if self._shard is None:
            return torch.zeros(0, dtype=torch.float32, device=self._parameter.tensor.device)
        return self._shard.read(name, self._range).float()

    def write(self, buffers: dict[str, Tensor]) -> None:
        """Take this rank's range out of full local tensors, by name."""
        parameter = self._parameter.tensor
        for name, stored in buffers.items():
            full = stored.to(parameter.device)
            if name == MASTER:
                # On every rank in full: what a parameter is rounded to must not depend on who holds its master.
                parameter.copy_(split(full)[0])
            if self._shard is not None:
                held = full.flatten()[self.start : self.start + self._range.stop - self._range.start]
                self._shard.write(name, self._range, held)


def _assembled(values: Tensor, start: int, like: Tensor, group: Any, owner: int) -> Tensor:
    """The full local tensor on the owner of the replica group, from the disjoint ranges its ranks hold."""
    if values.numel() == like.numel() and group.size() == 1:
        return values.view(like.shape)
    flat = torch.zeros(like.numel(), dtype=torch.float32, device=like.device)
    flat[start : start + values.numel()] = values.detach().flatten()
    if group.size() > 1:
        dist.reduce(flat, dst=dist.get_global_rank(group, owner), group=group)
    return flat.view(like.shape)
