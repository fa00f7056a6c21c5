"""The table of contents of a safetensors file, read with the standard library, so that damage is found without torch.

Layout (safetensors format specification): eight bytes little-endian length, that many bytes of JSON, then the tensors'
bytes without gaps. Everything the header promises is compared with the size of the file.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

from loong_core.errors import CheckpointError

HEADER_LIMIT = 100_000_000
"""Largest header in bytes; the limit of the reference implementation."""

BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of one element of each dtype of the format."""


class TensorEntry(NamedTuple):
    """One tensor of a file: dtype in the format's own names (`BF16`), shape, and its byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of the file by name. Reads the header only, never a tensor.

    Raises `CheckpointError` naming the file when it is truncated, corrupt, has an oversized header, holds bytes that
    no tensor claims, or is not a safetensors file at all.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """As `read_header`, with the file's free-form `__metadata__`."""
    header, start, size = _raw_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its __metadata__ is not a table of texts")
    entries = {name: _entry(path, name, row, start) for name, row in header.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise _damaged(path, f"tensor {name!r} begins at byte {entry.begin}, expected {end}")
        end = entry.end
    if size < end:
        raise _damaged(path, f"it is truncated: {size:,} bytes, its header promises {end:,}")
    if size > end:
        raise _damaged(path, f"it has {size - end:,} bytes more than its header promises")
    return entries, metadata


def _raw_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The decoded header, the offset of the first tensor byte, and the size of the file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _damaged(path, f"it has {size} bytes, too few for a header")
            (length,) = struct.unpack("<Q", prefix)
            if length > HEADER_LIMIT:
                raise _damaged(path, f"its header claims {length:,} bytes; at most {HEADER_LIMIT:,} are allowed")
            if 8 + length > size:
                raise _damaged(path, f"it is truncated: {size:,} bytes, its header alone needs {8 + length:,}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror or error}). Check the path and its permissions."
        ) from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a table of tensors")
    return header, 8 + length, size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return table


def _natural(value: object) -> bool:
    return type(value) is int and value >= 0


def _entry(path: Path, name: str, row: Any, start: int) -> TensorEntry:
    if not isinstance(row, dict) or not {"dtype", "shape", "data_offsets"} <= row.keys():
        raise _damaged(path, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(_natural(extent) for extent in shape):
        raise _damaged(path, f"tensor {name!r} has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(offset) for offset in offsets):
        raise _damaged(path, f"tensor {name!r} has the impossible data_offsets {offsets!r}")
    bits = BITS[dtype]
    for extent in shape:
        bits *= extent
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _damaged(path, f"tensor {name!r} ({dtype} {shape}) does not fit its {offsets[1] - offsets[0]} bytes")
    return TensorEntry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a usable safetensors file: {reason}. Copy or download it again.")
