"""The Triton products of the op `experts`, one by one and together, at the sizes of Qwen3-30B-A3B.

Inputs and routings are those of `bench/quack_experts.py`, which has QuACK's rows. Beside ours: the reference, torch's
`grouped_mm` for the bare products (rows already gathered, nothing else done), and Transformer Engine's `GroupedLinear`
with the gathers and the activation that a layer needs around it, its splits known to the host.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from loong_core.references.experts import experts as reference
from loong_ops import experts as ours
from loong_ops.bench.quack_experts import CHOICES, EXPERTS, HIDDEN, INNER, TOKENS, Case, _bytes, _rows_like, inputs
from loong_ops.bench.row import Missing, Row, Thunk
from loong_ops.experts import HOPPER, Tile
from loong_ops.permutation import Permutation, sort_by_expert

KINDS: Mapping[str, str] = {
    "up": "up",
    "down": "down",
    "d_act": "activation_gradient",
    "d_hidden": "hidden_gradient",
    "d_up": "up_gradient",
    "d_down": "down_gradient",
}
"""Product -> its field of the op's `Config`."""

_WIDE = (Tile(128, 256, 64, 3, 8), Tile(128, 256, 64, 4, 8), Tile(256, 128, 64, 3, 8))
_PAIRED = (Tile(128, 128, 64, 3, 4), Tile(128, 128, 64, 2, 4))
_ROW_TILES = tuple(
    tile._replace(group=group, parts=parts)
    for tile in (*_WIDE, *_PAIRED)
    for group, parts in ((1, 1), (1, 4), (2, 4), (8, 4))
)
VARIANTS: Mapping[str, tuple[Tile, ...]] = {
    "up": (*_ROW_TILES, Tile(128, 256, 128, 2, 8, 8, 4)),
    "down": (*_ROW_TILES, Tile(128, 256, 64, 4, 8, 8, 2)),
    "d_act": (
        Tile(128, 128, 64, 3, 8, 1, 8),
        Tile(128, 128, 64, 3, 8, 2, 8),
        Tile(128, 128, 64, 4, 8, 8, 4),
        Tile(128, 128, 64, 3, 4, 8, 8),
        Tile(128, 128, 64, 3, 4, 1, 8),
        Tile(128, 256, 64, 3, 8, 8, 8),
        Tile(128, 256, 64, 3, 8, 1, 8),
        Tile(128, 64, 64, 4, 4, 8, 4),
        Tile(64, 128, 64, 3, 4, 8, 4),
    ),
    "d_hidden": _ROW_TILES,
    **dict.fromkeys(
        ("d_up", "d_down"),
        tuple(
            Tile(*shape, group=group, parts=4, reduce=reduce)
            for shape in (
                (128, 256, 64, 6, 8),
                (256, 128, 64, 6, 8),
                (128, 128, 64, 6, 4),
                (128, 128, 64, 3, 4),
                (128, 256, 128, 3, 8),
            )
            for group, reduce in ((8, True), (8, False), (1, True))
        ),
    ),
}
"""Product -> tiles worth a look. On sm_90 the compiler spills at most 8 bytes in any of them."""


def rows() -> list[Row]:
    """Each product with each of its tiles, the sort and the sums, then forward and backward of the whole op."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for case in (Case(tokens) for tokens in TOKENS):
        for kind, field in KINDS.items():
            own: Tile = getattr(HOPPER, field)
            for tile in dict.fromkeys((own, *VARIANTS[kind])):
                yield _product_row(case, kind, _name(tile, own), partial(product, case, kind, tile))
            if kind != "d_act":
                yield _product_row(case, kind, "torch.grouped_mm", partial(_grouped_mm, case, kind))
    for case in (Case(tokens, skewed) for tokens in TOKENS for skewed in (False, True)):
        moved = 2.0 * (case.pairs + case.tokens) * HIDDEN
        yield Row(
            op="experts",
            shape=f"sort: {case.shape}",
            name="triton",
            direction="forward",
            make=partial(sort, case),
            bytes=12.0 * case.pairs,  # the choice is read, the order and the position of each pair are written
        )
        yield Row(
            op="experts",
            shape=f"combine: {case.shape}",
            name="triton",
            direction="forward",
            make=partial(combine, case),
            bytes=moved,
        )
        for name, make in (("triton", whole), ("torch", _reference), ("transformer_engine", _transformer_engine)):
            for direction, factor in (("forward", 1), ("backward", 2)):
                yield Row(
                    op="experts",
                    shape=case.shape,
                    name=name,
                    direction=direction,
                    make=partial(make, case, direction),
                    flops=2.0 * case.pairs * HIDDEN * 3 * INNER * factor,
                    bytes=factor * (2.0 * EXPERTS * 3 * INNER * HIDDEN + 4.0 * case.tokens * HIDDEN),
                )


def _name(tile: Tile, own: Tile) -> str:
    if tile == own:
        return "triton"
    how = "" if tile.reduce else ",load"
    return f"triton[{tile.m}x{tile.n}x{tile.k},s{tile.stages},w{tile.warps},g{tile.group},p{tile.parts}{how}]"


def _product_row(case: Case, kind: str, name: str, make: Any) -> Row:
    columns = 2 * INNER if kind in ("up", "d_hidden", "d_up") else INNER
    return Row(
        op="experts",
        shape=f"{kind}: {case.shape}",
        name=name,
        direction="forward" if kind in ("up", "down") else "backward",
        make=make,
        flops=2.0 * case.pairs * HIDDEN * columns,
        bytes=_bytes(case, kind),
        headline="[" not in name,
    )


def _plan(case: Case, chosen: Tensor, tile: int = 128) -> Permutation:
    return sort_by_expert(chosen, EXPERTS, 0, case.pairs, tile)


def product(case: Case, kind: str, tile: Tile) -> Thunk:
    """One product on inputs of its own."""
    hidden, up, down, weights, chosen = inputs(case)
    plan = _plan(case, chosen, HOPPER.up.m if kind in ("d_up", "d_down") else tile.m)
    if kind == "up":
        return lambda: ours.up_product(hidden, up, weights, plan, tile)
    if kind == "d_act":
        gate_up, out = _rows_like(case, 2 * INNER), _rows_like(case, 2 * INNER)
        return lambda: ours.activation_gradient(hidden, down, weights, plan, gate_up, tile, out=out)
    if kind == "down":
        act = _rows_like(case, INNER)
        return lambda: ours.row_product(act, down, plan, tile, k_first=False)
    if kind == "d_down":
        act, weight = _rows_like(case, INNER), _buffered(down)
        return lambda: ours.weight_gradient(hidden, act, "left", plan, weight, CHOICES, tile)
    gradient, weight = _rows_like(case, 2 * INNER), _buffered(up)
    if kind == "d_up":
        return lambda: ours.weight_gradient(gradient, hidden, "right", plan, weight, CHOICES, tile)
    return lambda: ours.row_product(gradient, up, plan, tile, k_first=True)


def sort(case: Case) -> Thunk:
    """The rows of every expert."""
    chosen = case.chosen()
    return lambda: _plan(case, chosen)


def combine(case: Case) -> Thunk:
    """The sum of every token's rows."""
    plan, out = _plan(case, case.chosen()), _rows_like(case, HIDDEN)
    return lambda: ours.combine(out, plan, CHOICES)


def whole(case: Case, direction: str) -> Thunk:
    """The op forward (keeping what backward needs), or its backward alone, into float32 buffers."""
    hidden, up, down, weights, chosen = inputs(case)
    for tensor in (hidden, weights):
        tensor.requires_grad_()
    parameters = _buffered(up), _buffered(down)
    if direction == "forward":
        return lambda: ours.experts(hidden, *parameters, weights, chosen)
    config, plan = HOPPER, _plan(case, chosen)
    gate_up, _ = ours.up_product(hidden, up, weights, plan, config.up)
    gradient, out = torch.randn_like(hidden), torch.empty_like(gate_up)
    needs, tensors = (True,) * 4, (hidden.detach(), up.detach(), down.detach(), weights.detach())
    # The op's own backward can run once: it writes over gate_up.
    return lambda: ours.gradients_of(tensors, parameters, plan, gate_up, gradient, needs, config, out)


def _buffered(weight: Tensor) -> Tensor:
    weight = weight.detach().requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device=weight.device)  # type: ignore[attr-defined]
    return weight


def _grouped_mm(case: Case, kind: str) -> Thunk:
    _, up, down, _, chosen = inputs(case)
    ends = _plan(case, chosen).offsets[1:]
    wide, f_rows, n_rows = (_rows_like(case, columns) for columns in (2 * INNER, INNER, HIDDEN))
    operands: Mapping[str, tuple[Tensor, Tensor]] = {
        "up": (n_rows, up.mT),
        "down": (f_rows, down.mT),
        "d_hidden": (wide, up),
        "d_up": (wide.t(), n_rows),
        "d_down": (n_rows.t(), f_rows),
    }
    left, right = operands[kind]
    return lambda: functional.grouped_mm(left, right, offs=ends)


def _reference(case: Case, direction: str) -> Thunk:
    *tensors, chosen = inputs(case)
    hidden, up, down, weights = (tensor.requires_grad_() for tensor in tensors)
    return _passes(lambda: reference(hidden, up, down, weights, chosen), (hidden, up, down, weights), direction)


def _transformer_engine(case: Case, direction: str) -> Thunk:
    if importlib.util.find_spec("transformer_engine") is None:
        raise Missing("transformer-engine")
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    hidden, up, down, weights, chosen = inputs(case)
    layers = []
    for weight in (up, down):
        layer = engine.GroupedLinear(
            EXPERTS, weight.shape[2], weight.shape[1], bias=False, params_dtype=torch.bfloat16,
            fuse_wgrad_accumulation=True,
        )  # fmt: skip
        for parameter in layer.parameters():
            parameter.main_grad = torch.zeros(parameter.shape, device="cuda")
        layers.append(layer)
    plan = _plan(case, chosen)
    splits = plan.offsets.diff().tolist()
    order, position = plan.order.long(), plan.position.long().view(case.tokens, CHOICES)
    token = order // CHOICES

    def call() -> Tensor:
        gate, value = layers[0](hidden[token], splits).chunk(2, dim=-1)
        act = functional.silu(gate) * value * weights.view(-1)[order, None].to(gate.dtype)
        return layers[1](act, splits)[position].sum(1)

    for tensor in (hidden, weights):
        tensor.requires_grad_()
    return _passes(call, (hidden, weights, *layers[0].parameters(), *layers[1].parameters()), direction)


def _passes(call: Any, wanted: tuple[Tensor, ...], direction: str) -> Thunk:
    if direction == "forward":
        forward: Thunk = call
        return forward
    result = call()
    gradient = torch.randn_like(result)

    def backward() -> None:
        for tensor in wanted:
            tensor.grad = None  # otherwise autograd would add to them, which is not the op's work
        result.backward(gradient, retain_graph=True)

    return backward
