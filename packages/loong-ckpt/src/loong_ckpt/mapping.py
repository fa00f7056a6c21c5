"""Which tensors of a checkpoint make which parameter of the model, decided from names and shapes before any is read.

A family may have several rows for a parameter (experts one by one, or all in one tensor): the first one whose tensors
are all in the checkpoint is used. Every tensor must be used exactly once, every parameter must be made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loong_ckpt.hf_folder import listed
from loong_core.errors import CheckpointError
from loong_core.types import ModelShape, ParameterSpec, Weight
from loong_core.weights import WeightMap, verb_of

if TYPE_CHECKING:
    from loong_core.safetensors_header import TensorEntry

FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass
class Assignment:
    """`rows[role]` makes a parameter; `copies` are tensors equal to another one (a tied head that is stored anyway);
    `dropped` are tensors read past on purpose."""

    rows: dict[str, Weight] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def candidates(weights: WeightMap, spec: ParameterSpec) -> list[Weight]:
    """The family's rows for `spec`; `CheckpointError` if it has none."""
    rows = weights.candidates(spec)
    if not rows:
        raise CheckpointError(f"The model family has no weight row for its own parameter {spec.role!r}: report this.")
    return rows


def assign(shape: ModelShape, rows: Sequence[Weight], tensors: Mapping[str, TensorEntry], where: object) -> Assignment:
    """Match all parameters of `shape` with `tensors`; `where` is named in messages.

    Raises `CheckpointError` with all problems: parameters nothing makes, tensors used by nothing or twice, shapes
    that do not fit, tensors that are not plain floating point.
    """
    weights, result = WeightMap(rows), Assignment()
    users: dict[str, list[ParameterSpec]] = {}
    problems: list[str] = []
    missing: list[str] = []
    for spec in shape.parameters:
        options = candidates(weights, spec)
        chosen = next((row for row in options if all(name in tensors for name in row.hf)), None)
        if chosen is None:
            missing.append(f"{spec.role} (searched {', or '.join(' + '.join(row.hf) for row in options)})")
            continue
        result.rows[spec.role] = chosen
        for name in chosen.hf:
            users.setdefault(name, []).append(spec)
        problems += _misfit(spec, chosen, shape, tensors)
    if missing:
        problems.append(f"{where}: no tensors for {len(missing)} parameters: {listed(missing)}.")
    problems += _overused(users, result, tensors, where)
    unused = [name for name in tensors if name not in users]
    result.dropped = [name for name in unused if weights.is_dropped(name)]
    result.copies = _copies(shape, weights, [name for name in unused if name not in set(result.dropped)], result)
    result.copies |= _twins(shape, weights, set(unused), result)
    unknown = [name for name in unused if name not in result.copies and not weights.is_dropped(name)]
    if unknown:
        problems.append(
            f"{where}: {len(unknown)} tensors belong to no parameter of family {shape.family!r} as its config.json "
            f"describes it: {listed(unknown)}. Does config.json belong to these weights?"
        )
    if problems:
        raise CheckpointError(problems[:40])
    return result


def _misfit(spec: ParameterSpec, row: Weight, shape: ModelShape, tensors: Mapping[str, TensorEntry]) -> list[str]:
    """Problems of shape and dtype of one parameter's tensors."""
    wrong = [f"{name} is {tensors[name].dtype}" for name in row.hf if tensors[name].dtype not in FLOATS]
    if wrong:
        return [f"{', '.join(wrong)}: quantised weights cannot be trained. Convert the checkpoint to bf16 first."]
    expected = hf_shapes(spec, row, shape)
    found = [tensors[name].shape[1:] if row.verb == "stack" else tensors[name].shape for name in row.hf]
    return [
        f"{name} has shape {list(tensors[name].shape)}, config.json implies {list(want)}"
        f"{' per expert' if row.verb == 'stack' else ''}. Does config.json belong to these weights?"
        for name, have, want in zip(row.hf, found, expected, strict=True)
        if have != want
    ]


def hf_shapes(spec: ParameterSpec, row: Weight, shape: ModelShape) -> list[tuple[int, ...]]:
    """Shapes of the HF tensors behind one parameter (of `stack`: of one expert), found by unpacking without data."""
    import torch

    if row.verb in ("copy", "stack"):
        return [spec.shape]
    parts = verb_of(row).unpack(torch.empty(spec.shape, device="meta"), shape.fields)
    return [tuple(part.shape) for part in parts]


def _overused(
    users: Mapping[str, list[ParameterSpec]],
    result: Assignment,
    tensors: Mapping[str, TensorEntry],
    where: object,
) -> list[str]:
    problems = []
    for name, specs in users.items():
        stacked = [spec for spec in specs if result.rows[spec.role].verb == "stack"]
        if not stacked and len(specs) > 1:
            problems.append(
                f"{where}: tensor {name} is used by {len(specs)} parameters: {listed([s.role for s in specs])}."
            )
        elif stacked and sorted(spec.expert or 0 for spec in specs) != list(range(tensors[name].shape[0])):
            problems.append(
                f"{where}: tensor {name} holds {tensors[name].shape[0]} experts, config.json implies {len(specs)}."
            )
    return problems


def _copies(shape: ModelShape, weights: WeightMap, unused: Sequence[str], result: Assignment) -> dict[str, str]:
    """A stored head of a model whose head is its embedding: head tensor -> embedding tensor."""
    if not shape.tied_embeddings or not unused or "embed" not in result.rows:
        return {}
    heads = {name for row in weights.candidates(ParameterSpec(role="head", shape=())) for name in row.hf}
    return {name: result.rows["embed"].hf[0] for name in unused if name in heads}


def _twins(shape: ModelShape, weights: WeightMap, unused: set[str], result: Assignment) -> dict[str, str]:
    """Tensors stored a second time under the names that `twin` rows tell."""
    return {
        name: result.rows[spec.role].hf[0]
        for spec in shape.parameters
        if spec.role in result.rows
        for name in weights.twins(spec)
        if name in unused
    }
