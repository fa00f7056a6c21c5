"""A checkpoint whose index would run code is refused without running it; a real index passes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from loong_core.errors import CheckpointError
from loong_core.parallel.metadata_guard import METADATA, require_harmless


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.filterwarnings("ignore")
def test_a_real_index_passes(tmp_path: Path) -> None:
    state = {name: torch.ones(3, 5, dtype=getattr(torch, name)) for name in ("float32", "bfloat16", "int64")}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    require_harmless(tmp_path)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("function", [os.system, print, exec])
def test_a_call_is_refused_and_not_made(function, protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    hostile = {"state": [Calls(function, f"open({str(canary)!r}, 'w')")]}
    (tmp_path / METADATA).write_bytes(pickle.dumps(hostile, protocol=protocol))
    with pytest.raises(CheckpointError, match="Do not use it"):
        require_harmless(tmp_path)
    assert not canary.exists()


def test_names_cannot_be_hidden_behind_decoys(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    popped = b"\x80\x04" + text("os") + text("system") + text("torch") + text("Size") + b"00\x93."
    memoized = b"\x80\x04" + text("os") + b"\x940" + text("system") + b"\x940h\x00h\x01\x93."
    built = b"\x80\x04" + text("torch") + text("Size") + b"]\x93."
    for content in (popped, memoized, built):
        (tmp_path / METADATA).write_bytes(content)
        with pytest.raises(CheckpointError):
            require_harmless(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x04\x95"])
def test_what_is_no_pickle_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match="no index"):
        require_harmless(tmp_path)


def test_an_absent_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        require_harmless(tmp_path)
