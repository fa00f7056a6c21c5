"""Where packed samples begin, as attention kernels want it: derived on the host, so that no layer waits for a device.

A micro-batch comes from the host, so `prepare` derives its packing there and remembers it for the device's copy of
`segments`. Every layer of the micro-batch, and every layer that is computed again in backward, then finds it. Segments
that nobody prepared are copied from the device once, which waits for it.

Shape legend: s rows, b batch.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

PADDING = -1
_SHORTEST = 64
"""Lengths are rounded up to powers of two from here on: kernels are planned per bound, and so few bounds occur."""


class Packing(NamedTuple):
    """The sequences in the flattened [b*s] tokens of `segments` [b,s].

    `offsets` int32 [n+1] says where each begins and the last ends; every run of padding is one of them. `longest` is
    an upper bound of their lengths. `tokens` counts the flattened tokens before the last run, if that is padding.
    `padding` bool [s,b,1] marks all padding, None where there is none; `inner`: some lies before the last run.
    """

    offsets: Tensor
    longest: int
    tokens: int
    padding: Tensor | None
    inner: bool

    @property
    def without_tail(self) -> Tensor:
        """`offsets` without the last run, if that is padding."""
        return self.offsets if self.tokens == self._total else self.offsets[:-1]

    @property
    def _total(self) -> int:
        return self.tokens if self.padding is None else self.padding.numel()


_Key = tuple[int, tuple[int, ...]]
_KNOWN: dict[_Key, tuple[weakref.ref[Tensor], int, Packing]] = {}


def prepare(host: Tensor, device: Tensor) -> None:
    """Remember the packing of `device` as long as that tensor lives. `host` [b,s] is its copy on the CPU."""
    _remember(device, packing_of(host, device))


def packing(segments: Tensor) -> Packing:
    """The packing of `segments` [b,s], remembered while the tensor lives and nothing writes into it.

    Known by its memory and not by its identity: recomputation hands layers a detached alias of the tensor.
    """
    known = _KNOWN.get(_key(segments))
    if known is not None:
        owner, version, found = known
        if owner() is not None and version == segments._version:
            return found
    found = packing_of(segments.cpu(), segments)
    _remember(segments, found)
    return found


def packing_of(host: Tensor, device: Tensor) -> Packing:
    """The packing of `host` [b,s] on the CPU, with its tensors on the device of `device`, a copy of it."""
    starts = torch.ones_like(host, dtype=torch.bool)
    starts[:, 1:] = host[:, 1:] != host[:, :-1]
    begin = starts.flatten().nonzero().squeeze(-1)
    offsets = torch.cat([begin, begin.new_tensor([host.numel()])]).to(torch.int32)
    longest = int(offsets.diff().max()) if len(begin) else 0
    longest = min(max(1 << max(longest - 1, 0).bit_length(), _SHORTEST), host.shape[1])
    is_padding = host.flatten() == PADDING
    ends_in_padding = len(begin) > 0 and bool(is_padding[-1])
    tokens = int(begin[-1]) if ends_in_padding else host.numel()
    padding = (device == PADDING).t().unsqueeze(-1) if bool(is_padding.any()) else None
    return Packing(_moved(offsets, device), longest, tokens, padding, bool(is_padding[:tokens].any()))


def _moved(offsets: Tensor, device: Tensor) -> Tensor:
    """`offsets` beside `device`; from pinned memory, so that the host does not wait for the copy."""
    if device.device.type != "cuda":
        return offsets.to(device.device)
    return offsets.pin_memory().to(device.device, non_blocking=True)


def _key(segments: Tensor) -> _Key:
    return segments.data_ptr(), tuple(segments.shape)


def _remember(segments: Tensor, found: Packing) -> None:
    for key in [key for key, (owner, _, _) in _KNOWN.items() if owner() is None]:
        del _KNOWN[key]
    _KNOWN[_key(segments)] = (weakref.ref(segments), segments._version, found)
