"""The weight rows of GR00T's parts, in the names of the published checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from loong_core.types import Weight
from loong_core.weights import concat, copy, gate_up, qkv, stack

QWEN = "backbone.model.model"
TOWER = f"{QWEN}.visual"
HEAD = "action_head"
DIT = f"{HEAD}.model"


def _linear(role: str, hf: str) -> Iterator[Weight]:
    yield copy(role, f"{hf}.weight")
    yield copy(f"{role}_bias", f"{hf}.bias")


def _joined(role: str, hf: str, parts: tuple[str, ...]) -> Iterator[Weight]:
    """Several linear layers with one input as one."""
    yield concat(role, [f"{hf}.{part}.weight" for part in parts])
    yield concat(f"{role}_bias", [f"{hf}.{part}.bias" for part in parts])


def language(hf: str) -> Iterator[Weight]:
    """Rows of Qwen3's text model at `hf`."""
    layer = f"{hf}.layers.*"
    yield copy("embed", f"{hf}.embed_tokens.weight")
    yield copy("llm.layers.*.norm1", f"{layer}.input_layernorm.weight")
    yield qkv("llm.layers.*.qkv", f"{layer}.self_attn.{{}}_proj.weight")
    yield copy("llm.layers.*.q_norm", f"{layer}.self_attn.q_norm.weight")
    yield copy("llm.layers.*.k_norm", f"{layer}.self_attn.k_norm.weight")
    yield copy("llm.layers.*.out", f"{layer}.self_attn.o_proj.weight")
    yield copy("llm.layers.*.norm2", f"{layer}.post_attention_layernorm.weight")
    yield gate_up("llm.layers.*.up", f"{layer}.mlp.{{}}_proj.weight")
    yield copy("llm.layers.*.down", f"{layer}.mlp.down_proj.weight")


def qwen_tower() -> Iterator[Weight]:
    """Rows of Qwen3-VL's vision tower."""
    block = f"{TOWER}.blocks.*"
    yield from _linear("vision.patch", f"{TOWER}.patch_embed.proj")
    yield copy("vision.positions", f"{TOWER}.pos_embed.weight")
    names = {"norm1": "norm1", "qkv": "attn.qkv", "out": "attn.proj", "norm2": "norm2"}
    for role, name in {**names, "up": "mlp.linear_fc1", "down": "mlp.linear_fc2"}.items():
        yield from _linear(f"vision.layers.*.{role}", f"{block}.{name}")
    for role, name in {"norm": "norm", "up": "linear_fc1", "down": "linear_fc2"}.items():
        yield from _linear(f"vision.merger.{role}", f"{TOWER}.merger.{name}")
        yield from _linear(f"vision.deep.*.{role}", f"{TOWER}.deepstack_merger_list.*.{name}")


def siglip_tower(hf: str, projector: str) -> Iterator[Weight]:
    """Rows of a SigLIP 2 tower at `hf`, and of what makes rows of the language model from its patches."""
    block = f"{hf}.encoder.layers.*"
    yield from _linear("vision.patch", f"{hf}.embeddings.patch_embedding")
    yield copy("vision.positions", f"{hf}.embeddings.position_embedding.weight")
    yield from _joined("vision.layers.*.qkv", f"{block}.self_attn", ("q_proj", "k_proj", "v_proj"))
    names = {"norm1": "layer_norm1", "out": "self_attn.out_proj", "norm2": "layer_norm2"}
    for role, name in {**names, "up": "mlp.fc1", "down": "mlp.fc2"}.items():
        yield from _linear(f"vision.layers.*.{role}", f"{block}.{name}")
    yield from _linear("vision.norm", f"{hf}.post_layernorm")
    for role, number in {"norm": 0, "up": 1, "down": 3}.items():
        yield from _linear(f"vision.merger.{role}", f"{projector}.{number}")


def head() -> Iterator[Weight]:
    """Rows of the action head; what a model does not have is not asked for."""
    refiner, block = f"{HEAD}.vl_self_attention.transformer_blocks.*", f"{DIT}.transformer_blocks.*"
    qkv_parts = ("to_q", "to_k", "to_v")
    yield from _linear("refiner.norm", f"{HEAD}.vlln")
    yield from _linear("refiner.layers.*.norm1", f"{refiner}.norm1")
    yield from _linear("refiner.layers.*.norm2", f"{refiner}.norm3")
    for role, hf in (("refiner.layers.*", refiner), ("dit.layers.*", block)):
        yield from _joined(f"{role}.qkv", f"{hf}.attn1", qkv_parts)
        yield from _linear(f"{role}.out", f"{hf}.attn1.to_out.0")
        yield from _linear(f"{role}.up", f"{hf}.ff.net.0.proj")
        yield from _linear(f"{role}.down", f"{hf}.ff.net.2")
    yield from _linear("dit.layers.*.modulation", f"{block}.norm1.linear")
    yield from _linear("dit.layers.*.q", f"{block}.attn1.to_q")
    yield from _joined("dit.layers.*.kv", f"{block}.attn1", qkv_parts[1:])
    yield from _linear("dit.time_in", f"{DIT}.timestep_encoder.timestep_embedder.linear_1")
    yield from _linear("dit.time_out", f"{DIT}.timestep_encoder.timestep_embedder.linear_2")
    yield from _linear("dit.out_modulation", f"{DIT}.proj_out_1")
    yield from _linear("dit.out", f"{DIT}.proj_out_2")
    yield copy("positions", f"{HEAD}.position_embedding.weight")
    yield copy("mask_token", f"{HEAD}.mask_token")
    slots = {"state_in": "state_encoder.layer1", "state_out": "state_encoder.layer2"}
    slots |= {"action_in": "action_encoder.W1", "action_time": "action_encoder.W2", "action_out": "action_encoder.W3"}
    slots |= {"decoder_in": "action_decoder.layer1", "decoder_out": "action_decoder.layer2"}
    for part, name in slots.items():
        yield stack(f"slots.#.{part}", f"{HEAD}.{name}.W")
        yield stack(f"slots.#.{part}_bias", f"{HEAD}.{name}.b")
