"""The FLOPs behind MFU and HFU, beside those that torch counts in a real step of a tiny model.

Every product of matrices is counted exactly. The reference computes attention's scores in full squares, of which the
formula takes the causal half: half of what is counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loong_core.testing.ranks import run_ranks
from loong_core.types import ModelShape
from loong_llm.models.qwen3 import QWEN3
from loong_llm.models.qwen3_moe import QWEN3_MOE
from loong_llm.shape import describe

SEQ_LEN, GLOBAL_BATCH, HALF = 16, 4, 0.5
PACKED = ([5, 11], [1, 7, 8], [16], [2, 2, 12])
SIZES: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "moe_intermediate_size": 20,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
}
FAMILIES = {"qwen3": QWEN3, "qwen3_moe": QWEN3_MOE}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"family": "qwen3", "config": SIZES},
    "tied": {"family": "qwen3", "config": {**SIZES, "tie_word_embeddings": True}},
    "experts": {"family": "qwen3_moe", "config": {**SIZES, **EXPERTS}},
}


def counted(_rank: int, folder: Path, model: dict[str, Any], recompute: str, packed: bool) -> dict[str, float]:
    """What torch counts in one step: products of two matrices, and of batches of matrices (attention alone)."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from loong_core.testing.tiny import batches, settings, start

    sizes = {"seq_len": SEQ_LEN, "global_batch": GLOBAL_BATCH, "micro_batch": 2}
    recipe = settings(model["family"], model["config"], data=sizes, parallel={"recompute": recompute})
    run, engine = start(recipe, folder)
    given = batches(run)
    if packed:
        numbers = [[n for n, length in enumerate(row) for _ in range(length)] for row in PACKED]
        for at, batch in enumerate(given):
            batch["segments"] = torch.tensor(numbers[2 * at : 2 * at + 2])
    # Without a fused kernel every product is an operation of its own, which the counter sees.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        engine.forward_backward(given, 0)
    found = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    engine.close()
    attention = found.pop("aten.bmm", 0)
    assert set(found) <= {"aten.mm", "aten.addmm"}, found
    return {"matrices": sum(found.values()), "attention": attention, "planned": run.plan.flops_per_step}


def one_step(
    folder: Path, name: str, recompute: str = "none", packed: bool = False
) -> tuple[ModelShape, dict[str, float]]:
    model = MODELS[name]
    shape = describe(FAMILIES[model["family"]], model["config"])
    return shape, run_ranks(1, counted, folder, model, recompute, packed)[0]


@pytest.mark.parametrize("name", MODELS)
def test_model_flops_are_those_counted(tmp_path: Path, name: str) -> None:
    shape, found = one_step(tmp_path, name)
    tokens = GLOBAL_BATCH * SEQ_LEN
    assert found["matrices"] == shape.train_flops(tokens, 0)
    assert found["attention"] * HALF == shape.train_flops(tokens, SEQ_LEN) - shape.train_flops(tokens, 0)
    assert found["planned"] == shape.train_flops(tokens, SEQ_LEN)


@pytest.mark.parametrize("name", ["dense", "experts"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_flops_are_those_counted_beyond(tmp_path: Path, name: str, recompute: str) -> None:
    shape, found = one_step(tmp_path, name, recompute)
    tokens = GLOBAL_BATCH * SEQ_LEN
    extra = [shape.recomputed_flops(tokens, context, recompute) for context in (0, SEQ_LEN)]
    assert found["matrices"] == shape.train_flops(tokens, 0) + extra[0]
    assert (extra[0] > 0) == (recompute == "full")
    whole = shape.train_flops(tokens, SEQ_LEN) + extra[1]
    assert found["matrices"] + found["attention"] * HALF == whole
    assert shape.recomputed_flops(tokens, SEQ_LEN, "none") == 0


def test_packed_samples_attend_within_themselves(tmp_path: Path) -> None:
    """The linears of a packed step are those of any other; attention is that of its samples, each computed apart."""
    shape, found = one_step(tmp_path, "dense", packed=True)
    tokens = GLOBAL_BATCH * SEQ_LEN
    assert found["matrices"] == shape.train_flops(tokens, 0)
    lengths = [length for row in PACKED for length in row]
    context = sum(length**2 for length in lengths) / sum(lengths)
    apart = run_ranks(1, attention_alone, lengths)[0] * shape.layers
    assert apart * HALF == pytest.approx(shape.train_flops(tokens, context) - shape.train_flops(tokens, 0), rel=1e-12)
    assert apart < found["attention"]  # the reference computes the whole row and masks


def attention_alone(_rank: int, lengths: list[int]) -> int:
    """What torch counts in attention over one sample after the other."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from loong_core.references.attention import attention

    heads, groups, width = (SIZES[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for length in lengths:
            query = torch.randn(length, 1, heads, width, requires_grad=True)
            key, value = (torch.randn(length, 1, groups, width, requires_grad=True) for _ in range(2))
            attention(query, key, value, scale=1.0).sum().backward()
    return counter.get_total_flops()
