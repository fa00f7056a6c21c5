"""Runs in LeRobot's interpreter: what its processors make of images, states, actions and instructions.

It reads names of folders from its input, a line each. Of every `FOLDER` it reads `case.json` and `inputs.safetensors`,
calls the functions that the case names, writes `outputs.safetensors`, and answers `done`, or what went wrong as JSON.
One process serves all cases, because importing takes longer than computing.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import lerobot.policies.groot.processor_groot as groot
import lerobot.policies.pi05.processor_pi05 as pi05
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.datasets.compute_stats import compute_relative_action_stats
from lerobot.policies.common.vla_utils import resize_with_pad_torch
from lerobot.policies.groot.configuration_groot import GrootConfig
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

CAMERAS = ("observation.images.front", "observation.images.wrist")


def features(case):
    image = PolicyFeature(type=FeatureType.VISUAL, shape=(3, 64, 64))
    return {
        "input_features": {
            **{name: image for name in CAMERAS},
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(case["state"],)),
        },
        "output_features": {"action": PolicyFeature(type=FeatureType.ACTION, shape=(case["action"],))},
    }


def statistics_of(inputs):
    found = {}
    for name, tensor in inputs.items():
        if name.startswith("statistics/"):
            _, feature, key = name.split("/")
            found.setdefault(feature, {})[key] = tensor
    return found


def batch_of(case, inputs):
    batch = {"observation.state": inputs["state"], "action": inputs["actions"], "task": case["tasks"]}
    if "front" in inputs:
        batch |= {name: inputs[name.rpartition(".")[2]].permute(0, 3, 1, 2).float() / 255 for name in CAMERAS}
    return batch


def run_pi05(case, inputs, folder):
    modes = {key: NormalizationMode[value] for key, value in case["modes"].items()}
    config = PI05Config(
        device="cpu",
        chunk_size=case["horizon"],
        n_action_steps=case["horizon"],
        tokenizer_max_length=case["length"],
        normalization_mapping={"VISUAL": NormalizationMode.IDENTITY, **modes},
        use_relative_actions=case["relative"],
        relative_exclude_joints=case["exclude"],
        action_feature_names=case["names"],
        **features(case),
    )

    def tokens(tokenizer_name, **more):
        return step(tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"), **more)

    step = pi05.TokenizerProcessorStep
    with mock.patch.object(pi05, "TokenizerProcessorStep", tokens):
        before, after = pi05.make_pi05_pre_post_processors(config, statistics_of(inputs))
    made = before(batch_of(case, inputs))
    return {
        "state": made["observation.state"],
        "actions": made["action"],
        "tokens": made["observation.language.tokens"],
        "token_mask": made["observation.language.attention_mask"].bool(),
        "restored": after(inputs["predicted"]),
    }


def qwen(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template = (folder / "template.jinja").read_text()
    images = Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2, min_pixels=1, max_pixels=1 << 24)
    videos = Qwen3VLVideoProcessor(patch_size=16, merge_size=2, temporal_patch_size=2)
    found = Qwen3VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template)
    found.tokenizer.padding_side = "left"
    return found


def run_groot(case, inputs, folder):
    config = GrootConfig(
        device="cpu",
        base_model_path=str(folder / "base"),
        chunk_size=case["horizon"],
        n_action_steps=case["horizon"],
        max_state_dim=case["state_size"],
        max_action_dim=case["action_size"],
        embodiment_tag=case["embodiment"],
        use_relative_actions=case["relative"],
        relative_exclude_joints=case["exclude"],
        **features(case),
    )
    known = statistics_of(inputs)
    names = {"action": {"names": case["names"]}, "observation.state": {"names": case["names"]}}
    absolute = {**known, "action": known.pop("absolute", known.get("action"))}
    meta = SimpleNamespace(features=names, stats=absolute)
    with mock.patch.object(groot, "_build_n1_7_processor", lambda name: qwen(folder)):
        before, after = groot.make_groot_pre_post_processors(config, known, meta)
        with torch.no_grad():
            made = before({**batch_of(case, inputs), **{k: v for k, v in inputs.items() if k == "action_is_pad"}})
    return {
        "state": made["state"],
        "actions": made["action"],
        "action_mask": made["action_mask"].bool(),
        "tokens": made["input_ids"],
        "token_mask": made["attention_mask"].bool(),
        "pixels": made["pixel_values"],
        "embodiment": made["embodiment_id"].long(),
        "restored": after(inputs["predicted"]),
    }


def run_images(case, inputs, folder):
    found = {}
    for name, image in inputs.items():
        found[f"pad/{name}"] = resize_with_pad_torch(image.float() / 255, *case["pad"])[0] * 255
        size = {
            "image_crop_size": case["crop"],
            "image_target_size": case["target"],
            "shortest_image_edge": case["edge"],
        }
        more = {"crop_fraction": None, "letter_box_transform": case["letterbox"]}
        square = groot._transform_n1_7_image_for_vlm_torch(image.permute(2, 0, 1), **size, **more)
        found[f"square/{name}"] = square.permute(1, 2, 0)
        for where, position in {"middle": None, "drawn": tuple(case["position"])}.items():
            edge = groot._transform_n1_7_image_for_vlm_albumentations(
                image.numpy(), **size, **more, crop_position=position
            )
            found[f"edge-{where}/{name}"] = torch.from_numpy(edge.copy())
    return found


def run_relative(case, inputs, folder):
    state, action, horizon = inputs["state"], inputs["action"], case["horizon"]
    index = torch.tensor(case["episodes"])
    items = []
    for row in range(len(index)):
        last = int((index == index[row]).nonzero().max())
        rows = torch.arange(row, row + horizon)
        items.append(
            {
                "action": action[rows.clamp(max=last)],
                "observation.state": state[row],
                "action_is_pad": rows > last,
            }
        )
    found = groot._make_relative_action_training_stats(
        items, exclude_joints=case["exclude"], action_names=case["names"]
    )
    together = compute_relative_action_stats(
        {"action": action.tolist(), "observation.state": state.tolist(), "episode_index": case["episodes"]},
        {"action": {"shape": [action.shape[1]], "names": case["names"]}},
        horizon,
        case["exclude"],
    )
    return {
        **{f"by step/{key}": torch.as_tensor(value) for key, value in found["action"].items()},
        **{f"together/{key}": torch.as_tensor(value) for key, value in together.items()},
    }


def serve_one(folder):
    case = json.loads((folder / "case.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    run = {"pi05": run_pi05, "groot": run_groot, "images": run_images, "relative": run_relative}[case["what"]]
    outputs = run(case, inputs, folder)
    save_file({name: tensor.contiguous() for name, tensor in outputs.items()}, folder / "outputs.safetensors")


def main():
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    for line in sys.stdin:
        try:
            serve_one(Path(line.strip()))
            answer = "done"
        except Exception:
            answer = json.dumps(traceback.format_exc())
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
