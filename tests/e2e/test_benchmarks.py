"""The benchmark of `benchmarks/qwen3_moe.py`, tiny, on a CPU: both sides train alike, and its figures are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import megatron_model  # noqa: E402
import megatron_peer  # noqa: E402
import report  # noqa: E402
import token_data  # noqa: E402

QWEN3_30B = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "vocab_size": 151936,
}


def benchmark(folder: Path, rows: str, *words: str) -> tuple[dict[str, dict], str]:
    """Run the script; the result of each row, and what it printed."""
    command = [sys.executable, str(BENCHMARKS / "qwen3_moe.py"), "--rows", rows, "--tiny", "--backend", "cpu"]
    command += ["--out", str(folder), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in rows.split(",")}, done.stdout


@pytest.mark.slow
def test_both_sides_train_on_skewed_packed_rows_from_the_same_weights(tmp_path: Path) -> None:
    words = ("--precision", "bf16", "--steps", "3", "--warmup", "1", "--revision", "abc")
    results, printed = benchmark(tmp_path, "moe-skewed", *words)
    found = results["moe-skewed"]
    assert found["comparison"]["loss_difference_first_step"] < 1e-3
    assert found["comparison"]["one_run"] is True
    assert found["loong"]["grad_norm"][0] == pytest.approx(found["megatron"]["grad_norm"][0], rel=1e-2)
    assert [len(found[side][name]) for side in ("loong", "megatron") for name in ("ms", "loss")] == [4] * 4
    assert all(busiest > 2 for busiest in found["megatron"]["busiest_expert"]), "half of the tokens: 8 / (2 x 2)"
    assert found["loong"]["commit"] == {"revision": "abc"}
    assert found["loong"]["command"][:3] == ["loong", "train", "qwen3_30b_a3b_h200_32k"]
    assert found["megatron"]["config"]["moe_aux_loss_coeff"] == 0.001
    assert str(Path.cwd()) not in json.dumps(found)
    assert printed.splitlines()[-1].split()[0] == "moe-skewed"


@pytest.mark.slow
def test_loss_curves_of_the_two_sides_agree(tmp_path: Path) -> None:
    """At a learning rate that moves the loss: a peer with 0.8 of it is 3e-2 away after 24 steps."""
    words = ("--precision", "fp32", "--curve-steps", "24", "--loong", "optim.lr=3e-3", "--loong", "optim.warmup=4")
    results, _ = benchmark(tmp_path, "curves", *words)
    found = results["curves"]
    assert found["comparison"]["loss_difference_first_step"] < 1e-5
    assert found["comparison"]["loss_difference_largest"] < 1e-3
    assert found["comparison"]["loss_difference_largest_after_20"] is not None
    assert found["work"]["warmup"] == 12
    assert found["megatron"]["config"]["moe_aux_loss_coeff"] == 0.0


def test_work_is_what_the_published_floors_count() -> None:
    """Floors measured beside Megatron before: 8 and 12 layers, 8 rows of 4096 tokens a GPU."""
    for layers, world, floor in ((8, 1, 224.1), (12, 4, 297.4)):
        batches = {"tokens": np.zeros((2, 8 * world, 4096)), "targets": np.zeros((2, 8 * world, 4096))}
        work = report.measure(batches, {**QWEN3_30B, "num_hidden_layers": layers}, 1, world)
        assert work["floor_ms_790"] == pytest.approx(floor, abs=0.05)
        assert work["tokens_per_step"] == 8 * world * 4096


def test_packed_work_counts_every_document_by_its_own_length() -> None:
    segments = np.array([[[0, 0, 0, 1, 1, -1]], [[0, 0, 0, 0, 0, 1]]])
    batches = {"tokens": np.zeros((2, 1, 6)), "targets": np.zeros((2, 1, 6)), "segments": segments}
    config = {**QWEN3_30B, "num_hidden_layers": 1}
    work = report.measure(batches, config, 0, 1)
    assert (work["tokens_per_step"], work["documents_per_step"]) == (5.5, 2)
    assert work["forward_tflop"]["attention"] * 1e12 == pytest.approx(2 * 4096 * (9 + 4 + 25 + 1) / 2)
    assert report.measure(batches, config, 1, 1)["tokens_per_step"] == 6


def test_rates_leave_the_warmup_out() -> None:
    work = {"tflop_per_step": 98.9, "tokens_per_step": 1000.0, "world": 2}
    side = report.side([900.0, 100.0, 300.0, 200.0], [4.0, 3.0, 2.0, 1.0], 2**31, 1, work)
    assert (side["median_ms"], side["peak_memory_gib"]) == (200.0, 2.0)
    assert side["mfu_989"] == pytest.approx(98.9e12 / 2 / 0.2 / 989e12)
    assert side["tokens_per_second"] == pytest.approx(5000.0)


def test_comparison_finds_where_curves_part() -> None:
    ours, theirs = [2.0] * 30, [2.0] * 30
    ours[5], ours[25], ours[29] = 4.0, 2.02, 1.99
    sides = [{"loss": losses, "median_ms": ms, "peak_memory_gib": 1.0} for losses, ms in ((ours, 10), (theirs, 25))]
    found = report.compare(*sides)
    assert found["speedup"] == 2.5
    assert found["loss_difference_largest"] == pytest.approx(1.0)
    assert found["loss_difference_largest_after_20"] == pytest.approx(0.01)
    assert found["loss_difference_last_step"] == pytest.approx(0.005)


@pytest.mark.parametrize("documents", ["full", "packed", "skewed"])
def test_documents_fill_rows(documents: token_data.Documents, tmp_path: Path) -> None:
    token_data.write(tmp_path / "a.jsonl", documents, rows=6, seq_len=2048, vocabulary=500)
    rows = [json.loads(line)["input_ids"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    ends = np.cumsum([len(row) for row in rows])
    assert set(range(2048, 6 * 2048 + 1, 2048)) <= set(ends.tolist()), "every row ends where a document ends"
    assert min(len(row) for row in rows) > 1
    assert len(rows) == 6 if documents == "full" else len(rows) > 60
    share = np.bincount(np.concatenate(rows)).max() / ends[-1]
    assert (0.48 < share < 0.54) if documents == "skewed" else share < 0.01


def test_skewed_documents_are_as_long_as_packed_ones(tmp_path: Path) -> None:
    for documents in ("packed", "skewed"):
        token_data.write(tmp_path / documents, documents, rows=3, seq_len=512, vocabulary=50)
    packed, skewed = ((tmp_path / name).read_text().splitlines() for name in ("packed", "skewed"))
    assert [line.count(",") for line in packed] == [line.count(",") for line in skewed]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("module.module.embedding.word_embeddings.weight", "embed"),
        ("module.decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", "layers.3.attn.norm"),
        ("decoder.layers.3.input_layernorm.weight", "layers.3.attn.norm"),
        ("decoder.layers.0.self_attention.k_layernorm.weight", "layers.0.attn.k_norm"),
        ("decoder.layers.11.mlp.linear_fc1.layer_norm_weight", "layers.11.mlp.norm"),
        ("decoder.layers.1.mlp.linear_fc1.weight", "layers.1.mlp.up"),
        ("decoder.layers.1.mlp.experts.linear_fc1.weight7", "layers.1.moe.up.71"),
        ("decoder.layers.1.mlp.experts.local_experts.0.linear_fc2.weight", "layers.1.moe.down.64"),
        ("module.output_layer.weight", "head"),
    ],
)
def test_parameters_of_the_peer_have_roles(name: str, role: str) -> None:
    assert megatron_model.role_of(name, first_expert=64) == role


def test_an_unknown_parameter_is_not_passed_over() -> None:
    with pytest.raises(KeyError, match="no role"):
        megatron_model.role_of("decoder.layers.0.self_attention.linear_qkv.bias", 0)


def test_the_peer_sees_documents_as_sequences_of_their_own() -> None:
    segments = torch.tensor([[0, 0, 0, 1, -1, -1]])
    assert megatron_peer.boundaries(segments) == [0, 3, 4, 6]
    mask = megatron_peer._mask(segments)[0, 0]
    assert mask.logical_not().nonzero().tolist() == [
        [0, 0],
        [1, 0],
        [1, 1],
        [2, 0],
        [2, 1],
        [2, 2],
        [3, 3],
        [4, 4],
        [5, 4],
        [5, 5],
    ]


def test_the_stand_in_for_apex_adds_the_weight_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, gradient, start = (torch.randn(shape, generator=generator) for shape in ((5, 3), (5, 4), (4, 3)))
    name, known = "fused_weight_gradient_mlp_cuda", "fused_weight_gradient_mlp_cuda" in sys.modules
    try:
        megatron_model.stand_in_for_apex()
        for dtype in (torch.float32, torch.bfloat16):
            total = start.to(dtype, copy=True)
            sys.modules[name].wgrad_gemm_accum_fp16(inputs.bfloat16(), gradient.bfloat16(), total)
            torch.testing.assert_close(total.float(), start + gradient.t() @ inputs, rtol=0.05, atol=0.05)
    finally:
        if not known:
            sys.modules.pop(name, None)


def test_a_switch_that_fails_is_a_line_and_the_others_are_compared() -> None:
    import switches

    from loong_core.op_declarations import DECLARATIONS

    on = {"median_ms": 200.0, "peak_memory_gib": 10.0}
    lines = switches.table({switches.BASE: on, "slower": on | {"median_ms": 250.0}, "broken": {"error": "no"}})
    assert [line.split()[-1] for line in lines.splitlines()] == ["GiB", "10.0", "10.0", "failed"]
    assert "25.0%" in lines
    named = [word.split("=")[0] for words in switches.SWITCHES.values() for word in words if word.startswith("ops.")]
    assert {name.removeprefix("ops.") for name in named} <= set(DECLARATIONS)
