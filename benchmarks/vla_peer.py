"""LeRobot's training step on the batches of a row: forward, backward, clipping, optimizer, and the two numbers that its
trainer asks the device for.

    python benchmarks/vla_peer.py JOB.json

runs in LeRobot's interpreter and imports nothing of loong. The step is that of `lerobot/scripts/lerobot_train.py`
(0.6.1): TF32 products and cuDNN's search are allowed, gradients are clipped over all parameters, AdamW is torch's. Not
timed, to LeRobot's advantage: reading, decoding, its processors, and the way of a batch to the device.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import sys
import time
import types
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

LIBRARIES = ("torch", "lerobot", "transformers", "diffusers")
Step = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]


def stand_in_for_datasets() -> list[str]:
    """Names that LeRobot's policies import for type hints, where the packages for reading datasets are missing."""
    if all(importlib.util.find_spec(name) is not None for name in ("av", "datasets")):
        return []
    names = ["lerobot.datasets"]
    names += [f"lerobot.datasets.{name}" for name in ("lerobot_dataset", "dataset_metadata", "language")]
    names += ["lerobot.datasets.language_render"]
    held = {
        **dict.fromkeys(("LeRobotDataset", "LeRobotDatasetMetadata"), object),
        **dict.fromkeys(("LANGUAGE_EVENTS", "LANGUAGE_PERSISTENT", "LANGUAGE_COLUMNS"), ()),
        "render_sample": None,
    }
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__dict__.update(held)
        sys.modules[name] = module
    return names


class Clock:
    """Milliseconds between `start` and `stop`, by events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began: Any = None

    def start(self) -> None:
        """Nothing is under way on the device."""
        if self._cuda:
            torch.cuda.synchronize()
        self._began = self._mark()

    def stop(self) -> float:
        """Waits for the device."""
        ended = self._mark()
        if not self._cuda:
            return float((ended - self._began) * 1e3)
        torch.cuda.synchronize()
        return float(self._began.elapsed_time(ended))

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def batch_of(path: str, step: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Batch `step` of a row, on the device."""
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.partition(".")[0] == str(step)]  # noqa: SIM118
        return {name.partition(".")[2]: file.get_tensor(name).to(device) for name in names}


def train(job: Mapping[str, Any]) -> dict[str, Any]:
    """Every step's time, loss and gradient norm, and facts."""
    began = time.perf_counter()
    device = torch.device(job["device"])
    torch.manual_seed(job["seed"])
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    missing = stand_in_for_datasets()
    module = importlib.import_module("vla_peer_pi05" if job["family"] == "pi05" else "vla_peer_groot")
    policy, inputs, forward = module.build(job, device)
    preset = policy.config.get_optimizer_preset()
    optimizer = preset.build(policy.get_optim_params())
    lrs = job["lr"]
    found: dict[str, Any] = {"ms": [], "loss": [], "norm": [], "memory_bytes": 0}
    clock = Clock(device)
    for step in range(job["steps"]):
        given = inputs(batch_of(job["batches"], step, device))
        for group in optimizer.param_groups:
            group["lr"] = lrs[step]
        if step == job["warmup"] and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock.start()
        policy.train()
        loss = forward(given)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), preset.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        found["loss"].append(loss.item())
        found["norm"].append(norm.item())
        found["ms"].append(clock.stop())
        if step == 0:
            found["first_step_seconds"] = time.perf_counter() - began
    found["memory_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    held: dict[str, int] = {}
    for parameter in policy.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        held[name] = held.get(name, 0) + parameter.numel()
    facts = {"trained_parameters": trained, "parameters": held, "stood_in_for": missing, "settings": job["settings"]}
    return {**found, **facts, "versions": {name: _version(name) for name in LIBRARIES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(work["out"]).write_text(json.dumps(train(work)), encoding="utf-8")
