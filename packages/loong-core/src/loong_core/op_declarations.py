"""The ops that loong declares: what may be replaced by a faster implementation. Importing this loads no tensor library.

An op is declared once, with its signature, its plain-torch reference and its tolerances; `loong_core.ops` has what
implements it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loong_core.types import Ref


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
            signature="sum_parts(parts[r,...], out[...], own[...] or None) -> None, into `out` and without gradients",
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
