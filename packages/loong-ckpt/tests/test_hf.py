"""Folders written by transformers go in and come out unchanged, under every layout and in every dtype."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ckpt_helpers import (
    assert_same_tensors,
    engine_for,
    make_plan,
    make_run,
    read_all,
    save_tiny,
)
from safetensors.torch import save_file

from loong_ckpt import hf, source
from loong_core.errors import CheckpointError
from loong_core.precision import POLICIES
from loong_core.recipe import Recipe
from loong_core.testing.ranks import run_ranks
from loong_core.weights import VERBS, shard

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1}),
    ("llama", {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
    ("qwen3_moe", {"num_experts": 5}),
]


def fused(folder: Path) -> None:
    """Rewrite a saved mixture of experts with all experts of a layer in one tensor."""
    tensors = read_all(folder)
    layers = {int(name.split(".")[2]) for name in tensors if ".experts." in name}
    for layer in layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        experts = 1 + max(int(name.split(".")[5]) for name in tensors if name.startswith(prefix))
        take = lambda e, part, p=prefix: tensors.pop(f"{p}.{e}.{part}_proj.weight")  # noqa: E731
        ups = [torch.cat([take(expert, "gate"), take(expert, "up")]) for expert in range(experts)]
        tensors[f"{prefix}.gate_up_proj"] = torch.stack(ups)
        tensors[f"{prefix}.down_proj"] = torch.stack([take(expert, "down") for expert in range(experts)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def round_trip(folder: Path, config: dict[str, Any], family: str, out: Path, **options: Any) -> Any:
    run = make_run(family, config, out.parent / "run", model={"weights": folder})
    engine = engine_for(run)
    hf.load(folder, run, engine)
    hf.save(out, run, engine, **options)
    return run, engine


@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_byte_equal(tmp_path: Path, family: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    config = save_tiny(family, tmp_path / "in", dtype, **changes)
    run, engine = round_trip(tmp_path / "in", config, family, tmp_path / "out")
    assert_same_tensors(read_all(tmp_path / "in"), read_all(tmp_path / "out"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert engine.changed == 1
    assert not hf.check(tmp_path / "out")
    loads_in_transformers(tmp_path / "out")


def loads_in_transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("limit", [1, 20_000, 60_000])
def test_files_are_bounded_and_indexed(tmp_path: Path, limit: int) -> None:
    config = save_tiny("qwen3", tmp_path / "in", shard="30KB")
    round_trip(tmp_path / "in", config, "qwen3", tmp_path / "out", shard_bytes=limit)
    assert_same_tensors(read_all(tmp_path / "in"), read_all(tmp_path / "out"))
    index, theirs = (
        json.loads((tmp_path / side / "model.safetensors.index.json").read_text()) for side in ("out", "in")
    )
    assert index["metadata"] == theirs["metadata"]
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    largest = max(tensor.numel() * 4 for tensor in read_all(tmp_path / "in").values())
    for file in (tmp_path / "out").glob("*.safetensors"):
        assert file.stat().st_size <= max(limit, largest) + 8192
    assert not hf.check(tmp_path / "out")
    loads_in_transformers(tmp_path / "out")


def test_fused_experts_stay_fused(tmp_path: Path) -> None:
    config = save_tiny("qwen3_moe", tmp_path / "in")
    separate = make_run("qwen3_moe", config, tmp_path / "run", model={"weights": tmp_path / "in"})
    reference = engine_for(separate)
    hf.load(tmp_path / "in", separate, reference)
    fused(tmp_path / "in")
    _, engine = round_trip(tmp_path / "in", config, "qwen3_moe", tmp_path / "out")
    for one, other in zip(reference.held, engine.held, strict=True):
        assert torch.equal(one.tensor, other.tensor)
    assert "model.layers.0.mlp.experts.gate_up_proj" in read_all(tmp_path / "out")
    assert_same_tensors(read_all(tmp_path / "in"), read_all(tmp_path / "out"))


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    config = save_tiny("qwen3", tmp_path / "in", torch.bfloat16)
    tensors = read_all(tmp_path / "in")
    for number, name in enumerate(sorted(tensors)):
        tensors[name] = tensors[name].to((torch.bfloat16, torch.float32, torch.float16)[number % 3])
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    round_trip(tmp_path / "in", config, "qwen3", tmp_path / "out")
    assert_same_tensors(tensors, read_all(tmp_path / "out"))


def test_stored_head_of_a_tied_model(tmp_path: Path) -> None:
    config = save_tiny("qwen2", tmp_path / "in", tie_word_embeddings=True)
    tensors = read_all(tmp_path / "in")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    round_trip(tmp_path / "in", config, "qwen2", tmp_path / "out")
    assert_same_tensors(tensors, read_all(tmp_path / "out"))

    tensors["lm_head.weight"][3, 1] += 1
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    run = make_run("qwen2", config, tmp_path / "run", model={"weights": tmp_path / "in"})
    with pytest.raises(CheckpointError, match="tie_word_embeddings: false"):
        hf.load(tmp_path / "in", run, engine_for(run))


def test_dropped_tensors_are_read_past(tmp_path: Path) -> None:
    config = save_tiny("llama", tmp_path / "in")
    tensors = read_all(tmp_path / "in")
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    round_trip(tmp_path / "in", config, "llama", tmp_path / "out")
    assert "model.layers.1.self_attn.rotary_emb.inv_freq" not in read_all(tmp_path / "out")


def spoil(tensors: dict[str, torch.Tensor], how: str) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    if how == "absent":
        del tensors[name]
    elif how == "extra":
        tensors["model.layers.2.input_layernorm.weight"] = torch.ones(48)
    elif how == "shape":
        tensors[name] = tensors[name][:8].clone()
    elif how == "integers":
        tensors[name] = tensors[name].to(torch.int8)
    elif how == "scalar":
        tensors[name] = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "absent",
            ["no tensors for 1 parameters", "layers.1.attn.qkv", "searched", "layers.1.self_attn.k_proj.weight"],
        ),
        ("extra", ["belong to no parameter", "model.layers.2.input_layernorm.weight", "config.json"]),
        ("shape", ["model.layers.1.self_attn.k_proj.weight", "[8, 48]", "[16, 48]"]),
        ("scalar", ["model.layers.1.self_attn.k_proj.weight", "[]", "[16, 48]"]),
        ("integers", ["I8", "quantised"]),
    ],
)
def test_wrong_tensors_are_named_before_any_is_read(tmp_path: Path, how: str, words: list[str]) -> None:
    config = save_tiny("llama", tmp_path / "in")
    tensors = read_all(tmp_path / "in")
    spoil(tensors, how)
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    run = make_run("llama", config, tmp_path / "run", model={"weights": tmp_path / "in"})
    engine = engine_for(run)
    with pytest.raises(CheckpointError) as raised:
        hf.load(tmp_path / "in", run, engine)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert all((parameter.tensor == 7).all() for parameter in engine.held)


def test_wrong_number_of_fused_experts(tmp_path: Path) -> None:
    config = save_tiny("qwen3_moe", tmp_path / "in")
    fused(tmp_path / "in")
    run = make_run("qwen3_moe", config | {"num_local_experts": 3, "num_experts": 3}, tmp_path / "run")
    with pytest.raises(CheckpointError, match="router|gate.weight|4 experts"):
        hf.load(tmp_path / "in", run, engine_for(run))


# ------------------------------------------------------------------------------------------------- layouts
LAYOUTS: list[tuple[str, int, dict[str, int]]] = [
    ("qwen3", 2, {"tp": 2}),
    ("qwen3", 2, {"pp": 2}),
    ("qwen3", 2, {}),
    ("llama", 4, {"tp": 2, "pp": 2}),
    ("qwen3_moe", 2, {"ep": 2}),
    ("qwen3_moe", 4, {"tp": 2, "ep": 2, "etp": 2}),
    ("qwen3_moe", 4, {"tp": 2, "ep": 4}),
    ("qwen3_moe", 2, {"tp": 2, "etp": 2}),
]


@pytest.mark.parametrize(("family", "world", "degrees"), LAYOUTS)
@pytest.mark.parametrize("joined", [False, True])
def test_layouts_load_their_parts_and_write_the_same_bytes(
    tmp_path: Path, family: str, world: int, degrees: dict[str, int], joined: bool
) -> None:
    config = save_tiny(family, tmp_path / "in", torch.bfloat16)
    if joined and family != "qwen3_moe":
        config = save_tiny(family, tmp_path / "in", torch.bfloat16, tie_word_embeddings=True)
    elif joined:
        fused(tmp_path / "in")
    _, reference = round_trip(tmp_path / "in", config, family, tmp_path / "one", shard_bytes=40_000)
    full = {parameter.spec.role: parameter.tensor for parameter in reference.held}

    def rank_main(rank: int) -> int:
        plan = make_plan(world, **degrees)
        run = make_run(family, config, tmp_path / "run", plan, rank, model={"weights": tmp_path / "in"})
        engine = engine_for(run)
        hf.load(tmp_path / "in", run, engine)
        for spec, tensor, *_ in engine.held:
            size = plan.tp if spec.expert is None else plan.etp
            expected = shard(full[spec.role], rank % size, size, spec.axis, spec.blocks, spec.padded)
            assert torch.equal(tensor, expected), spec.role
        hf.save(tmp_path / "many", run, engine, shard_bytes=40_000)
        return len(engine.held)

    held = run_ranks(world, rank_main, init=True)
    assert sum(held) >= len(reference.held)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "many").iterdir())
    assert len(names) > 3
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes(), name


def test_a_rank_that_cannot_read_stops_all_ranks(tmp_path: Path) -> None:
    config = save_tiny("qwen3", tmp_path / "in")

    def rank_main(rank: int) -> str:
        run = make_run("qwen3", config, tmp_path / "run", make_plan(2, tp=2), rank, model={"weights": tmp_path / "in"})
        engine = engine_for(run)
        if rank == 1:
            (tmp_path / "in" / "model.safetensors").rename(tmp_path / "in" / "gone")
        torch.distributed.barrier()
        place = tmp_path / "in" if rank == 1 else tmp_path / "copy"
        try:
            hf.load(place, run, engine)
        except CheckpointError as error:
            return str(error)
        return ""

    import shutil

    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    first, second = run_ranks(2, rank_main, init=True)
    assert "rank 1" in first and "no weights" in first
    assert "no weights" in second


# ------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("joined", [False, True])
def test_slices_equal_cutting_the_packed_whole(tmp_path: Path, size: int, joined: bool) -> None:
    from loong_ckpt.hf_folder import open_folder
    from loong_ckpt.mapping import assign
    from loong_ckpt.read import Reader

    config = save_tiny("qwen3_moe", tmp_path, mlp_only_layers=[1], attention_bias=True)
    if joined:
        fused(tmp_path)
    run = make_run("qwen3_moe", config, tmp_path / "run")
    tensors, folder = read_all(tmp_path), open_folder(tmp_path)
    rows = assign(run.shape, run.family.weights, folder.tensors, tmp_path).rows
    with Reader(folder, run.shape.fields) as reader:
        for spec in run.shape.parameters:
            row = rows[spec.role]
            parts = [tensors[name][spec.expert] if row.verb == "stack" else tensors[name] for name in row.hf]
            whole = VERBS[row.verb].pack(parts, run.shape.fields)
            for rank in range(size):
                expected = shard(whole, rank, size, spec.axis, spec.blocks, spec.padded)
                assert torch.equal(reader.part(spec, row, rank, size, torch.float32), expected), (spec.role, rank)


# ------------------------------------------------------------------------------------------------- exports
def test_random_weights_export(tmp_path: Path) -> None:
    config = save_tiny("qwen3", tmp_path / "reference")
    for key in ("architectures", "dtype", "model_type", "transformers_version"):
        config.pop(key)
    run = make_run("qwen3", config, tmp_path / "run", precision="bf16", data={"tokenizer": {"train": 300}})
    (tmp_path / "run" / "tokenizer").mkdir()
    added = [{"id": 5, "content": "<|end|>"}]
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (tmp_path / "run" / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (tmp_path / "run" / "tokenizer" / "notes.txt").write_text("not part of a tokenizer")
    engine = engine_for(run)
    for _, tensor, *_ in engine.held:
        tensor.normal_()
    config.pop("eos_token_id")
    hf.save(tmp_path / "out", run, engine)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["Qwen3ForCausalLM"]
    assert (written["dtype"], written["model_type"], written["eos_token_id"]) == ("bfloat16", "qwen3", 5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert {tensor.dtype for tensor in read_all(tmp_path / "out").values()} == {torch.bfloat16}
    assert loads_in_transformers(tmp_path / "out").dtype == torch.bfloat16


def test_overrides_reach_config_json(tmp_path: Path) -> None:
    config = save_tiny("qwen3", tmp_path / "in")
    overrides = {"rms_norm_eps": 1e-3}
    run = make_run(
        "qwen3", config | overrides, tmp_path / "run", model={"weights": tmp_path / "in", "config": overrides}
    )
    engine = engine_for(run)
    hf.load(tmp_path / "in", run, engine)
    hf.save(tmp_path / "out", run, engine)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | overrides


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    config = save_tiny("qwen3", tmp_path / "in")
    run, engine = round_trip(tmp_path / "in", config, "qwen3", tmp_path / "out", shard_bytes=20_000)
    hf.save(tmp_path / "out", run, engine)
    assert not list((tmp_path / "out").glob("*-of-*"))
    assert_same_tensors(read_all(tmp_path / "in"), read_all(tmp_path / "out"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="left alone"):
        hf.save(tmp_path / "mine", run, engine)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_full_disk_keeps_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    config = save_tiny("qwen3", tmp_path / "in")
    run, engine = round_trip(tmp_path / "in", config, "qwen3", tmp_path / "out")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match="No space left.*intact.*make room"):
            hf.save(tmp_path / "out", run, engine)
    assert_same_tensors(read_all(tmp_path / "in"), read_all(tmp_path / "out"))
    hf.save(tmp_path / "out", run, engine)


def test_a_parameter_nobody_wrote_stops_the_export(tmp_path: Path) -> None:
    config = save_tiny("qwen3", tmp_path / "in")
    run, engine = round_trip(tmp_path / "in", config, "qwen3", tmp_path / "out")
    role = engine.held.pop().spec.role
    with pytest.raises(CheckpointError, match=role):
        hf.save(tmp_path / "out2", run, engine)
    assert not (tmp_path / "out2").exists()


def test_keys_that_a_recipe_sets_to_null_are_not_exported(tmp_path: Path) -> None:
    """transformers takes a null for a size, and fails; one that the source had is the source's matter."""
    config = {"architectures": ["Qwen2ForCausalLM"], "head_dim": None, "rope_scaling": None, "hidden_size": 8}
    recipe = Recipe.model_validate({"model": {"config": {"head_dim": None, "hidden_size": 8}}})
    run: Any = SimpleNamespace(recipe=recipe, config=config, precision=POLICIES[0], family=SimpleNamespace(
        name="qwen2", hf_architectures=("Qwen2ForCausalLM",), sidecars=None
    ))  # fmt: skip
    written = json.loads(source._config(run, None, None))
    assert "head_dim" not in written and written["rope_scaling"] is None and written["hidden_size"] == 8
