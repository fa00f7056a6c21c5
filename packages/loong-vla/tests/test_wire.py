"""Messages on the wire: what is sent arrives, and whatever else arrives is refused with a reason."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from loong_vla.wire import Message, WireError, pack, unpack

HEADER = {"type": "act", "protocol": 1, "id": "ä", "task": "put it\nthere"}
TENSORS = {
    "state": np.arange(5, dtype=np.float32) / 3,
    "image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "empty": np.zeros((0, 3), np.float64),
    "count": np.array(7, np.int64),
}


def tensors(table: Any, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return pack({}) + struct.pack("<Q", len(text)) + text + data


def test_what_is_sent_arrives() -> None:
    header, found = unpack(pack(HEADER, TENSORS))
    assert header == HEADER and found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert unpack(pack(HEADER)) == Message(HEADER, {})


def test_tensors_are_safetensors() -> None:
    """Frames of any client that has the library, and the other way round."""
    frame = pack(HEADER, TENSORS)
    (length,) = struct.unpack_from("<I", frame)
    assert json.loads(frame[4 : 4 + length]) == HEADER
    for name, array in load(frame[4 + length :]).items():
        np.testing.assert_array_equal(array, TENSORS[name])
    assert unpack(pack({}) + save(TENSORS)).tensors.keys() == TENSORS.keys()


ROW = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        ("text", "text frame"),
        (b"", "0 bytes is too short"),
        (b"\1\0\0", "3 bytes is too short"),
        (struct.pack("<I", 2**32 - 1), "claims 4294967295 bytes"),
        (struct.pack("<I", 9) + b"{}", "truncated"),
        (struct.pack("<I", 2) + b"{]", "not valid JSON"),
        (struct.pack("<I", 2) + b"\xff\xfe", "not valid JSON"),
        (struct.pack("<I", 2) + b"[]", "not a JSON object"),
        (struct.pack("<I", 9) + b'{"a":NaN}', "NaN is no JSON"),
        (struct.pack("<I", 13) + b'{"a":1,"a":2}', "occurs twice"),
        (struct.pack("<I", 60000) + b"[" * 60000, "not valid JSON"),
        (struct.pack("<I", 10006) + b'{"a":' + b"9" * 10000 + b"}", "not valid JSON"),
        (pack({}) + b"\1", "tensors are truncated"),
        (pack({}) + struct.pack("<Q", 2**63) + b"{}", "claims 9223372036854775808 bytes"),
        (pack({}) + struct.pack("<Q", 9) + b"{}", "tensors are truncated"),
        (tensors([]), "not a JSON object"),
        (tensors({f"{number}": ROW for number in range(65)}), "65 tensors"),
        (tensors({"a": 1}), "1 is not one of the dtypes"),
        (tensors({"a": {**ROW, "dtype": "BF16"}}, bytes(8)), "'BF16' is not one of the dtypes"),
        (tensors({"a": {**ROW, "dtype": ["F32"]}}, bytes(8)), "is not one of the dtypes"),
        (tensors({"a": {**ROW, "shape": [2.0]}}, bytes(8)), "no usable shape"),
        (tensors({"a": {**ROW, "shape": [-2]}}, bytes(8)), "no usable shape"),
        (tensors({"a": {**ROW, "shape": [1] * 9}}, bytes(8)), "no usable shape"),
        (tensors({"a": {**ROW, "shape": [2**40, 2**40]}}, bytes(8)), "does not fit its 8 bytes"),
        (tensors({"a": {**ROW, "data_offsets": [8, 0]}}, bytes(8)), "does not fit its -8 bytes"),
        (tensors({"a": {**ROW, "data_offsets": [0]}}, bytes(8)), "no usable data_offsets"),
        (tensors({"a": {**ROW, "data_offsets": [1, 9]}}, bytes(9)), "one behind the other"),
        (tensors({"a": ROW, "b": ROW}, bytes(8)), "one behind the other"),
        (tensors({"a": ROW}, bytes(7)), "speaks of 8 bytes; there are 7"),
        (tensors({"a": ROW}, bytes(9)), "speaks of 8 bytes; there are 9"),
    ],
)
def test_what_is_no_message_is_refused(frame: bytes | str, told: str) -> None:
    with pytest.raises(WireError, match=told):
        unpack(frame)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_message_or_refused(content: bytes) -> None:
    for frame in (content, pack({}) + content):
        try:
            assert isinstance(unpack(frame), Message)
        except WireError as error:
            assert str(error)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_messages_are_messages_or_refused(data: st.DataObject) -> None:
    frame = bytearray(pack(HEADER, TENSORS))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(frame) - 1))
        frame[place] = data.draw(st.integers(0, 255))
    frame = frame[: data.draw(st.integers(0, len(frame)))]
    try:
        assert isinstance(unpack(bytes(frame)), Message)
    except WireError as error:
        assert str(error)
