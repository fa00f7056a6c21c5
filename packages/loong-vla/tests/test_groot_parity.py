"""GR00T N1.7 against LeRobot's: the same prediction, loss, gradients and samples, and checkpoints that go both ways."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lerobot_peer
import pytest
import torch
from groot_tiny import BASE, QWEN, build_model, loss_of
from safetensors.torch import load_file
from torch import Tensor

from loong_ckpt import hf
from loong_core.precision import POLICIES
from loong_core.recipe import Recipe
from loong_core.types import ParallelPlan
from loong_core.weights import WeightMap, verb_of
from loong_vla.groot import Groot
from loong_vla.groot_shape import describe
from loong_vla.models.groot import GROOT_N17

ask_peer = partial(lerobot_peer.run, "groot_peer.py")
CASES: dict[str, dict[str, Any]] = {
    "uneven": {
        **{"seed": 1, "cameras": 3, "image": [16, 24], "camera_mask": [[1, 1, 0], [0, 1, 0], [1, 1, 1]]},
        **{"words": [5, 9, 4], "more_padding": 3, "real_steps": [7, 3, 5], "real_actions": 6, "embodiment": [4, 1, 4]},
        **{"backbone": QWEN, "base": BASE, "tune": {}, "embodiments": [1, 4]},
    },
    "even": {
        **{"seed": 2, "cameras": 2, "image": [16, 16], "camera_mask": [[1, 1], [1, 1]]},
        **{"words": [6, 6], "more_padding": 0, "real_steps": [7, 7], "real_actions": 9, "embodiment": [3, 3]},
        **{"backbone": QWEN, "base": BASE, "tune": {"tune_top_llm_layers": 2}, "embodiments": [3]},
    },
    "all": {
        **{"seed": 3, "cameras": 1, "image": [24, 16], "camera_mask": [[1], [1], [1]]},
        **{"words": [3, 8, 2], "more_padding": 0, "real_steps": [7, 2, 7], "real_actions": 2, "embodiment": [0, 1, 2]},
        **{"backbone": QWEN, "base": {**BASE, "vl_self_attention_cfg": {"num_layers": 0}}},
        **{"tune": {"tune_llm": True, "tune_visual": True}, "embodiments": None},
    },
}
TOLERANCE = 1e-4
SINGLE = "model.safetensors"
STATISTICS = {
    "observation.state": {"min": [0.0, 1.0, -3.0], "max": [2.0, 2.0, -3.0]},
    "action": {"min": [-1.0, 10.0], "max": [1.0, 30.0]},
}
"""As a run leaves them in its folder."""


class Computed(NamedTuple):
    """A case as LeRobot computed it."""

    case: dict[str, Any]
    folder: Path
    batch: dict[str, Tensor]
    results: dict[str, Tensor]


@pytest.fixture(scope="module", params=CASES)
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Computed:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "case.json").write_text(json.dumps(case))
    ask_peer("compute", folder)
    batch, results = (load_file(folder / f"{name}.safetensors") for name in ("batch", "results"))
    return Computed(case, folder, batch, results)


def config_of(computed: Computed, kind: str = "checkpoint", **more: Any) -> dict[str, Any]:
    written = json.loads((computed.folder / kind / "config.json").read_text())
    embodiments = computed.case["embodiments"] or list(range(BASE["max_num_embodiments"]))
    return {**written, "embodiments": embodiments, **computed.case["tune"], **more}


def load_rows(model: Groot, tensors: dict[str, Tensor]) -> set[str]:
    """Fill the model by the family's rows; returns the names of tensors used."""
    weights, used = WeightMap(GROOT_N17.weights), set()
    for parameter in model.local_parameters():
        spec = parameter.spec
        row = next(row for row in weights.candidates(spec) if all(name in tensors for name in row.hf))
        parts = [tensors[name] if row.verb != "stack" else tensors[name][spec.expert] for name in row.hf]
        parameter.assign(verb_of(row).pack(parts, model.shape.fields))
        used.update(row.hf)
    return used


def loaded(computed: Computed, **more: Any) -> Groot:
    model = build_model(config_of(computed, **more))
    load_rows(model, load_file(computed.folder / "checkpoint" / SINGLE))
    return model


def test_prediction_loss_and_every_gradient(peer: Computed) -> None:
    """With padding seen as the peer sees it, in one batch; what is frozen has no gradient."""
    model = loaded(peer, padding_as_keys=True)
    prediction, loss = loss_of(model, peer.batch)
    torch.testing.assert_close(prediction, peer.results["prediction"], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(loss, peer.results["loss"], rtol=TOLERANCE, atol=0.0)
    loss.backward()
    theirs = {name.partition("/")[2]: grad for name, grad in peer.results.items() if name.startswith("gradient/")}
    left = dict(theirs)
    weights = WeightMap(GROOT_N17.weights)
    for parameter in model.local_parameters():
        spec, ours = parameter.spec, parameter.gradient
        row = next(row for row in weights.candidates(spec) if row.hf[0].startswith("_groot_model."))
        if spec.frozen:
            assert ours is None and not parameter.trained.requires_grad, spec.role
            if row.verb == "stack":
                assert not theirs[row.hf[0]][spec.expert].any(), "LeRobot trained a slot that no sample has"
            else:
                assert not any(name in theirs for name in row.hf), spec.role
            continue
        if all(name not in theirs for name in row.hf):
            assert ours is None or not ours.any(), spec.role
            continue
        assert ours is not None, spec.role
        for name, mine in zip(row.hf, verb_of(row).unpack(ours, model.shape.fields), strict=True):
            left.pop(name, None)
            grad = theirs[name] if row.verb != "stack" else theirs[name][spec.expert]
            # The biases of keys cancel in the softmax: what is left there is rounding.
            scale = torch.tensor(0.01) if name.endswith("to_k.bias") else grad.norm()
            assert (mine - grad).norm() <= TOLERANCE * scale, (name, float((mine - grad).norm()), float(scale))
    assert not left


def test_padding_is_nobodys_key(peer: Computed) -> None:
    """By default every sample has the prediction it has alone, however long the others are."""
    model = loaded(peer)
    with torch.no_grad():
        torch.testing.assert_close(model(peer.batch), peer.results["alone"], rtol=TOLERANCE, atol=TOLERANCE)


def test_samples(peer: Computed) -> None:
    alone, together = (loaded(peer, padding_as_keys=seen).sample(peer.batch) for seen in (False, True))
    torch.testing.assert_close(together, peer.results["sampled"], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(alone, peer.results["sampled_alone"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["checkpoint", "base"])
def test_every_tensor_is_used_or_known_to_be_unused(peer: Computed, kind: str) -> None:
    tensors = load_file(peer.folder / kind / SINGLE)
    model = build_model(config_of(peer, kind))
    used, weights = load_rows(model, tensors), WeightMap(GROOT_N17.weights)
    twins = set(weights.twins(model.shape.parameters[0]))
    assert not [name for name in tensors if name not in used | twins and not weights.is_dropped(name)]


def trained(model: Groot) -> Any:
    """As far as checkpoint formats look at an engine: one process that holds everything."""
    whole = {parameter.spec.role: parameter for parameter in model.local_parameters()}
    return SimpleNamespace(
        parameters=whole.values, gather=lambda parameter: parameter.tensor.detach(), weights_changed=lambda: None
    )


def run_on(computed: Computed, kind: str, folder: Path) -> Any:
    config, weights = config_of(computed, kind), computed.folder / kind
    changes = {"embodiments": config["embodiments"], **computed.case["tune"]}
    recipe = Recipe.model_validate({"model": {"weights": weights, "config": changes}})
    return SimpleNamespace(
        recipe=recipe, folder=folder, plan=ParallelPlan(planner="torch", world=1), family=GROOT_N17, config=config,
        shape=describe(GROOT_N17, config), precision=POLICIES[0], device="cpu", rank=0, world=1, notes=[], is_main=True,
        step=0,
    )  # fmt: skip


def test_exports_open_in_lerobot(peer: Computed, tmp_path: Path) -> None:
    """After a step of training, from a policy and from a base model: frozen tensors keep every bit, and LeRobot draws
    the same samples as we."""
    out = {kind: tmp_path / "exported" / kind for kind in ("checkpoint", "base")}
    models = {kind: stepped_and_exported(peer, kind, out[kind]) for kind in out}
    ask_peer("sample", peer.folder, *out.values())
    sampled = load_file(peer.folder / "sampled.safetensors")
    for kind, model in models.items():
        assert (sampled[kind] - peer.results["sampled_alone"]).abs().max() > 100 * TOLERANCE, "the step changed nothing"
        torch.testing.assert_close(model.sample(peer.batch), sampled[kind], rtol=TOLERANCE, atol=TOLERANCE)
        # LeRobot scales by the run's statistics; a number that never changes is 0 to the policy.
        state = torch.tensor([-0.5, 1.0, 0.0]) if kind == "checkpoint" else sampled["checkpoint_state"][0, 0, :3]
        torch.testing.assert_close(sampled[f"{kind}_state"][0, 0, :3], state)
        low, high = torch.tensor([-1.0, 10.0]), torch.tensor([1.0, 30.0])
        action = torch.linspace(-0.9, 0.9, 14).reshape(7, 2)
        torch.testing.assert_close(sampled[f"{kind}_action"][0], low + (action + 1) / 2 * (high - low))


def stepped_and_exported(computed: Computed, kind: str, out: Path) -> Groot:
    run, embodiment = run_on(computed, kind, out.parent / f"run-{kind}"), computed.case["embodiment"][0]
    (computed.folder / kind / "embodiment_id.json").write_text(json.dumps({"new_embodiment": embodiment}))
    run.folder.mkdir(exist_ok=True, parents=True)
    (run.folder / "statistics.json").write_text(json.dumps(STATISTICS))
    model = build_model(run.config)
    hf.load(run.recipe.model.weights, run, trained(model))
    loss_of(model, computed.batch)[1].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.02 * parameter.grad
    hf.save(out, run, trained(model))
    # LeRobot takes any folder with a model.safetensors for a policy of its own.
    written = SINGLE if kind == "checkpoint" else "model-00001-of-00001.safetensors"
    before, after = load_file(computed.folder / kind / SINGLE), load_file(out / written)
    assert (out / "model.safetensors.index.json").is_file() == (kind == "base")
    assert before.keys() == after.keys()
    prefix = "_groot_model." if kind == "checkpoint" else ""
    changed = {name.partition("/_groot_model.")[2] for name in computed.results if name.startswith("gradient/")}
    if "backbone.model.model.language_model.embed_tokens.weight" in changed:
        changed.add("backbone.model.lm_head.weight")
    frozen = [name for name in before if name.removeprefix(prefix) not in changed]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    assert (out / "embodiment_id.json").is_file()
    return model
