"""Reads of one rank's part of one parameter: by slices of the files where the verb allows, never more than needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_ckpt.hf_folder import HFFolder
from loong_core.errors import CheckpointError
from loong_core.types import ParameterSpec, Weight
from loong_core.weights import padded_extent, shard, verb_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COMPARE_BYTES = 64_000_000
"""Bytes of each tensor held in memory while two of them are compared."""


class Reader:
    """Tensors of a folder, converted to `dtype` as they are read. Files stay memory-mapped until `close`."""

    def __init__(self, folder: HFFolder, fields: Mapping[str, Any]) -> None:
        self._folder = folder
        self._fields = fields
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def part(self, spec: ParameterSpec, row: Weight, rank: int, size: int, dtype: torch.dtype) -> Tensor:
        """Part `rank` of `size` of the native tensor of `spec`, equal to `shard(pack(all HF tensors), ...)`."""
        fields = dict(self._fields)
        pack = verb_of(row).pack
        cut = size > 1 and spec.axis is not None
        if not cut:
            return pack([self._slices(spec, row, name, dtype) for name in row.hf], fields)
        if row.verb in ("copy", "stack"):
            return self._slices(spec, row, row.hf[0], dtype, rank, size, spec.axis, spec.blocks)
        if self._cuts_part_by_part(spec, row, size):
            if row.verb == "qkv":
                fields["kv_heads"] //= size
            return pack([self._slices(spec, row, name, dtype, rank, size, spec.axis) for name in row.hf], fields)
        full = pack([self._slices(spec, row, name, dtype) for name in row.hf], fields)
        return shard(full, rank, size, spec.axis, spec.blocks, spec.padded).clone()

    def _cuts_part_by_part(self, spec: ParameterSpec, row: Weight, size: int) -> bool:
        """Whether a part of the packed tensor is the packing of the same part of each HF tensor."""
        if spec.axis != 0 or spec.padded:
            return False
        if row.verb == "gate_up":
            return spec.blocks == 2
        return row.verb == "qkv" and spec.blocks == 1 and self._fields["kv_heads"] % size == 0

    def _slices(
        self,
        spec: ParameterSpec,
        row: Weight,
        name: str,
        dtype: torch.dtype,
        rank: int = 0,
        size: int = 1,
        axis: int | None = None,
        blocks: int = 1,
    ) -> Tensor:
        """A tensor, or its part along `axis`, zero-padded if the parameter is; of a `stack`, only the spec's expert."""
        import torch

        view = self._view(name)
        lead = [slice(spec.expert, (spec.expert or 0) + 1)] if row.verb == "stack" else []
        if axis is None:
            whole = view[tuple(lead)] if lead else view[...] if view.get_shape() else self._scalar(name)
            return (whole[0] if lead else whole).to(dtype)
        shape = view.get_shape()[len(lead) :]
        extent = padded_extent(shape[axis], size, blocks) if spec.padded else shape[axis]
        width = extent // (size * blocks)
        pieces = []
        for block in range(blocks):
            begin = block * (extent // blocks) + rank * width
            end = min(begin + width, shape[axis])
            index = [slice(None)] * len(shape)
            index[axis] = slice(begin, max(begin, end))
            piece = view[tuple(lead + index)] if end > begin else torch.zeros(0)
            piece = piece[0] if lead and end > begin else piece
            pieces.append(_grown(piece.to(dtype), axis, width, shape) if end - begin < width else piece.to(dtype))
        return torch.cat(pieces, axis) if blocks > 1 else pieces[0]

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal byte by byte; read in pieces of `COMPARE_BYTES`."""
        import torch

        one, other = self._folder.tensors[first], self._folder.tensors[second]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        rows = max(1, COMPARE_BYTES // max(1, (one.end - one.begin) // max(1, one.shape[0])))
        views = self._view(first), self._view(second)
        for begin in range(0, one.shape[0], rows):
            left, right = (view[begin : begin + rows].contiguous().view(torch.uint8) for view in views)
            if not torch.equal(left, right):
                return False
        return True

    def _file(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self._folder.files[name]
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be opened: {error}. Copy or download it again.") from error
        return self._open[path]

    def _view(self, name: str) -> Any:
        return self._file(name).get_slice(name)

    def _scalar(self, name: str) -> Tensor:
        return self._file(name).get_tensor(name)


def _grown(piece: Tensor, axis: int, width: int, shape: list[int]) -> Tensor:
    """`piece` with zeros appended along `axis` up to `width` (of an empty piece: all zeros)."""
    wanted = [width if dim == axis else extent for dim, extent in enumerate(shape)]
    full = piece.new_zeros(wanted)
    if piece.numel():
        full.narrow(axis, 0, piece.shape[axis]).copy_(piece)
    return full
