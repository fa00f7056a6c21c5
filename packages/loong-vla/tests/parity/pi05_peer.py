"""Runs in LeRobot's interpreter: what its Pi0.5 policy computes, at sizes a test can afford.

`python pi05_peer.py compute FOLDER...` reads `case.json` (sizes) in each, draws weights and a batch, and writes
`checkpoint/` (as LeRobot saves it), `batch.safetensors` and `results.safetensors`. `python pi05_peer.py sample FOLDER
CHECKPOINT...` opens other checkpoints of the same sizes and writes `sampled.safetensors` into each, for the same batch;
where one has processors, `processed.json` has what they make of a robot's state and of the policy's actions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import lerobot.policies.pi05.modeling_pi05 as peer
import lerobot.processor.tokenizer_processor as tokenizers
import torch
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from safetensors.torch import load_file, save_file

build_language, build_expert = peer.PaliGemmaForConditionalGenerationWithPiGemma, peer.PiGemmaForCausalLM


def shrink(sizes):
    """Make the module build small models: LeRobot's configuration knows only the published sizes."""

    def gemma(variant):
        prefix = "" if variant == "gemma_2b" else "expert_"
        return peer.GemmaConfig(
            width=sizes[f"{prefix}hidden"],
            depth=sizes["layers"],
            mlp_dim=sizes[f"{prefix}ffn"],
            num_heads=sizes["heads"],
            num_kv_heads=sizes["kv_heads"],
            head_dim=sizes["head_dim"],
        )

    def language(config):
        config._vocab_size = config.text_config.vocab_size = sizes["vocabulary"]
        config.image_token_id = sizes["vocabulary"] - 1
        config.projection_dim = config.vision_config.projection_dim = sizes["hidden"]
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size = sizes["vision_hidden"], sizes["vision_ffn"]
        vision.num_hidden_layers, vision.num_attention_heads = sizes["vision_layers"], sizes["vision_heads"]
        vision.patch_size = sizes["patch"]
        return build_language(config=config)

    def expert(config):
        config.vocab_size = sizes["vocabulary"]
        return build_expert(config=config)

    peer.get_gemma_config = gemma
    peer.PaliGemmaForConditionalGenerationWithPiGemma, peer.PiGemmaForCausalLM = language, expert


def configuration(case):
    side, cameras = case["sizes"]["image_size"], case["cameras"]
    image = PolicyFeature(type=FeatureType.VISUAL, shape=(3, side, side))
    return PI05Config(
        device="cpu",
        image_resolution=(side, side),
        chunk_size=case["horizon"],
        n_action_steps=case["horizon"],
        max_action_dim=case["action_size"],
        max_state_dim=case["action_size"],
        input_features={f"observation.images.camera{i}": image for i in range(cameras)},
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(case["real_actions"],))},
    )


def draw_batch(case):
    samples, cameras, side = len(case["prompts"]), case["cameras"], case["sizes"]["image_size"]
    length, horizon, width = case["prompt_length"], case["horizon"], case["action_size"]
    mask = torch.zeros(samples, horizon, width, dtype=torch.bool)
    mask[..., : case["real_actions"]] = True
    tokens = torch.randint(0, case["sizes"]["vocabulary"] - 1, (samples, length))
    tokens[0, 0] = 0  # padding's number as content: its embedding is read and not trained
    return {
        "images": torch.randint(0, 256, (samples, cameras, side, side, 3), dtype=torch.uint8),
        "camera_mask": torch.tensor(case["camera_mask"], dtype=torch.bool),
        "tokens": tokens,
        "token_mask": torch.arange(length) < torch.tensor(case["prompts"])[:, None],
        "actions": torch.randn(samples, horizon, width),
        "action_mask": mask,
        "noise": torch.randn(samples, horizon, width),
        "time": torch.rand(samples) * 0.999 + 0.001,
    }


def inputs(batch):
    images = batch["images"].permute(1, 0, 4, 2, 3).float() / 255.0 * 2.0 - 1.0
    return list(images), list(batch["camera_mask"].t()), batch["tokens"], batch["token_mask"]


def randomise(policy):
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.9 / parameter[0].numel() ** 0.5
            scale = 0.3 if "dense.weight" in name or "position_embedding" in name else scale
            parameter.normal_(0.0, scale)
            if "layer_norm" in name and name.endswith("weight"):
                parameter += 1.0


def compute(folder, case):
    torch.manual_seed(case["seed"])
    policy = peer.PI05Policy(configuration(case))
    randomise(policy)
    policy.save_pretrained(folder / "checkpoint")
    batch = draw_batch(case)
    save_file({name: tensor.contiguous() for name, tensor in batch.items()}, folder / "batch.safetensors")
    seen = []
    policy.model.action_out_proj.register_forward_hook(lambda module, arguments, output: seen.append(output.detach()))
    losses = policy.model.forward(*inputs(batch), batch["actions"], batch["noise"], batch["time"])
    loss = losses[..., : case["real_actions"]].mean()
    loss.backward()
    results = {"loss": loss.detach(), "prediction": seen[0]}
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            results[f"gradient/{name}"] = parameter.grad
    results["sampled"] = sample(policy, batch, case)
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, folder / "results.safetensors")


def sample(policy, batch, case):
    return policy.model.sample_actions(*inputs(batch), noise=batch["noise"], num_steps=case["steps"])


def process(checkpoint):
    prompts = []

    class Tokenizer:
        def __call__(self, texts, **options):
            prompts.extend(texts)
            shape = (len(texts), options["max_length"])
            return {"input_ids": torch.zeros(shape).long(), "attention_mask": torch.ones(shape).long()}

    tokenizers.AutoTokenizer = SimpleNamespace(from_pretrained=lambda name: Tokenizer())
    config = PreTrainedConfig.from_pretrained(checkpoint, local_files_only=True)
    before, after = make_pre_post_processors(config, pretrained_path=str(checkpoint))
    given = json.loads((checkpoint / "given.json").read_text())
    images = {name: torch.rand(feature.shape) for name, feature in config.image_features.items()}
    before({"observation.state": torch.tensor(given["state"]), "task": given["task"], **images})
    features = {**config.input_features, **config.output_features}
    return {
        "prompt": prompts,
        "action": after(torch.tensor(given["action"])).tolist(),
        "features": {name: list(feature.shape) for name, feature in features.items()},
    }


def prepare(folder):
    case = json.loads((Path(folder) / "case.json").read_text())
    shrink(case["sizes"])
    return case


def main(task, folder, *rest):
    if task == "compute":
        for each in (folder, *rest):
            compute(Path(each), prepare(each))
        return
    case = prepare(folder)
    batch = load_file(Path(folder) / "batch.safetensors")
    for checkpoint in rest:
        # The policy prints what fails to load and goes on with random weights: samples then differ.
        policy = peer.PI05Policy.from_pretrained(checkpoint, config=configuration(case), local_files_only=True)
        save_file({"sampled": sample(policy, batch, case)}, Path(checkpoint) / "sampled.safetensors")
        if (Path(checkpoint) / "policy_preprocessor.json").is_file():
            (Path(checkpoint) / "processed.json").write_text(json.dumps(process(Path(checkpoint))))


if __name__ == "__main__":
    main(*sys.argv[1:])
