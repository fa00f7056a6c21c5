"""LeRobot's Pi0.5 with a row's weights, and its view of loong's batches. Imports nothing of loong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lerobot.policies.pi05.modeling_pi05 as peer
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from safetensors import safe_open
from torch import Tensor

Batch = Mapping[str, Tensor]


def build(
    job: Mapping[str, Any], device: torch.device
) -> tuple[torch.nn.Module, Callable[[Batch], Any], Callable[[Any], Tensor]]:
    """The policy; what makes its inputs of a batch; what makes its loss of them."""
    config = job["config"]
    if "sizes" in config:
        shrink(config["sizes"])
    side, real = config["image_resolution"][0], job["cameras"]
    image = PolicyFeature(type=FeatureType.VISUAL, shape=(3, side, side))
    settings = PI05Config(
        device=str(device),
        **job["settings"],
        image_resolution=(side, side),
        empty_cameras=job["absent"],
        **{name: config[name] for name in ("chunk_size", "n_action_steps", "max_state_dim", "max_action_dim")},
        input_features={
            **{f"observation.images.camera{number}": image for number in range(real)},
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(job["state"],)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(job["action"],))},
    )
    settings.validate_features()  # adds the absent cameras, as LeRobot's trainer does
    with device:
        policy = peer.PI05Policy(settings)
    policy = policy.to(device)
    load(policy, Path(job["weights"]) / "model.safetensors")
    drawn: dict[str, Tensor] = {}
    policy.model.sample_noise = lambda shape, where: drawn["noise"]
    policy.model.sample_time = lambda count, where: drawn["time"]

    def inputs(batch: Batch) -> dict[str, Tensor]:
        drawn.update(noise=batch["noise"], time=batch["time"])
        pixels = batch["images"].permute(1, 0, 4, 2, 3).float() / 255.0
        return {
            **{f"observation.images.camera{number}": pixels[number].contiguous() for number in range(real)},
            "observation.state": batch["state"][:, : job["state"]],
            "observation.language.tokens": batch["tokens"],
            "observation.language.attention_mask": batch["token_mask"],
            "action": batch["actions"][..., : job["action"]],
        }

    return policy, inputs, lambda given: policy.forward(given)[0]


def load(policy: torch.nn.Module, path: Path) -> None:
    """Put a checkpoint's tensors into the policy; what it holds besides keeps the values it was made with.

    Raises:
        KeyError: a tensor of the checkpoint has no place.
    """
    places = policy.state_dict()
    with safe_open(str(path), "pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118
            places[f"model.{name}"].copy_(file.get_tensor(name))
    # A tied head is a parameter of its own in LeRobot and trained by nothing; what is not finite is not read either.
    for parameter in policy.parameters():
        if not bool(torch.isfinite(parameter).all()):
            parameter.data.zero_()


def shrink(sizes: Mapping[str, int]) -> None:
    """LeRobot names the sizes of its transformers by a variant; here are others in their place, to try the script."""

    def gemma(variant: str) -> Any:
        prefix = "expert_" if variant == "gemma_300m" else ""
        return peer.GemmaConfig(
            width=sizes[f"{prefix}hidden"],
            depth=sizes["layers"],
            mlp_dim=sizes[f"{prefix}ffn"],
            num_heads=sizes["heads"],
            num_kv_heads=sizes["kv_heads"],
            head_dim=sizes["head_dim"],
        )

    language, expert = peer.PaliGemmaForConditionalGenerationWithPiGemma, peer.PiGemmaForCausalLM

    def small_language(config: Any) -> Any:
        config.text_config.vocab_size = config.vocab_size = sizes["vocabulary"]
        config.image_token_id = sizes["vocabulary"] - 1
        config.projection_dim = config.vision_config.projection_dim = sizes["hidden"]
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size = sizes["vision_hidden"], sizes["vision_ffn"]
        vision.num_hidden_layers, vision.num_attention_heads = sizes["vision_layers"], sizes["vision_heads"]
        vision.patch_size = sizes["patch"]
        return language(config=config)

    def small_expert(config: Any) -> Any:
        config.vocab_size = sizes["vocabulary"]
        return expert(config=config)

    peer.get_gemma_config = gemma
    peer.PaliGemmaForConditionalGenerationWithPiGemma = small_language
    peer.PiGemmaForCausalLM = small_expert
