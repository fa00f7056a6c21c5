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
from loong_core.parallel.metadata_guard import require_harmless

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.parallel.megatron import MegatronEngine
    from loong_core.train.engine import LocalParameter

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP_FILE = "optimizer_step.json"


def save(folder: Path, engine: MegatronEngine, optimizer: Any) -> None:
    """Write weights, master weights where they differ, and moments. Every tensor is written by one rank only, and
    the ranks of a replica group share the work."""
    tensors: dict[str, ShardedTensor] = {}
    steps = []
    owners = _Owners(engine)
    for parameter in engine.state_parameters():
        owned = owners.owns(parameter)
        weight = parameter.tensor.detach()
        if owned:
            _put(tensors, engine, parameter, "weight", weight)
        part = _optimizer_part(optimizer, parameter)
        if part is None:
            continue
        states, step = part.read(weight)
        steps.append(step)
        for name, values in states.items():
            full = _assembled(values, part.start, weight, engine.replica_group(parameter), owners.owner(parameter))
            if owned:
                _put(tensors, engine, parameter, name, full)
    if torch.device(engine.device).type == "cpu":
        # megatron's writer passes results through a manager process, spawned by default: that imports the main module
        # again, seconds on every rank. A fork is safe where no device context is copied.
        get_write_results_queue("fork")
    dist_checkpointing.save(tensors, str(folder), async_strategy="mcore", validate_access_integrity=True)
    if dist.get_rank() == 0:
        (folder / STEP_FILE).write_text(json.dumps({"step": max(steps, default=0)}))
    dist.barrier()


def load(folder: Path, engine: MegatronEngine, optimizer: Any) -> None:
    """Read what `save` wrote. Each rank reads the parts of its own parameters; `optimizer=None` reads weights alone."""
    require_harmless(folder)
    parameters = engine.state_parameters()
    if optimizer is not None:
        for member in _members(optimizer):
            if not member.is_stub_optimizer:
                member._init_optimizer_states_with_dummy_values()
    wanted: dict[str, ShardedTensor] = {}
    plans: list[tuple[LocalParameter, dict[str, Tensor], _Part | None]] = []
    for parameter in parameters:
        part = _optimizer_part(optimizer, parameter)
        names = ["weight"] if part is None else ["weight", *part.state_names()]
        buffers = {}
        for name in names:
            dtype = parameter.tensor.dtype if name == "weight" else torch.float32
            buffers[name] = torch.zeros(parameter.tensor.shape, dtype=dtype, device=parameter.tensor.device)
            _put(wanted, engine, parameter, name, buffers[name])
        plans.append((parameter, buffers, part))
    try:
        loaded = dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)
    except (OSError, KeyError, ValueError, RuntimeError, dist_checkpointing.core.CheckpointingException) as error:
        raise CheckpointError(f"{folder}: the sharded state cannot be read under this layout: {error}") from error
    step_file = folder / STEP_FILE
    step = json.loads(step_file.read_text())["step"] if step_file.is_file() else 0
    with torch.no_grad():
        for parameter, buffers, part in plans:
            for name in buffers:
                _take(loaded, engine, parameter, name, buffers[name])
            parameter.tensor.copy_(buffers.pop("weight"))
            if part is not None:
                part.write(buffers, step)


def set_masters(engine: MegatronEngine, optimizer: Any) -> None:
    """Give master weights the exact float32 values that were rounded into the parameters (`LocalParameter.assign`).

    Masters on the grid of bfloat16 would all wait until updates add up to half a step of that grid: training with a
    small learning rate starts late.
    """
    for parameter in engine.state_parameters():
        exact = parameter.take_exact()
        part = None if exact is None else _optimizer_part(optimizer, parameter)
        if part is not None:
            part.write_master(exact)


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
def _members(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", None) or [optimizer])


def _optimizer_part(optimizer: Any, parameter: LocalParameter) -> _Part | None:
    """This rank's piece of a parameter's optimizer state; None where the parameter is frozen or there is none."""
    if optimizer is None or not parameter.trained.requires_grad:
        return None
    for member in _members(optimizer):
        # The buffers know every parameter of the replica, megatron's range maps only those with a range on this rank.
        if not member.is_stub_optimizer and any(
            parameter.trained in buffer.param_index_map for buffer in member.buffers
        ):
            return _Part(member, parameter)
    return None


class _Part:
    """The range of a flattened parameter whose master weight and moments live on this rank (it may be empty)."""

    def __init__(self, member: Any, parameter: LocalParameter) -> None:
        self._member = member
        self._tensor = parameter.trained
        # Master weights of fp32 parameters are the parameters themselves.
        self._has_master = parameter.tensor.dtype != torch.float32
        self._held = False
        self.start = 0
        if self._tensor in member.model_param_gbuf_map:
            shard = member._get_model_param_range_map(self._tensor)["param"]
            first = max(shard.start, parameter.offset)
            last = min(shard.end, parameter.offset + parameter.tensor.numel())
            self._held = first < last
            self.start = first - parameter.offset if self._held else 0
            self._range = slice(first - shard.start, last - shard.start)

    def state_names(self) -> list[str]:
        return [*MOMENTS, "master"] if self._has_master else list(MOMENTS)

    def _states(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        group, order = self._member.model_param_group_index_map[self._tensor]
        inner = self._member.optimizer
        main = inner.param_groups[group]["params"][order]
        return {"master": main}, inner.state[main], inner.param_groups[group]

    def read(self, like: Tensor) -> tuple[dict[str, Tensor], int]:
        """The held ranges by name (empty tensors where nothing is held or nothing was stepped yet), and the step."""
        empty = torch.zeros(0, dtype=torch.float32, device=like.device)
        if not self._held:
            return {name: empty for name in self.state_names()}, 0
        main, state, group = self._states()
        values = {name: state[name].flatten()[self._range] if name in state else empty for name in MOMENTS}
        if self._has_master:
            values |= {name: tensor.flatten()[self._range] for name, tensor in main.items()}
        return values, int(state.get("step", group.get("step", 0)))

    def write_master(self, exact: Tensor) -> None:
        """Copy this rank's range of the full local tensor into its master weight."""
        if self._held and self._has_master:
            self._fill(self._states()[0]["master"], exact)

    def write(self, buffers: dict[str, Tensor], step: int) -> None:
        """Copy this rank's range out of the full local tensors and set the step count."""
        if not self._held:
            return
        main, state, group = self._states()
        for name, full in buffers.items():
            self._fill(main[name] if name == "master" else state[name], full)
        if "step" in state:
            # One tensor per parameter: torch's AdamW increments it in place.
            state["step"] = torch.full_like(torch.as_tensor(state["step"]), float(step))
        else:
            group["step"] = step

    def _fill(self, target: Tensor, full: Tensor) -> None:
        held = target.detach().view(-1)[self._range]
        held.copy_(full.detach().flatten()[self.start : self.start + held.numel()])


def _assembled(values: Tensor, start: int, like: Tensor, group: Any, owner: int) -> Tensor:
    """The full local tensor on the owner of the replica group, from the disjoint ranges its ranks hold."""
    flat = torch.zeros(like.numel(), dtype=torch.float32, device=like.device)
    flat[start : start + values.numel()] = values.detach().flatten()
    if group.size() > 1:
        dist.reduce(flat, dst=dist.get_global_rank(group, owner), group=group)
    return flat.view(like.shape)
