"""Runs in LeRobot's interpreter: what its GR00T N1.7 policy computes, at sizes a test can afford.

`python groot_peer.py compute FOLDER` reads `FOLDER/case.json`, draws weights and a batch, and writes `backbone/`,
`base/` (a base model), `checkpoint/` (as LeRobot saves a policy), `batch.safetensors` and `results.safetensors`.
`python groot_peer.py sample FOLDER CHECKPOINT BASE` opens another policy and another base model and writes their
samples for the same batch to `sampled.safetensors`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import lerobot.policies.groot.groot_n1_7 as peer
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.lerobot_types import TransitionKey
from lerobot.policies.groot.configuration_groot import GrootConfig
from lerobot.policies.groot.modeling_groot import GrootPolicy
from lerobot.policies.groot.processor_groot import (
    make_groot_pre_post_processors,
    make_groot_pre_post_processors_from_pretrained,
)
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLImageProcessor

START, END = 1, 2  # token ids around an image


def write_backbone(folder, case):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **case["backbone"]}))


def write_base(folder, case):
    config = peer.GR00TN17Config(model_name=str(folder / "backbone"), **case["base"])
    model = peer.GR00TN17(config, load_backbone_weights=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim == 1 or name.endswith(".b") else 0.9 / parameter.shape[-1] ** 0.5
            scale = 0.3 if "pos_embed" in name or "position_embedding" in name else scale
            parameter.normal_(0.0, scale)
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter += 1.0
    model.save_pretrained(folder / "base")


def config_on(base, case):
    image = PolicyFeature(type=FeatureType.VISUAL, shape=(3, *case["image"]))
    return GrootConfig(
        device="cpu",
        base_model_path=str(base),
        use_bf16=False,
        chunk_size=case["base"]["action_horizon"],
        n_action_steps=case["base"]["action_horizon"],
        input_features={f"observation.images.camera{i}": image for i in range(case["cameras"])},
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(case["base"]["max_action_dim"],))},
        **case["tune"],
    )


def prompt(case, cameras, words, generator):
    """One user turn: some words, every camera's tokens between two marks, the rest of the words."""
    height, width = case["image"]
    vision = case["backbone"]["vision_config"]
    unit = vision["patch_size"] * vision["spatial_merge_size"]
    image = [START, *[case["backbone"]["image_token_id"]] * ((height // unit) * (width // unit)), END]
    text = torch.randint(5, case["backbone"]["text_config"]["vocab_size"], (words,), generator=generator).tolist()
    return [*text[:2], *image * cameras, *text[2:]]


def draw_batch(case):
    generator = torch.Generator().manual_seed(case["seed"])
    cameras = map(sum, case["camera_mask"])
    prompts = [prompt(case, *each, generator) for each in zip(cameras, case["words"], strict=True)]
    length = max(map(len, prompts)) + case["more_padding"]
    samples, horizon, width = len(prompts), case["base"]["action_horizon"], case["base"]["max_action_dim"]
    mask = torch.zeros(samples, horizon, width, dtype=torch.bool)
    for sample, real in enumerate(case["real_steps"]):
        mask[sample, :real, : case["real_actions"]] = True
    shape = (samples, case["cameras"], *case["image"], 3)
    return {
        "images": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        "camera_mask": torch.tensor(case["camera_mask"], dtype=torch.bool),
        "tokens": torch.tensor([row + [0] * (length - len(row)) for row in prompts]),
        "token_mask": torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in prompts]),
        "state": torch.randn(samples, case["base"]["max_state_dim"], generator=generator),
        "actions": torch.randn(samples, horizon, width, generator=generator),
        "action_mask": mask,
        "noise": torch.randn(samples, horizon, width, generator=generator),
        "time": torch.rand(samples, generator=generator) * 0.999,
        "embodiment": torch.tensor(case["embodiment"]),
    }


def inputs(batch, case, samples=slice(None)):
    """As LeRobot's processor packs them: images of the cameras there are, prompts padded on the left to the longest."""
    vision = case["backbone"]["vision_config"]
    processor = Qwen2VLImageProcessor(
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        merge_size=vision["spatial_merge_size"],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_resize=False,
    )
    images = batch["images"][samples][batch["camera_mask"][samples]].permute(0, 3, 1, 2)
    pixels = processor(images=list(images), return_tensors="pt")
    lengths = batch["token_mask"][samples].sum(1).tolist()
    longest = max(lengths)
    rows = [row[:length] for row, length in zip(batch["tokens"][samples], lengths, strict=True)]
    tokens = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    return {
        "input_ids": tokens,
        "attention_mask": torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long(),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
        "state": batch["state"][samples][:, None],
        "action": batch["actions"][samples],
        "action_mask": batch["action_mask"][samples].float(),
        "embodiment_id": batch["embodiment"][samples].int(),
    }


class Drawn:
    """LeRobot draws noise and time itself: here are the batch's instead."""

    def __init__(self, policy, batch, samples=slice(None)):
        head = policy._groot_model.action_head
        head.sample_time = lambda *arguments, **more: batch["time"][samples]
        self.patch = mock.patch.object(torch, "randn", lambda *arguments, **more: batch["noise"][samples].clone())

    def __enter__(self):
        self.patch.__enter__()

    def __exit__(self, *error):
        self.patch.__exit__(*error)


def sample(policy, batch, case, samples=slice(None)):
    policy.eval()
    given = inputs(batch, case, samples)
    given.pop("action")
    with Drawn(policy, batch, samples), torch.no_grad():
        return policy._groot_model.get_action(given)["action_pred"]


def sample_alone(policy, batch, case):
    """Every sample as a batch of its own: no padding."""
    return torch.cat([sample(policy, batch, case, slice(i, i + 1)) for i in range(len(case["words"]))])


def scaled(before, after):
    """A state as the policy gets it, and an action as the robot gets it: the two steps that scale, alone."""
    state = {"observation.state": torch.tensor([[0.5, 2.0, -3.0]])}
    packed = before.steps[2]({TransitionKey.OBSERVATION: state, TransitionKey.COMPLEMENTARY_DATA: {"task": ["go"]}})
    action = torch.linspace(-0.9, 0.9, 14).reshape(1, 7, 2)
    done = after.steps[0]({TransitionKey.ACTION: action})
    return packed[TransitionKey.OBSERVATION]["state"].contiguous(), done[TransitionKey.ACTION].contiguous()


def compute(folder, case):
    torch.manual_seed(case["seed"])
    write_backbone(folder / "backbone", case)
    write_base(folder, case)
    policy = GrootPolicy(config_on(folder / "base", case))
    policy.save_pretrained(folder / "checkpoint")
    batch = draw_batch(case)
    save_file(batch, folder / "batch.safetensors")
    seen, horizon = [], case["base"]["action_horizon"]
    hook = lambda module, arguments, output: seen.append(output.detach()[:, -horizon:].contiguous())  # noqa: E731
    policy._groot_model.action_head.action_decoder.register_forward_hook(hook)
    policy.train()
    with Drawn(policy, batch):
        loss, _ = policy.forward(inputs(batch, case))
    loss.backward()
    results = {"loss": loss.detach(), "prediction": seen.pop()}
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            results[f"gradient/{name}"] = parameter.grad
    alone = []
    for index in range(len(case["words"])):
        one = slice(index, index + 1)
        with Drawn(policy, batch, one), torch.no_grad():
            policy.forward(inputs(batch, case, one))
        alone.append(seen.pop())
    results["alone"] = torch.cat(alone)
    results["sampled"] = sample(policy, batch, case)
    results["sampled_alone"] = sample_alone(policy, batch, case)
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / "results.safetensors")


def main(task, folder, *rest):
    folder = Path(folder)
    case = json.loads((folder / "case.json").read_text())
    if task == "compute":
        compute(folder, case)
        return
    batch = load_file(folder / "batch.safetensors")
    policy = GrootPolicy.from_pretrained(rest[0], local_files_only=True)
    base = GrootPolicy.from_pretrained(rest[1], config=config_on("elsewhere", case), local_files_only=True)
    found = {"checkpoint": sample_alone(policy, batch, case), "base": sample_alone(base, batch, case)}
    pipelines = {
        "checkpoint": make_groot_pre_post_processors_from_pretrained(policy.config, rest[0]),
        "base": make_groot_pre_post_processors(base.config),
    }
    for kind, (before, after) in pipelines.items():
        found[f"{kind}_state"], found[f"{kind}_action"] = scaled(before, after)
    save_file(found, folder / "sampled.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
