"""Every family against transformers in float32: the same logits, the same gradients, all tensors used exactly once."""

from __future__ import annotations

import copy

import pytest

from loong_core.testing.ranks import run_ranks
from loong_llm.models.llama import LLAMA
from loong_llm.models.qwen2 import QWEN1_5, QWEN2
from loong_llm.models.qwen3 import QWEN3
from loong_llm.models.qwen3_moe import QWEN3_MOE

FAMILIES = {family.name: family for family in (LLAMA, QWEN1_5, QWEN2, QWEN3, QWEN3_MOE)}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MOE = {
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
CASES = {
    "llama-plain": ("llama", "Llama", {"num_attention_heads": 6, "num_key_value_heads": 2}),
    "llama-tied-multi-head": ("llama", "Llama", {"num_attention_heads": 6, "tie_word_embeddings": True}),
    "llama-all-biases": (
        "llama",
        "Llama",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-3.1-rope": (
        "llama",
        "Llama",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-linear-rope": (
        "llama",
        "Llama",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
        },
    ),
    "llama-five-heads": (
        "llama",
        "Llama",
        {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 12},
    ),
    "qwen2-untied": ("qwen2", "Qwen2", {"num_attention_heads": 6, "num_key_value_heads": 2}),
    "qwen2-tied": ("qwen2", "Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen1.5": ("qwen1_5", "Qwen2", {"num_attention_heads": 3, "num_key_value_heads": 3, "rms_norm_eps": 1e-3}),
    "qwen3-tied": (
        "qwen3",
        "Qwen3",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "qwen3-biases": (
        "qwen3",
        "Qwen3",
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "attention_bias": True},
    ),
    "moe-normalised": ("qwen3_moe", "Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    "moe-not-normalised": ("qwen3_moe", "Qwen3Moe", {**MOE, "norm_topk_prob": False, "tie_word_embeddings": True}),
    "moe-dense-layer": ("qwen3_moe", "Qwen3Moe", {**MOE, "mlp_only_layers": [0], "attention_bias": True}),
    "moe-one-expert": ("qwen3_moe", "Qwen3Moe", {**MOE, "norm_topk_prob": True, "num_experts_per_tok": 1}),
    "moe-every-second": ("qwen3_moe", "Qwen3Moe", {**MOE, "decoder_sparse_step": 2, "num_experts_per_tok": 1}),
    "moe-aux-loss": ("qwen3_moe", "Qwen3Moe", {**MOE, "output_router_logits": True, "router_aux_loss_coef": 0.7}),
    "moe-aux-loss-mixed": (
        "qwen3_moe",
        "Qwen3Moe",
        {**MOE, "output_router_logits": True, "router_aux_loss_coef": 3.0, "mlp_only_layers": [1]},
    ),
}


# Padding is seen by attention and by the balancing loss only, so not every case needs it.
PADDED = [(case, True) for case in ("qwen2-untied", "moe-aux-loss", "moe-aux-loss-mixed")]


@pytest.mark.parametrize(("case", "padded"), [*((case, False) for case in CASES), *PADDED])
def test_logits_and_gradients_equal_those_of_transformers(case, padded, tiny, tmp_path):
    name, kind, settings = CASES[case]

    def compare(rank):
        import torch

        family = FAMILIES[name]
        found = tiny.checkpoint(kind, tmp_path, **settings)
        chunks, shape, context = tiny.build(family, found.config)
        used = tiny.load(family, chunks, shape, context, found.tensors)
        assert used == set(found.tensors), used ^ set(found.tensors)
        (decoder,) = chunks
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, shape.vocabulary, (2, 17), generator=generator)
        batch = {"tokens": tokens, "positions": torch.arange(17).expand(2, -1)}
        mask = None
        if padded:
            mask = torch.arange(17)[None] < torch.tensor([[17], [11]])
            batch["segments"] = torch.where(mask, 0, -1)
        keep = torch.ones(2, 17) if mask is None else mask.float()
        direction = torch.randn(2, 17, shape.vocabulary, generator=generator) * keep[..., None]
        logits = decoder(batch)
        losses = decoder.auxiliary_losses()
        assert decoder.auxiliary_losses() == {}
        ((logits * direction).sum() + sum(losses.values()) * 11.0).backward()
        reference = found.model(tokens, attention_mask=mask, use_cache=False)
        total = (reference.logits * direction).sum()
        if reference.get("aux_loss") is not None:
            expected = reference.aux_loss * found.config["router_aux_loss_coef"]
            torch.testing.assert_close(losses["aux_loss"], expected, rtol=1e-5, atol=1e-7)
            total = total + expected * 11.0
        assert bool(losses) == ("aux" in case)
        total.backward()
        torch.testing.assert_close(logits * keep[..., None], reference.logits * keep[..., None], rtol=0, atol=1e-4)
        return worst_gradient(tiny, family, shape, decoder, found.model)

    (worst,) = run_ranks(1, compare, init=True)
    assert worst < 1e-4


def worst_gradient(tiny, family, shape, decoder, model):
    """The largest relative difference of a gradient to transformers', over all parameters."""
    gradients = tiny.reference_gradients(model)
    worst, used = 0.0, set()
    for parameter in decoder.local_parameters():
        expected, names = tiny.full_tensor(family, shape.fields, parameter.spec, gradients)
        used.update(names)
        difference, size = (parameter.gradient - expected).norm().item(), expected.norm().item()
        if size < 1e-5:  # rounding: the only expert of a token has weight 1, whatever its router says
            assert difference < 1e-5, parameter.spec.role
        else:
            worst = max(worst, difference / size)
    assert used == set(gradients), used ^ set(gradients)
    return worst


@pytest.mark.parametrize("case", ["llama-3.1-rope", "llama-linear-rope", "qwen3-tied"])
def test_angles_are_those_of_transformers_far_out(case):
    import torch
    import transformers

    from loong_llm.rope import RotaryAngles
    from loong_llm.shape import describe

    name, kind, settings = CASES[case]
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48, intermediate_size=80, num_hidden_layers=1, vocab_size=131, **settings
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    rotary = type(model.model.rotary_emb)(config)
    fields = describe(FAMILIES[name], {**config.to_dict(), "architectures": []}).fields
    positions = torch.tensor([[0, 1, 2, 131071], [5, 0, 77777, 3]])
    angles = RotaryAngles(fields)(positions)
    cosines, sines = rotary(torch.zeros(1), positions)
    assert torch.equal(angles[:, :, 0].transpose(0, 1).cos(), cosines)
    assert torch.equal(angles[:, :, 0].transpose(0, 1).sin(), sines)
    halved = copy.deepcopy(RotaryAngles(fields)).bfloat16()
    assert torch.equal(halved(positions), angles)


def test_packed_samples_do_not_see_each_other(tiny, tmp_path):
    def compare(rank):
        import torch

        found = tiny.checkpoint("Qwen3Moe", tmp_path, **{**MOE, "norm_topk_prob": True})
        chunks, shape, context = tiny.build(QWEN3_MOE, found.config)
        tiny.load(QWEN3_MOE, chunks, shape, context, found.tensors)
        (decoder,) = chunks
        tokens = torch.randint(0, 131, (1, 24), generator=torch.Generator().manual_seed(2))
        lengths = [5, 12, 4]
        positions = torch.cat([*(torch.arange(length) for length in lengths), torch.zeros(3, dtype=torch.long)])
        segments = torch.tensor(sum(([index] * length for index, length in enumerate(lengths)), []) + [-1] * 3)
        packed = decoder({"tokens": tokens, "positions": positions[None], "segments": segments[None]})
        start = 0
        for length in lengths:
            part = tokens[:, start : start + length]
            expected = found.model(part, use_cache=False).logits
            torch.testing.assert_close(packed[:, start : start + length], expected, rtol=0, atol=1e-5)
            start += length
        assert packed.isfinite().all()
        return True

    assert run_ranks(1, compare, init=True) == [True]


def test_a_checkpoint_with_fused_experts_is_read_through_the_other_rows(tiny, tmp_path):
    def compare(rank):
        import torch

        found = tiny.checkpoint("Qwen3Moe", tmp_path, **MOE)
        fused = {name: tensor.detach() for name, tensor in found.model.state_dict().items()}
        assert any(name.endswith("mlp.experts.gate_up_proj") for name in fused)
        assert not any(name.endswith("mlp.experts.gate_up_proj") for name in found.tensors)
        chunks, shape, context = tiny.build(QWEN3_MOE, found.config)
        assert tiny.load(QWEN3_MOE, chunks, shape, context, fused) == set(fused)
        tokens = torch.randint(0, 131, (1, 9), generator=torch.Generator().manual_seed(3))
        logits = chunks[0]({"tokens": tokens, "positions": torch.arange(9)[None]})
        torch.testing.assert_close(logits, found.model(tokens, use_cache=False).logits, rtol=0, atol=1e-5)
        return True

    assert run_ranks(1, compare, init=True) == [True]
