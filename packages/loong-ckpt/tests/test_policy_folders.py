"""Folders of policies: names with or without a prefix, tied and dead tensors, one file, files of the family's own."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from ckpt_helpers import assert_same_tensors, engine_for, make_plan, read_all
from hypothesis import given, settings
from hypothesis import strategies as some
from safetensors.torch import save_file

from loong_ckpt import hf, native
from loong_core.errors import CheckpointError
from loong_core.plugins import load
from loong_core.precision import POLICIES
from loong_core.recipe import Recipe
from loong_core.registry import Registry
from loong_core.types import ModelFamily, ModelShape, ParameterSpec
from loong_core.validate_model import config_of_weights
from loong_core.weights import concat, copy, drop, flatten, prefixed, twin, unused, verb_of

ROWS = prefixed(
    (
        copy("embed", "embed_tokens.weight"),
        twin("embed", "lm_head.weight"),
        flatten("patches", "vision.patch.weight", 3, "patch", "patch"),
        concat("layers.*.qkv", [f"layers.*.{part}.weight" for part in "qkv"], "wide", "narrow", "narrow"),
        concat("modulation", [f"layers.{layer}.norm.weight" for layer in range(2)]),
        drop("layers.*.rope"),
        unused("expert.lm_head.weight", 5, "narrow"),
        unused("layers.*.gate", "narrow"),
    ),
    "model.",
)


def sidecars(run: Any, files: dict[str, bytes]) -> dict[str, bytes]:
    """As a family writes them: a config of its own, and statistics, unless the run knows no data."""
    if run.recipe.data.path is None:
        return files
    return {**files, "config.json": b'{"type": "tiny"}', "statistics.json": b"{}"}


FAMILY = ModelFamily(
    name="tiny",
    hf_architectures=("tiny",),
    describe="",
    builder="",
    arch={},
    from_hf={},
    weights=ROWS,
    sidecars="tiny_policy:sidecars",
    single_file=True,
)
FIELDS = {"patch": 2, "wide": 6, "narrow": 3}
SHAPE = ModelShape(
    family="tiny",
    fields=FIELDS,
    layers=2,
    hidden=4,
    parameters=(
        ParameterSpec(role="embed", shape=(7, 4), place="first"),
        ParameterSpec(role="patches", shape=(4, 12), place="first"),
        ParameterSpec(role="layers.0.qkv", shape=(12, 4), layer=0),
        ParameterSpec(role="layers.1.qkv", shape=(12, 4), layer=1),
        ParameterSpec(role="modulation", shape=(10, 4), place="last"),
    ),
)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tiny_policy")
    module.__dict__["sidecars"] = sidecars
    monkeypatch.setitem(sys.modules, "tiny_policy", module)


def run_of(folder: Path, weights: Path | None, data: str | None = "robot", **more: Any) -> Any:
    sections = {"precision": "fp32", "model": {"weights": weights}, "data": {"path": data}}
    policy = next(policy for policy in POLICIES if policy.name == "fp32")
    folder.mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(
        recipe=Recipe.model_validate(sections), folder=folder, plan=make_plan(), family=FAMILY, shape=SHAPE,
        config={"type": "tiny", **more}, precision=policy, device="cpu", rank=0, world=1, step=0, notes=[],
        is_main=True,
    )  # fmt: skip


def tensors(prefix: str = "", *without: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    found = {"embed_tokens.weight": torch.randn(7, 4), "vision.patch.weight": torch.randn(4, 3, 2, 2)}
    found["lm_head.weight"] = found["embed_tokens.weight"].clone()
    for layer in range(2):
        sizes = zip("qkv", (6, 3, 3), strict=True)
        found |= {f"layers.{layer}.{part}.weight": torch.randn(rows, 4) for part, rows in sizes}
        found[f"layers.{layer}.norm.weight"] = torch.randn(5, 4)
    found["expert.lm_head.weight"] = torch.randn(5, 3, dtype=torch.float32).to(torch.bfloat16)
    found["layers.1.gate"] = torch.randn(3)
    return {prefix + name: tensor for name, tensor in found.items() if name not in without}


def write(folder: Path, given: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(given, folder / "model.safetensors")
    (folder / "config.json").write_text('{"type": "tiny", "old": 1}')
    return folder


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("without", [(), ("embed_tokens.weight",), ("lm_head.weight",), ("expert.lm_head.weight",)])
def test_every_layout_goes_in_and_comes_out(tmp_path: Path, prefix: str, without: tuple[str, ...]) -> None:
    given = tensors(prefix, *without)
    run = run_of(tmp_path / "run", write(tmp_path / "in", given))
    engine = engine_for(run)
    hf.load(tmp_path / "in", run, engine)
    held = {parameter.spec.role: parameter.tensor for parameter in engine.held}
    assert torch.equal(held["layers.1.qkv"], torch.cat([tensors()[f"layers.1.{part}.weight"] for part in "qkv"]))
    assert torch.equal(held["patches"], tensors()["vision.patch.weight"].reshape(4, 12))
    hf.save(tmp_path / "out", run, engine, shard_bytes=1)
    assert_same_tensors(given, read_all(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "statistics.json",
    ]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"type": "tiny"}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"type": "tiny"}, ["model.safetensors"]),
        ({"architectures": ["Tiny"]}, ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]),
    ],
)
def test_one_file_where_the_configuration_has_a_key_and_numbered_ones_elsewhere(
    tmp_path: Path, config: dict[str, Any], names: list[str]
) -> None:
    run = run_of(tmp_path / "run", None)
    run.config, run.family = config, replace(FAMILY, single_file="type")
    hf.save(tmp_path / "out", run, engine_for(run))
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == names
    assert set(read_all(tmp_path / "out")) == set(tensors("", "lm_head.weight"))


def test_twins_that_differ_are_refused(tmp_path: Path) -> None:
    given = tensors()
    given["lm_head.weight"][2, 1] += 1e-3
    run = run_of(tmp_path / "run", write(tmp_path / "in", given))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is embed_tokens\.weight"):
        hf.load(tmp_path / "in", run, engine_for(run))


def test_a_dead_tensor_may_not_stand_for_another(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", write(tmp_path / "in", {**tensors(), "expert.other": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"expert\.other"):
        hf.load(tmp_path / "in", run, engine_for(run))


def test_random_weights_are_written_without_prefix_and_with_zeros_for_dead_tensors(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", None)
    hf.save(tmp_path / "out", run, engine_for(run))
    found = read_all(tmp_path / "out")
    assert set(found) == set(tensors("", "lm_head.weight"))
    assert found["expert.lm_head.weight"].shape == (5, 3) and not found["expert.lm_head.weight"].any()
    assert found["layers.1.gate"].shape == (3,)


def test_a_native_checkpoint_keeps_the_sidecars_for_its_export(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", write(tmp_path / "in", tensors("model.")))
    engine = engine_for(run)
    hf.load(tmp_path / "in", run, engine)
    native.save(tmp_path / "native", run, engine)
    later = run_of(tmp_path / "later", tmp_path / "native", data=None)
    hf.save(tmp_path / "out", later, engine)
    found = read_all(tmp_path / "out")
    assert found.keys() == tensors("model.").keys()
    assert torch.equal(found["model.layers.0.q.weight"], tensors()["layers.0.q.weight"])
    names = ["config.json", "model.safetensors", "statistics.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_keys_that_the_public_loader_refuses_lie_beside(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", None, architectures=["X"], sizes={"wide": 6})
    hf.save(tmp_path / "out", run, engine_for(run))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"type": "tiny"}
    assert json.loads((tmp_path / "out" / "loong.json").read_text()) == {"sizes": {"wide": 6}}
    assert config_of_weights(tmp_path / "out", Registry(load())) == {"type": "tiny", "sizes": {"wide": 6}}


@settings(max_examples=40, deadline=None)
@given(sizes=some.lists(some.integers(1, 5), min_size=1, max_size=4), columns=some.integers(0, 3))
def test_concat(sizes: list[int], columns: int) -> None:
    fields = {f"size{number}": size for number, size in enumerate(sizes)}
    row = concat("x", [f"hf{number}" for number in range(len(sizes))], *fields)
    parts = [torch.randn(size, *([columns] if columns else [])) for size in sizes]
    packed = verb_of(row).pack(parts, fields)
    assert packed.shape[0] == sum(sizes)
    back = verb_of(row).unpack(packed, fields)
    assert all(torch.equal(one, other) for one, other in zip(parts, back, strict=True))


@settings(max_examples=40, deadline=None)
@given(shape=some.lists(some.integers(1, 4), min_size=2, max_size=5))
def test_flatten(shape: list[int]) -> None:
    row = flatten("x", "hf", *shape[1:])
    whole = torch.randn(shape)
    packed = verb_of(row).pack([whole], {})
    assert packed.shape == (shape[0], whole[0].numel())
    assert torch.equal(verb_of(row).unpack(packed, {})[0], whole)
