"""GR00T without the peer: against plain references, padded against unpadded, one embodiment against several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from groot_tiny import N16, N17, batch_of, build_model, hf_tensors, loss_of, randomise, reference_velocity, tiny
from torch import Tensor

from loong_core.errors import DataError, RecipeError, Unsupported
from loong_core.types import ModelFamily
from loong_core.weights import WeightMap, verb_of
from loong_vla.groot import Groot
from loong_vla.groot_packing import packing_of
from loong_vla.groot_shape import describe
from loong_vla.models import groot, groot_n16
from loong_vla.models.groot import GROOT_N17
from loong_vla.models.groot_n16 import GROOT_N16

TOLERANCE = 1e-4


# -------------------------------------------------------------------------------------------------- references
def eagle_features(w: dict[str, Tensor], sample: dict[str, Tensor], fields: Any) -> tuple[Tensor, Tensor]:
    """What transformers' SigLIP 2 and Qwen3 make of one sample, without padding: [l,f], and which rows are images."""
    from transformers import Qwen3Config, Qwen3Model, Siglip2VisionConfig, Siglip2VisionModel

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}

    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = Siglip2VisionModel(Siglip2VisionConfig(**sizes, patch_size=4, num_patches=9, vision_use_head=False))
    tower_prefix = "backbone.model.vision_model."
    own = (
        part(tower_prefix)
        if any("vision_model." in name for name in tower.state_dict())
        else part(f"{tower_prefix}vision_model.")
    )
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-6}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    sizes = {"vocab_size": 53, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3}
    text = Qwen3Model(Qwen3Config(**sizes, **heads, rope_parameters=rope))
    images = sample["images"][sample["camera_mask"]].float() / 127.5 - 1
    count, height, width, _ = images.shape
    rows, columns = height // 4, width // 4
    patches = images.view(count, rows, 4, columns, 4, 3).transpose(2, 3).flatten(3).flatten(1, 2)
    tokens = sample["tokens"][sample["token_mask"]]
    is_image = tokens == 3

    def call(module: torch.nn.Module, weights: dict[str, Tensor], **given: Any) -> Tensor:
        assert not set(module.state_dict()) ^ set(weights), set(module.state_dict()) ^ set(weights)
        return torch.func.functional_call(module.eval(), weights, (), given).last_hidden_state

    mask, shapes = torch.ones(count, rows * columns), torch.tensor([[rows, columns]] * count)
    seen = call(tower, own, pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)
    grid = seen.view(count, rows, columns, -1).permute(0, 3, 1, 2)
    merged = torch.nn.functional.pixel_unshuffle(grid, 2).flatten(2).transpose(1, 2)
    names = {number: [w[f"backbone.model.mlp1.{number}.{end}"] for end in ("weight", "bias")] for number in (0, 1, 3)}
    merged = torch.nn.functional.layer_norm(merged, merged.shape[-1:], *names[0])
    merged = torch.nn.functional.linear(merged, *names[1])
    merged = torch.nn.functional.linear(torch.nn.functional.gelu(merged), *names[3])
    language = part("backbone.model.language_model.model.")
    words = language["embed_tokens.weight"][tokens].clone()
    words[is_image] = merged.flatten(0, 1)
    return call(text, language, inputs_embeds=words[None])[0], is_image


def test_n16_equals_a_plain_reference() -> None:
    """Prediction, loss and every gradient; images of another size than the learned positions, absent cameras."""
    model, batch = tiny(GROOT_N16, embodiments=[1, 4]), batch_of()
    w = {name: tensor.requires_grad_() for name, tensor in hf_tensors(model, GROOT_N16).items()}
    expected = []
    for index in range(3):
        sample = {name: tensor[index] for name, tensor in batch.items()}
        features, is_image = eagle_features(w, sample, model.shape.fields)
        expected.append(reference_velocity(w, features, is_image, sample))
    prediction, loss = loss_of(model, batch)
    torch.testing.assert_close(prediction, torch.stack(expected), rtol=TOLERANCE, atol=TOLERANCE)
    error = (torch.stack(expected) - batch["actions"] + batch["noise"]).square() * batch["action_mask"]
    theirs = error.sum() / batch["action_mask"].sum()
    torch.testing.assert_close(loss, theirs, rtol=TOLERANCE, atol=0.0)
    loss.backward()
    theirs.backward()
    compare_gradients(model, GROOT_N16, {name: tensor.grad for name, tensor in w.items()})


def compare_gradients(model: Groot, family: ModelFamily, theirs: dict[str, Tensor | None]) -> None:
    trained = 0
    for parameter in model.local_parameters():
        spec, ours = parameter.spec, parameter.gradient
        if spec.frozen:
            assert ours is None, spec.role
            continue
        assert ours is not None, spec.role
        row = WeightMap(family.weights).candidates(spec)[0]
        for name, mine in zip(row.hf, verb_of(row).unpack(ours, model.shape.fields), strict=True):
            grad = theirs[name]
            assert grad is not None, name
            grad = grad if row.verb != "stack" else grad[spec.expert]
            scale = 0.01 if name.endswith("to_k.bias") else float(grad.norm())
            assert scale > 0, name
            assert (mine - grad).norm() <= TOLERANCE * scale, (name, float((mine - grad).norm()), scale)
            trained += 1
    assert trained > 100


def test_n17_head_equals_a_plain_reference() -> None:
    model, batch = tiny(), batch_of()
    packing = packing_of(model.packing(batch))
    assert packing is not None
    features = model.features(batch, packing).transpose(0, 1)
    w = hf_tensors(model, GROOT_N17)
    prediction = model(batch)
    for index in range(3):
        sample = {name: tensor[index] for name, tensor in batch.items()}
        valid = sample["token_mask"]
        expected = reference_velocity(w, features[index][valid], sample["tokens"][valid] == 3, sample)
        torch.testing.assert_close(prediction[index], expected, rtol=TOLERANCE, atol=TOLERANCE)


# ---------------------------------------------------------------------------------------------------- invariance
@pytest.mark.parametrize("family", [GROOT_N17, GROOT_N16], ids=lambda family: family.name)
def test_padding_changes_nothing(family: ModelFamily) -> None:
    model = tiny(family)
    torch.testing.assert_close(model(batch_of(padding=0)), model(batch_of(padding=37)), rtol=TOLERANCE, atol=TOLERANCE)


def test_what_an_absent_camera_shows_changes_nothing() -> None:
    model, batch = tiny(), batch_of()
    changed = {**batch, "images": torch.where(batch["camera_mask"][..., None, None, None], batch["images"], 255)}
    assert not torch.equal(changed["images"], batch["images"])
    torch.testing.assert_close(model(batch), model(changed), rtol=0.0, atol=0.0)


def test_floating_point_images_are_taken_as_normalised() -> None:
    model, batch = tiny(), batch_of()
    floating = {**batch, "images": batch["images"].float() / 127.5 - 1}
    torch.testing.assert_close(model(batch), model(floating), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_batch_may_carry_its_packing() -> None:
    model, batch = tiny(), batch_of()
    torch.testing.assert_close(model({**batch, **model.packing(batch)}), model(batch), rtol=0.0, atol=0.0)


def test_one_embodiment_and_several_give_the_same() -> None:
    """The plain product of one slot and the picked weights of several: equal predictions and gradients."""
    batch = batch_of(embodiment=[3, 3, 3])
    one, several = tiny(embodiments=[3]), tiny(embodiments=[0, 3, 4])
    (first, loss), (second, other) = loss_of(one, batch), loss_of(several, batch)
    torch.testing.assert_close(first, second, rtol=TOLERANCE, atol=1e-5)
    loss.backward()
    other.backward()
    gradients = {parameter.spec.role: parameter.gradient for parameter in several.local_parameters()}
    for parameter in one.local_parameters():
        expected = gradients[parameter.spec.role]
        if parameter.gradient is None:
            assert expected is None or not expected.any(), parameter.spec.role
        else:
            torch.testing.assert_close(parameter.gradient, expected, rtol=TOLERANCE, atol=1e-6)


def test_positions_of_text_and_images() -> None:
    """Counted in a loop, token by token."""
    model, batch = tiny(), batch_of(image=(16, 24))
    packing = packing_of(model.packing(batch))
    assert packing is not None
    for sample in range(3):
        current, place, expected = 0, 0, []
        for token, valid in zip(batch["tokens"][sample].tolist(), batch["token_mask"][sample].tolist(), strict=True):
            if not valid:
                break
            if token == 3:
                expected.append((current, current + place // 3, current + place % 3))
                place += 1
                if place == 6:
                    current, place = current + 3, 0
            else:
                expected.append((current,) * 3)
                current += 1
        found = packing.positions[:, : len(expected), sample].t().tolist()
        assert found == [list(row) for row in expected]


# ------------------------------------------------------------------------------------------------------ training
def test_frozen_parts_have_no_graph_and_keep_every_bit() -> None:
    model, batch = tiny(), batch_of()
    packing = packing_of(model.packing(batch))
    assert packing is not None
    assert not model.features(batch, packing).requires_grad
    before = {parameter.spec.role: parameter.tensor.clone() for parameter in model.local_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss_of(model, batch)[1].backward()
    optimizer.step()
    for parameter in model.local_parameters():
        spec = parameter.spec
        backbone = spec.role.startswith(("embed", "vision", "llm"))
        assert spec.frozen == backbone, spec.role
        assert torch.equal(parameter.tensor, before[spec.role]) == spec.frozen or not parameter.gradient.any()


def test_dropout_is_drawn_in_training_alone() -> None:
    drawn = {**N17["diffusion_model_cfg"], "dropout": 0.2}
    model, batch = tiny(diffusion_model_cfg=drawn, state_dropout_prob=0.5), batch_of()
    assert model.training
    torch.manual_seed(1)
    first = model(batch)
    torch.manual_seed(1)
    assert torch.equal(first, model(batch))
    assert not torch.equal(first, model(batch))
    plain = tiny()(batch)
    torch.testing.assert_close(model.eval()(batch), plain, rtol=0.0, atol=0.0)
    frozen = tiny(diffusion_model_cfg=drawn, tune_diffusion_model=False)(batch)
    torch.testing.assert_close(frozen, plain, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("family", [GROOT_N17, GROOT_N16], ids=lambda family: family.name)
def test_a_state_left_out_says_nothing(family: ModelFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny(family, state_dropout_prob=0.5), batch_of()
    assert ("mask_token" in dict(model.named_parameters())) == (family is GROOT_N16)
    monkeypatch.setattr(torch, "rand", lambda *shape, **more: torch.tensor([0.2, 0.9, 0.2]).view(shape))
    first, second = model(batch), model({**batch, "state": batch["state"] + 1.0})
    assert torch.equal(first[[0, 2]], second[[0, 2]]) and not torch.equal(first[1], second[1])


def test_bfloat16_is_near_float32() -> None:
    batch = batch_of()
    exact, rounded = tiny(), tiny(policy=1)
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    prediction, loss = loss_of(rounded, batch)
    assert prediction.dtype == torch.float32
    wanted = exact(batch)
    assert (prediction - wanted).norm() < 0.05 * wanted.norm()
    loss.backward()


def test_samples_are_euler_steps() -> None:
    model, batch = tiny(), batch_of()
    x = batch["noise"]
    for step in range(3):
        # `forward` moves from noise to actions by time: at such actions it is at x.
        time = torch.full((3,), int(step / 3 * 1000) / 1000 + 1e-4)
        there = {**batch, "noise": x, "actions": x, "time": time}
        with torch.no_grad():
            x = x + model(there) / 3
    torch.testing.assert_close(model.sample(batch, 3), x, rtol=TOLERANCE, atol=TOLERANCE)


def test_units_and_parameters_partition_the_model() -> None:
    model = tiny()
    inside = [id(parameter) for unit in model.units() for parameter in unit.parameters()]
    assert len(inside) == len(set(inside))
    covered: dict[int, int] = {}
    for parameter in model.local_parameters():
        assert parameter.tensor.data_ptr() == parameter.trained.view(-1)[parameter.offset :].data_ptr()
        assert tuple(parameter.tensor.shape) == parameter.spec.shape
        assert parameter.trained.requires_grad != parameter.spec.frozen
        covered[id(parameter.trained)] = covered.get(id(parameter.trained), 0) + parameter.tensor.numel()
    assert covered == {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert [parameter.spec.role for parameter in model.local_parameters()].count("dit.layers.2.kv") == 1


# --------------------------------------------------------------------------------------------------- descriptions
@pytest.mark.parametrize(
    ("family", "config", "held", "trained"),
    [
        (GROOT_N17, groot.n17_presets()["groot_n17"], 3.144e9, 1.621e9),
        (GROOT_N16, groot_n16.presets()["groot_n16"], 2.961e9, 1.620e9),
    ],
    ids=["n17", "n16"],
)
def test_published_sizes(family: ModelFamily, config: dict[str, Any], held: float, trained: float) -> None:
    shape = describe(family, config)
    assert sum(spec.size for spec in shape.parameters) == pytest.approx(held, rel=1e-3)
    assert sum(spec.size for spec in shape.parameters if not spec.frozen) == pytest.approx(trained, rel=1e-3)
    rows = WeightMap(family.weights)
    assert all(rows.candidates(spec) for spec in shape.parameters)


def test_lerobot_configuration_trains_its_embodiment() -> None:
    fields = describe(GROOT_N17, {"type": "groot", "embodiment_tag": "libero_sim", "max_state_dim": 132}).fields
    assert fields["embodiments"] == (2,) and fields["image_tokens"] == 64


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"use_alternate_vl_dit": False}, Unsupported, "use_alternate_vl_dit"),
    ({"state_history_length": 2}, Unsupported, "state_history_length"),
    ({"embodiments": [7]}, RecipeError, "7 is no slot of the model, which has 0 to 4"),
    ({"embodiments": "all"}, RecipeError, "list of slot numbers"),
    ({"action_horizon": 0}, RecipeError, "horizon must be a positive integer"),
    ({"state_dropout_prob": 1.0}, RecipeError, "state_dropout"),
    ({"tune_llm": "yes"}, RecipeError, "tune_llm must be true or false"),
    ({"tune_top_llm_layers": 9}, RecipeError, "tune_top_llm_layers"),
    ({"image_target_size": [16, 20]}, RecipeError, "square"),
    ({"image_target_size": [20, 20]}, RecipeError, "multiple of 8 pixels"),
]


@pytest.mark.parametrize(("changes", "error", "words"), WRONG, ids=[next(iter(row[0])) for row in WRONG])
def test_wrong_configurations(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        describe(GROOT_N17, {**N17, **changes})


def test_a_base_model_folder_that_is_damaged(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(Exception, match="not a JSON object"):
        describe(GROOT_N17, {"type": "groot", "base_model_path": str(tmp_path)})


def test_prompts_and_embodiments_that_do_not_fit() -> None:
    model, batch = tiny(embodiments=[1, 4]), batch_of()
    with pytest.raises(DataError, match="embodiment 0, but the model was built for 1, 4"):
        model({**batch, "embodiment": torch.tensor([0, 1, 4])})
    with pytest.raises(DataError, match="Sample 1 .* 6 image tokens .* 2 cameras of 6"):
        cameras = batch["camera_mask"].clone()
        cameras[1, 0] = True
        model({**batch, "camera_mask": cameras})
    with pytest.raises(DataError, match="tokens behind padding"):
        model({**batch, "token_mask": batch["token_mask"].roll(1, 1)})


def test_n16_builds_without_what_it_lacks() -> None:
    roles = {spec.role for spec in describe(GROOT_N16, N16).parameters}
    assert "llm.norm" in roles and not any(role.startswith(("refiner.layers", "vision.deep")) for role in roles)
    assert "mask_token" not in roles
    randomise(build_model(N16, GROOT_N16))
