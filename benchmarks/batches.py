"""The global batches of a recipe as one safetensors file, cut by loong's own data code, for whoever trains beside it.

    python benchmarks/batches.py RECIPE FOLDER STEPS [override ...]

leaves in FOLDER: `batches.safetensors` (`tokens`, `targets`, `positions` and, where rows are packed or padded,
`segments`; int32 [steps, rows, sequence], row `i` of a step as `loong_core.data.stream` numbers them), `recipe.yaml`
(resolved) and, if the recipe says to train one, `tokenizer/`.
"""

from __future__ import annotations

import sys
from pathlib import Path


def dump(recipe_name: str, folder: Path, steps: int, overrides: list[str]) -> None:
    """Prepare the data of the recipe and write what its first `steps` steps train on."""
    import torch
    from safetensors.torch import save_file

    from loong_core import recipe_load, validate
    from loong_core.data.prepare import prepare
    from loong_core.data.stream import Stream
    from loong_core.registry import open_registry

    registry = open_registry()
    prepared = validate.prepare(recipe_load.load(recipe_name, overrides, registry), registry)
    folder.mkdir(parents=True, exist_ok=True)
    data = prepare(prepared.recipe, folder, rank=0, registry=registry)
    stream = Stream(prepared.recipe, data, prepared.plan, 0)
    taken = [stream.arrays(step) for step in range(steps)]
    stream.close()
    tensors = {name: torch.stack([torch.from_numpy(step[name]).int() for step in taken]) for name in taken[0]}
    save_file(tensors, str(folder / "batches.safetensors"))
    recipe = prepared.recipe
    if data.tokenizer is not None:
        section = recipe.data.model_copy(update={"tokenizer": data.tokenizer.absolute()})
        recipe = recipe.model_copy(update={"data": section})
    (folder / "recipe.yaml").write_text(recipe_load.dump(recipe), encoding="utf-8")


if __name__ == "__main__":
    from loong_core.errors import LoongError

    try:
        dump(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    except LoongError as error:
        sys.exit(f"error: {error}")
