"""The peer's model: megatron-core's GPTModel as NVIDIA's recipe configures it, with the weights loong draws.

Settings are those published for Qwen3-30B-A3B in bf16 on H100 (Megatron-Bridge 0.6): Transformer Engine's layers,
grouped GEMM, fused permutation, router, rope, SwiGLU and cross entropy, gradient accumulation in the GEMMs, distributed
optimizer with overlap, gradients reduced in bf16. Not used: DeepEP and HybridEP (all-to-all instead), which need more
than one NVLink host to matter, and Apex, whose one kernel that is missed is a GEMM here (`stand_in_for_apex`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loong_core.types import ModelShape

_LAYER = r"decoder\.layers\.(?P<layer>\d+)\."
_EXPERTS = _LAYER + r"mlp\.experts\."
NAMES: dict[str, str] = {
    r"embedding\.word_embeddings\.weight": "embed",
    _LAYER + r"(?:input_layernorm\.|self_attention\.linear_qkv\.layer_norm_)weight": "layers.*.attn.norm",
    _LAYER + r"self_attention\.linear_qkv\.weight": "layers.*.attn.qkv",
    _LAYER + r"self_attention\.(?P<part>[qk])_layernorm\.weight": "layers.*.attn.@_norm",
    _LAYER + r"self_attention\.linear_proj\.weight": "layers.*.attn.out",
    _LAYER + r"(?:pre_mlp_layernorm\.|mlp\.linear_fc1\.layer_norm_)weight": "layers.*.mlp.norm",
    _LAYER + r"mlp\.linear_fc1\.weight": "layers.*.mlp.up",
    _LAYER + r"mlp\.linear_fc2\.weight": "layers.*.mlp.down",
    _LAYER + r"mlp\.router\.weight": "layers.*.moe.router",
    _EXPERTS + r"linear_fc1\.weight(?P<expert>\d+)": "layers.*.moe.up.#",
    _EXPERTS + r"linear_fc2\.weight(?P<expert>\d+)": "layers.*.moe.down.#",
    _EXPERTS + r"local_experts\.(?P<expert>\d+)\.linear_fc1\.weight": "layers.*.moe.up.#",
    _EXPERTS + r"local_experts\.(?P<expert>\d+)\.linear_fc2\.weight": "layers.*.moe.down.#",
    r"decoder\.final_layernorm\.weight": "final_norm",
    r"output_layer\.weight": "head",
}
"""megatron-core's parameter names, with Transformer Engine's layers or its own, and the role of each in loong."""


def stand_in_for_apex() -> bool:
    """Give megatron-core the accumulating weight gradient of its output layer, if Apex is not installed."""
    name = "fused_weight_gradient_mlp_cuda"
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return False

    def accumulate(inputs: Tensor, gradient: Tensor, total: Tensor) -> None:
        if total.dtype == inputs.dtype:
            total.addmm_(gradient.t(), inputs)
        else:
            total.add_((gradient.t() @ inputs).to(total.dtype))

    module = ModuleType(name)
    vars(module).update(wgrad_gemm_accum_fp32=accumulate, wgrad_gemm_accum_fp16=accumulate)
    sys.modules[name] = module
    return True


def settings(fields: Mapping[str, Any], layers: int, job: Mapping[str, Any], ep: int, half: bool) -> dict[str, Any]:
    """Keyword arguments of TransformerConfig. `job` is that of `megatron_peer`; `half`: bfloat16."""
    import torch

    fused = job["backend"] != "cpu"
    dtype = torch.bfloat16 if half else torch.float32
    result: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": fields["hidden"],
        "ffn_hidden_size": fields["ffn"],
        "num_attention_heads": fields["heads"],
        "num_query_groups": fields["kv_heads"],
        "kv_channels": fields["head_dim"],
        "qk_layernorm": fields["qk_norm"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": fields["norm_epsilon"],
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "perform_initialization": False,
        "bf16": half,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1,
        "bias_activation_fusion": fused,
        "bias_dropout_fusion": fused,
        "masked_softmax_fusion": False,
        "cross_entropy_loss_fusion": fused,
        "cross_entropy_fusion_impl": "te" if fused else "native",
        "gradient_accumulation_fusion": fused,
        "apply_rope_fusion": fused,
    }
    if fields["experts"]:
        result |= {
            "num_moe_experts": fields["experts"],
            "moe_ffn_hidden_size": fields["expert_ffn"],
            "moe_router_topk": fields["top_k"],
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": not fields["norm_top_k"],
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "aux_loss" if fields["aux_loss"] else "none",
            "moe_aux_loss_coeff": fields["aux_coefficient"] if fields["aux_loss"] else 0.0,
            "moe_router_force_load_balancing": job["force_balance"],
            "moe_token_dispatcher_type": "alltoall",
            "moe_grouped_gemm": fused,
            "moe_permute_fusion": fused,
            "moe_router_fusion": fused,
            "overlap_moe_expert_parallel_comm": job["ep_overlap"],
        }
    if job["recompute"]:
        result |= {"recompute_granularity": "selective", "recompute_modules": job["recompute"].split(",")}
    return result


def build(config: Any, fields: Mapping[str, Any], vocabulary: int, seq_len: int, fused: bool) -> nn.Module:
    """GPTModel with Transformer Engine's layers, or, where there is no GPU, with megatron-core's own."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    # Its own layers take the norm's kind from this argument, Transformer Engine's from the config.
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=fused, normalization="RMSNorm")
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocabulary,
        max_sequence_length=seq_len,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=int(fields["rope_base"]),
    )


def role_of(name: str, first_expert: int) -> str:
    """The role of the parameter `name`, on a rank that holds experts from `first_expert` on."""
    bare = name[name.find(next(part for part in ("embedding.", "decoder.", "output_layer.") if part in name)) :]
    for pattern, role in NAMES.items():
        if found := re.fullmatch(pattern, bare):
            parts = found.groupdict()
            if parts.get("expert") is not None:
                role = role.replace("#", str(first_expert + int(parts["expert"])))
            return role.replace("*", parts.get("layer") or "").replace("@", parts.get("part") or "")
    raise KeyError(f"the benchmark knows no role for megatron-core's parameter {name}")


def assign(model: nn.Module, optimizer: Any, shape: ModelShape, seed: int, std: float, ep_rank: int, ep: int) -> int:
    """Fill parameters and master weights with what loong starts from; returns the number of elements held here.

    Masters are given the exact values: made from bfloat16 they would lie on its grid, and small updates would wait.
    A precision-aware optimizer makes its masters itself, from the rounded values.
    """
    import torch
    import torch.distributed as dist

    from loong_core.train.init import draw

    experts = int(shape.fields["experts"] or 0)
    first = ep_rank * (experts // ep)
    specs = {spec.role: spec for spec in shape.parameters}
    named = [(role_of(name, first), parameter) for name, parameter in model.named_parameters()]
    here = {role for role, spec in specs.items() if spec.expert is None or first <= spec.expert < first + experts // ep}
    assert sorted(role for role, _ in named) == sorted(here), "the two models do not have the same parameters"
    members = list(getattr(optimizer, "chained_optimizers", [optimizer]))

    def fill(item: tuple[str, nn.Parameter]) -> int:
        role, parameter = item
        exact = draw(specs[role], seed, std)
        with torch.no_grad():
            parameter.copy_(exact)
            for master, part in _masters(parameter, members):
                master.copy_(exact.flatten()[part])
        return parameter.numel()

    # On a CPU `torch.cuda` stands for it by a mode of this thread alone.
    if next(model.parameters()).device.type == "cpu":
        return sum(map(fill, named))
    device, threads = torch.cuda.current_device(), max(1, (os.cpu_count() or 1) // dist.get_world_size())
    with ThreadPoolExecutor(threads, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        return sum(pool.map(fill, named))


def _masters(parameter: nn.Parameter, optimizers: list[Any]) -> Iterator[tuple[Tensor, slice]]:
    """The float32 shard of a parameter on this rank, if it is a copy, and which part of the parameter it holds."""
    master = getattr(parameter, "main_param", None)
    if master is None or master is parameter:
        return
    for optimizer in optimizers:
        if parameter in optimizer.model_param_gbuf_map:
            held = optimizer._get_model_param_range_map(parameter)["param"]
            yield master, slice(held.start, held.end)
