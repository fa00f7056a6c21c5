"""The whole way in LeRobot and in loong: the same raw observation, policy and noise, the same actions for the robot."""

from __future__ import annotations

import json
from pathlib import Path

import lerobot_peer
import numpy as np
from policy_tiny import make_run
from safetensors.numpy import load_file, save_file

from loong_vla.lerobot.generate import generate
from loong_vla.lerobot.video import FrameReader
from loong_vla.policy import load_policy, recorded
from loong_vla.sequence import Draws


@lerobot_peer.needs_lerobot
def test_lerobot_does_the_same_with_an_export(tmp_path: Path) -> None:
    """Images have the policy's size: how they are resized is compared in test_inputs_parity."""
    cameras = {"observation.images.front": (42, 42), "observation.images.wrist": (42, 42)}
    dataset = generate(tmp_path / "data", frames=[12, 9], cameras=cameras)
    run = make_run(tmp_path / "run", dataset)
    policy = load_policy(run.folder)
    with FrameReader(dataset) as reader:
        seen = recorded(policy, dataset, reader, 1, 5)
    actions = policy.act_on_one(seen, seed=3)
    noise = Draws(3, "act").normal(0, 8 * 32, "noise").reshape(8, 32)
    save_file({policy.settings.state: seen.state, **seen.images, "noise": noise}, run.folder / "given.safetensors")
    case = {"sizes": dict(run.shape.fields), "tokenizer": str(run.folder / "tokenizer"), "task": seen.task}
    (run.folder / "case.json").write_text(json.dumps(case))
    config = json.loads((run.folder / "hf" / "config.json").read_text())
    config.pop("sizes", None)  # LeRobot knows the published sizes only; the peer is told of these
    (run.folder / "hf" / "config.json").write_text(json.dumps(config))
    lerobot_peer.run("policy_peer.py", run.folder)
    theirs = load_file(run.folder / "done.safetensors")["actions"]
    assert theirs.shape == actions.shape
    np.testing.assert_allclose(actions, theirs, atol=1e-4)
    assert np.abs(policy.act_on_one(seen._replace(task="wave"), seed=3) - theirs).max() > 1e-2
