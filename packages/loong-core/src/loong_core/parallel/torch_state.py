"""The state of the torch engine as safetensors: each rank writes ranges of flattened parameters, named by role.

A tensor `master/layers.0.up@4096` holds master weights of that parameter from element 4096 on. What several ranks hold
they divide among them. So any number of ranks, sharded in any way, finds the ranges it needs. No file has to be told of
another: the headers say what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loong_core.errors import CheckpointError
from loong_core.log import logger
from loong_core.parallel.adamw import EMA, MASTER

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.parallel.torch_holdings import Holdings, Part, Record
    from loong_core.parallel.torch_optimizer import TorchAdamW

STATE_FILE = "torch_state.json"
VERSION = 1
WEIGHT = "weight"
_SMALL = 1 << 12
"""Elements below which a range is not divided among the ranks that hold it."""


# ---------------------------------------------------------------------------------------------------------- saving
def save(folder: Path, holdings: Holdings, trainer: TorchAdamW | None) -> None:
    """Write master weights and optimizer state of what is trained, weights of the rest. Collective."""
    tensors: dict[str, Tensor] = {}
    records = holdings.records()
    for turn, (role, record) in enumerate(records.items()):
        state = holdings.state(record)
        if state is None or trainer is None:
            part = holdings.values(record)
            begin, where = _share(part, turn)
            _put(tensors, f"{WEIGHT}/{role}@{begin}", holdings.flat(record)[where])
            continue
        shard, part = state
        begin, where = _share(part, turn)
        for name in trainer.names if shard is not None else ():
            assert shard is not None
            _put(tensors, f"{name}/{role}@{begin}", shard.read(name, where))
    save_file(tensors, folder / f"state-{dist.get_rank():05d}.safetensors")
    if dist.get_rank() == 0:
        shapes = {role: list(record.spec.shape) for role, record in records.items()}
        steps = 0 if trainer is None else trainer.steps
        content = {"version": VERSION, "files": dist.get_world_size(), "steps": steps, "shapes": shapes}
        (folder / STATE_FILE).write_text(json.dumps(content))
    dist.barrier()


def _put(tensors: dict[str, Tensor], key: str, values: Tensor) -> None:
    if values.numel():
        # A copy of its own: views of one buffer may not be saved side by side.
        tensors[key] = values.detach().to("cpu", copy=True).contiguous()


def _share(part: Part, turn: int) -> tuple[int, slice]:
    """What this rank writes of a range that others hold too: where that begins in the parameter, and in the range."""
    rank, copies = part.copies
    if part.size < _SMALL:
        low, high = (0, part.size) if turn % copies == rank else (0, 0)
    else:
        low, high = part.size * rank // copies, part.size * (rank + 1) // copies
    return part.begin + low, slice(part.where.start + low, part.where.start + high)


# --------------------------------------------------------------------------------------------------------- loading
class Piece(NamedTuple):
    """A stored range: `size` elements from `begin` on, tensor `key` of an open file."""

    begin: int
    size: int
    file: Any
    key: str


class Stored:
    """The ranges in a folder, by (name, role)."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self.folder = folder
        self.description = _description(folder)
        self._pieces: dict[tuple[str, str], list[Piece]] = {}
        for rank in range(self.description["files"]):
            path = folder / f"state-{rank:05d}.safetensors"
            try:
                file = files.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be opened: {error}. Choose another checkpoint.") from error
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                name, _, rest = key.partition("/")
                role, _, begin = rest.rpartition("@")
                size = file.get_slice(key).get_shape()[0]
                self._pieces.setdefault((name, role), []).append(Piece(int(begin), size, file, key))

    def has(self, name: str, role: str) -> bool:
        """Whether any range of it is stored."""
        return (name, role) in self._pieces

    def read(self, name: str, role: str, begin: int, size: int) -> Tensor:
        """`size` elements of a flattened tensor from `begin` on."""
        parts, at = [], begin
        for piece in sorted(self._pieces.get((name, role), []), key=lambda piece: piece.begin):
            low, high = max(at, piece.begin), min(begin + size, piece.begin + piece.size)
            if low == at and low < high:
                parts.append(piece.file.get_slice(piece.key)[low - piece.begin : high - piece.begin])
                at = high
        if at < begin + size:
            raise CheckpointError(
                f"{self.folder}: {name} of {role} is not there from element {at} on: the checkpoint is incomplete. "
                "Choose another one."
            )
        return torch.cat(parts) if parts else torch.zeros(0)

    def weight(self, role: str, begin: int, size: int) -> Tensor:
        """As stored: a master weight in float32, or the weight of a parameter that was not trained."""
        return self.read(MASTER if self.has(MASTER, role) else WEIGHT, role, begin, size)


def load(folder: Path, holdings: Holdings, trainer: TorchAdamW | None, optimizer: bool) -> None:
    """Read what `save` wrote, each rank the ranges it holds; without `optimizer` the weights alone."""
    with ExitStack() as files:
        stored = Stored(folder, files)
        records = holdings.records()
        if problems := list(_differences(stored.description["shapes"], records)):
            raise CheckpointError([f"{folder}: {problem}" for problem in problems])
        with torch.no_grad():
            for role, record in records.items():
                _load_values(stored, role, record, holdings, trainer)
                if trainer is not None:
                    _load_state(stored, role, record, holdings, trainer, optimizer)
        if trainer is not None and optimizer:
            trainer.steps = int(stored.description["steps"])


def _load_values(stored: Stored, role: str, record: Record, holdings: Holdings, trainer: TorchAdamW | None) -> None:
    """The weights of what has no master: of a model without optimizer, or frozen."""
    if trainer is not None and trainer.trains(record.trained):
        return
    part = holdings.values(record)
    values = stored.weight(role, part.begin, part.size)
    if trainer is None:
        holdings.local(record).assign(values.view(record.spec.shape))
    else:
        holdings.flat(record)[part.where].copy_(values)


def _load_state(
    stored: Stored, role: str, record: Record, holdings: Holdings, trainer: TorchAdamW, optimizer: bool
) -> None:
    state = holdings.state(record)
    if state is None:
        return
    shard, part = state
    if shard is None or not part.size:
        return
    for name in trainer.names:
        if name == MASTER or (name == EMA and not stored.has(EMA, role)):
            values = stored.weight(role, part.begin, part.size)
        elif not optimizer:
            continue
        elif not stored.has(name, role):
            raise CheckpointError(
                f"{stored.folder}: {role} was not trained when this was saved, so there is no {name} of it. Freeze it "
                "as it was (model.freeze), or start a new run from the checkpoint's weights (model.weights)."
            )
        else:
            values = stored.read(name, role, part.begin, part.size)
        if name == EMA and not stored.has(EMA, role):
            logger.debug("%s: no moving average of %s; it begins at the weights", stored.folder, role)
        shard.write(name, part.where, values.to(shard.parameter.device))


def _description(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no state of the torch engine ({STATE_FILE} is absent). It was saved under another "
            "planner: set parallel.planner to that one, or start from an export to safetensors."
        )
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}. The checkpoint is damaged.") from error
    wanted = {"files": int, "steps": int, "shapes": dict}
    if not isinstance(found, dict) or any(not isinstance(found.get(key), kind) for key, kind in wanted.items()):
        raise CheckpointError(f"{path} does not describe a state. The checkpoint is damaged.")
    if found.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {found.get('version')!r}; this loong reads {VERSION}.")
    return found


def _differences(shapes: dict[str, Any], records: dict[str, Record]) -> Iterator[str]:
    for role in sorted(shapes.keys() | records.keys()):
        stored = shapes.get(role)
        wanted = list(records[role].spec.shape) if role in records else None
        if stored != wanted:
            yield f"{role} is stored as {stored or 'nothing'}, and the model has {wanted or 'no such parameter'}"
