"""Runs in LeRobot's interpreter: what LeRobot does at an observation with a Pi0.5 that loong exported.

`python policy_peer.py FOLDER` reads `case.json` (sizes, folder of the tokenizer, instruction), `given.safetensors` (an
observation as a robot gives it, and noise) and the policy in `hf/`; it writes `done.safetensors` with the actions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lerobot.policies.pi05.modeling_pi05 as peer
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from pi05_peer import shrink
from safetensors.torch import load_file, save_file


def main(folder):
    case = json.loads((folder / "case.json").read_text())
    shrink(case["sizes"])
    config = PreTrainedConfig.from_pretrained(folder / "hf", local_files_only=True)
    config.device = "cpu"
    policy = peer.PI05Policy.from_pretrained(folder / "hf", config=config, local_files_only=True).eval()
    before, after = make_pre_post_processors(
        config,
        pretrained_path=str(folder / "hf"),
        preprocessor_overrides={"tokenizer_processor": {"tokenizer_name": case["tokenizer"]}},
    )
    given = load_file(folder / "given.safetensors")
    noise = given.pop("noise")
    images = {name: image.permute(2, 0, 1).float() / 255 for name, image in given.items() if image.ndim == 3}
    with torch.no_grad():
        seen = before({**given, **images, "task": case["task"]})
        actions = after(policy.predict_action_chunk(seen, noise=noise[None]))
    save_file({"actions": actions[0].contiguous()}, folder / "done.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
