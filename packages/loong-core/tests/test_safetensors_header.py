"""Every way a safetensors file can be broken is told apart, without torch."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from loong_core.errors import CheckpointError
from loong_core.safetensors_header import TensorEntry, read_header, read_header_and_metadata


def build(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def row(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {
        "weight": torch.randn(3, 5, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 7),
        "flags": torch.tensor([True, False, True]),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    entries, metadata = read_header_and_metadata(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"}
    content = (tmp_path / "a.safetensors").read_bytes()
    for name, tensor in tensors.items():
        entry = entries[name]
        assert entry.shape == tuple(tensor.shape)
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert content[entry.begin : entry.end] == raw


def test_an_entry_is_dtype_shape_and_byte_range(tmp_path: Path) -> None:
    text = json.dumps({"w": row("F32", [2], 0, 8)}).encode()
    (tmp_path / "a.safetensors").write_bytes(build(text, bytes(8)))
    start = 8 + len(text)
    assert read_header(tmp_path / "a.safetensors") == {"w": TensorEntry("F32", (2,), start, start + 8)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "too few"),
        (b"\x01\x02", "too few"),
        (struct.pack("<Q", 2**63) + b"{}", "at most"),
        (struct.pack("<Q", 40) + b"{}", "truncated"),
        (build(b"{]"), "not valid JSON"),
        (build(b"\xff\xfe"), "not valid JSON"),
        (build(b"[" * 100_000), "not valid JSON"),
        (build([1]), "not a table"),
        (build({"w": row("F32", [4], 0, 16)}, bytes(15)), "truncated"),
        (build({"w": row("F32", [4], 0, 16)}, bytes(17)), "1 bytes more"),
        (build({"w": row("F32", [4], 0, 12)}, bytes(12)), "does not fit"),
        (build({"w": row("F33", [4], 0, 16)}, bytes(16)), "unknown dtype"),
        (build({"w": row("F32", [-4], 0, 16)}, bytes(16)), "impossible shape"),
        (build({"w": row("F32", [True], 0, 4)}, bytes(4)), "impossible shape"),
        (build({"w": row("F32", [1], 4, 0)}, bytes(4)), "does not fit"),
        (build({"w": row("F32", [1], 4, 8)}, bytes(8)), "expected"),
        (build({"a": row("U8", [4], 0, 4), "b": row("U8", [4], 2, 6)}, bytes(6)), "expected"),
        (build({"w": {"dtype": "F32"}}), "lacks"),
        (build({"w": 3}), "lacks"),
        (build({"w": {"dtype": [], "shape": [], "data_offsets": [0, 4]}}, bytes(4)), "unknown dtype"),
        (build({"__metadata__": {"a": 1}}), "table of texts"),
        (build(b'{"w": {}, "w": {}}'), "occurs twice"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as raised:
        read_header(path)
    assert str(path) in str(raised.value)


def test_absent_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


def test_any_flipped_header_byte_gives_a_header_or_a_checkpoint_error(tmp_path: Path) -> None:
    content = build({"a": row("BF16", [2, 3], 0, 12), "b": row("F32", [2], 12, 20)}, bytes(20))
    generator = random.Random(0)
    for position in range(len(content) - 20):
        changed = bytearray(content)
        changed[position] ^= 1 << generator.randrange(8)
        (tmp_path / "a.safetensors").write_bytes(changed)
        try:
            read_header(tmp_path / "a.safetensors")
        except CheckpointError:
            continue


def test_imports_no_tensor_library() -> None:
    code = (
        "import sys, loong_core.safetensors_header; print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
