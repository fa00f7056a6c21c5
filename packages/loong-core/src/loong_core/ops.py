"""Ops: how an implementation of each is chosen. Importing this loads no tensor library.

Ops are declared in `loong_core.op_declarations`. Implementations are `OpImpl` rows that plugins provide. `choose`
decides by name or by rank, in the parent process as well as in workers; `bind` resolves the choices once per worker to
plain functions, so that nothing is dispatched per call.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from loong_core.errors import NotFound, PluginError, Unsupported
from loong_core.op_declarations import DECLARATIONS
from loong_core.registry import resolve
from loong_core.types import OpImpl, OpRequest

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


OPS: tuple[OpImpl, ...] = (
    *(OpImpl(op=name, name="torch", target=row.reference, rank=0) for name, row in DECLARATIONS.items()),
    OpImpl(
        op="attention",
        name="transformer_engine",
        target="loong_core.parallel.te_attention:attention",
        backends=frozenset({"cuda"}),
        needs=frozenset({"transformer_engine"}),
        supports="loong_core.parallel.te_attention:supports",
        rank=10,
    ),
    OpImpl(
        op="ragged_attention",
        name="varlen",
        target="loong_core.parallel.varlen_attention:ragged_attention",
        backends=frozenset({"cuda"}),
        supports="loong_core.parallel.varlen_attention:supports",
        rank=10,
    ),
)
"""The core's rows: a reference for every op, on every backend, and Transformer Engine's and torch's attention."""


class OpChoice(NamedTuple):
    """The implementation chosen for an op, and why, in words."""

    op: str
    name: str
    reason: str


class Ops:
    """The bound ops as plain functions, and how each was chosen. Signatures: `DECLARATIONS`."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
    residual_rms_norm: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    residual_layer_norm: Callable[[Tensor, Tensor | None, Tensor | None, float], tuple[Tensor, Tensor]]
    residual_ada_rms_norm: Callable[[Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    attention: Callable[..., Tensor]
    ragged_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[int, int]], Tensor]
    cross_entropy: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
    rotary_qkv: Callable[..., tuple[Tensor, Tensor, Tensor]]
    swiglu: Callable[[Tensor], Tensor]
    route: Callable[..., Any]
    experts: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    linear_gelu: Callable[..., Tensor]
    gated_mlp: Callable[..., Tensor]
    geglu: Callable[[Tensor], Tensor]
    ada_rms_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    layer_norm_modulate: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    gated_residual: Callable[[Tensor, Tensor, Tensor], Tensor]
    dropout_add: Callable[[Tensor, Tensor, float], Tensor]
    sum_of_squares: Callable[[Sequence[Tensor], str], Tensor]
    sum_parts: Callable[[Tensor, Tensor, Tensor | None], None]
    adamw: Callable[..., None]

    def __init__(self, functions: Mapping[str, Callable[..., Any]], choices: Mapping[str, OpChoice]) -> None:
        self.choices = dict(choices)
        for name, function in functions.items():
            setattr(self, name, function)

    def __repr__(self) -> str:
        return f"Ops({', '.join(f'{choice.op}={choice.name}' for choice in self.choices.values())})"


def choose(
    impls: Iterable[OpImpl],
    request: OpRequest,
    choices: Mapping[str, str],
    capabilities: frozenset[str] | None = None,
) -> dict[str, OpChoice]:
    """Choose an implementation for every declared op.

    An op named in `choices` takes that implementation, and so does one that has it as its `base`, if it has one of that
    name that can run; others take that of the highest rank that can run. `capabilities` are the backend's; without them
    an implementation's `needs` are left to its `supports`.

    Raises `NotFound` for an unknown op or implementation, `Unsupported` where the named one (or, unnamed, none) can
    run, with the reasons, and `PluginError` where two of the same rank could.
    """
    rows = _by_op(impls)
    problems = [_unknown("op", name, DECLARATIONS) for name in choices if name not in DECLARATIONS]
    problems += [
        _unknown(f"implementation of op {name}", choices[name], [row.name for row in rows[name]])
        for name in choices
        if name in DECLARATIONS and choices[name] not in {row.name for row in rows[name]}
    ]
    if problems:
        raise NotFound(*problems)
    chosen: dict[str, OpChoice] = {}
    for op, candidates in rows.items():
        refused = {row.name: reason for row in candidates if (reason := _refusal(row, request, capabilities))}
        able = [row for row in candidates if row.name not in refused]
        follows = choices.get(DECLARATIONS[op].base or "")
        if op in choices and choices[op] in refused:
            reason = f"{refused[choices[op]]}.{_others(candidates, refused)}"
            problems.append(f"ops.{op} = {choices[op]}: cannot run here: {reason}")
        elif op in choices:
            chosen[op] = OpChoice(op, choices[op], "named in the recipe")
        elif follows in {row.name for row in able}:
            chosen[op] = OpChoice(op, str(follows), f"as {DECLARATIONS[op].base}, which is named in the recipe")
        elif able:
            chosen[op] = _best(op, able, refused)
        else:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items()) or "none is installed"
            problems.append(f"op {op}: no implementation can run on backend {request.backend} ({reasons}).")
    if problems:
        raise Unsupported(*problems)
    return chosen


def bind(
    impls: Iterable[OpImpl],
    request: OpRequest,
    choices: Mapping[str, str],
    capabilities: frozenset[str] | None = None,
) -> Ops:
    """As `choose`, and import what was chosen. Called once per worker, before the model is built."""
    impls = list(impls)
    chosen = choose(impls, request, choices, capabilities)
    targets = {(row.op, row.name): row.target for row in impls}
    functions = {op: resolve(targets[op, choice.name], f"{op}.{choice.name}") for op, choice in chosen.items()}
    for choice in chosen.values():
        logger.info("op %s: %s (%s)", choice.op, choice.name, choice.reason)
    return Ops(functions, chosen)


def _by_op(impls: Iterable[OpImpl]) -> dict[str, list[OpImpl]]:
    rows: dict[str, list[OpImpl]] = {name: [] for name in DECLARATIONS}
    for row in impls:
        if row.op not in rows:
            raise PluginError(
                f"{row.target} implements the op {row.op!r}, which is not declared. "
                f"Declared in loong_core.ops: {', '.join(DECLARATIONS)}."
            )
        rows[row.op].append(row)
    return rows


def _unknown(what: str, name: str, allowed: Iterable[str]) -> str:
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"ops: there is no {what} named {name!r}.{hint} Allowed: {', '.join(names) or 'none'}."


def _refusal(row: OpImpl, request: OpRequest, capabilities: frozenset[str] | None) -> str | None:
    """Why this implementation cannot serve the request; None where it can."""
    if row.backends is not None and request.backend not in row.backends:
        return f"it runs on backend {', '.join(sorted(row.backends))}, not on {request.backend}"
    if capabilities is not None and (missing := row.needs - capabilities):
        return f"backend {request.backend} lacks {', '.join(sorted(missing))} here"
    if row.supports is None:
        return None
    try:
        reason = resolve(row.supports, f"{row.op}.{row.name}")(request)
    except PluginError:
        raise
    except Exception as error:
        raise PluginError(f"{row.supports} ({row.op}.{row.name}) raised {type(error).__name__}: {error}") from error
    return None if reason is None else str(reason)


def _others(candidates: Sequence[OpImpl], refused: Mapping[str, str]) -> str:
    able = sorted(row.name for row in candidates if row.name not in refused)
    return f" Can run: {', '.join(able)}." if able else ""


def _best(op: str, able: Sequence[OpImpl], refused: Mapping[str, str]) -> OpChoice:
    rank = max(row.rank for row in able)
    best = [row for row in able if row.rank == rank]
    if len(best) > 1:
        rivals = " and ".join(f"{row.name} ({row.target})" for row in best)
        raise PluginError(
            f"op {op}: {rivals} have the same rank {rank}, so neither is the better one. "
            f"Choose in the recipe: `ops: {{{op}: {best[0].name}}}`."
        )
    passed_over = "; ".join(f"{name} passed over: {reason}" for name, reason in refused.items())
    reason = "the only one that runs here" if len(able) == 1 else f"highest rank ({rank}) of {len(able)} that run here"
    return OpChoice(op, best[0].name, f"{reason}; {passed_over}" if passed_over else reason)
