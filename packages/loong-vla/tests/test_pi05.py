"""Pi0.5 by itself: what it may not depend on, how it is built, and what its configuration may say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from loong_core.errors import RecipeError, Unsupported, UserError
from loong_core.ops import OPS, bind
from loong_core.precision import POLICIES
from loong_core.types import ModelShape, OpRequest
from loong_core.weights import WeightMap, verb_of
from loong_vla import flops
from loong_vla.models.pi05 import PI05, presets
from loong_vla.packing import PREFIX, packing_of
from loong_vla.pi05 import FLOAT32, Pi05, build, sinusoids
from loong_vla.pi05_shape import describe

CONFIG: dict[str, Any] = {
    **{"type": "pi05", "paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"},
    **{"chunk_size": 3, "max_action_dim": 5, "max_state_dim": 4, "image_resolution": [20, 20]},
    "sizes": {
        **{"layers": 2, "hidden": 24, "ffn": 40, "heads": 4, "kv_heads": 2, "head_dim": 6, "vocabulary": 31},
        **{"expert_hidden": 16, "expert_ffn": 20, "patch": 10},
        **{"vision_hidden": 12, "vision_ffn": 28, "vision_layers": 2, "vision_heads": 3},
    },
}


def shape_of(**changes: Any) -> ModelShape:
    return describe(PI05, {**CONFIG, **changes})


def build_policy(shape: ModelShape, precision: str = "fp32", seed: int = 5, backend: str = "cpu") -> Pi05:
    policy = next(policy for policy in POLICIES if policy.name == precision)
    ops = bind(OPS, OpRequest(backend, policy.activations, {}, {}), {})
    context = SimpleNamespace(ops=ops, precision=policy, device="cpu")
    model = build(shape, context)[0]  # type: ignore[arg-type]
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


def draw_batch(samples: int = 3, cameras: int = 2, length: int = 6) -> dict[str, Tensor]:
    torch.manual_seed(9)
    mask = torch.ones(samples, cameras, dtype=torch.bool)
    mask[0, 1] = False
    return {
        "images": torch.randint(0, 256, (samples, cameras, 20, 20, 3), dtype=torch.uint8),
        "camera_mask": mask,
        "tokens": torch.randint(1, 31, (samples, length)),
        "token_mask": torch.arange(length) < torch.tensor([2, 6, 3, 1, 4][:samples])[:, None],
        "actions": torch.randn(samples, 3, 5),
        "noise": torch.randn(samples, 3, 5),
        "time": torch.rand(samples),
    }


def gradients(model: Pi05, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    prediction = model(batch)
    (prediction - model.target(batch)).square().sum().backward()
    return prediction.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=1e-5, atol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        if not name.endswith("attn.qkv.bias"):  # those of keys are rounding alone
            assert (gradient - other[1][name]).norm() <= 2e-5 * gradient.norm(), name


def test_padding_changes_nothing() -> None:
    """Not what stands in absent cameras and behind the prompt, nor whether it is computed, nor a longer padding."""
    model, batch = build_policy(shape_of()), draw_batch()
    reference = gradients(model, batch)
    noisy = {name: tensor.clone() for name, tensor in batch.items()}
    noisy["images"][~batch["camera_mask"]] = 77
    noisy["tokens"][~batch["token_mask"]] = 11
    assert_same(reference, gradients(model, noisy))
    everything = build_policy(shape_of(skip_padding=False))
    assert_same(reference, gradients(everything, noisy))
    longer = {**batch, **{name: torch.cat([batch[name]] * 2, 1) for name in ("tokens", "token_mask")}}
    longer["token_mask"][:, 6:] = False
    longer["images"] = torch.cat([batch["images"]] * 2, 1)
    longer["camera_mask"] = torch.cat([batch["camera_mask"], torch.zeros_like(batch["camera_mask"])], 1)
    assert_same(reference, gradients(model, longer))


def test_real_inputs_matter() -> None:
    """The counterpart: every image and prompt that is there changes the prediction of its sample, and of no other."""
    model, batch = build_policy(shape_of()), draw_batch()
    reference = model(batch)
    for name, place in (("images", (1, 1)), ("tokens", (1, 5)), ("noise", (1, 0)), ("time", (1,))):
        changed = {**batch, name: batch[name].clone()}
        changed[name][place] = 3
        moved = (model(changed) - reference).abs().amax(dim=(1, 2))
        assert moved[1] > 1e-4 and moved[0] < 1e-5 and moved[2] < 1e-5, name


def test_samples_do_not_depend_on_their_batch() -> None:
    model, batch = build_policy(shape_of()), draw_batch(5)
    together = model(batch)
    for sample in range(5):
        alone = model({name: tensor[sample : sample + 1] for name, tensor in batch.items()})
        torch.testing.assert_close(alone[0], together[sample], rtol=1e-5, atol=1e-5)


def test_a_packed_batch_gives_the_same() -> None:
    model, batch = build_policy(shape_of()), draw_batch()
    packed = {**batch, **model.packing(batch)}
    assert packing_of(packed) is not None
    assert torch.equal(model(packed), model(batch))
    assert torch.equal(model.sample(packed, 2), model.sample(batch, 2))


def test_floating_point_images_are_taken_as_they_are() -> None:
    model, batch = build_policy(shape_of()), draw_batch()
    floats = {**batch, "images": batch["images"].double() / 255 * 2 - 1}
    torch.testing.assert_close(model(floats), model(batch), rtol=1e-5, atol=1e-5)


def test_sampling_integrates_the_velocity() -> None:
    model, batch = build_policy(shape_of()), draw_batch()
    x = batch["noise"]
    for step in range(4):
        # With the actions at x and no noise left out, the model sees exactly x.
        at = {**batch, "actions": x, "noise": x, "time": torch.full((3,), 1 - step / 4)}
        x = x - model(at).detach() / 4
    torch.testing.assert_close(model.sample(batch, 4), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_built_model_is_the_described_one(precision: str) -> None:
    shape = shape_of()
    model = build_policy(shape, precision)
    built = {parameter.spec.role: parameter.tensor for parameter in model.local_parameters()}
    assert {role: tuple(tensor.shape) for role, tensor in built.items()} == {
        spec.role: spec.shape for spec in shape.parameters
    }
    wide = {role for role, tensor in built.items() if tensor.dtype == torch.float32}
    assert wide == {role for role in built if precision == "fp32" or role.split(".")[0].split("_")[0] in FLOAT32}
    prediction = model(draw_batch())
    assert prediction.dtype == torch.float32 and prediction.isfinite().all()


def test_units_are_disjoint_and_of_one_dtype() -> None:
    model = build_policy(shape_of(), "bf16")
    owned = [id(parameter) for unit in model.units() for parameter in unit.parameters()]
    assert len(owned) == len(set(owned))
    assert all(len({parameter.dtype for parameter in unit.parameters()}) == 1 for unit in model.units())
    rest = {name.split(".")[0] for name, parameter in model.named_parameters() if id(parameter) not in set(owned)}
    assert rest == {"vision", "projector", "modulation"}


def test_bf16_is_close() -> None:
    wide, narrow = build_policy(shape_of()), build_policy(shape_of(), "bf16")
    batch = draw_batch()
    with torch.no_grad():
        for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
            other.copy_(one)
        difference = (wide(batch) - narrow(batch)).norm() / wide(batch).norm()
    assert 0 < difference < 0.05


@pytest.mark.parametrize(
    ("key", "frozen"), [("freeze_vision_encoder", ("vision",)), ("train_expert_only", ("vision", "projector", "embed"))]
)
def test_frozen_parts_have_no_gradient(key: str, frozen: tuple[str, ...]) -> None:
    shape = shape_of(**{key: True})
    model, batch = build_policy(shape), draw_batch()
    _, found = gradients(model, batch)
    for parameter in model.local_parameters():
        role = parameter.spec.role
        part = role.startswith(frozen) or (key == "train_expert_only" and ".prefix." in role)
        assert parameter.spec.frozen == part == (parameter.tensor.grad is None), role
    reference = gradients(build_policy(shape_of()), batch)[1]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-5)


def test_the_published_size() -> None:
    """3.353 billion parameters are trained by the peers; those of the last layer that nothing reads are not held."""
    shape = describe(PI05, presets()["pi05"])
    total = sum(spec.size for spec in shape.parameters)
    idle = 2 * 2048 * 2048 + 3 * 2048 * 16384 + 2 * 2048
    assert total + idle == 3_353_433_872
    assert shape.fields["image_tokens"] == 256 and shape.fields["prompt_length"] == 200
    weights = WeightMap(PI05.weights)
    names = [name for spec in shape.parameters for name in weights.candidates(spec)[0].hf]
    assert len(names) == len(set(names)) == 804


def test_rows_are_exact_inverses() -> None:
    weights, model = WeightMap(PI05.weights), build_policy(shape_of())
    for parameter in model.local_parameters():
        for row in weights.candidates(parameter.spec):
            parts = verb_of(row).unpack(parameter.tensor.detach(), model.shape.fields)
            assert len(parts) == len(row.hf)
            assert torch.equal(verb_of(row).pack(parts, model.shape.fields), parameter.tensor)


def test_sinusoids_have_the_periods_of_their_ends() -> None:
    waves = sinusoids(torch.tensor([0.25, 0.251]), 8, 4e-3, 4.0)
    assert waves.dtype == torch.float64 and waves.shape == (2, 8)
    torch.testing.assert_close(waves[0, 3], torch.tensor(2 * torch.pi * 0.25 / 4.0, dtype=torch.float64).sin())
    assert abs(float(waves[1, 0] - waves[0, 0])) > 0.9  # a quarter of the shortest period later


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunk_size": None}, r"`chunk_size` or `action_horizon` is missing"),
        ({"paligemma_variant": "gemma_7b"}, r"gemma_7b.*gemma_2b, gemma_300m"),
        ({"max_action_dim": 0}, "action_size must be a positive integer, not 0"),
        ({"chunk_size": True}, "horizon must be a positive integer, not True"),
        ({"image_resolution": [20, 30]}, "square"),
        ({"image_resolution": [25, 25]}, "25 pixels are not a whole number of patches of 10"),
        ({"image_resolution": "large"}, "image_size must be a positive integer"),
        ({"sizes": {"depth": 3}}, "`sizes` has no 'depth'"),
        ({"sizes": [3]}, "`sizes` must be an object"),
        ({"sizes": {**CONFIG["sizes"], "kv_heads": 3}}, "kv_heads does not divide heads"),
        ({"min_period": 5.0}, "longer"),
        ({"train_expert_only": "yes"}, "true or false"),
    ],
)
def test_wrong_configurations_are_explained(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        shape_of(**changes)


def test_adapters_are_refused() -> None:
    with pytest.raises(Unsupported, match="use_peft"):
        shape_of(use_peft=True)
    assert issubclass(Unsupported, UserError)


def test_all_problems_come_together() -> None:
    with pytest.raises(RecipeError) as caught:
        describe(PI05, {"type": "pi05"})
    assert len(caught.value.problems) == 4


def test_on_a_device_a_packed_batch_is_never_waited_for() -> None:
    """Traced with tensors that have a device, shapes and no values: whatever asks for a value fails."""
    model, batch = build_policy(shape_of(), "bf16", backend="cuda"), draw_batch()
    batch |= model.packing(batch)
    with FakeTensorMode(), torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                setattr(module, name, torch.nn.Parameter(fake))
        there = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda") for name, tensor in batch.items()}
        for result in (model(there), model.sample(there, 3)):
            assert result.shape == batch["noise"].shape and result.device.type == "cuda"
        unpacked = {name: tensor for name, tensor in there.items() if not name.startswith(PREFIX)}
        with pytest.raises(DataDependentOutputException):
            model(unpacked)


@pytest.mark.parametrize("skip_padding", [True, False])
def test_products_are_those_of_the_rows_alone(skip_padding: bool) -> None:
    """Every weight once for each row that exists: nothing else is multiplied, forward."""
    model, batch = build_policy(shape_of(skip_padding=skip_padding)), draw_batch()
    packing = packing_of(model.packing(batch))
    assert packing is not None
    images, rows = len(packing.images) * 4, len(packing.rows)
    if skip_padding:
        assert images == 5 * 4 and rows < 3 * (2 * 4 + 6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch)
    found = sum(
        count for name, count in counter.get_flop_counts()["Global"].items() if str(name) in ("aten.mm", "aten.addmm")
    )
    passes = {"vision": images, "projector": images, "prefix": rows, "modulation": 3, "time_in": 3, "time_out": 3}
    expected = 0
    for spec in model.shape.parameters:
        words = spec.role.split(".")
        if len(spec.shape) > 1 and spec.role not in ("embed", "vision.positions"):
            expected += 2 * spec.size * next((passes[word] for word in passes if word in words), 3 * 3)
    assert found == expected


@pytest.mark.parametrize("changes", [{}, {"freeze_vision_encoder": True}, {"train_expert_only": True}])
def test_estimates_for_planners_agree_with_the_formulas(changes: dict[str, Any]) -> None:
    config = {**presets()["pi05"], **changes}
    shape = describe(PI05, config)
    tokens = shape.fields["sample_tokens"]
    assert tokens == 2 * 256 + 64
    formula = flops.training(shape.fields, flops.Seen(images=2, text=64))
    estimate = shape.train_flops(tokens, tokens)
    # What is frozen has a third of the products, but the planner knows one share of attention for all.
    assert estimate == pytest.approx(formula, rel=0.01 if not changes else 0.1)
    inputs = {f"observation.images.{name}": {"type": "VISUAL"} for name in "abc"}
    padded = describe(PI05, {**config, "input_features": inputs, "skip_padding": False})
    assert padded.fields["sample_tokens"] == 3 * 256 + 200
    assert padded.activation_replicated > 0
