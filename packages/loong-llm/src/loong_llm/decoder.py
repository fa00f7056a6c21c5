"""Decoder-only models on megatron-core: all that is known of its model class, configuration and parameter names."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from loong_core.parallel.build import BuildContext
from loong_core.parallel.options import way
from loong_core.train.engine import Batch, LocalParameter
from loong_core.types import ModelShape
from loong_core.weights import padded_extent
from loong_llm import layers
from loong_llm.head import Head
from loong_llm.moe import Meeting, Mixture
from loong_llm.rope import RotaryAngles
from loong_llm.router import Balance, BalancedRouter
from loong_llm.shape import is_sparse
from loong_llm.sharded_experts import ShardedExperts

ROLES: dict[str, str] = {
    "embed": "embedding.word_embeddings.weight",
    "layers.*.attn.norm": "decoder.layers.*.input_layernorm.weight",
    "layers.*.attn.qkv": "decoder.layers.*.self_attention.linear_qkv.weight",
    "layers.*.attn.qkv_bias": "decoder.layers.*.self_attention.linear_qkv.bias",
    "layers.*.attn.q_norm": "decoder.layers.*.self_attention.q_layernorm.weight",
    "layers.*.attn.k_norm": "decoder.layers.*.self_attention.k_layernorm.weight",
    "layers.*.attn.out": "decoder.layers.*.self_attention.linear_proj.weight",
    "layers.*.attn.out_bias": "decoder.layers.*.self_attention.linear_proj.bias",
    "layers.*.mlp.norm": "decoder.layers.*.pre_mlp_layernorm.weight",
    "layers.*.mlp.up": "decoder.layers.*.mlp.linear_fc1.weight",
    "layers.*.mlp.up_bias": "decoder.layers.*.mlp.linear_fc1.bias",
    "layers.*.mlp.down": "decoder.layers.*.mlp.linear_fc2.weight",
    "layers.*.mlp.down_bias": "decoder.layers.*.mlp.linear_fc2.bias",
    "layers.*.moe.router": "decoder.layers.*.mlp.router.weight",
    "layers.*.moe.up.#": "decoder.layers.*.mlp.experts.up",
    "layers.*.moe.down.#": "decoder.layers.*.mlp.experts.down",
    "final_norm": "decoder.final_layernorm.weight",
    "head": "output_layer.weight",
}
"""Loong's role -> the parameter's name in the module (`*` local layer). A role with `#` is one expert of a stack."""

_NAMES = [(re.compile(re.escape(name).replace(r"\*", r"(\d+)")), role) for role, name in ROLES.items()]


def role_of(name: str, layers_here: tuple[int, ...]) -> str | None:
    """The role of the module's parameter `name` where `layers_here` are held; `#` stands for each expert of a stack."""
    for pattern, role in _NAMES:
        if match := pattern.fullmatch(name):
            return role.replace("*", str(layers_here[int(match[1])])) if match.groups() else role
    return None


class Decoder(GPTModel):
    """One pipeline chunk of a decoder-only model; satisfies `loong_core.parallel.build.Chunk`."""

    output_layer: Any

    def __init__(
        self, shape: ModelShape, context: BuildContext, config: TransformerConfig, index: int, meeting: Meeting
    ) -> None:
        fields = shape.fields
        self._index, self._sharded = index, meeting.sharded
        if meeting.sharded is not None:
            meeting.sharded.begin_chunk()
        balance = _balance(shape, context)
        router = None
        if fields["experts"]:
            settings: dict[str, Any] = {"ops": context.ops, "balance": balance, "normalise": fields["norm_top_k"]}
            router = partial(BalancedRouter, **settings)
        super().__init__(
            config=config,
            transformer_layer_spec=layers.block(
                context.layers, context.ops, fields, context.chunks[index], router, meeting
            ),
            vocab_size=padded_extent(shape.vocabulary, context.plan.tp),
            max_sequence_length=0,  # only learned positions would read it
            pre_process=context.first[index],
            post_process=context.last[index],
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="none",  # angles come from the batch, see `forward`
            pg_collection=context.groups,
            vp_stage=index if context.plan.vpp > 1 else None,
        )
        if meeting.sharded is not None:
            for layer in self.decoder.layers:
                if isinstance(layer.mlp, Mixture):
                    layer.register_forward_pre_hook(partial(_enter, meeting.sharded, layer.mlp.place))
        self.rotary_angles = RotaryAngles(fields)
        if self.post_process:
            self.output_layer = Head(self.output_layer, context.ops, shape.vocabulary, context.groups.tp)
        if self.pre_process:
            self.embedding.embedding_dropout.p = 0.0  # `model.dropout` covers attention and the residual branches only
        self.balance = balance
        self.layers_here = context.chunks[index]
        self._shape = shape
        self._first_expert = (
            context.groups.ep.rank() * (fields["experts"] // context.plan.ep) if fields["experts"] else 0
        )
        self._auxiliary: dict[str, Tensor] = {}

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states [sequence, batch, hidden]. On the last chunk the cross entropy of each target, [batch,
        sequence] in float32, or without `targets` in the batch logits [batch, sequence, local vocabulary]."""
        segments = batch.get("segments")
        if self.balance is not None:
            self.balance.start(None if segments is None else self._counted(segments))
        if self._sharded is not None:
            self._sharded.start(self._index)
        hidden = self._embedded(batch["tokens"], batch["positions"]) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=segments,  # what `loong_core.parallel.core_attention` expects in its place
            rotary_pos_emb=self.rotary_angles(batch["positions"]),
        )
        if not self.post_process:
            return hidden
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        output: Tensor = self.output_layer(hidden, batch.get("targets"), tied)
        self._auxiliary = {} if self.balance is None else {"aux_loss": self.balance.close(output)}
        return output

    def _embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embeddings [sequence, batch, hidden]. As in transformers, looking up config.json's `pad_token_id` trains
        nothing (torch's `padding_idx`), not even where data holds that token as content."""
        hidden = self.embedding(tokens, positions)
        if self.config.recompute_granularity == "full" and torch.is_grad_enabled() and not hidden.requires_grad:
            # Of frozen embeddings: a layer that is to be computed again has gradients only if its input has one.
            hidden = hidden.detach().requires_grad_()
        if (padding := self._shape.fields.get("pad_token")) is None:
            return hidden
        is_padding = self._local(tokens == padding % self._shape.vocabulary)
        return torch.where(is_padding[..., None], hidden.detach(), hidden)

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """`aux_loss`: the load-balancing loss of the last forward, where the model's config.json asks for one."""
        losses, self._auxiliary = self._auxiliary, {}
        return losses

    def local_parameters(self) -> Iterator[LocalParameter]:
        """Every parameter of this chunk; see `Chunk.local_parameters`."""
        specs = {spec.role: spec for spec in self._shape.parameters}
        for name, parameter in self.named_parameters():
            role = role_of(name, self.layers_here)
            if role == "head" and self._shape.tied_embeddings:
                continue
            assert role is not None, f"no role for {name}"
            if "#" not in role:
                yield LocalParameter(specs[role], parameter)
                continue
            for index, view in enumerate(parameter.detach().unbind(0)):
                spec = specs[role.replace("#", str(self._first_expert + index))]
                yield LocalParameter(spec, view, owner=parameter, offset=index * view.numel())

    def _counted(self, segments: Tensor) -> Tensor:
        """Which of the routers' tokens are no padding: segments [batch, sequence] -> [tokens on this rank]."""
        return self._local(segments >= 0).reshape(-1)

    def _local(self, values: Tensor) -> Tensor:
        """Values per token, [batch, sequence], cut as hidden states are: [sequence on this rank, batch]."""
        values = values.transpose(0, 1)
        if self.config.sequence_parallel:
            values = values.chunk(self.pg_collection.tp.size(), 0)[self.pg_collection.tp.rank()]
        return values


def _enter(sharded: ShardedExperts, place: int, *_: Any) -> None:
    """Before a layer is called."""
    sharded.enter(place)


def _balance(shape: ModelShape, context: BuildContext) -> Balance | None:
    fields, groups = shape.fields, context.groups
    if not (fields["experts"] and fields["aux_loss"] and any(is_sparse(fields, i) for i in range(shape.layers))):
        return None
    spread = [groups.cp, groups.tp if context.plan.sp else None]
    return Balance(fields["experts"], fields["aux_coefficient"], spread, groups.cp)


def build(shape: ModelShape, context: BuildContext) -> list[Decoder]:
    """This rank's pipeline chunks, in order. Parameters hold no meaningful values yet."""
    # megatron-core 0.19 warns of every model that its successor HybridModel is preferred: news for us, not for users.
    logging.getLogger(GPTModel.__module__).setLevel(logging.ERROR)
    config, meeting = configure(shape, context), _meeting(context)
    return [Decoder(shape, context, config, index, meeting).to(context.device) for index in range(len(context.chunks))]


def _meeting(context: BuildContext) -> Meeting:
    plan = context.plan
    found = way(context.dispatch, plan.ep, plan.etp)
    sharded = None
    if found == "weights":
        full = plan.recompute == "full"
        sharded = ShardedExperts(context.groups.ep, context.exchange, context.ops.sum_parts, recomputes=full)
    again = plan.recompute == "selective"
    return Meeting(way=found, by=context.exchange, pieces=context.exchange_pieces, again=again, sharded=sharded)


def configure(shape: ModelShape, context: BuildContext) -> TransformerConfig:
    """megatron-core's configuration of the model under the plan."""
    fields, plan, precision = shape.fields, context.plan, context.precision
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=fields["hidden"],
        ffn_hidden_size=fields["ffn"],
        num_attention_heads=fields["heads"],
        num_query_groups=fields["kv_heads"],
        kv_channels=fields["head_dim"],
        normalization="RMSNorm",
        layernorm_epsilon=fields["norm_epsilon"],
        qk_layernorm=fields["qk_norm"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=context.dropout,
        attention_dropout=context.dropout,
        perform_initialization=False,  # the engine initialises by role, the same for every layout
        calculate_per_token_loss=True,
        deterministic_mode=context.deterministic,
        params_dtype=getattr(torch, precision.parameters),
        bf16=precision.activations == "bfloat16",
        pipeline_dtype=getattr(torch, precision.activations),
        use_te_activation_func=True,  # megatron-core's name for an activation that the layer spec brings
        bias_activation_fusion=False,
        bias_dropout_fusion=False,  # without biases and dropout it is one addition, not worth compiling
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        **_parallelism(context),
        **_recomputation(plan.recompute),
        **(_expert_settings(shape, context) if fields["experts"] else {}),
    )


def _parallelism(context: BuildContext) -> dict[str, Any]:
    plan = context.plan
    settings: dict[str, Any] = {
        "tensor_model_parallel_size": plan.tp,
        "sequence_parallel": plan.sp,
        "context_parallel_size": plan.cp,
        "pipeline_model_parallel_size": plan.pp,
        "expert_model_parallel_size": plan.ep,
        "expert_tensor_parallel_size": plan.etp,
    }
    if plan.pp > 1:
        stages = [["decoder"] * len(stage) for stage in plan.stages]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        settings["pipeline_model_parallel_layout"] = stages
    if plan.vpp > 1:
        # Without these two, messages of two chunks between one pair of ranks cross; megatron-core 0.19 does not check.
        settings.update(virtual_pipeline_model_parallel_size=plan.vpp, overlap_p2p_comm=True, batch_p2p_comm=False)
    return settings


def _recomputation(kind: str) -> dict[str, Any]:
    if kind == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    # What megatron-core would compute again, core attention, keeps no scores here, and its output is kept by what
    # follows: that would spare nothing. `selective` is the exchange's.
    return {}


def _expert_settings(shape: ModelShape, context: BuildContext) -> dict[str, Any]:
    fields = shape.fields
    return {
        "num_moe_experts": fields["experts"],
        "moe_ffn_hidden_size": fields["expert_ffn"],
        "moe_router_topk": fields["top_k"],
        "moe_router_pre_softmax": True,  # of no effect on our router; megatron-core refuses one expert a token without
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # the families' own loss is `loong_llm.router`
        "moe_aux_loss_coeff": 0.0,
        "moe_layer_freq": [int(is_sparse(fields, layer)) for layer in range(shape.layers)],
        "moe_token_dispatcher_type": "alltoall",
    }
