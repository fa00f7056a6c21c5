"""Images, states, actions and prompts against LeRobot's processors on the same inputs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lerobot_peer
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loong_vla.families import Policy, processing
from loong_vla.images import edge_resize, pad_resize, square_resize
from loong_vla.normalise import relative_mask, relative_statistics
from loong_vla.options import RobotOptions
from loong_vla.processing import Processing, Robot
from loong_vla.prompts import IMAGE, SPECIAL, load_tokenizer, train

NAMES = ["shoulder", "elbow", "wrist_1", "gripper"]
TASKS = [" Pick_up the cube.\n", "fold: the T-shirt, then hold it", "go"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for item in message.content %}"
    "{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


Ask = Callable[[Path, dict[str, Any], dict[str, Any]], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def ask_peer() -> Iterator[Ask]:
    """Asks one process in LeRobot's interpreter: folder, case, inputs -> outputs."""
    command = lerobot_peer.command("inputs_peer.py")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **pipes, text=True, env=lerobot_peer.ENVIRONMENT) as process:
        yield partial(ask_process, process)


def ask_process(
    process: subprocess.Popen[str], folder: Path, case: dict[str, Any], inputs: dict[str, Any]
) -> dict[str, np.ndarray]:
    (folder / "case.json").write_text(json.dumps(case))
    tensors = {name: torch.as_tensor(np.ascontiguousarray(value)) for name, value in inputs.items()}
    save_file(tensors, folder / "inputs.safetensors")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{folder}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer == "done\n", json.loads(answer) if answer else "LeRobot's process ended"
    return {name: tensor.numpy() for name, tensor in load_file(folder / "outputs.safetensors").items()}


def picture(rows: int, columns: int, seed: int) -> np.ndarray:
    """Smooth shapes with some noise: neither constant nor all high frequencies."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:rows, 0:columns]
    waves = [np.sin(x / 7 + seed) + np.cos(y / (5 + channel)) for channel in range(3)]
    return (np.stack(waves, -1) * 55 + 128 + random.normal(0, 10, (rows, columns, 3))).clip(0, 255).astype(np.uint8)


SIZES = {"square": (64, 64), "wide": (48, 100), "tall": (90, 37), "small": (20, 31), "exact": (56, 56), "odd": (61, 61)}


@pytest.mark.parametrize(("edge", "letterbox"), [(None, False), (60, False), (64, True)])
def test_images(ask_peer: Ask, tmp_path: Path, edge: int | None, letterbox: bool) -> None:
    pictures = {name: picture(*size, seed) for seed, (name, size) in enumerate(SIZES.items())}
    case = {"what": "images", "pad": [56, 56], "target": [56, 56], "crop": [50, 50], "edge": edge}
    case |= {"letterbox": letterbox, "position": [0.9, 0.2]}
    theirs = ask_peer(tmp_path, case, pictures)
    crop = 50 / 56
    pad, square = pad_resize(56, 56), square_resize(56, 56, edge=edge, crop=crop, letterbox=letterbox)
    area = edge_resize(56, edge=edge, crop=crop, letterbox=letterbox)
    for name, image in pictures.items():
        ours = {
            "pad": pad(image, None),
            "square": square(image, None),
            "edge-middle": area(image, None),
            "edge-drawn": area(image, (0.9, 0.2)),
        }
        for kind, found in ours.items():
            expected = theirs[f"{kind}/{name}"].astype(np.float32)
            assert found.shape == expected.shape, (kind, name)
            difference = np.abs(found.astype(np.float32) - expected)
            # Half a level is what rounding to bytes costs; OpenCV rounds weights too, and `edge` resizes twice.
            limit = 0.5 + 1e-3 if kind == "pad" else 2.0
            assert difference.max() <= limit, (kind, name, float(difference.max()))
            assert difference.mean() <= (0.3 if kind != "pad" else 0.26), (kind, name, float(difference.mean()))


def draw(samples: int, horizon: int, state: int, action: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    found = {
        "state": random.normal(size=(samples, state)),
        "actions": random.normal(size=(samples, horizon, action)),
        "predicted": random.normal(size=(samples, horizon, action)) * 0.7,
    }
    for feature, size in (("observation.state", state), ("action", action)):
        low, high = random.normal(-1.5, 0.2, size), random.normal(1.5, 0.2, size)
        inner = {"q01": low + 0.2, "q99": high - 0.2, "mean": (low + high) / 2, "std": (high - low) / 4}
        for key, value in {"min": low, "max": high, **inner}.items():
            found[f"statistics/{feature}/{key}"] = value
    return {name: value.astype(np.float32) for name, value in found.items()}


def robot_with(inputs: dict[str, np.ndarray], case: dict[str, Any]) -> Robot:
    statistics: dict[str, dict[str, np.ndarray]] = {}
    for name, value in inputs.items():
        if name.startswith("statistics/"):
            _, feature, key = name.split("/")
            statistics.setdefault(feature, {})[key] = value
    cameras = {f"observation.images.{name}": (64, 64) for name in ("front", "wrist")}
    names = tuple(case["names"])
    return Robot(case["state"], case["action"], names, cameras, tuple(TASKS), statistics, "a dataset")


def compare(
    use: Processing, case: dict[str, Any], inputs: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
) -> None:
    """States, action chunks, tokens, and actions given back."""
    for row, task in enumerate(case["tasks"]):
        state = inputs["state"][row]
        sample = use.observe(state, task)
        np.testing.assert_allclose(
            sample["state"][: theirs["state"].shape[-1]], theirs["state"][row].reshape(-1), rtol=1e-5, atol=1e-5
        )
        count = case.get("recorded", [case["horizon"]] * 9)[row]
        chunk = use.chunk(inputs["actions"][row, :count], state)
        expected = theirs["actions"][row]
        np.testing.assert_allclose(
            chunk["actions"][: len(expected), : expected.shape[1]], expected, rtol=1e-5, atol=1e-5
        )
        if "action_mask" in theirs:
            np.testing.assert_array_equal(chunk["action_mask"], theirs["action_mask"][row])
        tokens, mask = theirs["tokens"][row], theirs["token_mask"][row]
        np.testing.assert_array_equal(sample["tokens"][sample["token_mask"]], tokens[mask])
    restored = use.restore(padded(inputs["predicted"], use), inputs["state"])
    np.testing.assert_allclose(restored, theirs["restored"], rtol=1e-5, atol=1e-5)


def padded(actions: np.ndarray, use: Processing) -> np.ndarray:
    result = np.zeros((len(actions), use.horizon, use.action_size), np.float32)
    result[:, : actions.shape[1], : actions.shape[2]] = actions
    return result


@pytest.mark.parametrize(
    ("modes", "relative"),
    [
        ({"STATE": "QUANTILES", "ACTION": "QUANTILES"}, False),
        ({"STATE": "MIN_MAX", "ACTION": "MEAN_STD"}, False),
        ({"STATE": "MEAN_STD", "ACTION": "IDENTITY"}, True),
        ({"STATE": "QUANTILES", "ACTION": "QUANTILES"}, True),
    ],
)
def test_pi05(ask_peer: Ask, tmp_path: Path, modes: dict[str, str], relative: bool) -> None:
    tokenizer = train(TASKS, 320, tmp_path / "tokenizer")
    case = {"what": "pi05", "state": 6, "action": 4, "horizon": 5, "length": 40, "modes": modes, "tasks": TASKS}
    case |= {"relative": relative, "exclude": ["gripper"], "names": NAMES}
    inputs = draw(3, 5, 6, 4)
    theirs = ask_peer(tmp_path, case, inputs)
    config = {"normalization_mapping": modes, "use_relative_actions": relative, "relative_exclude_joints": ["gripper"]}
    fields = {"image_size": 28, "horizon": 5, "state_size": 32, "action_size": 32, "prompt_length": 40}
    policy = Policy(family="pi05", fields=fields, config=config, tokenizer=load_tokenizer(tokenizer))
    use = processing(policy, robot_with(inputs, case))
    compare(use, case, inputs, theirs)
    lengths = theirs["token_mask"].sum(1)
    assert lengths.max() == 40 and lengths.min() < 40, "one prompt is cut, one is not"


GROOT_FIELDS: dict[str, Any] = {
    **{"image_size": 256, "patch": 16, "merge": 2, "horizon": 40, "state_size": 11, "action_size": 9, "slots": 32},
    **{"image_token": SPECIAL.index(IMAGE), "time_alpha": 1.5, "time_beta": 1.0, "time_scale": 0.999},
}


def groot_case(folder: Path, **more: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    train(TASKS, 320, folder / "tokenizer")
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "Gr00tN1d7"}))
    case = {"what": "groot", "state": 4, "action": 4, "horizon": 40, "tasks": TASKS, "names": NAMES, "relative": False}
    case |= {"state_size": 11, "action_size": 9, "embodiment": "new_embodiment", "exclude": ["gripper"], **more}
    inputs = draw(3, 40, 4, 4)
    recorded = case.get("recorded", [40, 40, 40])
    inputs["action_is_pad"] = np.arange(40) >= np.array(recorded)[:, None]
    for number, name in enumerate(("front", "wrist")):
        inputs[name] = np.stack([picture(64, 64, number * 3 + row) for row in range(3)])
    return case, inputs


def groot_policy(folder: Path, case: dict[str, Any], **more: Any) -> Policy:
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    config = {"embodiment_tag": case["embodiment"], "use_relative_actions": case["relative"]}
    config["relative_exclude_joints"] = case["exclude"]
    return Policy(
        family="groot_n17", fields=GROOT_FIELDS, config=config, tokenizer=tokenizer, folders=[folder / "base"], **more
    )


def compare_pixels(use: Processing, inputs: dict[str, np.ndarray], theirs: np.ndarray) -> None:
    """LeRobot's patches of all images, in the order samples and cameras stand in, against ours. Its image processor
    scales by the statistics of CLIP by default, which the published preprocessor replaces by 0.5."""
    rows, columns = (side // 16 for side in use.size)
    images = np.stack([use.image(inputs[name][row], name) for row in range(3) for name in ("front", "wrist")])
    patches = images.reshape(-1, rows // 2, 2, 16, columns // 2, 2, 16, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    ours = np.repeat(patches.reshape(len(images) * rows * columns, 3, 1, 256), 2, axis=2).astype(np.float32) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073]).reshape(1, 3, 1, 1)
    scale = np.array([0.26862954, 0.26130258, 0.27577711]).reshape(1, 3, 1, 1)
    found = theirs.reshape(ours.shape) * scale + mean
    assert np.abs(found - ours).max() <= 2.0 / 255 + 1e-4


@pytest.mark.parametrize("recorded", [[40, 40, 40], [40, 17, 1]])
def test_groot(ask_peer: Ask, tmp_path: Path, recorded: list[int]) -> None:
    case, inputs = groot_case(tmp_path, recorded=recorded)
    inputs["actions"] *= 1.5  # some lie outside the statistics and are clipped
    inputs["statistics/action/max"][2] = inputs["statistics/action/min"][2]
    for row, count in enumerate(recorded):
        inputs["actions"][row, count:] = inputs["actions"][row, count - 1]
    theirs = ask_peer(tmp_path, case, inputs)
    use = processing(groot_policy(tmp_path, case), robot_with(inputs, case))
    compare(use, case, inputs, theirs)
    compare_pixels(use, inputs, theirs["pixels"])
    assert theirs["embodiment"].tolist() == [use.embodiment] * 3


def test_groot_with_relative_actions(ask_peer: Ask, tmp_path: Path) -> None:
    case, inputs = groot_case(tmp_path, relative=True)
    random = np.random.default_rng(8)
    low, high = random.normal(-2, 0.1, (40, 4)), random.normal(2, 0.1, (40, 4))
    own = {"min": low, "max": high, "mean": low * 0, "std": high * 0 + 1, "q01": low, "q99": high}
    own = {key: value.astype(np.float32) for key, value in own.items()}
    robot = robot_with(inputs, case)
    for key in list(inputs):
        if key.startswith("statistics/action/"):
            inputs[key.replace("/action/", "/absolute/")] = inputs.pop(key)
    inputs |= {f"statistics/action/{key}": value for key, value in own.items()}
    theirs = ask_peer(tmp_path, case, inputs)
    policy = groot_policy(tmp_path, case, relative=lambda mask, steps, by_step: own)
    compare(processing(policy, robot), case, inputs, theirs)


def test_groot_with_the_statistics_of_its_base_model(ask_peer: Ask, tmp_path: Path) -> None:
    case, inputs = groot_case(tmp_path, embodiment="libero_sim", recorded=[16, 16, 9])
    random = np.random.default_rng(9)

    def entry(size: int) -> dict[str, list[float]]:
        low, high = random.normal(-1.5, 0.1, size), random.normal(1.5, 0.1, size)
        found = {"min": low, "max": high, "q01": low + 0.1, "q99": high - 0.1, "mean": low * 0, "std": low * 0 + 1}
        return {key: value.tolist() for key, value in found.items()}

    groups = {"modality_keys": ["arm", "gripper"]}
    absolute = {"rep": "ABSOLUTE", "type": "NON_EEF", "format": "DEFAULT", "state_key": None}
    modality = {
        "state": groups,
        "action": {**groups, "action_configs": [absolute, absolute], "delta_indices": list(range(16))},
        "video": {"modality_keys": ["front", "wrist"], "delta_indices": [0]},
    }
    processor = {"modality_configs": {"libero_sim": modality}, "use_percentiles": True, "max_action_horizon": 40}
    processor |= {"image_crop_size": [230, 230], "image_target_size": [256, 256], "use_albumentations": True}
    processor |= {"shortest_image_edge": 256, "crop_fraction": 0.95, "formalize_language": False}
    statistics = {key: {"arm": entry(3), "gripper": entry(1)} for key in ("state", "action")}
    for name, content in {
        "processor_config.json": {"processor_kwargs": processor},
        "statistics.json": {"libero_sim": statistics},
        "embodiment_id.json": {"libero_sim": 7},
    }.items():
        (tmp_path / "base" / name).write_text(json.dumps(content))
    inputs["actions"] = inputs["actions"][:, :16]
    inputs["action_is_pad"] = inputs["action_is_pad"][:, :16]
    theirs = ask_peer(tmp_path, case, inputs)
    use = processing(groot_policy(tmp_path, case), robot_with(inputs, case))
    assert use.steps == 16 and use.embodiment == 7 == theirs["embodiment"][0]
    inputs["predicted"] = inputs["predicted"][:, :40]
    # LIBERO's gripper is turned into an open-or-close command behind the normalisation; that is the simulator's.
    theirs["restored"], expected = theirs["restored"][..., :3], theirs["restored"][..., 3]
    ours = use.restore(padded(inputs["predicted"], use), inputs["state"])
    np.testing.assert_array_equal(-np.sign(2 * ours[..., 3] - 1), expected)
    np.testing.assert_allclose(ours[..., :3], theirs["restored"], rtol=1e-5, atol=1e-5)
    theirs["restored"] = ours
    compare(use, case, inputs, theirs)
    compare_pixels(use, inputs, theirs["pixels"])


def test_relative_statistics(ask_peer: Ask, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    lengths = [12, 30, 5]
    state, action = (random.normal(size=(sum(lengths), 4)).astype(np.float32) for _ in range(2))
    index = np.repeat(np.arange(3), lengths)
    case = {"what": "relative", "horizon": 6, "episodes": index.tolist(), "exclude": ["gripper"], "names": NAMES}
    theirs = ask_peer(tmp_path, case, {"state": state, "action": action})
    mask = relative_mask(NAMES, 4, ["gripper"])
    pairs = [(state[index == number], action[index == number]) for number in range(3)]
    for kind, by_step in (("by step", True), ("together", False)):
        ours = relative_statistics(pairs, mask, 6, by_step=by_step)
        for key in ("min", "max", "mean", "std", "q01", "q99"):
            # LeRobot's pooled quantiles are read off a histogram.
            tolerance = 1e-5 if by_step or key[0] != "q" else 5e-3
            np.testing.assert_allclose(ours[key], theirs[f"{kind}/{key}"], rtol=1e-5, atol=tolerance, err_msg=key)


def test_settings_of_the_recipe_come_before_those_of_the_policy(tmp_path: Path) -> None:
    inputs = draw(1, 5, 6, 4)
    case = {"state": 6, "action": 4, "names": NAMES}
    fields = {"image_size": 28, "horizon": 5, "state_size": 32, "action_size": 32, "prompt_length": 48}
    policy = Policy(
        family="pi05",
        fields=fields,
        config={"normalization_mapping": {"STATE": "QUANTILES", "ACTION": "QUANTILES"}},
        tokenizer=load_tokenizer(train(TASKS, 320, tmp_path / "tokenizer")),
        settings=RobotOptions(normalise={"action": "min_max"}, prompt="task"),
    )
    use = processing(policy, robot_with(inputs, case))
    assert use.states.mode == "quantiles" and use.actions.mode == "min_max"
    tokens = use.observe(inputs["state"][0], "go")
    assert tokens["token_mask"].sum() < 8
