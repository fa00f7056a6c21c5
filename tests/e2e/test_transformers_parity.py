"""`loong` from a Hugging Face folder trains as transformers does: losses and gradient norms of three AdamW steps."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loong_core.testing.training import run_training

SEQUENCE, ROWS, STEPS = 24, 4, 3
LR, DECAY = 1e-3, 0.1  # an element whose gradient is near eps moves by lr x noise: a larger lr tests rounding


def rows_of_tokens(vocabulary: int) -> list[list[int]]:
    """Rows of different lengths, the longest fills the sequence."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(7, SEQUENCE + 1, (ROWS * STEPS,), generator=generator).tolist()
    lengths[0] = SEQUENCE
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def recipe_for(folder: Path, data: Path, **sections: dict) -> dict:
    recipe = {
        "model": {"weights": str(folder)},
        "data": {
            "source": "jsonl",
            "path": str(data),
            "seq_len": SEQUENCE,
            "global_batch": ROWS,
            "micro_batch": ROWS,
            "shuffle": False,
            "pack": False,
        },
        "precision": "fp32",
        "backend": "cpu",
        "optim": {"lr": LR, "clip": None, "schedule": "constant", "weight_decay": DECAY},
        "run": {"steps": STEPS},
        "checkpoint": {"every": None, "export": "hf"},
        "log": {"to": ["jsonl"]},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    return recipe


def reference(folder: Path, rows: list[list[int]]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step with transformers and torch's AdamW."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    results = []
    for step in range(STEPS):
        batch = rows[step * ROWS : (step + 1) * ROWS]
        tokens = torch.zeros(ROWS, SEQUENCE, dtype=torch.long)
        labels = torch.full((ROWS, SEQUENCE), -100)
        mask = torch.zeros(ROWS, SEQUENCE, dtype=torch.long)
        for index, row in enumerate(batch):
            tokens[index, : len(row)] = labels[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        loss = model(input_ids=tokens, labels=labels, attention_mask=mask).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        results.append((loss.item(), norm.item()))
    return results


@pytest.mark.parametrize("name", checkpoints.CHECKPOINTS)
def test_three_steps_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = checkpoints.write(name, tmp_path / "hf")
    rows = rows_of_tokens(131)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    expected = reference(folder, rows)
    measured = run_training(tmp_path / "runs", recipe_for(folder, data))
    tolerance = 1e-4 if "moe" in name else 1e-5
    for (loss, norm), row in zip(expected, measured, strict=True):
        assert row["loss"] == pytest.approx(loss, rel=tolerance)
        assert row["grad_norm"] == pytest.approx(norm, rel=tolerance)
    assert measured[0]["tokens"] == sum(len(row) - 1 for row in rows[:ROWS])


@pytest.mark.parametrize("name", checkpoints.CHECKPOINTS)
def test_export_after_steps_at_zero_learning_rate_is_the_input(name: str, tmp_path: Path) -> None:
    folder = checkpoints.write(name, tmp_path / "hf")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows_of_tokens(131)))
    run_training(tmp_path / "runs", recipe_for(folder, data, optim={"lr": 0.0}, run={"steps": 2}))
    exported = tmp_path / "runs" / "run" / "hf"
    source, result = load_file(folder / "model.safetensors"), load_file(exported / "model.safetensors")
    assert sorted(source) == sorted(result)
    for key, tensor in source.items():
        assert tensor.dtype == result[key].dtype and torch.equal(tensor, result[key]), key
    assert (exported / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    reloaded, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert reloaded.config.vocab_size == 131
