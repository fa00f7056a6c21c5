"""Messages between a robot and a policy server: a JSON header and safetensors in one binary frame, nothing executable.

A frame is four bytes (little-endian length of the header), the header (a JSON object in UTF-8), and the tensors (the
safetensors format; absent where there are none). Whatever a peer sends is checked before memory is taken for it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import numpy as np

PROTOCOL = 1
"""Version of the messages; a server refuses any other."""
LONGEST_HEADER = 65536
"""Bytes of a JSON header."""
MOST_TENSORS = 64
LONGEST_TABLE = 65536
"""Bytes of the table of contents of the tensors."""
_LENGTH = struct.Struct("<I")
_TABLE = struct.Struct("<Q")
_DTYPES = {"U8": np.uint8, "F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64}


class WireError(Exception):
    """A frame that is no message. The text is for the peer."""


class Message(NamedTuple):
    """A header and named arrays."""

    header: dict[str, Any]
    tensors: dict[str, np.ndarray]


def pack(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> bytes:
    """A message as a frame."""
    from safetensors.numpy import save

    text = json.dumps(header, allow_nan=False).encode()
    arrays = {name: np.ascontiguousarray(array) for name, array in (tensors or {}).items()}
    return _LENGTH.pack(len(text)) + text + (save(arrays) if arrays else b"")


def unpack(frame: bytes | str) -> Message:
    """The message in a frame; arrays are read-only views of it.

    Raises:
        WireError: it is none.
    """
    if isinstance(frame, str):
        raise WireError("a text frame; messages are binary frames")
    if len(frame) < _LENGTH.size:
        raise WireError(f"a frame of {len(frame)} bytes is too short for a message")
    (length,) = _LENGTH.unpack_from(frame)
    if length > LONGEST_HEADER:
        raise WireError(f"the header claims {length} bytes; at most {LONGEST_HEADER} are allowed")
    begin = _LENGTH.size + length
    if len(frame) < begin:
        raise WireError(f"the frame is truncated: its header claims {length} bytes")
    header = _object(frame[_LENGTH.size : begin], "the header")
    return Message(header, _tensors(memoryview(frame)[begin:]) if len(frame) > begin else {})


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise WireError(f"{what} is not a JSON object")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensors(content: memoryview) -> dict[str, np.ndarray]:
    """The arrays of safetensors in memory. Read here and not by the library, whose errors and dtypes are wider."""
    if len(content) < _TABLE.size:
        raise WireError("the tensors are truncated")
    (length,) = _TABLE.unpack_from(content)
    if length > LONGEST_TABLE:
        raise WireError(f"the tensors' table claims {length} bytes; at most {LONGEST_TABLE} are allowed")
    if length > len(content) - _TABLE.size:
        raise WireError("the tensors are truncated")
    table = _object(bytes(content[_TABLE.size : _TABLE.size + length]), "the tensors' table")
    table.pop("__metadata__", None)
    if len(table) > MOST_TENSORS:
        raise WireError(f"{len(table)} tensors; at most {MOST_TENSORS} are allowed")
    data = content[_TABLE.size + length :]
    places = {name: _place(name, row) for name, row in table.items()}
    end = 0
    for _, _, first, last in sorted(places.values(), key=lambda place: place[2:]):
        if first != end:
            raise WireError("the tensors do not lie one behind the other")
        end = last
    if end != len(data):
        raise WireError(f"the tensors' table speaks of {end} bytes; there are {len(data)}")
    return {
        name: np.frombuffer(data[first:last], dtype).reshape(shape)
        for name, (dtype, shape, first, last) in places.items()
    }


def _place(name: str, row: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """dtype, shape and byte range of a tensor, checked against each other."""
    if not isinstance(row, dict) or row.get("dtype") not in list(_DTYPES):
        found = row.get("dtype") if isinstance(row, dict) else row
        raise WireError(f"tensor {name!r}: {found!r} is not one of the dtypes {', '.join(_DTYPES)}")
    shape, offsets = row.get("shape"), row.get("data_offsets")
    if not _naturals(shape) or len(shape) > 8:
        raise WireError(f"tensor {name!r} has no usable shape")
    if not _naturals(offsets) or len(offsets) != 2:
        raise WireError(f"tensor {name!r} has no usable data_offsets")
    dtype = np.dtype(_DTYPES[row["dtype"]]).newbyteorder("<")
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if size != offsets[1] - offsets[0]:
        raise WireError(f"tensor {name!r} of shape {shape} does not fit its {offsets[1] - offsets[0]} bytes")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
