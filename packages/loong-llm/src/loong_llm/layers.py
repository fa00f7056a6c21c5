"""Layer specs: which module of the backend's layer provider stands in which place of a transformer layer.

Norms and linears stay separate modules with every provider, so that parameter names do not depend on the hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from loong_llm.attention import HeadNorm, rotary_attention
from loong_llm.moe import Experts, HeldExperts, Meeting, Mixture
from loong_llm.shape import is_sparse

if TYPE_CHECKING:
    from loong_core.ops import Ops


def has_bias(linear: Callable[..., Any], bias: bool) -> Callable[..., Any]:
    """`linear` with its bias decided here: megatron-core's one switch for all places cannot tell them apart."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return linear(*args, **{**kwargs, "bias": bias})

    return build


def block(
    provider: Any,
    ops: Ops,
    fields: Mapping[str, Any],
    layers: Sequence[int],
    router: Callable[..., Any] | None,
    meeting: Meeting,
) -> TransformerBlockSubmodules:
    """The layers `layers` (global indices) of a model with settings `fields`.

    `router` builds the router of layers with experts; `meeting` is how their tokens meet experts of other ranks.
    """
    norm = provider.layer_norm(rms_norm=True, has_residual=True)
    attention = _attention(provider, ops, fields)
    dense = _mlp(provider, ops, fields)
    sparse = _experts(ops, router, meeting) if router is not None else None
    specs = [
        ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=attention,
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=norm,
                mlp=sparse if is_sparse(fields, layer) else dense,
                mlp_bda=get_bias_dropout_add,
            ),
        )
        for layer in layers
    ]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=provider.layer_norm(rms_norm=True))


def _attention(provider: Any, ops: Ops, fields: Mapping[str, Any]) -> ModuleSpec:
    head_norm = HeadNorm if fields["qk_norm"] else IdentityOp
    return ModuleSpec(
        module=rotary_attention(ops),
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=has_bias(provider.column_parallel_linear(), fields["qkv_bias"]),
            core_attention=provider.core_attention(),
            linear_proj=has_bias(provider.row_parallel_linear(), fields["out_bias"]),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


class Activation(nn.Module):
    """The op `swiglu` where megatron-core wants a module: [..., 2f] -> [..., f]."""

    def __init__(self, ops: Ops, **_: Any) -> None:
        super().__init__()
        self._ops = ops

    def forward(self, x: Tensor) -> Tensor:
        """Gate and value, side by side, to their product."""
        return self._ops.swiglu(x)


class GatedMLP(MLP):
    """megatron-core's MLP, without biases on one rank, in the op `gated_mlp`. Made by `_mlp`."""

    ops: ClassVar[Ops]

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """hidden_states [s,b,n] -> ([s,b,n], no bias)."""
        return type(self).ops.gated_mlp(hidden_states, self.linear_fc1(), self.linear_fc2()), None


def _mlp(provider: Any, ops: Ops, fields: Mapping[str, Any]) -> Callable[..., Any]:
    linears = [provider.column_parallel_linear(), provider.row_parallel_linear()]

    def builder(kind: type[MLP], column: type, row: type) -> Callable[..., Any]:
        submodules = MLPSubmodules(
            activation_func=partial(Activation, ops),
            linear_fc1=has_bias(column, fields["mlp_bias"]),
            linear_fc2=has_bias(row, fields["mlp_bias"]),
        )
        return partial(kind.as_mlp_submodule, submodules=submodules)

    plain = builder(MLP, *linears)
    # The reference would be the same three ops, without what a provider's layers do for their gradients.
    if fields["mlp_bias"] or ops.choices["gated_mlp"].name == "torch":
        return plain
    fused = builder(type("GatedMLP", (GatedMLP,), {"ops": ops}), *map(_holding, linears))

    def build(*args: Any, pg_collection: Any, **kwargs: Any) -> MLP:
        chosen = fused if pg_collection.tp.size() == 1 else plain
        return chosen(*args, pg_collection=pg_collection, **kwargs)

    return build


def _holding(linear: type) -> type:
    """`linear` as the holder of its weight for an op that reads it. Calling it returns the weight: the hooks by which
    megatron-core finishes a parameter's gathering run on calls."""

    def forward(self: Any) -> Tensor:
        weight: Tensor = self.weight
        return weight

    return type(linear.__name__, (linear,), {"forward": forward})


def _experts(ops: Ops, router: Callable[..., Any], meeting: Meeting) -> Callable[..., Any]:
    experts = type("Experts", (HeldExperts if meeting.way == "weights" else Experts,), {"ops": ops})
    return partial(Mixture, submodules=MoESubmodules(experts=experts, router=router), meeting=meeting)
