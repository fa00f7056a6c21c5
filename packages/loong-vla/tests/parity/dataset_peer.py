"""Runs in lerobot's interpreter: reads datasets with lerobot itself and writes what it saw.

`python dataset_peer.py JOBS.json`, a list of `{"root", "out", "horizon", "record", "convert", "statistics"}`. `record`
first writes the dataset with lerobot's recorder; `convert` turns a copy of a v2.1 dataset into v3.0, which is all that
lerobot 0.6 reads. `out` (safetensors) gets a tensor a column over all frames, `images/<camera>` uint8 [frames, 3,
height, width], with `horizon` also `chunk` and `chunk_is_pad` of the actions from each frame on, and
`stats/<feature>/<name>` of the dataset or, with `statistics`, as lerobot computes them anew; the file's `.json` sibling
the tasks by frame.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.numpy import save_file


def converted(root: Path) -> Path:
    """A copy of a v2.1 dataset, brought to v3.0 by lerobot's own script."""
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

    copy = Path(tempfile.mkdtemp(prefix="convert-")) / "dataset"
    shutil.copytree(root, copy)
    convert_dataset("local/dataset", root=copy, push_to_hub=False)
    return copy


def record(root: Path) -> None:
    """A dataset as lerobot's own recorder leaves it: two episodes, one with two instructions."""
    features = {
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]},
        "action": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
        "observation.effort": {"dtype": "float32", "shape": (1,), "names": None},
        "next.done": {"dtype": "bool", "shape": (1,), "names": None},
        "observation.images.top": {"dtype": "video", "shape": (48, 64, 3), "names": ["height", "width", "channels"]},
    }
    dataset = LeRobotDataset.create("local/dataset", fps=20, features=features, root=root, robot_type="arm")
    random = np.random.default_rng(0)
    for length in (9, 14):
        for frame in range(length):
            row = {name: random.normal(size=size).astype(np.float32) for name, size in (("action", 2),)}
            row["observation.state"] = random.normal(size=3).astype(np.float32)
            row["observation.effort"] = np.array([frame / 7], np.float32)
            row["next.done"] = np.array([frame == length - 1])
            image = np.full((48, 64, 3), 20 * (frame % 10), np.uint8)
            image[5 : 5 + frame, :, 1] = 200
            dataset.add_frame({**row, "observation.images.top": image, "task": "wave" if frame < 11 else "rest"})
        dataset.save_episode(parallel_encoding=False)
    dataset.finalize()


def read(job: dict) -> None:
    root, out, horizon = Path(job["root"]), Path(job["out"]), job.get("horizon", 0)
    if job.get("record"):
        record(root)
    root = converted(root) if job.get("convert") else root
    fps = json.loads((root / "meta" / "info.json").read_text())["fps"]
    deltas = {"action": [step / fps for step in range(horizon)]} if horizon else None
    settings = {"video_backend": "pyav", "return_uint8": True}
    dataset = LeRobotDataset("local/dataset", root=root, delta_timestamps=deltas, **settings)
    tensors: dict[str, list[torch.Tensor]] = {}
    tasks = []
    for number in range(len(dataset)):
        item = dataset[number]
        tasks.append(item.pop("task"))
        for name, value in item.items():
            key = {"action": "chunk", "action_is_pad": "chunk_is_pad"}.get(name, name) if horizon else name
            if name in dataset.meta.camera_keys:
                value = value if value.dtype == torch.uint8 else (value * 255).round().to(torch.uint8)
                key = f"images/{name}"
            tensors.setdefault(key, []).append(value)
    arrays = {name: np.ascontiguousarray(torch.stack(values).numpy()) for name, values in tensors.items()}
    statistics = dataset.meta.stats
    if job.get("statistics"):
        from lerobot.scripts.augment_dataset_quantile_stats import compute_quantile_stats_for_dataset

        statistics = compute_quantile_stats_for_dataset(LeRobotDataset("local/dataset", root=root, **settings))
    for feature, entry in statistics.items():
        for name, value in entry.items():
            arrays[f"stats/{feature}/{name}"] = np.ascontiguousarray(value)
    save_file(arrays, out)
    out.with_suffix(".json").write_text(json.dumps(tasks))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    for each in json.loads(Path(sys.argv[1]).read_text()):
        read(each)
