"""The verbs of a weight map, as pure functions on full tensors; `shard` is the only code that knows tensor parallelism.

A family writes rows such as `qkv("layers.*.attn.qkv", "model.layers.*.self_attn.{}_proj.weight")`. Each verb is a
pair of inverse functions: `pack` makes the native tensor from Hugging Face tensors, `unpack` the reverse.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loong_core.types import ParameterSpec, Weight

if TYPE_CHECKING:
    from torch import Tensor

Fields = Mapping[str, Any]


# -------------------------------------------------------------------------------- rows, as a family writes them
def copy(role: str, hf: str) -> Weight:
    """The native tensor is the HF tensor."""
    return Weight(role=role, hf=(hf,))


def qkv(role: str, hf: str) -> Weight:
    """Queries, keys and values, interleaved by key-value group: `{}` in `hf` becomes q, k, v."""
    return Weight(role=role, hf=tuple(hf.format(part) for part in "qkv"), verb="qkv")


def gate_up(role: str, hf: str) -> Weight:
    """The two halves of a gated MLP input, gate first: `{}` in `hf` becomes gate, up."""
    return Weight(role=role, hf=tuple(hf.format(part) for part in ("gate", "up")), verb="gate_up")


def stack(role: str, hf: str) -> Weight:
    """Expert `#` of a checkpoint that keeps all experts in one tensor, experts first and otherwise as `copy`."""
    return Weight(role=role, hf=(hf,), verb="stack")


def concat(role: str, hf: Sequence[str], *extents: str | int) -> Weight:
    """The HF tensors one after the other along their first axis, with `extents` rows each; without extents all have
    equally many."""
    return Weight(role=role, hf=tuple(hf), verb="concat", extents=extents)


def flatten(role: str, hf: str, *extents: str | int) -> Weight:
    """A convolution over patches as the matrix it is: [out, ...] -> [out, product]. `extents` are those of `...`."""
    return Weight(role=role, hf=(hf,), verb="flatten", extents=extents)


def twin(role: str, hf: str) -> Weight:
    """A second name under which checkpoints may store the same tensor (a tied head), besides the first or instead of
    it. Both have to be equal byte by byte, and both are written where the source had both."""
    return Weight(role=role, hf=(hf,), verb="twin")


def drop(hf: str) -> Weight:
    """A tensor of the checkpoint that loong derives itself (rope frequencies); read past, never written."""
    return Weight(role="", hf=(hf,), verb="drop")


def unused(hf: str, *extents: str | int) -> Weight:
    """A tensor of shape `extents` that no computation uses, but that public loaders insist on: read past, and written
    as the source had it, or as zeros. `*` is the last layer."""
    return Weight(role="", hf=(hf,), verb="unused", extents=extents)


def prefixed(rows: Sequence[Weight], *prefixes: str) -> tuple[Weight, ...]:
    """The rows, and once more for checkpoints whose names all begin with one of `prefixes`. Names without a prefix
    come first: they are what an export of random weights has."""
    found = [row for row in rows if row.verb != "unused"]
    for prefix in prefixes:
        named = (replace(row, hf=tuple(prefix + name for name in row.hf)) for row in rows if row.verb != "unused")
        found += named
    idle = [row for row in rows if row.verb == "unused"]
    return (*found, *(replace(row, hf=(*row.hf, *(p + name for p in prefixes for name in row.hf))) for row in idle))


# ----------------------------------------------------------------------------------------------- verbs
@dataclass(frozen=True)
class Verb:
    """`pack(HF tensors, fields) -> native`, and `unpack(native, fields) -> HF tensors`, its exact inverse."""

    pack: Callable[[Sequence[Tensor], Fields], Tensor]
    unpack: Callable[[Tensor, Fields], list[Tensor]]


def _pack_qkv(parts: Sequence[Tensor], fields: Fields) -> Tensor:
    """[heads*d, ...], [kv*d, ...], [kv*d, ...] -> [kv * (heads/kv + 2) * d, ...], one group after the other."""
    import torch

    groups = fields["kv_heads"]
    return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)


def _unpack_qkv(full: Tensor, fields: Fields) -> list[Tensor]:
    groups, width = fields["kv_heads"], fields["head_dim"]
    grouped = full.reshape(groups, -1, *full.shape[1:])
    sizes = [grouped.shape[1] - 2 * width, width, width]
    return [part.flatten(0, 1) for part in grouped.split(sizes, dim=1)]


def _pack_gate_up(parts: Sequence[Tensor], fields: Fields) -> Tensor:
    import torch

    return torch.cat(list(parts))


VERBS: dict[str, Verb] = {
    "copy": Verb(lambda parts, fields: parts[0], lambda full, fields: [full]),
    "stack": Verb(lambda parts, fields: parts[0], lambda full, fields: [full]),
    "qkv": Verb(_pack_qkv, _unpack_qkv),
    "gate_up": Verb(_pack_gate_up, lambda full, fields: list(full.chunk(2))),
}


def verb_of(row: Weight) -> Verb:
    """The pair of functions behind a row that makes a parameter."""
    if row.verb == "concat":
        return Verb(_pack_gate_up, lambda full, fields: list(full.split(_parts(row, full, fields))))
    if row.verb == "flatten":
        shape = row.extents
        return Verb(
            lambda parts, fields: parts[0].flatten(1),
            lambda full, fields: [full.reshape(full.shape[0], *extents(shape, fields))],
        )
    return VERBS[row.verb]


def extents(named: Sequence[str | int], fields: Fields) -> list[int]:
    """Numbers behind the `extents` of a row."""
    return [item if isinstance(item, int) else int(fields[item]) for item in named]


def _parts(row: Weight, full: Tensor, fields: Fields) -> list[int]:
    """Rows of each part of a `concat`."""
    return extents(row.extents, fields) or [full.shape[0] // len(row.hf)] * len(row.hf)


# ------------------------------------------------------------------------------------------- matching rows
def _pattern(name: str) -> re.Pattern[str]:
    expression = re.escape(name).replace(r"\*", r"(?P<layer>\d+)", 1).replace(r"\#", r"(?P<expert>\d+)", 1)
    return re.compile(expression.replace(r"\*", r"(?P=layer)"))


def fill(name: str, layer: int | None, expert: int | None) -> str:
    """`name` with its layer and expert wildcards replaced by numbers."""
    if layer is not None:
        name = name.replace("*", str(layer))
    return name if expert is None else name.replace("#", str(expert))


class WeightMap:
    """A family's rows, ready to answer which HF tensors a native parameter is made of, and the reverse."""

    def __init__(self, rows: Sequence[Weight]) -> None:
        self._rows = [(_pattern(row.role), row) for row in rows if row.verb not in ("drop", "unused", "twin")]
        self._twins = [(_pattern(row.role), row) for row in rows if row.verb == "twin"]
        self._passed = [_pattern(name) for row in rows if row.verb in ("drop", "unused") for name in row.hf]
        self.unused = [row for row in rows if row.verb == "unused"]
        self._cache: dict[str, list[Weight]] = {}

    def candidates(self, spec: ParameterSpec) -> list[Weight]:
        """Rows that can make `spec`, wildcards filled in; several when checkpoints of a family differ in layout."""
        if spec.role not in self._cache:
            found = [_filled(row, spec) for pattern, row in self._rows if pattern.fullmatch(spec.role)]
            found += [replace(found[0], hf=(name,), verb="copy") for name in self.twins(spec) if found]
            self._cache[spec.role] = found
        return self._cache[spec.role]

    def twins(self, spec: ParameterSpec) -> list[str]:
        """Further names under which checkpoints may store the tensor of `spec` once more."""
        return [name for pattern, row in self._twins if pattern.fullmatch(spec.role) for name in _filled(row, spec).hf]

    def is_dropped(self, hf_name: str) -> bool:
        """Whether the family reads past this tensor on purpose."""
        return any(pattern.fullmatch(hf_name) for pattern in self._passed)


def _filled(row: Weight, spec: ParameterSpec) -> Weight:
    return replace(row, role=spec.role, hf=tuple(fill(name, spec.layer, spec.expert) for name in row.hf))


# --------------------------------------------------------------------------------------- tensor parallelism
def padded_extent(extent: int, size: int, blocks: int = 1) -> int:
    """`extent` grown to the next multiple of `size * blocks`."""
    unit = size * blocks
    return -(-extent // unit) * unit


def shard(full: Tensor, rank: int, size: int, axis: int | None, blocks: int = 1, padded: bool = False) -> Tensor:
    """The part of `full` that tensor-parallel rank `rank` of `size` holds; zero-padded first if `padded`."""
    import torch

    if axis is None or size == 1:
        return full
    if padded and (missing := padded_extent(full.shape[axis], size, blocks) - full.shape[axis]):
        filler = full.new_zeros([missing if dim == axis else extent for dim, extent in enumerate(full.shape)])
        full = torch.cat([full, filler], dim=axis)
    return torch.cat([block.chunk(size, axis)[rank] for block in full.chunk(blocks, axis)], dim=axis)


def unshard(shards: Sequence[Tensor], axis: int | None, blocks: int = 1, extent: int | None = None) -> Tensor:
    """The inverse of `shard` over all ranks' parts; `extent` cuts padding off again."""
    import torch

    if axis is None:
        return shards[0]
    columns = [part.chunk(blocks, axis) for part in shards]
    full = torch.cat([torch.cat([column[block] for column in columns], axis) for block in range(blocks)], axis)
    return full if extent is None else full.narrow(axis, 0, extent)
