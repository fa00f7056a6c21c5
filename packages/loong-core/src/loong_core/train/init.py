"""Random initial weights that depend on the seed and the parameter's role, never on the parallel layout.

Drawing is what takes time: a generator makes one number after the other on one core. So many tensors are drawn side by
side, the largest first, piece by piece in memory that stays in use (a fresh page costs as much as the numbers on it),
and on an accelerator each piece is on its way to the device while the next one is drawn.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch

from loong_core.weights import shard

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.train.engine import Engine, LocalParameter
    from loong_core.types import ParameterSpec

PIECE = 1 << 20
"""Numbers drawn at a time. A multiple of 16, see `_pieces`."""

BUFFERS = 2
"""Pieces a thread has in page-locked memory: one is drawn while the other is copied."""

_LARGEST_STATE = 20
"""Bytes a parameter takes on a device at most until masters are set: 2 itself, 4 exact, 4 gradient, 8 moments, 2 master
remainder."""


def initialise(engine: Engine, seed: int, std: float, processes: int = 1) -> None:
    """Fill this rank's parameters: normal(0, `std`), ones or zeros as each spec says. `processes` do so on this
    machine, and share its cores.

    Every full tensor is drawn from a generator of its own, seeded by (seed, role), and then cut, so that all layouts
    start from the same weights. Drawn on the CPU in float32: devices have different generators.
    """
    # The largest, an embedding say, would otherwise be drawn alone at the end.
    parameters = sorted(engine.parameters(), key=lambda parameter: -math.prod(parameter.spec.shape))
    exact = _room_for_exact(parameters)
    devices = {parameter.tensor.device for parameter in parameters if not parameter.tensor.is_cpu}
    with ThreadPoolExecutor(threads(processes), initializer=partial(_bind, devices)) as pool:
        try:
            jobs = [
                pool.submit(_fill, parameter, engine.cut(parameter), exact.get(parameter.trained), seed, std)
                for parameter in parameters
            ]
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    engine.weights_changed()


def draw(spec: ParameterSpec, seed: int, std: float) -> Tensor:
    """The full float32 tensor of `spec.shape`."""
    if spec.init != "normal":
        return torch.full(spec.shape, 1.0 if spec.init == "ones" else 0.0)
    return torch.empty(spec.shape).normal_(0.0, std, generator=_generator(spec, seed))


def threads(processes: int) -> int:
    """How many tensors are drawn side by side: one on each core of this process's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def _generator(spec: ParameterSpec, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{spec.role}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") % (2**63))


# ------------------------------------------------------------------------------------- one parameter, in one thread
@torch.no_grad()
def _fill(parameter: LocalParameter, cut: tuple[int, int], exact: Tensor | None, seed: int, std: float) -> None:
    """Give one parameter its values. `exact`: float32 memory on the device for the whole trained tensor."""
    spec, tensor, (rank, size) = parameter.spec, parameter.tensor.detach(), cut
    whole = spec.axis is None or size == 1
    if spec.init != "normal" or not whole or not tensor.is_contiguous():
        parameter.assign(shard(draw(spec, seed, std), rank, size, spec.axis, spec.blocks, spec.padded))
        return
    assert tensor.shape == spec.shape, (spec.role, tensor.shape)
    kept: Tensor | None = None
    if tensor.dtype.itemsize < torch.float32.itemsize:
        end = parameter.offset + tensor.numel()
        kept = torch.empty(tensor.numel()) if exact is None else exact[parameter.offset : end]
        parameter.keep_exact(kept.view(tensor.shape))
    _stream(_generator(spec, seed), std, tensor.view(-1), kept)


def _stream(generator: torch.Generator, std: float, into: Tensor, kept: Tensor | None) -> None:
    """Draw flat `into`, and `kept` in float32, piece by piece. Copies to a device are in flight when this returns."""
    in_place = _in_place(into, kept)
    for begin, end in _pieces(into.numel()):
        values = _buffer(into.device)[: end - begin] if in_place is None else in_place[begin:end]
        values.normal_(0.0, std, generator=generator)
        if kept is not None and kept is not in_place:
            kept[begin:end].copy_(values, non_blocking=True)
        if into is not in_place:
            # Rounded on the device: a copy that also converts would convert here first, and wait.
            if kept is not None and kept.device == into.device:
                into[begin:end].copy_(kept[begin:end])
            else:
                into[begin:end].copy_(values.to(into.device, non_blocking=True))
        if not into.is_cpu:
            _local.events[_local.turn].record(torch.get_device_module(into.device).current_stream(into.device))


def _in_place(into: Tensor, kept: Tensor | None) -> Tensor | None:
    """The one of them that can be drawn into; None: neither, a buffer is needed."""
    if not into.is_cpu:
        return None
    return next((tensor for tensor in (into, kept) if tensor is not None and tensor.dtype == torch.float32), None)


def _pieces(numbers: int) -> Iterator[tuple[int, int]]:
    """Ranges that, drawn one after the other, hold what one draw of `numbers` would.

    torch fills float32 tensors of 16 numbers and more in blocks of 16, and draws 16 further numbers for the last block
    where that is not full. So all pieces but the last are multiples of 16, and the last has at least 16.
    """
    begin = 0
    while numbers - begin >= PIECE + 16:
        yield begin, begin + PIECE
        begin += PIECE
    yield begin, numbers


# --------------------------------------------------------------------------------------------- memory of a thread
_local = threading.local()


def _bind(devices: set[torch.device]) -> None:
    """Page-locked memory belongs to the current device, which is the first one in a new thread."""
    for device in devices:
        torch.get_device_module(device).set_device(device)


def _buffer(device: torch.device) -> Tensor:
    """Room for the next piece, once what was copied from it before has arrived."""
    away = device.type != "cpu"
    if getattr(_local, "device", None) != device:
        _local.device, _local.turn = device, 0
        _local.buffers = [torch.empty(PIECE + 16, pin_memory=away) for _ in range(BUFFERS if away else 1)]
        _local.events = [torch.get_device_module(device).Event() for _ in _local.buffers] if away else []
    _local.turn = (_local.turn + 1) % len(_local.buffers)
    if away:
        _local.events[_local.turn].synchronize()
    return _local.buffers[_local.turn]


def _room_for_exact(parameters: list[LocalParameter]) -> dict[Tensor, Tensor]:
    """Flat float32 memory beside each trained tensor of lower precision, on its device, for all of them or none.

    Masters take these values from the device in no time, and over the bus in seconds. None where all that a parameter
    takes until then might not fit: its exact values then stay on the CPU.
    """
    trained = {
        parameter.trained: parameter.tensor.device
        for parameter in parameters
        if parameter.tensor.dtype.itemsize < torch.float32.itemsize and not parameter.tensor.is_cpu
    }
    needed = _LARGEST_STATE * sum(tensor.numel() for tensor in trained)
    if not trained or needed > min(map(_free_bytes, set(trained.values()))):
        return {}
    return {
        tensor: torch.empty(tensor.numel(), dtype=torch.float32, device=device) for tensor, device in trained.items()
    }


def _free_bytes(device: torch.device) -> int:
    module = torch.get_device_module(device)
    return int(module.mem_get_info(device)[0]) if hasattr(module, "mem_get_info") else 0
