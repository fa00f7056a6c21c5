"""The suites that need a model find what they promise to find: each fault is planted once, in plugins of a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from loong_core.testing import (
    BackendContract,
    EngineContract,
    FamilyContract,
    PlannerContract,
    PrecisionContract,
    RecipeContract,
)
from loong_core.testing import backend as backend_suite
from loong_core.testing.ranks import run_ranks

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "attention_bias": True,
}

PLANTED = '''
from dataclasses import replace
from pathlib import Path
from loong_core import Backend, ParallelPlanner, PrecisionPolicy, Probe, RecipeFolder, hookimpl

ROWS = {rows!r}


@hookimpl
def loong_model_families():
    from loong_core.weights import copy
    from loong_llm.models.llama import LLAMA

    def without(*roles):
        return tuple(row for row in LLAMA.weights if row.role not in roles)

    def called(name, **changes):
        return replace(LLAMA, name=name, hf_architectures=(name,), presets=None, **changes)

    o_as_q = copy("layers.*.attn.out", "model.layers.*.self_attn.q_proj.weight")
    return [
        called("wrong_epsilon", arch={{"norm_epsilon": 0.1}}, from_hf={{
            name: rule for name, rule in LLAMA.from_hf.items() if name != "norm_epsilon"}}),
        called("row_missing", weights=without("layers.*.mlp.norm")),
        called("tensor_twice", weights=(*without("layers.*.attn.out"), o_as_q)),
        called("no_biases", from_hf={{name: rule for name, rule in LLAMA.from_hf.items() if "bias" not in name}}),
    ]


def plan(shape, recipe, cluster, precision):
    """One problem at a time, another plan at every call, and more rows than the recipe has."""
    from loong_core.errors import RecipeError
    from loong_core.parallel.plan import plan

    try:
        found = plan(shape, recipe, cluster, precision)
    except RecipeError as error:
        raise RecipeError(error.problems[0].replace("99", "many"))
    ROWS.append(1)
    return replace(found, planner="hasty", reasons=(str(len(ROWS)),), micro_batches=found.micro_batches + 1)


def sound_plan(shape, recipe, cluster, precision):
    from loong_core.parallel.plan import plan

    return replace(plan(shape, recipe, cluster, precision), planner="sloppy")


def build(run):
    """An engine that evaluates by training, and reports sums instead of means."""
    from loong_core.parallel import megatron

    class Sloppy(megatron.MegatronEngine):
        def forward_backward(self, batches, step):
            found = super().forward_backward(batches, step)
            return {{**found, "loss": found["loss"] * len(batches)}}

        def evaluate(self, batches):
            found = self.forward_backward(batches, 0)
            self.step(1e-3)
            return found

    made = megatron.build(run)
    made.__class__ = Sloppy
    return made


@hookimpl
def loong_parallel_planners():
    return [
        ParallelPlanner(name="hasty", plan="planted:plan", build="planted:build"),
        ParallelPlanner(name="sloppy", plan="planted:sound_plan", build="planted:build"),
    ]


@hookimpl
def loong_precision_policies():
    return [
        PrecisionPolicy(name="liar", parameters="float32", activations="bfloat16"),
        PrecisionPolicy(name="typo", parameters="float33", activations="float32", needs=frozenset({{"float33"}})),
    ]


def failing_probe():
    import torch

    raise RuntimeError("the driver is asleep")


@hookimpl
def loong_backends():
    return [Backend(name="rude", device_type="cpu", collective="gloo", probe="planted:failing_probe", setup="a:b",
                    layer_provider="a:b", capabilities=frozenset({{"Teleport"}}), priority=-9)]


@hookimpl
def loong_recipes():
    return [RecipeFolder(name="planted", path=Path({folder!r}))]
'''


@pytest.fixture(autouse=True)
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The faulty plugin, and a folder for its recipes."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    path = tmp_path / "planted.py"
    path.write_text(PLANTED.format(rows=[], folder=str(folder)))
    monkeypatch.setenv("LOONG_PLUGIN_FILES", str(path))
    sys.modules.pop("planted", None)
    yield folder
    sys.modules.pop("planted", None)


def suite(contract: type, **attributes: Any) -> Any:
    """A use of a contract, made on the spot."""
    return type("Planted", (contract,), attributes)


def failures(contract: Any, names: dict[str, tuple[Any, ...]]) -> set[str]:
    """Which of these tests fail."""
    found = set()
    for name, arguments in names.items():
        try:
            getattr(contract(), f"test_{name}")(*arguments)
        except (AssertionError, pytest.fail.Exception):
            found.add(name)
    return found


# ---------------------------------------------------------------------------------------------------- families
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wrong_epsilon", {"logits", "loss", "gradients"}),
        ("row_missing", {"every_tensor_is_used_once"}),
        ("tensor_twice", {"every_tensor_is_used_once"}),
        ("no_biases", {"config_is_read", "every_tensor_is_used_once"}),
    ],
)
def test_faulty_family(name: str, expected: set[str], tmp_path: Path) -> None:
    from loong_core.testing.family import _measure, _write_reference

    contract = suite(FamilyContract, family=name, config={"model_type": "llama", **SIZES})
    run_ranks(1, _write_reference, contract, tmp_path, megatron=False)
    tests: dict[str, tuple[Any, ...]] = {"config_is_read": (tmp_path,), "every_tensor_is_used_once": (tmp_path,)}
    if name == "wrong_epsilon":  # the others cannot be loaded, which the whole suite reports as errors
        measured = run_ranks(1, _measure, contract, tmp_path)[0]
        tests |= {"logits": (measured,), "loss": (measured, tmp_path), "gradients": (measured,)}
        tests |= {"packing_is_exact": (measured,), "export_is_byte_equal": (measured,)}
    assert failures(contract, tests) == expected


# ------------------------------------------------------------------------------------------ planners, engines
class Hasty(PlannerContract):
    planner = "hasty"
    family = "llama"
    config: ClassVar = {"architectures": ["LlamaForCausalLM"], **SIZES}


def test_hasty_planner() -> None:
    tests = {"plan_is_deterministic": (1,), "products_equal_the_world": (2,), "all_problems_at_once": ()}
    assert failures(Hasty, tests) == set(tests)


def test_sloppy_engine(tmp_path: Path) -> None:
    contract = suite(EngineContract, planner="sloppy", family="llama", config=Hasty.config)
    measured = run_ranks(1, contract._measure, tmp_path)[0]
    names = [name.removeprefix("test_") for name in dir(contract) if name.startswith("test_")]
    found = failures(contract, {name: (measured,) for name in names})
    assert {"loss_is_the_mean_over_counted_targets", "evaluation_leaves_no_trace"} <= found
    assert not {"parameters_are_those_described", "gather_gives_full_tensors"} & found


# ---------------------------------------------------------------------------------------------------- policies
def test_policies_that_do_not_keep_their_word(tmp_path: Path) -> None:
    from loong_core.testing.precision import _measure

    liar = suite(PrecisionContract, policy="liar", family="llama", config=Hasty.config)
    measured = run_ranks(1, _measure, liar.recipe("liar"), tmp_path)[0]
    assert failures(liar, {"formats_are_honoured": (measured,), "names_are_torch_dtypes": ()}) == {
        "formats_are_honoured"
    }
    typo = suite(PrecisionContract, policy="typo", family="llama", config=Hasty.config)
    tests = {"names_are_torch_dtypes": (), "missing_capability_is_named": (tmp_path,)}
    assert failures(typo, tests) == set(tests)


# ---------------------------------------------------------------------------------------------------- backends
def test_rude_backend() -> None:
    rude = suite(BackendContract, backend="rude", family="llama", config=Hasty.config)
    assert failures(rude, {"probe_is_safe_and_cheap": (), "descriptor_is_plain": ()}) == {
        "probe_is_safe_and_cheap",
        "descriptor_is_plain",
    }


def test_undeclared_questions_and_unshown_capabilities() -> None:
    class Provider:
        def layer_norm(self, rms_norm: bool = False) -> type:
            return object

    def ask(rank: int) -> list[str]:
        return backend_suite.provider_problems(Provider())

    problems = " ".join(run_ranks(1, ask)[0])
    assert "it has no method core_attention" in problems
    assert "layer_norm takes no argument for_qk" in problems
    run: Any = SimpleNamespace(device="cpu")
    assert "nobody shows it" in str(backend_suite._shown("teleport", None, run))
    assert backend_suite._shown("bf16", None, run) is None


# ----------------------------------------------------------------------------------------------------- recipes
def test_recipes_that_do_not_hold(planted: Path) -> None:
    contract = suite(RecipeContract, folder="planted")
    assert failures(contract, {"folder_holds_recipes": ()}) == {"folder_holds_recipes"}
    sound = {
        "model": {"family": "llama", "config": Hasty.config},
        "data": {"path": "rows.jsonl", "seq_len": 16, "global_batch": 8},
        "parallel": {"tp": 2},
        "launch": {"devices": 4},
        "backend": "cuda",
    }
    path = planted / "sound.json"
    path.write_text(json.dumps(sound))
    names = [name.removeprefix("test_") for name in dir(contract) if name.startswith("test_recipe")]
    assert failures(contract, {name: (path,) for name in names}) == set()
    path = planted / "Bad-Name.yaml"
    path.write_text(f"model: {{weights: ~/model}}\n{json.dumps({'data': {'seq_len': 7}})[1:-1]}\n")
    bad = failures(contract, {"recipe_is_named_and_described": (path,), "recipe_names_no_place_of_its_author": (path,)})
    assert len(bad) == 2
