"""What both sides of a robot row start from: a dataset of videos, random weights as a public checkpoint, and the
batches that loong's data code makes of the recipe.

    python benchmarks/vla_work.py JOB.json

The job names `weights` (folder, family, config, dtype, backbone), `dataset` (path and arguments of
`loong_vla.lerobot.generate`), `recipe`, `words`, `steps` and `folder`. In `folder` it leaves `batches.safetensors`
(tensors named `STEP.NAME`, a global batch each), `facts.json` (what a sample shows, and its arithmetic) and
`tokenizer/`. Weights and dataset are made once.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.types import ModelShape

SPREAD = 0.02
"""Standard deviation of every matrix, those too that training starts at zero: a product with zeros is faster."""


# ------------------------------------------------------------------------------------------------------- weights
def weights(job: Mapping[str, Any]) -> None:
    """A folder that both sides open as the checkpoint they fine-tune: `config.json`, `model.safetensors`."""
    import torch
    from safetensors.torch import save_file

    from loong_core.registry import open_registry, resolve
    from loong_core.weights import WeightMap, verb_of

    folder = Path(job["folder"])
    if (folder / "model.safetensors").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(job["config"])
    if job.get("backbone"):
        (folder / "backbone").mkdir(exist_ok=True)
        (folder / "backbone" / "config.json").write_text(json.dumps(job["backbone"]), encoding="utf-8")
        config["model_name"] = str(folder / "backbone")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    family = open_registry().get("model_families", job["family"])
    shape: ModelShape = resolve(family.describe)(family, config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, found, stacked = WeightMap(family.weights), {}, {}
    for spec in shape.parameters:
        full = _drawn(spec.role, spec.shape, spec.init, device).to(getattr(torch, job["dtype"])).cpu()
        row = rows.candidates(spec)[0]
        for name, part in zip(row.hf, verb_of(row).unpack(full, shape.fields), strict=True):
            if row.verb == "stack":
                stacked.setdefault(name, []).append(part)
            else:
                found[name] = part.contiguous()
    found |= {name: torch.stack(parts) for name, parts in stacked.items()}
    save_file(found, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _drawn(role: str, shape: tuple[int, ...], init: str, device: str) -> Tensor:
    """A parameter's values: normal ones for matrices, else what training starts at."""
    import torch

    if len(shape) < 2:
        return torch.full(shape, float(init == "ones"))
    generator = torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(role.encode()).digest()[:7]))
    return torch.randn(shape, generator=generator, device=device) * SPREAD


# ------------------------------------------------------------------------------------------------------- batches
def batches(job: Mapping[str, Any]) -> None:
    """What the recipe's first steps train on, and the arithmetic of each."""
    import torch
    from safetensors.torch import save_file

    from loong_core import recipe_load, validate
    from loong_core.registry import open_registry
    from loong_core.train.run import Run
    from loong_core.train.schedule import learning_rate
    from loong_vla.flops import Seen, forward, training
    from loong_vla.stream import stream

    registry, folder = open_registry(), Path(job["folder"])
    prepared = validate.prepare(recipe_load.load(job["recipe"], job["words"], registry), registry)
    run = Run(
        recipe=prepared.recipe,
        folder=folder,
        registry=registry,
        cluster=prepared.cluster,
        backend=prepared.backend,
        plan=prepared.plan,
        precision=prepared.precision,
        family=prepared.family,
        config=prepared.config,
        shape=prepared.shape,
        task=prepared.task,
        ops=None,  # type: ignore[arg-type]
        device="cpu",
    )
    tensors: dict[str, Tensor] = {}
    replicas = [stream(run, replica) for replica in range(prepared.plan.dp)]
    seen = []
    for step in range(job["steps"]):
        parts = [batch for replica in replicas for batch in replica.batches(step)]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        tensors |= {f"{step}.{name}": tensor.contiguous() for name, tensor in whole.items()}
        seen += list(_seen(whole, prepared.shape.fields))
    for replica in replicas:
        replica.close()
    save_file(tensors, str(folder / "batches.safetensors"))
    fields = prepared.shape.fields
    everything = [_everything(one, tensors, fields) for one in seen] if fields.get("skip_padding") is False else seen
    mean = Seen(*(sum(values) / len(seen) for values in zip(*everything, strict=True)))
    facts = {
        "images_of_a_sample": mean.images,
        "text_tokens_of_a_sample": mean.text,
        "forward_tflop_of_a_sample": {name: flops / 1e12 for name, flops in forward(fields, mean).items()},
        "tflop_of_a_sample": sum(training(fields, one) for one in everything) / len(seen) / 1e12,
        "counted": [int(tensors[f"{step}.action_mask"].sum()) for step in range(job["steps"])],
        "lr": [learning_rate(prepared.recipe.optim, step + 1, job["steps"]) for step in range(job["steps"])],
        "optim": prepared.recipe.optim.model_dump(mode="json"),
        "precision": prepared.recipe.precision,
        "plan": {"dp": prepared.plan.dp, "micro_batch": prepared.plan.micro_batch},
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _seen(batch: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Iterator[Any]:
    """What each sample shows: images of real cameras, and tokens of the prompt that are none of an image."""
    from loong_vla.flops import Seen

    texts = batch["token_mask"]
    if "image_token" in fields:
        texts = texts & (batch["tokens"] != fields["image_token"])
    for images, text in zip(batch["camera_mask"].sum(1).tolist(), texts.sum(1).tolist(), strict=True):
        yield Seen(images, text)


def _everything(one: Any, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Any:
    """A sample with its padding, where the row asks for that to be computed."""
    from loong_vla.flops import Seen

    return Seen(tensors["0.camera_mask"].shape[1], fields["prompt_length"])


# ---------------------------------------------------------------------------------------------------------- dataset
def dataset(job: Mapping[str, Any]) -> None:
    """Generate the dataset, unless it is there."""
    from loong_vla.lerobot.generate import generate

    given = dict(job)
    path = Path(given.pop("path"))
    if not (path / "meta" / "info.json").is_file():
        given["cameras"] = {name: tuple(size) for name, size in given["cameras"].items()}
        generate(path, **given)


def main(path: Path) -> None:
    """Make what the job names."""
    job = json.loads(path.read_text(encoding="utf-8"))
    weights(job["weights"])
    dataset(job["dataset"])
    batches(job)


if __name__ == "__main__":
    from loong_core.errors import LoongError

    try:
        main(Path(sys.argv[1]))
    except LoongError as error:
        sys.exit(f"error: {error}")
