"""LeRobot's GR00T N1.7 with a row's weights, and its view of loong's batches. Imports nothing of loong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.groot.configuration_groot import GrootConfig
from lerobot.policies.groot.modeling_groot import GrootPolicy
from torch import Tensor
from transformers import Qwen2VLImageProcessor

Batch = Mapping[str, Tensor]


def build(
    job: Mapping[str, Any], device: torch.device
) -> tuple[torch.nn.Module, Callable[[Batch], Any], Callable[[Any], Tensor]]:
    """The policy; what makes its inputs of a batch; what makes its loss of them."""
    image = PolicyFeature(type=FeatureType.VISUAL, shape=(3, job["size"], job["size"]))
    horizon = job["config"]["action_horizon"]
    config = GrootConfig(
        device=str(device),
        base_model_path=job["weights"],
        use_bf16=device.type == "cuda",
        chunk_size=horizon,
        n_action_steps=horizon,
        input_features={
            **{f"observation.images.camera{number}": image for number in range(job["cameras"])},
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(job["state"],)),
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(job["action"],))},
        **job["settings"],
    )
    policy = GrootPolicy(config).to(device)
    model = policy._groot_model
    drawn: dict[str, Tensor] = {}
    model.action_head.sample_time = lambda *arguments, **more: drawn["time"]
    vision, backbone = model.backbone.model.config.vision_config, model.backbone.model.config
    processor = Qwen2VLImageProcessor(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_resize=False,
    )
    # The row's tokenizer was trained on its instructions; these of its tokens mean something to the backbone.
    special = {4: backbone.vision_start_token_id, 5: backbone.vision_end_token_id, 6: backbone.image_token_id}

    def inputs(batch: Batch) -> dict[str, Tensor]:
        drawn.update(time=batch["time"], noise=batch["noise"])
        images = batch["images"][batch["camera_mask"]].permute(0, 3, 1, 2).cpu()
        pixels = processor(images=list(images), return_tensors="pt")
        tokens = batch["tokens"].clone()
        for ours, theirs in special.items():
            tokens[batch["tokens"] == ours] = theirs
        lengths = batch["token_mask"].sum(1).tolist()
        longest = max(lengths)
        rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]  # LeRobot pads on the left
        padded = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
        kept = torch.stack([torch.arange(longest) >= longest - length for length in lengths])
        return {
            "input_ids": padded,
            "attention_mask": kept.long().to(device),
            "pixel_values": pixels["pixel_values"].to(device),
            "image_grid_thw": pixels["image_grid_thw"].to(device),
            "state": batch["state"][:, None],
            "action": batch["actions"],
            "action_mask": batch["action_mask"].float(),
            "embodiment_id": batch["embodiment"].int(),
        }

    def forward(given: Any) -> Tensor:
        with mock.patch.object(torch, "randn", lambda *arguments, **more: drawn["noise"]):
            loss: Tensor = policy.forward(given)[0]
        return loss

    return policy, inputs, forward
