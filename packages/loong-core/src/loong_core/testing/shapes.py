"""Model shapes without a model: what planners see of a decoder, dense or with experts, in any size; torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from loong_core.types import Divisor, ModelShape, ParameterSpec


def decoder_shape(
    *,
    layers: int = 4,
    hidden: int = 48,
    heads: int = 6,
    kv_heads: int = 2,
    ffn: int = 96,
    vocabulary: int = 131,
    experts: int = 0,
    top_k: int = 2,
    dense_layers: int = 0,
    tied: bool = False,
) -> ModelShape:
    """A decoder with grouped attention and gated MLPs. `experts` > 0 puts that many MLPs of the width `ffn` into every
    layer after the first `dense_layers`."""
    width = hidden // heads
    query, key = heads * width, kv_heads * width
    sparse = [bool(experts) and layer >= dense_layers for layer in range(layers)]
    attention = hidden * (2 * query + 2 * key)
    mlps = [(top_k if is_sparse else 1) * 3 * hidden * ffn for is_sparse in sparse]
    divisors = [Divisor("tp", heads, "attention heads"), Divisor("tp", kv_heads, "key-value heads")]
    if not all(sparse):
        divisors.append(Divisor("tp", ffn, "rows of the MLP"))
    if experts:
        divisors += [Divisor("ep", experts, "experts"), Divisor("etp", ffn, "rows of an expert")]
    return ModelShape(
        family="synthetic",
        fields={"hidden": hidden, "heads": heads, "kv_heads": kv_heads, "experts": experts},
        layers=layers,
        hidden=hidden,
        parameters=tuple(_parameters(sparse, hidden, query, key, ffn, vocabulary, experts, tied)),
        divisors=tuple(divisors),
        vocabulary=vocabulary,
        tied_embeddings=tied,
        active_parameters=layers * attention + sum(mlps) + hidden * vocabulary,
        attention_width=layers * query,
        activation_sharded=2.0 * (query + key) + 4.0 * ffn * (top_k if experts else 1),
        activation_replicated=4.0 * hidden,
    )


def _parameters(
    sparse: list[bool], hidden: int, query: int, key: int, ffn: int, vocabulary: int, experts: int, tied: bool
) -> Iterator[ParameterSpec]:
    yield ParameterSpec(role="embed", shape=(vocabulary, hidden), axis=0, place="first", padded=True)
    for layer, is_sparse in enumerate(sparse):
        start = f"layers.{layer}"
        yield ParameterSpec(role=f"{start}.attn.norm", shape=(hidden,), layer=layer, init="ones")
        yield ParameterSpec(role=f"{start}.attn.qkv", shape=(query + 2 * key, hidden), axis=0, layer=layer)
        yield ParameterSpec(role=f"{start}.attn.out", shape=(hidden, query), axis=1, layer=layer)
        yield ParameterSpec(role=f"{start}.mlp.norm", shape=(hidden,), layer=layer, init="ones")
        if not is_sparse:
            yield ParameterSpec(role=f"{start}.mlp.up", shape=(2 * ffn, hidden), axis=0, blocks=2, layer=layer)
            yield ParameterSpec(role=f"{start}.mlp.down", shape=(hidden, ffn), axis=1, layer=layer)
            continue
        yield ParameterSpec(role=f"{start}.moe.router", shape=(experts, hidden), layer=layer)
        for expert in range(experts):
            up, down = f"{start}.moe.up.{expert}", f"{start}.moe.down.{expert}"
            yield ParameterSpec(role=up, shape=(2 * ffn, hidden), axis=0, blocks=2, layer=layer, expert=expert)
            yield ParameterSpec(role=down, shape=(hidden, ffn), axis=1, layer=layer, expert=expert)
    yield ParameterSpec(role="final_norm", shape=(hidden,), place="last", init="ones")
    if not tied:
        yield ParameterSpec(role="head", shape=(vocabulary, hidden), axis=0, place="last", padded=True)
