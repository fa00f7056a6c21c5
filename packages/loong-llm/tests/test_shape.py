"""Sizes worked out from config.json files, against published parameter counts and against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc

import pytest

from loong_core.errors import RecipeError, Unsupported
from loong_core.registry import resolve
from loong_core.weights import WeightMap
from loong_llm.models.llama import LLAMA
from loong_llm.models.qwen2 import QWEN1_5, QWEN2
from loong_llm.models.qwen3 import QWEN3
from loong_llm.models.qwen3_moe import QWEN3_MOE
from loong_llm.shape import describe, is_sparse

FAMILIES = {family.name: family for family in (LLAMA, QWEN1_5, QWEN2, QWEN3, QWEN3_MOE)}
TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 131,
}
TINY_MOE = {**TINY, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# Parameters of the public checkpoints, in the element counts of their safetensors indexes.
PUBLISHED = {
    ("llama", "llama-2-7b"): 6_738_415_616,
    ("llama", "llama-2-13b"): 13_015_864_320,
    ("llama", "llama-2-70b"): 68_976_648_192,
    ("llama", "llama-3-8b"): 8_030_261_248,
    ("llama", "llama-3-70b"): 70_553_706_496,
    ("llama", "llama-3.1-8b"): 8_030_261_248,
    ("llama", "llama-3.1-405b"): 405_853_388_800,
    ("qwen2", "qwen2.5-0.5b"): 494_032_768,
    ("qwen2", "qwen2.5-1.5b"): 1_543_714_304,
    ("qwen2", "qwen2.5-3b"): 3_085_938_688,
    ("qwen2", "qwen2.5-7b"): 7_615_616_512,
    ("qwen2", "qwen2.5-14b"): 14_770_033_664,
    ("qwen2", "qwen2.5-32b"): 32_763_876_352,
    ("qwen2", "qwen2.5-72b"): 72_706_203_648,
    ("qwen1_5", "qwen1.5-0.5b"): 463_987_712,
    ("qwen3", "qwen3-0.6b"): 596_049_920,
    ("qwen3", "qwen3-1.7b"): 1_720_574_976,
    ("qwen3", "qwen3-4b"): 4_022_468_096,
    ("qwen3", "qwen3-8b"): 8_190_735_360,
    ("qwen3", "qwen3-14b"): 14_768_307_200,
    ("qwen3", "qwen3-32b"): 32_762_123_264,
    ("qwen3_moe", "qwen3-30b-a3b"): 30_532_122_624,
    ("qwen3_moe", "qwen3-235b-a22b"): 235_093_634_560,
}


def total(shape):
    return sum(spec.size for spec in shape.parameters)


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_presets_have_the_published_number_of_parameters(family, size):
    config = resolve(FAMILIES[family].presets)()[size]
    assert total(describe(FAMILIES[family], config)) == PUBLISHED[family, size]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_preset_is_read_and_covered_by_rows(family):
    presets = resolve(family.presets)()
    assert presets
    for config in presets.values():
        assert config["architectures"][0] in (family.hf_architectures or QWEN2.hf_architectures)
        shape = describe(family, config)
        rows = WeightMap(family.weights)
        assert all(rows.candidates(spec) for spec in shape.parameters[:40])


def test_active_parameters_of_a_sparse_model_are_those_a_token_meets():
    shape = describe(QWEN3_MOE, resolve(QWEN3_MOE.presets)()["qwen3-30b-a3b"])
    assert shape.active_parameters == pytest.approx(3.0e9, rel=0.05)
    dense = describe(QWEN3, resolve(QWEN3.presets)()["qwen3-8b"])
    embedding = dense.vocabulary * dense.hidden
    norms = sum(spec.size for spec in dense.parameters if len(spec.shape) == 1)
    assert dense.active_parameters == total(dense) - embedding - norms


def test_tied_embeddings_have_no_head_but_their_matmul_counts():
    tied, untied = (describe(QWEN3, {**TINY, "tie_word_embeddings": tie}) for tie in (True, False))
    assert [spec.role for spec in untied.parameters if spec.role not in {s.role for s in tied.parameters}] == ["head"]
    assert tied.active_parameters == untied.active_parameters
    assert all(spec.padded for spec in untied.parameters if spec.role in ("embed", "head"))


@pytest.mark.parametrize(
    ("extra", "sparse"),
    [
        ({}, [True, True, True, True]),
        ({"mlp_only_layers": [0, 2]}, [False, True, False, True]),
        ({"decoder_sparse_step": 2}, [False, True, False, True]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [False, True, False, False]),
    ],
)
def test_layers_with_experts(extra, sparse):
    shape = describe(QWEN3_MOE, {**TINY_MOE, "num_hidden_layers": 4, **extra})
    assert [is_sparse(shape.fields, layer) for layer in range(4)] == sparse
    routers = {spec.layer for spec in shape.parameters if spec.role.endswith("moe.router")}
    assert routers == {layer for layer, has in enumerate(sparse) if has}


def test_divisors_name_what_each_degree_cuts():
    rules = {(rule.degree, rule.value) for rule in describe(QWEN3_MOE, TINY_MOE).divisors}
    assert rules == {("tp", 6), ("tp", 2), ("ep", 5), ("etp", 24)}
    mixed = {(rule.degree, rule.value) for rule in describe(QWEN3_MOE, {**TINY_MOE, "mlp_only_layers": [0]}).divisors}
    assert mixed == {*rules, ("tp", 80)}


def test_a_loss_across_all_layers_keeps_them_in_one_stage():
    (rule,) = [
        rule for rule in describe(QWEN3_MOE, {**TINY_MOE, "output_router_logits": True}).divisors if rule.degree == "pp"
    ]
    assert rule.value == 1 and "output_router_logits" in rule.what


def test_old_and_new_files_say_the_same():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }
    old = {**TINY, "rope_theta": 500000.0, "rope_scaling": scaling}
    new = {**TINY, "rope_parameters": {**scaling, "rope_theta": 500000.0}}
    assert describe(LLAMA, old) == describe(LLAMA, new)
    older = {**TINY, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert describe(LLAMA, older).fields["rope_type"] == "linear"
    renamed = {("num_local_experts" if key == "num_experts" else key): value for key, value in TINY_MOE.items()}
    assert describe(QWEN3_MOE, renamed) == describe(QWEN3_MOE, TINY_MOE)


def test_nulls_count_as_absent():
    shape = describe(LLAMA, {**TINY, "num_key_value_heads": None, "head_dim": None, "rope_scaling": None})
    assert (shape.fields["kv_heads"], shape.fields["head_dim"], shape.fields["rope_type"]) == (6, 8, "default")


def test_all_missing_keys_are_named_at_once():
    with pytest.raises(RecipeError) as caught:
        describe(QWEN3, {"hidden_size": 48, "num_attention_heads": 6})
    assert [problem.split("`")[1] for problem in caught.value.problems] == [
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
    ]


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "linear"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_size": 50, "num_key_value_heads": 6}, "head_dim"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_parameters": 5, "rope_scaling": [1]}, "rope_parameters"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ],
)
def test_what_training_would_change_silently_is_refused(extra, named):
    with pytest.raises(Unsupported, match=named):
        describe(LLAMA, {**TINY, **extra})


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
        ({"num_experts": -1}, "num_experts"),
        ({"mlp_only_layers": "none"}, "mlp_only_layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef"),
    ],
)
def test_expert_settings_are_checked(extra, named):
    with pytest.raises((Unsupported, RecipeError), match=named):
        describe(QWEN3_MOE, {**TINY_MOE, **extra})


def test_several_refusals_come_together():
    with pytest.raises(Unsupported) as caught:
        describe(LLAMA, {**TINY, "hidden_act": "gelu", "attention_dropout": 0.1, "rope_scaling": {"type": "yarn"}})
    assert len(caught.value.problems) == 3


def test_describing_needs_no_tensor_library():
    code = (
        "import sys, json; from loong_llm import plugin; from loong_core.registry import resolve\n"
        "from loong_llm.shape import describe\n"
        "for family in plugin.loong_model_families():\n"
        "    for config in resolve(family.presets)().values(): describe(family, config)\n"
        "print(json.dumps([m for m in ('torch', 'numpy', 'transformers', 'megatron') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_model_of_671_billion_parameters_is_described_in_little_memory():
    config = {
        **TINY_MOE,
        "num_hidden_layers": 61,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "vocab_size": 129280,
        "mlp_only_layers": [0, 1, 2],
    }
    tracemalloc.start()
    shape = describe(QWEN3_MOE, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(shape.parameters) > 2 * 58 * 256
    assert total(shape) > 650e9
    assert peak < 100e6
