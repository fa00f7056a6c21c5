"""What a decoder-only model consists of, worked out from its `config.json` in plain Python: plans need no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loong_core.types import Divisor, ModelFamily, ModelShape, ParameterSpec
from loong_llm.hf_config import kind_problems, read, refusals, refuse, rope_problems

DEFAULTS: dict[str, Any] = {
    "rope_base": 10000.0,
    "rope_type": "default",
    "norm_epsilon": 1e-6,
    "init_std": 0.02,
    "tied_embeddings": False,
    "qk_norm": False,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "experts": 0,
    "aux_loss": False,
}
"""Fields a family may leave out. Same defaults as the public implementations."""


_WHOLE = (
    "model whose load-balancing loss spans all layers (config.json: output_router_logits is true; set it to false in "
    "model.config to train in pipeline stages without that loss)"
)
"""Why a model is one pipeline stage; see `loong_llm.router`."""


def describe(family: ModelFamily, config: Mapping[str, Any]) -> ModelShape:
    """The full (unsharded) model that `config` describes.

    Activation elements per token and layer are those that backward needs with fused ops, after Korthikanti et al. 2022
    (arXiv 2205.05198, section 4.1), redone for grouped queries and SwiGLU: not cut by tensor parallelism alone are the
    inputs of both norms and of the two column-parallel linears (4 hidden) and the router's logits and probabilities;
    cut by it are queries, keys and values (and the projection they come from, where heads are normed), the attention
    output, and of the MLP gate, up and their product (3 ffn). Every chosen expert keeps gate and up (2 ffn) and nothing
    that is permuted. References in plain torch keep more. Measured: 8 layers of Qwen3-30B-A3B on 32,768 tokens need
    103.0 GiB on an H200, estimated are 103.1.

    Raises:
        RecipeError: a key of the config.json is missing.
        Unsupported: the config.json asks for something that loong would not compute.
    """
    fields = resolve(family, config)
    kinds = [is_sparse(fields, layer) for layer in range(fields["layers"])]
    sharded, replicated = _activation_elements(fields, sum(kinds) / len(kinds))
    return ModelShape(
        family=family.name,
        fields=fields,
        layers=fields["layers"],
        hidden=fields["hidden"],
        parameters=tuple(_parameters(fields, kinds)),
        divisors=_divisors(fields, kinds),
        vocabulary=fields["vocabulary"],
        tied_embeddings=fields["tied_embeddings"],
        active_parameters=_active_parameters(fields, kinds),
        attention_width=fields["layers"] * fields["heads"] * fields["head_dim"],
        activation_sharded=sharded,
        activation_replicated=replicated,
        experts_per_token=fields["top_k"] if any(kinds) else 0,
    )


def resolve(family: ModelFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """The family's fields of `config`, checked, with derived ones filled in (see `describe` for what is raised)."""
    fields = read(config, family.from_hf, {**DEFAULTS, **family.arch})
    if fields.get("kv_heads") is None:
        fields["kv_heads"] = fields["heads"]
    refuse([*refusals(config), *kind_problems(fields, family.from_hf), *rope_problems(fields)])
    if fields.get("head_dim") is None:
        fields["head_dim"] = fields["hidden"] // fields["heads"]
        refuse(_indivisible_heads(fields))
    refuse(_relations(fields))
    return fields


def _indivisible_heads(fields: Mapping[str, Any]) -> list[str]:
    if fields["hidden"] % fields["heads"] == 0:
        return []
    return [
        f"config.json: hidden_size {fields['hidden']} is not a multiple of num_attention_heads {fields['heads']}, "
        "and there is no head_dim."
    ]


def _relations(fields: Mapping[str, Any]) -> list[str]:
    """Problems between sizes that are fine one by one."""
    problems = []
    if fields["heads"] % fields["kv_heads"]:
        problems.append(
            f"config.json: num_key_value_heads {fields['kv_heads']} does not divide "
            f"num_attention_heads {fields['heads']}."
        )
    if fields["head_dim"] % 2:
        problems.append(f"config.json: head_dim {fields['head_dim']} is odd; rotary embeddings need pairs.")
    if fields["experts"] and fields["top_k"] > fields["experts"]:
        problems.append(f"config.json: num_experts_per_tok {fields['top_k']} exceeds num_experts {fields['experts']}.")
    return problems


def is_sparse(fields: Mapping[str, Any], layer: int) -> bool:
    """Whether layer `layer` (from 0) has experts."""
    if not fields["experts"] or layer in (fields.get("dense_layers") or ()):
        return False
    return (layer + 1) % fields["sparse_step"] == 0


def _parameters(fields: Mapping[str, Any], kinds: list[bool]) -> Iterator[ParameterSpec]:
    vocabulary, hidden = fields["vocabulary"], fields["hidden"]
    yield ParameterSpec(role="embed", shape=(vocabulary, hidden), axis=0, place="first", padded=True)
    for layer, sparse in enumerate(kinds):
        yield from _attention(fields, layer)
        yield from _experts(fields, layer) if sparse else _mlp(fields, layer)
    yield ParameterSpec(role="final_norm", shape=(hidden,), place="last", init="ones")
    if not fields["tied_embeddings"]:
        yield ParameterSpec(role="head", shape=(vocabulary, hidden), axis=0, place="last", padded=True)


def _attention(fields: Mapping[str, Any], layer: int) -> Iterator[ParameterSpec]:
    prefix, hidden, width = f"layers.{layer}.attn", fields["hidden"], fields["head_dim"]
    queries, rows = fields["heads"] * width, (fields["heads"] + 2 * fields["kv_heads"]) * width
    yield ParameterSpec(role=f"{prefix}.norm", shape=(hidden,), layer=layer, init="ones")
    yield ParameterSpec(role=f"{prefix}.qkv", shape=(rows, hidden), axis=0, layer=layer)
    if fields["qkv_bias"]:
        yield ParameterSpec(role=f"{prefix}.qkv_bias", shape=(rows,), axis=0, layer=layer, init="zeros")
    if fields["qk_norm"]:
        yield ParameterSpec(role=f"{prefix}.q_norm", shape=(width,), layer=layer, init="ones")
        yield ParameterSpec(role=f"{prefix}.k_norm", shape=(width,), layer=layer, init="ones")
    yield ParameterSpec(role=f"{prefix}.out", shape=(hidden, queries), axis=1, layer=layer)
    if fields["out_bias"]:
        yield ParameterSpec(role=f"{prefix}.out_bias", shape=(hidden,), layer=layer, init="zeros")


def _mlp(fields: Mapping[str, Any], layer: int) -> Iterator[ParameterSpec]:
    prefix, hidden, ffn = f"layers.{layer}.mlp", fields["hidden"], fields["ffn"]
    yield ParameterSpec(role=f"{prefix}.norm", shape=(hidden,), layer=layer, init="ones")
    yield ParameterSpec(role=f"{prefix}.up", shape=(2 * ffn, hidden), axis=0, blocks=2, layer=layer)
    yield ParameterSpec(role=f"{prefix}.down", shape=(hidden, ffn), axis=1, layer=layer)
    if fields["mlp_bias"]:
        yield ParameterSpec(role=f"{prefix}.up_bias", shape=(2 * ffn,), axis=0, blocks=2, layer=layer, init="zeros")
        yield ParameterSpec(role=f"{prefix}.down_bias", shape=(hidden,), layer=layer, init="zeros")


def _experts(fields: Mapping[str, Any], layer: int) -> Iterator[ParameterSpec]:
    hidden, ffn, prefix = fields["hidden"], fields["expert_ffn"], f"layers.{layer}"
    up, down = (2 * ffn, hidden), (hidden, ffn)
    yield ParameterSpec(role=f"{prefix}.mlp.norm", shape=(hidden,), layer=layer, init="ones")
    yield ParameterSpec(role=f"{prefix}.moe.router", shape=(fields["experts"], hidden), layer=layer)
    for expert in range(fields["experts"]):
        yield ParameterSpec(role=f"{prefix}.moe.up.{expert}", shape=up, axis=0, blocks=2, layer=layer, expert=expert)
        yield ParameterSpec(role=f"{prefix}.moe.down.{expert}", shape=down, axis=1, layer=layer, expert=expert)


def _divisors(fields: Mapping[str, Any], kinds: list[bool]) -> tuple[Divisor, ...]:
    rows = [
        Divisor("tp", fields["heads"], "attention heads"),
        Divisor("tp", fields["kv_heads"], "key-value heads"),
    ]
    if not all(kinds):
        rows.append(Divisor("tp", fields["ffn"], "rows of the MLP"))
    if any(kinds):
        rows.append(Divisor("ep", fields["experts"], "experts"))
        rows.append(Divisor("etp", fields["expert_ffn"], "rows of an expert"))
        if fields["aux_loss"]:
            rows.append(Divisor("pp", 1, _WHOLE))
    return tuple(rows)


def _active_parameters(fields: Mapping[str, Any], kinds: list[bool]) -> int:
    hidden, width, sparse = fields["hidden"], fields["head_dim"], sum(kinds)
    attention = hidden * width * (2 * fields["heads"] + 2 * fields["kv_heads"])
    active = len(kinds) * attention + (len(kinds) - sparse) * 3 * hidden * fields["ffn"]
    if sparse:
        active += sparse * hidden * (fields["experts"] + 3 * fields["top_k"] * fields["expert_ffn"])
    return active + hidden * fields["vocabulary"]


def _activation_elements(fields: Mapping[str, Any], sparse_share: float) -> tuple[float, float]:
    """(cut by tensor parallelism, cut only with sequence parallelism); formula in `describe`."""
    hidden, width = fields["hidden"], fields["head_dim"]
    queries, keys = fields["heads"] * width, fields["kv_heads"] * width
    attention = 2 * queries + 2 * keys + (queries + 2 * keys if fields["qk_norm"] else 0)
    dense = 3 * fields["ffn"]
    sparse = fields["top_k"] * 2 * fields["expert_ffn"] if sparse_share else 0
    router = 2 * fields["experts"] if sparse_share else 0
    return attention + (1 - sparse_share) * dense + sparse_share * sparse, 4 * hidden + sparse_share * router
