"""Tiny GR00T models and batches, and a plain reference of the action head: sample by sample, nothing fused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from loong_core.ops import OPS, bind
from loong_core.precision import POLICIES
from loong_core.types import ModelFamily, OpRequest
from loong_core.weights import WeightMap, verb_of
from loong_vla.groot import Groot, build
from loong_vla.groot_shape import describe
from loong_vla.models.groot import GROOT_N17

QWEN: dict[str, Any] = {
    "image_token_id": 3,
    "video_token_id": 4,
    "vision_start_token_id": 1,
    "vision_end_token_id": 2,
    "tie_word_embeddings": True,
    "text_config": {
        **{"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{
            "head_dim": 12,
            "num_hidden_layers": 5,
            "vocab_size": 53,
            "rms_norm_eps": 1e-6,
            "model_type": "qwen3_vl_text",
        },
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 2, 2], "rope_type": "default"},
        **{"rope_theta": 5000000, "tie_word_embeddings": True, "attention_bias": False, "hidden_act": "silu"},
    },
    "vision_config": {
        **{"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 44, "out_hidden_size": 48},
        **{"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 25},
        **{"deepstack_visual_indexes": [0, 2], "hidden_act": "gelu_pytorch_tanh", "model_type": "qwen3_vl"},
    },
}
EAGLE: dict[str, Any] = {
    "image_token_index": 3,
    "text_config": {
        **{"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 12, "vocab_size": 53, "rms_norm_eps": 1e-6, "rope_theta": 1000000},
    },
    "vision_config": {
        **{"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 44},
        **{"patch_size": 4, "num_patches": 9},
    },
}
BASE: dict[str, Any] = {
    **{"backbone_embedding_dim": 48, "select_layer": 3, "hidden_size": 20, "input_embedding_dim": 32},
    **{"max_state_dim": 11, "max_action_dim": 9, "action_horizon": 7, "max_num_embodiments": 5, "max_seq_len": 16},
    **{"image_target_size": [16, 16], "image_crop_size": [14, 14], "state_dropout_prob": 0.0},
    "diffusion_model_cfg": {
        **{"positional_embeddings": None, "num_layers": 7, "num_attention_heads": 4, "attention_head_dim": 8},
        **{"norm_type": "ada_norm", "dropout": 0.0, "final_dropout": True, "output_dim": 20},
        "interleave_self_attention": True,
    },
    "vl_self_attention_cfg": {
        **{"positional_embeddings": None, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 12},
        **{"dropout": 0.0, "final_dropout": True},
    },
}
N17 = {**BASE, "backbone_config": QWEN}
N16 = {**BASE, "backbone_config": EAGLE, "tune_top_llm_layers": 1}


def build_model(config: dict[str, Any], family: ModelFamily = GROOT_N17, policy: int = 0) -> Groot:
    precision = POLICIES[policy]
    ops = bind(OPS, OpRequest("cpu", precision.activations, {}, {}), {})
    context = SimpleNamespace(ops=ops, precision=precision, device="cpu")
    return build(describe(family, config), context)[0]  # type: ignore[arg-type]


def randomise(model: Groot, seed: int = 0) -> Groot:
    """Weights that make every part matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.local_parameters():
        spec = parameter.spec
        matrix = len(spec.shape) > 1 and spec.role not in ("positions", "vision.positions")
        fan = spec.shape[0] if spec.expert is not None else math.prod(spec.shape[1:])
        values = torch.randn(spec.shape, generator=generator) * (0.9 / fan**0.5 if matrix else 0.3)
        parameter.assign(values + (spec.init == "ones"))
    return model


def tiny(family: ModelFamily = GROOT_N17, policy: int = 0, **more: Any) -> Groot:
    base = N17 if family is GROOT_N17 else N16
    return randomise(build_model({**base, **more}, family, policy))


def hf_tensors(model: Groot, family: ModelFamily) -> dict[str, Tensor]:
    """The model's weights as a checkpoint of the family names them."""
    rows, found = WeightMap(family.weights), {}
    for parameter in model.local_parameters():
        row = rows.candidates(parameter.spec)[0]
        parts = verb_of(row).unpack(parameter.tensor.detach().clone(), model.shape.fields)
        for name, part in zip(row.hf, parts, strict=True):
            if row.verb == "stack":
                found.setdefault(name, []).append(part)
            else:
                found[name] = part
    return {name: torch.stack(part) if isinstance(part, list) else part for name, part in found.items()}


def batch_of(
    camera_mask: list[list[int]] = ((1, 1, 0), (0, 1, 0), (1, 1, 1)),  # type: ignore[assignment]
    words: list[int] = (5, 9, 4),  # type: ignore[assignment]
    embodiment: list[int] = (4, 1, 4),  # type: ignore[assignment]
    image: tuple[int, int] = (16, 24),
    padding: int = 3,
    seed: int = 5,
) -> dict[str, Tensor]:
    """A batch as the stream gives it; prompts: two words, the cameras' tokens between marks, the other words."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [1, *[3] * (image[0] // 8 * (image[1] // 8)), 2]
    rows = []
    for mask, count in zip(camera_mask, words, strict=True):
        text = torch.randint(5, 53, (count,), generator=generator).tolist()
        rows.append([*text[:2], *tokens * sum(mask), *text[2:]])
    length = max(map(len, rows)) + padding
    samples = len(rows)
    return {
        "images": torch.randint(
            0, 256, (samples, len(camera_mask[0]), *image, 3), dtype=torch.uint8, generator=generator
        ),
        "camera_mask": torch.tensor(camera_mask, dtype=torch.bool),
        "tokens": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "token_mask": torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows]),
        "state": torch.randn(samples, 11, generator=generator),
        "actions": torch.randn(samples, 7, 9, generator=generator),
        "action_mask": torch.rand(samples, 7, 9, generator=generator) < 0.7,
        "noise": torch.randn(samples, 7, 9, generator=generator),
        "time": torch.rand(samples, generator=generator) * 0.999,
        "embodiment": torch.tensor(embodiment),
    }


def loss_of(model: Groot, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    prediction = model(batch)
    error = (prediction - model.target(batch)).square()
    return prediction, (error * batch["action_mask"]).sum() / batch["action_mask"].sum()


# ------------------------------------------------------------------------------------------------ the reference
def reference_velocity(w: dict[str, Tensor], features: Tensor, is_image: Tensor, sample: dict[str, Tensor]) -> Tensor:
    """One sample's velocity [h,a] from its features [l,f] (no padding), in the names of the checkpoint."""
    w = {name.removeprefix("action_head."): tensor for name, tensor in w.items()}
    slot = int(sample["embodiment"])

    def layer(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].t() + w[f"{name}.bias"]

    def own(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.W"][slot] + w[f"{name}.b"][slot]

    def plain_norm(x: Tensor, epsilon: float) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + epsilon).sqrt()

    def attention(name: str, x: Tensor, seen: Tensor, heads: int) -> Tensor:
        query, key, value = (layer(f"{name}.to_{part}", y) for part, y in (("q", x), ("k", seen), ("v", seen)))
        out = []
        for q, k, v in zip(*(part.chunk(heads, -1) for part in (query, key, value)), strict=True):
            out.append((q @ k.t() / q.shape[-1] ** 0.5).softmax(-1) @ v)
        return layer(f"{name}.to_out.0", torch.cat(out, -1))

    def inner(name: str, x: Tensor) -> Tensor:
        return layer(f"{name}.net.2", functional.gelu(layer(f"{name}.net.0.proj", x), approximate="tanh"))

    def count(prefix: str) -> int:
        return 1 + max(
            (int(name.split(".")[len(prefix.split("."))]) for name in w if name.startswith(prefix)), default=-1
        )

    seen = plain_norm(features, 1e-5) * w["vlln.weight"] + w["vlln.bias"]
    for block in range(count("vl_self_attention.transformer_blocks")):
        name = f"vl_self_attention.transformer_blocks.{block}"
        normal = plain_norm(seen, 1e-5) * w[f"{name}.norm1.weight"] + w[f"{name}.norm1.bias"]
        seen = seen + attention(f"{name}.attn1", normal, normal, 4)
        normal = plain_norm(seen, 1e-5) * w[f"{name}.norm3.weight"] + w[f"{name}.norm3.bias"]
        seen = seen + inner(f"{name}.ff", normal)

    time, noise = sample["time"], sample["noise"]
    bucket = torch.floor(time * 1000)
    state = own("state_encoder.layer2", own("state_encoder.layer1", sample["state"][None]).relu())
    actions = own("action_encoder.W1", (1 - time) * noise + time * sample["actions"])
    half = actions.shape[1] // 2
    phase = bucket * torch.exp(-math.log(10000.0) / half * torch.arange(half))
    waves = torch.cat([phase.sin(), phase.cos()]).expand(len(actions), -1)
    actions = own("action_encoder.W3", functional.silu(own("action_encoder.W2", torch.cat([actions, waves], -1))))
    x = torch.cat([state, actions + w["position_embedding.weight"][: len(actions)]])
    phase = bucket * torch.exp(-math.log(10000.0) / 127 * torch.arange(128))
    embedder = "model.timestep_encoder.timestep_embedder.linear_"
    condition = layer(f"{embedder}1", torch.cat([phase.cos(), phase.sin()])[None])
    condition = functional.silu(layer(f"{embedder}2", functional.silu(condition)))
    for block in range(count("model.transformer_blocks")):
        name = f"model.transformer_blocks.{block}"
        scale, shift = layer(f"{name}.norm1.linear", condition).chunk(2, -1)
        normal = plain_norm(x, 1e-5) * (1 + scale) + shift
        memory = normal if block % 2 else seen[~is_image] if block % 4 == 0 else seen[is_image]
        x = x + attention(f"{name}.attn1", normal, memory, 4)
        x = x + inner(f"{name}.ff", plain_norm(x, 1e-5))
    shift, scale = layer("model.proj_out_1", condition).chunk(2, -1)
    x = layer("model.proj_out_2", plain_norm(x, 1e-6) * (1 + scale) + shift)[1:]
    return own("action_decoder.layer2", own("action_decoder.layer1", x).relu())
