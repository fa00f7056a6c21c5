"""What loong-llm offers; the only file of the package with hook implementations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loong_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from loong_core.types import ModelFamily, RecipeFolder, Task


@hookimpl
def loong_model_families() -> Iterable[ModelFamily]:
    """LLaMA, Qwen1.5, Qwen2, Qwen3, dense and with experts."""
    from loong_llm.models.llama import LLAMA
    from loong_llm.models.qwen2 import QWEN1_5, QWEN2
    from loong_llm.models.qwen3 import QWEN3
    from loong_llm.models.qwen3_moe import QWEN3_MOE

    return [LLAMA, QWEN1_5, QWEN2, QWEN3, QWEN3_MOE]


@hookimpl
def loong_tasks() -> Iterable[Task]:
    """Pre-training and fine-tuning on text."""
    from loong_llm.tasks import TASKS

    return TASKS


@hookimpl
def loong_recipes() -> Iterable[RecipeFolder]:
    """The recipes of this package."""
    from loong_core.types import RecipeFolder

    return [RecipeFolder(name="loong_llm", path=Path(__file__).parent / "recipes")]
