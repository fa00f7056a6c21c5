"""Pi0.5 against LeRobot's: the same prediction, loss, gradients and samples, and checkpoints that go both ways."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lerobot_peer
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loong_ckpt import hf
from loong_core.ops import OPS as ROWS
from loong_core.ops import Ops, bind
from loong_core.precision import POLICIES
from loong_core.recipe import Recipe
from loong_core.registry import resolve
from loong_core.types import ModelShape, OpRequest, ParallelPlan
from loong_core.weights import WeightMap, verb_of
from loong_vla.models.pi05 import PI05
from loong_vla.pi05 import Pi05, build
from loong_vla.prompts import pi05_prompt

ask_peer = partial(lerobot_peer.run, "pi05_peer.py")
SIZES: dict[str, int] = {
    **{"layers": 3, "hidden": 40, "ffn": 56, "heads": 8, "kv_heads": 1, "head_dim": 12, "vocabulary": 61},
    **{"expert_hidden": 24, "expert_ffn": 36, "image_size": 42, "patch": 14},
    **{"vision_hidden": 32, "vision_ffn": 44, "vision_layers": 2, "vision_heads": 4},
}
CASES: dict[str, dict[str, Any]] = {
    "padded": {
        **{"seed": 1, "cameras": 3, "horizon": 5, "action_size": 7, "real_actions": 4, "prompt_length": 9, "steps": 10},
        **{"camera_mask": [[1, 1, 0], [0, 1, 0], [1, 1, 1]], "prompts": [4, 1, 9]},
        "sizes": SIZES,
    },
    "full": {
        **{"seed": 2, "cameras": 1, "horizon": 7, "action_size": 5, "real_actions": 5, "prompt_length": 6, "steps": 3},
        **{"camera_mask": [[1], [1]], "prompts": [6, 6]},
        "sizes": {**SIZES, "kv_heads": 2, "layers": 2, "image_size": 28},
    },
}
TOLERANCE = 1e-4
SINGLE = "model.safetensors"


STATISTICS: dict[str, dict[str, list[float]]] = {
    "observation.state": {"q01": [-1.0, 0.0, 2.0], "q99": [1.0, 3.0, 2.5], "mean": [0.1, 1.0, 2.2], "count": [40.0]},
    "action": {"q01": [-2.0, -1.0, 0.0, 1.0], "q99": [2.0, 3.0, 0.5, 4.0], "count": [40.0]},
}
GIVEN: dict[str, Any] = {"state": [0.3, 2.9, 2.1], "task": "put_the cup\ndown", "action": [[0.5, -1.0, 0.1, 2.0]]}


class Computed(NamedTuple):
    """A case as LeRobot computed it."""

    case: dict[str, Any]
    folder: Path
    batch: dict[str, Tensor]
    results: dict[str, Tensor]


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Computed]:
    """All cases, of one start of LeRobot, which takes most of the time."""
    folders = {name: tmp_path_factory.mktemp(name) for name in CASES}
    for name, folder in folders.items():
        (folder / "case.json").write_text(json.dumps(CASES[name]))
    ask_peer("compute", *folders.values())
    return {name: read_case(name, folder) for name, folder in folders.items()}


def read_case(name: str, folder: Path) -> Computed:
    batch, results = (load_file(folder / f"{what}.safetensors") for what in ("batch", "results"))
    return Computed(CASES[name], folder, batch, results)


@pytest.fixture(params=CASES)
def peer(request: pytest.FixtureRequest, computed: dict[str, Computed]) -> Computed:
    return computed[request.param]


def config_of(computed: Computed, **more: Any) -> dict[str, Any]:
    written = json.loads((computed.folder / "checkpoint" / "config.json").read_text())
    return {**written, "sizes": computed.case["sizes"], **more}


def ops() -> Ops:
    return bind(ROWS, OpRequest("cpu", "float32", {}, {}), {})


def build_model(shape: ModelShape) -> Pi05:
    context = SimpleNamespace(ops=ops(), precision=POLICIES[0], device="cpu")
    return build(shape, context)[0]  # type: ignore[arg-type]


def load_rows(model: Pi05, tensors: dict[str, Tensor]) -> set[str]:
    """Fill the model by the family's rows; returns the names of tensors used."""
    weights, used = WeightMap(PI05.weights), set()
    for parameter in model.local_parameters():
        row = next(row for row in weights.candidates(parameter.spec) if all(name in tensors for name in row.hf))
        parameter.assign(verb_of(row).pack([tensors[name] for name in row.hf], model.shape.fields))
        used.update(row.hf)
    return used


def loaded(computed: Computed, **more: Any) -> Pi05:
    model = build_model(resolve(PI05.describe)(PI05, config_of(computed, **more)))
    load_rows(model, load_file(computed.folder / "checkpoint" / SINGLE))
    return model


def loss_of(model: Pi05, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    prediction = model(batch)
    error = (prediction - model.target(batch)).square()
    return prediction, (error * batch["action_mask"]).sum() / batch["action_mask"].sum()


@pytest.mark.parametrize("skip_padding", [True, False])
def test_prediction_loss_and_every_gradient(peer: Computed, skip_padding: bool) -> None:
    model = loaded(peer, skip_padding=skip_padding)
    prediction, loss = loss_of(model, peer.batch)
    torch.testing.assert_close(prediction, peer.results["prediction"], rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(loss, peer.results["loss"], rtol=TOLERANCE, atol=0.0)
    loss.backward()
    theirs = {name.partition("/")[2]: grad for name, grad in peer.results.items() if name.startswith("gradient/")}
    weights = WeightMap(PI05.weights)
    for parameter in model.local_parameters():
        row = next(row for row in weights.candidates(parameter.spec) if all(name in theirs for name in row.hf))
        assert parameter.tensor.grad is not None, parameter.spec.role
        parts = verb_of(row).unpack(parameter.tensor.grad, model.shape.fields)
        for name, ours in zip(row.hf, parts, strict=True):
            grad = theirs.pop(name)
            # The biases of keys in the vision tower cancel in the softmax: what is left there is rounding.
            scale = grad.norm() if not name.endswith("k_proj.bias") else torch.tensor(0.01)
            assert scale > 0, name
            assert (ours - grad).norm() <= TOLERANCE * scale, (name, float((ours - grad).norm() / scale))
    assert all(float(grad.abs().max()) == 0.0 for grad in theirs.values()), sorted(theirs)
    assert all(weights.is_dropped(name) for name in theirs)


@pytest.mark.parametrize("skip_padding", [True, False])
def test_samples(peer: Computed, skip_padding: bool) -> None:
    model = loaded(peer, skip_padding=skip_padding)
    sampled = model.sample(peer.batch, peer.case["steps"])
    torch.testing.assert_close(sampled, peer.results["sampled"], rtol=TOLERANCE, atol=TOLERANCE)


def test_every_tensor_is_used_or_known_to_be_unused(peer: Computed) -> None:
    tensors = load_file(peer.folder / "checkpoint" / SINGLE)
    model = build_model(resolve(PI05.describe)(PI05, config_of(peer)))
    used, weights = load_rows(model, tensors), WeightMap(PI05.weights)
    assert not [name for name in tensors if name not in used and not weights.is_dropped(name)]


def trained(model: Pi05) -> Any:
    """As far as checkpoint formats look at an engine: one process that holds everything."""
    whole = {parameter.spec.role: parameter for parameter in model.local_parameters()}
    return SimpleNamespace(
        parameters=whole.values, gather=lambda parameter: parameter.tensor.detach(), weights_changed=lambda: None
    )


def run_on(computed: Computed, weights: Path | None, folder: Path) -> Any:
    config = config_of(computed)
    recipe = Recipe.model_validate({"model": {"weights": weights, "config": {"sizes": config["sizes"]}}})
    plan = ParallelPlan(planner="torch", world=1)
    return SimpleNamespace(
        recipe=recipe, folder=folder, plan=plan, family=PI05, config=config, shape=resolve(PI05.describe)(PI05, config),
        precision=POLICIES[0], device="cpu", rank=0, world=1, notes=[], is_main=True, step=0,
    )  # fmt: skip


def test_exports_open_in_lerobot(computed: dict[str, Computed], tmp_path: Path) -> None:
    """After a step of training, from each kind of checkpoint and from none: LeRobot draws the same samples as we."""
    peer = computed["padded"]
    converted = tmp_path / "converted"
    converted.mkdir()
    save_file(openpi_names(load_file(peer.folder / "checkpoint" / SINGLE)), converted / SINGLE)
    (converted / "config.json").write_text(json.dumps(config_of(peer)))
    ours, folders = {}, [tmp_path / f"out{number}" for number in range(3)]
    for out, weights in zip(folders, (peer.folder / "checkpoint", converted, None), strict=True):
        run = run_on(peer, weights, tmp_path)
        model = build_model(run.shape)
        if weights is None:
            load_rows(model, load_file(peer.folder / "checkpoint" / SINGLE))
        else:
            hf.load(weights, run, trained(model))
        loss_of(model, peer.batch)[1].backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= 0.05 * parameter.grad
        if out == folders[1]:
            (run.folder / "statistics.json").write_text(json.dumps(STATISTICS))
        hf.save(out, run, trained(model))
        without_sizes(out / "config.json")
        ours[out] = model.sample(peer.batch, peer.case["steps"])
    (folders[2] / "given.json").write_text(json.dumps(GIVEN))
    (folders[1] / "given.json").write_text(json.dumps(GIVEN))
    ask_peer("sample", peer.folder, *folders)
    for out, sampled in ours.items():
        theirs = load_file(out / "sampled.safetensors")["sampled"]
        torch.testing.assert_close(sampled, theirs, rtol=TOLERANCE, atol=TOLERANCE)
        assert (theirs - peer.results["sampled"]).abs().max() > 100 * TOLERANCE, "the step changed nothing"
    assert not (folders[0] / "processed.json").exists()
    for out in folders[1:]:
        check_processors(json.loads((out / "processed.json").read_text()))


def without_sizes(path: Path) -> None:
    """LeRobot knows only the published sizes; the peer is given those of the test in another way."""
    config = json.loads(path.read_text())
    assert config.pop("sizes") == SIZES
    path.write_text(json.dumps(config))


def check_processors(processed: dict[str, Any]) -> None:
    """What LeRobot's processors of an export make of a robot's numbers is what ours make of them in training."""
    low, high = (np.array(STATISTICS["observation.state"][name]) for name in ("q01", "q99"))
    state = (np.array(GIVEN["state"]) - low) / (high - low) * 2 - 1
    assert processed["prompt"] == [pi05_prompt(GIVEN["task"], state.astype(np.float32))]
    low, high = (np.array(STATISTICS["action"][name]) for name in ("q01", "q99"))
    np.testing.assert_allclose(processed["action"], (np.array(GIVEN["action"]) + 1) / 2 * (high - low) + low, 1e-5)
    cameras = {f"observation.images.camera{index}": [3, 42, 42] for index in range(3)}
    assert processed["features"] == {**cameras, "observation.state": [3], "action": [4]}


def openpi_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As OpenPI's converter writes them: no prefix, and the embedding only as the head that was tied to it."""
    converted = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    embedding = converted.pop("paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight")
    converted["paligemma_with_expert.paligemma.lm_head.weight"] = embedding
    return converted


def test_openpi_layout(peer: Computed) -> None:
    """Names without LeRobot's prefix, the embedding stored as the head, older names of the time layers."""
    converted = openpi_names(load_file(peer.folder / "checkpoint" / SINGLE))
    for end in ("weight", "bias"):
        converted[f"action_time_mlp_in.{end}"] = converted.pop(f"time_mlp_in.{end}")
        converted[f"action_time_mlp_out.{end}"] = converted.pop(f"time_mlp_out.{end}")
    facts = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m", "precision": "float32"}
    facts |= {"action_dim": peer.case["action_size"], "action_horizon": peer.case["horizon"]}
    model = build_model(resolve(PI05.describe)(PI05, {**facts, "sizes": peer.case["sizes"]}))
    load_rows(model, converted)
    with torch.no_grad():
        prediction = model(peer.batch)
    torch.testing.assert_close(prediction, peer.results["prediction"], rtol=TOLERANCE, atol=TOLERANCE)
