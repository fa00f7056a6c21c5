"""Turns a checkpoint of one format into another by the code a run uses: one process, on the CPU, no optimizer.

`python -m loong_ckpt.convert <checkpoint> <output> <format>`, or `convert()` in a process that has not imported
megatron-core yet. The whole model has to fit into this machine's memory once.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loong_ckpt import hf_folder, native_folder
from loong_core.errors import CheckpointError, LoongError

if TYPE_CHECKING:
    from loong_core.registry import Registry

DEVICE = "cpu"
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def convert(checkpoint: Path, out: Path, kind: str) -> None:
    """Write `checkpoint` (any installed format) to `out` as format `kind`.

    A native checkpoint made this way holds weights only: it can start a run (`model.weights`), not continue one.
    Raises `CheckpointError`, and `RecipeError` if no installed family reads the checkpoint's config.json.
    """
    from loong_core import validate
    from loong_core.recipe_load import load
    from loong_core.registry import open_registry, resolve

    registry = open_registry()
    target = registry.get("checkpoint_formats", kind)
    if target.save is None:
        raise CheckpointError(f"The checkpoint format {kind!r} cannot be written, only read.")
    with tempfile.TemporaryDirectory(prefix="loong-convert-") as name:
        folder = Path(name)
        (folder / "recipe.json").write_text(json.dumps(_recipe(checkpoint, registry)))
        prepared = validate.prepare(load(str(folder / "recipe.json"), [], registry), registry, purpose="plan")

        from loong_core.train import run as runs
        from loong_core.train.start import start_weights

        run = runs.create(prepared, registry, folder)
        engine = resolve(registry.get("parallel_planners", run.plan.planner).build)(run)
        start_weights(run, engine)
        resolve(target.save)(out, run, engine)
        engine.close()


def _recipe(checkpoint: Path, registry: Registry) -> dict[str, Any]:
    """The smallest recipe whose model is the checkpoint's, in a precision that keeps its dtype."""
    model: dict[str, Any] = {"weights": str(checkpoint.absolute())}
    if native_folder.claims(checkpoint):
        model["family"] = native_folder.read_state(checkpoint).get("family")
        precision = _saved_precision(checkpoint)
    else:
        precision = _precision_of(checkpoint, registry)
    return {
        "model": model,
        "backend": DEVICE,
        "precision": precision,
        "launch": {"devices": 1},
        "parallel": {"recompute": "none"},
        "data": {"seq_len": 8, "global_batch": 1},
    }


def _saved_precision(checkpoint: Path) -> str:
    from loong_core.recipe_load import load_file

    return load_file(checkpoint / native_folder.RECIPE).precision


def _precision_of(folder: Path, registry: Registry) -> str:
    """The policy that keeps parameters in the dtype most of the weights have; float32 if none does."""
    elements = Counter[str]()
    for entry in hf_folder.open_folder(folder).tensors.values():
        elements[NAMES.get(entry.dtype, entry.dtype)] += entry.end - entry.begin
    policies = registry.table("precision_policies")
    for dtype in ([elements.most_common(1)[0][0]] if elements else []) + ["float32"]:
        for policy in policies.values():
            if policy.parameters == dtype:
                return policy.name
    raise CheckpointError(f"{folder}: no installed precision policy holds {' or '.join(elements)}.")


def main(words: list[str]) -> int:
    """Exit code 0, or 1 and 2 as on the command line."""
    from loong_core.cli import output

    checkpoint, out, kind = words
    try:
        convert(Path(checkpoint), Path(out), kind)
    except (LoongError, OSError) as error:
        return output.error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
