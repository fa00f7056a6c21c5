"""Looks into the one pickle that loong cannot avoid, without running it: `.metadata` of a sharded checkpoint.

torch.distributed.checkpoint stores its index of tensors as a pickle and loads it unrestricted, so a crafted checkpoint
could run code. The opcodes are read here by the standard library's disassembler: a file that names anything but the
classes of such an index, or uses opcodes that could hide a name, is refused before torch opens it.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import cast

from loong_core.errors import CheckpointError

METADATA = ".metadata"
MODULES = frozenset({"torch.distributed.checkpoint.metadata"})
NAMES = frozenset(
    {
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
    }
)
DTYPES = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"})
OPCODES = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "MEMOIZE",
        "BINGET",
        "LONG_BINGET",
        "STACK_GLOBAL",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "SHORT_BINBYTES",
        "BINBYTES",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "NEWOBJ",
        "REDUCE",
        "BUILD",
    ]
)
STRINGS = ("SHORT_BINUNICODE", "BINUNICODE")


def require_harmless(folder: Path) -> None:
    """Raise `CheckpointError` where `.metadata` of `folder` could do more than describe tensors."""
    path = folder / METADATA
    try:
        names = _names(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}). Choose another checkpoint.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no index of a sharded checkpoint: {error}. Do not use it.") from error
    if foreign := sorted(f"{module}.{name}" for module, name in names if not _allowed(module, name)):
        raise CheckpointError(
            f"{path} would make torch call {', '.join(foreign[:5])}, which no index of tensors needs: the checkpoint "
            "is damaged or hostile. Do not use it; start from safetensors instead."
        )


def _allowed(module: str, name: str) -> bool:
    return module in MODULES or (module, name) in NAMES or (module == "torch" and name in DTYPES)


def _names(content: bytes) -> set[tuple[str, str]]:
    """The globals a pickle names. `pushed` follows the top of its stack: with the opcodes allowed, the two values
    pushed last are what STACK_GLOBAL takes. Raises ValueError for any other opcode, and for a name not spelled out."""
    pushed: list[str | None] = []
    memo: list[str | None] = []
    names = set()
    for opcode, argument, position in pickletools.genops(content):
        if opcode.name not in OPCODES:
            raise ValueError(f"opcode {opcode.name} at byte {position}")
        if opcode.name in STRINGS:
            pushed.append(str(argument))
        elif opcode.name == "MEMOIZE":
            memo.append(pushed[-1] if pushed else None)
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            index = cast(int, argument)
            pushed.append(memo[index] if index < len(memo) else None)
        elif opcode.name == "STACK_GLOBAL":
            module, name = pushed[-2:] if len(pushed) > 1 else (None, None)
            if module is None or name is None:
                raise ValueError(f"a name that is not spelled out at byte {position}")
            names.add((module, name))
            pushed.append(None)
        elif opcode.name not in ("PROTO", "FRAME"):
            pushed.append(None)
    return names
