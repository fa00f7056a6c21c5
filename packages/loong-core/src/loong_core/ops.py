"""Ops: what may be replaced by a faster implementation, and how one is chosen. Importing this loads no tensor library.

An op is declared once, with its signature, its plain-torch reference and its tolerances. Implementations are `OpImpl`
rows that plugins provide. `choose` decides by name or by rank, in the parent process as well as in workers; `bind`
resolves the choices once per worker to plain functions, so that nothing is dispatched per call.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from loong_core.errors import NotFound, PluginError, Unsupported
from loong_core.registry import resolve
from loong_core.types import OpImpl, OpRequest, Ref

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OpDeclaration:
    """One op: its signature with shapes, its reference, and how far an implementation may be from it.

    `tolerances` maps a torch dtype name to the largest allowed |difference| / max|reference|, for the result and for
    every gradient, where the reference computes in float64 on the same (rounded) inputs. `base` is the op whose result
    this one gives, its first argument beside it.
    """

    name: str
    signature: str
    reference: Ref
    tolerances: Mapping[str, float]
    summary: str
    base: str | None = None


DECLARATIONS: Mapping[str, OpDeclaration] = {
    declaration.name: declaration
    for declaration in (
        OpDeclaration(
            name="rms_norm",
            signature="rms_norm(x[..., n], weight[n], epsilon) -> [..., n] in x's dtype",
            reference="loong_core.references.norm:rms_norm",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="Root-mean-square norm over the last dim: computed in float32, rounded, then scaled by weight.",
        ),
        OpDeclaration(
            name="layer_norm",
            signature="layer_norm(x[..., n], weight[n] or None, bias[n] or None, epsilon) -> [..., n] in x's dtype",
            reference="loong_core.references.norm:layer_norm",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="Layer norm over the last dim: computed in float32, rounded once.",
        ),
        *(
            OpDeclaration(
                name=f"residual_{name}",
                signature=f"residual_{name}(as {name}) -> (its result, x)",
                reference=f"loong_core.references.{module}:residual_{name}",
                tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3},
                summary=f"As {name}, x handed through beside it: one backward adds the gradients of both.",
                base=name,
            )
            for name, module in (("rms_norm", "norm"), ("layer_norm", "norm"), ("ada_rms_norm", "modulation"))
        ),
        OpDeclaration(
            name="attention",
            signature=(
                "attention(query[s,b,h,d], key[t,b,g,d], value[t,b,g,e], *, scale, dropout=0.0, rows=None, "
                "segments=None) -> [s,b,h*e]"
            ),
            reference="loong_core.references.attention:attention",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="Causal attention with grouped key-value heads, packed samples and context-parallel rows.",
        ),
        OpDeclaration(
            name="ragged_attention",
            signature=(
                "ragged_attention(query[q,h,d], key[k,g,d], value[k,g,d], query_offsets[s+1], key_offsets[s+1], "
                "longest) -> [q,h*d]"
            ),
            reference="loong_core.references.ragged_attention:ragged_attention",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="Attention without a mask over sequences of different lengths, one after the other in a tensor.",
        ),
        OpDeclaration(
            name="cross_entropy",
            signature="cross_entropy(logits[..., v/n], targets[...], *, vocabulary, group) -> loss[...] in float32",
            reference="loong_core.references.cross_entropy:cross_entropy",
            tolerances={"float64": 1e-6, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="Cross entropy of logits whose vocabulary is cut over the n ranks of a group.",
        ),
        OpDeclaration(
            name="linear_cross_entropy",
            signature=(
                "linear_cross_entropy(hidden[t,h], weight[v/n,h], targets[t], *, vocabulary, group=None) -> loss[t] "
                "in float32"
            ),
            reference="loong_core.references.linear_cross_entropy:linear_cross_entropy",
            tolerances={"float64": 1e-6, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="The head's matrix product and its cross entropy in one, so that no logits need to be kept.",
        ),
        OpDeclaration(
            name="rotary_qkv",
            signature=(
                "rotary_qkv(mixed[s,b,g,h/g+2,d], angles[s,b,1,r], query_norm[d], key_norm[d], epsilon) -> "
                "(query[s,b,h,d], key[s,b,g,d], value[s,b,g,d])"
            ),
            reference="loong_core.references.rotary:rotary_qkv",
            tolerances={"float64": 1e-6, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="Queries, keys and values of one projection, their heads normed (where asked for) and rotated.",
        ),
        OpDeclaration(
            name="swiglu",
            signature="swiglu(x[..., 2f]) -> [..., f] in x's dtype",
            reference="loong_core.references.activation:swiglu",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="SiLU of the first half of the last dim times the second half.",
        ),
        OpDeclaration(
            name="route",
            signature="route(logits[t,e], top_k, *, normalise, valid=None) -> Routing(weights, experts, counts, sums)",
            reference="loong_core.references.routing:route",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="The top-k softmax router of a mixture of experts, with the statistics of its balance.",
        ),
        OpDeclaration(
            name="experts",
            signature=(
                "experts(hidden[t,n], up[e,2f,n], down[e,n,f], weights[t,k], chosen[t,k], *, first=0, pairs=None) -> "
                "[t,n]"
            ),
            reference="loong_core.references.experts:experts",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="Every token through the SwiGLU experts chosen for it, summed with their weights.",
        ),
        OpDeclaration(
            name="linear",
            signature="linear(x[..., n], weight[m,n], bias[m]=None) -> [..., m] in x's dtype",
            reference="loong_core.references.linear:linear",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="A matrix product with a weight, and biases where there are any.",
        ),
        OpDeclaration(
            name="linear_gelu",
            signature="linear_gelu(x[..., n], weight[m,n], bias[m], *, dropout=0.0) -> [..., m] in x's dtype",
            reference="loong_core.references.linear:linear_gelu",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="A matrix product with biases, and GELU (tanh form) of it, dropped where there is a rate.",
        ),
        OpDeclaration(
            name="gated_mlp",
            signature="gated_mlp(x[..., n], up[2f,n], down[m,f], *, activation='silu') -> [..., m] in x's dtype",
            reference="loong_core.references.mlp:gated_mlp",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="A dense SwiGLU or GeGLU layer without biases: two products with the activation between them.",
        ),
        OpDeclaration(
            name="geglu",
            signature="geglu(x[..., 2f]) -> [..., f] in x's dtype",
            reference="loong_core.references.activation:geglu",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="GELU (tanh form) of the first half of the last dim times the second half.",
        ),
        OpDeclaration(
            name="ada_rms_norm",
            signature="ada_rms_norm(x[b,s,n], scale[b,n], shift[b,n] or None, epsilon) -> [b,s,n] in x's dtype",
            reference="loong_core.references.modulation:ada_rms_norm",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3},
            summary="Root-mean-square norm, scaled by 1 + scale and shifted by what belongs to the sample.",
        ),
        OpDeclaration(
            name="layer_norm_modulate",
            signature="layer_norm_modulate(x[b,s,n], scale[b,n], shift[b,n] or None, epsilon) -> [b,s,n] in x's dtype",
            reference="loong_core.references.modulation:layer_norm_modulate",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3},
            summary="Layer norm without weights, scaled by 1 + scale and shifted by what belongs to the sample.",
        ),
        OpDeclaration(
            name="gated_residual",
            signature="gated_residual(residual[b,s,n], x[b,s,n], gate[b,n]) -> [b,s,n] in residual's dtype",
            reference="loong_core.references.modulation:gated_residual",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="A branch times the gate of its sample, added to the residual.",
        ),
        OpDeclaration(
            name="dropout_add",
            signature="dropout_add(x[...], residual[...], rate) -> [...] in residual's dtype",
            reference="loong_core.references.dropout:dropout_add",
            tolerances={"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
            summary="A branch's dropout, added to the residual.",
        ),
        OpDeclaration(
            name="sum_of_squares",
            signature="sum_of_squares(tensors, device) -> [] in float32, without gradients",
            reference="loong_core.references.sum_of_squares:sum_of_squares",
            tolerances={"float32": 1e-5, "bfloat16": 1e-5, "float16": 1e-5},
            summary="Of all elements of tensors on a device, as a norm of gradients needs it.",
        ),
        OpDeclaration(
            name="sum_parts",
            signature="sum_parts(parts[r,...], out[...]) -> None, into `out` and without gradients",
            reference="loong_core.references.sum_parts:sum_parts",
            tolerances={"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3},
            summary="Over what ranks have sent, rounded once.",
        ),
        OpDeclaration(
            name="adamw",
            signature=(
                "adamw(parameter[n], gradient[n], exp_avg[n], exp_avg_sq[n], remainder[n] or None, *, lr, betas, eps, "
                "decay, step, scale[]) -> None, in place and without gradients"
            ),
            reference="loong_core.references.adamw:adamw",
            tolerances={"float64": 1e-12, "float32": 1e-6, "bfloat16": 1e-6},
            summary="One AdamW update; bfloat16 parameters with their master weights, as 16-bit remainders.",
        ),
    )
}
"""Shape legend: s query rows, t key rows, b batch, h query heads, g key-value heads, d, e head sizes, v vocabulary."""

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
    sum_parts: Callable[[Tensor, Tensor], None]
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
