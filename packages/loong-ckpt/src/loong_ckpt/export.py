"""The layout of an exported folder, computed before a tensor is gathered: which bytes of which file hold what.

Names, shapes and dtypes are known from the model's shape alone. So rank 0 writes all headers, and then every rank
writes its tensors straight to their place: nothing is merged, and the experts of one fused tensor may come from
different ranks. The bytes of the result do not depend on the parallel layout.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_ckpt.hf_folder import INDEX, SINGLE, HFFolder
from loong_ckpt.mapping import candidates, hf_shapes
from loong_core.safetensors_header import BITS
from loong_core.types import ModelShape, ParameterSpec, Weight
from loong_core.weights import WeightMap, extents, fill, verb_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from loong_ckpt.source import Source
    from loong_core.train.run import Run

SHARD_BYTES = 5_000_000_000
"""Default size limit of a file; that of transformers before version 5."""
COPIED_BYTES = 1 << 26
"""Bytes of a tensor without a parameter that are copied at once."""
DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Slot:
    """Where a tensor goes: file name, byte range in the file, dtype and shape."""

    file: str
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ExportPlan:
    """`slots` by HF name, `rows` by role, `copies` (HF name -> HF name whose bytes it repeats), `headers` by file.
    `unused` are names of tensors without a parameter."""

    slots: dict[str, Slot]
    rows: dict[str, Weight]
    copies: dict[str, str]
    headers: dict[str, bytes]
    sizes: dict[str, int]
    parameters: int
    unused: tuple[str, ...] = ()

    def create(self, folder: Path) -> None:
        """Make the files with their headers and full size, and the index of numbered ones."""
        for name, header in self.headers.items():
            with open(folder / name, "wb") as file:
                file.write(header)
                file.truncate(self.sizes[name])
        if SINGLE not in self.headers:
            total = sum(slot.end - slot.begin for slot in self.slots.values())
            index = {
                "metadata": {"total_parameters": self.parameters, "total_size": total},
                "weight_map": {name: slot.file for name, slot in sorted(self.slots.items())},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def fill_unused(self, folder: Path, source: HFFolder) -> None:
        """Copy tensors without a parameter from where the run started; those that are not there stay zeros."""
        for name in self.unused:
            entry = source.tensors.get(name)
            slot = self.slots[name]
            if entry is None or (entry.dtype, tuple(entry.shape)) != (slot.dtype, slot.shape):
                continue
            with open(source.files[name], "rb") as read, open(folder / slot.file, "r+b") as write:
                read.seek(entry.begin)
                write.seek(slot.begin)
                for begin in range(entry.begin, entry.end, COPIED_BYTES):
                    write.write(read.read(min(COPIED_BYTES, entry.end - begin)))


def plan_export(run: Run, source: Source | None, shard_bytes: int = SHARD_BYTES) -> ExportPlan:
    """The same plan on every rank, from the run's shape and the source's names and dtypes."""
    layout = source.layout if source is not None else None
    default = DTYPES[run.precision.parameters]
    rows = _rows(run.shape, run.family.weights, layout)
    shapes: dict[str, tuple[int, ...]] = {}
    experts: dict[str, int] = {}
    for spec in run.shape.parameters:
        row = rows[spec.role]
        for name, shape in zip(row.hf, hf_shapes(spec, row, run.shape), strict=True):
            if row.verb == "stack":
                experts[name] = experts.get(name, 0) + 1
                shape = (experts[name], *shape)
            shapes[name] = shape
    copies = _copies(run, rows, layout, shapes)
    shapes |= {name: shapes[original] for name, original in copies.items()}
    unused = {name: shape for name, shape in _unused(run, layout).items() if name not in shapes}
    shapes |= unused
    dtypes = {name: (layout or {}).get(name, default) for name in shapes}
    single = run.family.single_file
    one = single if isinstance(single, bool) else single in run.config
    numbered = isinstance(single, str) and not one
    slots, headers, sizes = _arrange(shapes, dtypes, None if one else shard_bytes, numbered)
    total = sum(spec.size for spec in run.shape.parameters)
    return ExportPlan(slots, rows, copies, headers, sizes, total, tuple(unused))


def _rows(shape: ModelShape, weights: tuple[Weight, ...], layout: Mapping[str, str] | None) -> dict[str, Weight]:
    """The row of each parameter: the one whose names the source had, else the family's first."""
    table = WeightMap(weights)
    rows = {}
    for spec in shape.parameters:
        options = candidates(table, spec)
        known = (row for row in options if layout is not None and all(name in layout for name in row.hf))
        rows[spec.role] = next(known, options[0])
    return rows


def _copies(
    run: Run, rows: Mapping[str, Weight], layout: Mapping[str, str] | None, shapes: Mapping[str, Any]
) -> dict[str, str]:
    """A tied head, or another twin, that the source stored all the same: written again, so that the names stay the
    same."""
    table = WeightMap(run.family.weights)
    names: dict[str, str] = {}
    if run.shape.tied_embeddings and "embed" in rows:
        head = table.candidates(ParameterSpec(role="head", shape=()))
        names = {name: rows["embed"].hf[0] for row in head for name in row.hf}
    for spec in run.shape.parameters:
        names |= dict.fromkeys(table.twins(spec), rows[spec.role].hf[0])
    return {name: names[name] for name in layout or {} if name in names and name not in shapes}


def _unused(run: Run, layout: Mapping[str, str] | None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that public loaders want and no parameter makes: those of the source, or the
    first name of each."""
    found: dict[str, tuple[int, ...]] = {}
    for row in WeightMap(run.family.weights).unused:
        shape = tuple(extents(row.extents, run.shape.fields))
        known = [fill(name, run.shape.layers - 1, None) for name in row.hf]
        names = [name for name in known if name in layout] if layout is not None else known[:1]
        found |= dict.fromkeys(names, shape)
    return found


def _arrange(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], shard_bytes: int | None, numbered: bool
) -> tuple[dict[str, Slot], dict[str, bytes], dict[str, int]]:
    """Fill files in the model's order up to `shard_bytes` (None: one file); inside a file wide dtypes come first, so
    all are aligned. A single file is `numbered` only on request."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in shapes:
        size = _bytes(shapes[name], dtypes[name])
        if groups[-1] and shard_bytes is not None and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    slots, headers, sizes = {}, {}, {}
    for number, names in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 and not numbered else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        names = sorted(names, key=lambda name: (-BITS[dtypes[name]], name))
        headers[file] = _header(names, shapes, dtypes)
        begin = len(headers[file])
        for name in names:
            end = begin + _bytes(shapes[name], dtypes[name])
            slots[name] = Slot(file, begin, end, dtypes[name], tuple(shapes[name]))
            begin = end
        sizes[file] = begin
    return slots, headers, sizes


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    count = BITS[dtype] // 8
    for extent in shape:
        count *= extent
    return count


def _header(names: list[str], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in names:
        end = begin + _bytes(shapes[name], dtypes[name])
        table[name] = {"dtype": dtypes[name], "shape": list(shapes[name]), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class TensorWriter:
    """Writes parameters into the files of a plan, each at its place. Several ranks write the same files at once."""

    def __init__(self, folder: Path, plan: ExportPlan, fields: Mapping[str, Any]) -> None:
        self._folder = folder
        self._plan = plan
        self._fields = fields
        self._handles: dict[str, int] = {}

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def put(self, spec: ParameterSpec, full: Tensor) -> None:
        """Write the full native tensor of `spec` as the HF tensors it stands for."""
        row = self._plan.rows[spec.role]
        for name, tensor in zip(row.hf, verb_of(row).unpack(full, self._fields), strict=True):
            self._write(name, tensor, spec.expert if row.verb == "stack" else None)
            for copy, original in self._plan.copies.items():
                if original == name:
                    self._write(copy, tensor, None)

    def flush(self) -> None:
        """Flush what this rank wrote to the disk."""
        for handle in self._handles.values():
            os.fsync(handle)

    def _write(self, name: str, tensor: Tensor, expert: int | None) -> None:
        slot = self._plan.slots[name]
        data = _raw(tensor, slot.dtype)
        begin = slot.begin + (0 if expert is None else expert * len(data))
        room = slot.end - slot.begin if expert is None else (slot.end - slot.begin) // slot.shape[0]
        assert len(data) == room, (name, len(data), room)
        if slot.file not in self._handles:
            self._handles[slot.file] = os.open(self._folder / slot.file, os.O_WRONLY)
        while len(data):
            count = os.pwrite(self._handles[slot.file], data, begin)
            data, begin = data[count:], begin + count


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a floating dtype of the safetensors format."""
    import torch

    return getattr(torch, next(key for key, value in DTYPES.items() if value == name))


def _raw(tensor: Tensor, dtype: str) -> memoryview:
    import torch

    flat = tensor.detach().to(device="cpu", dtype=torch_dtype(dtype)).contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
