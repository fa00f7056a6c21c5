"""The text tasks: what is counted in the loss. Heavy code is behind references: no tensor library is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from loong_core.train.engine import LossSum
from loong_core.types import Task

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.parallel.build import LossContext
    from loong_core.train.engine import Batch

LongRows = Literal["auto", "error", "split", "truncate"]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TextOptions(_Options):
    """Options of `pretrain`."""

    long_rows: LongRows = "auto"
    """Rows longer than data.seq_len: error (a bad row), split (pieces that continue each other), truncate (the rest is
    left out). auto: split for documents (sources of text files), error for rows of tables."""
    end_of_text: bool = True
    """Append the tokenizer's end-of-text token to every text."""


class ChatOptions(_Options):
    """Options of `sft`."""

    long_rows: Literal["auto", "error", "truncate"] = "auto"
    """Rows longer than data.seq_len: error (a bad row; auto is the same) or truncate (the rest is left out)."""
    chat_template: Path | None = None
    """File with a jinja chat template, in place of the tokenizer's own."""
    template_options: dict[str, Any] = {}
    """Further variables of the template, as {enable_thinking: false}."""
    turns: Literal["all", "last"] = "all"
    """Assistant turns that count in the loss."""


class MidtrainOptions(TextOptions):
    """Options of `midtrain`."""

    chat_template: Path | None = None
    """File with a jinja chat template, in place of the tokenizer's own."""
    template_options: dict[str, Any] = {}
    """Further variables of the template."""


def loss(losses: Tensor, batch: Batch, context: LossContext) -> LossSum:
    """Summed cross entropy of the counted targets. `losses` [batch, sequence] are zero where none counts."""
    return LossSum(losses.sum(), (batch["targets"] != -100).sum())


def _task(name: str, options: type[_Options], summary: str) -> Task:
    return Task(
        name=name,
        encoder=f"loong_llm.data:{name}",
        loss="loong_llm.tasks:loss",
        options=f"loong_llm.tasks:{options.__name__}",
        generate="loong_llm.generate:generate",
        summary=summary,
    )


TASKS: tuple[Task, ...] = (
    _task("pretrain", TextOptions, "Next-token prediction on text or token ids; every token counts."),
    _task("midtrain", MidtrainOptions, "As pretrain, and conversations are allowed: every token of them counts."),
    _task("sft", ChatOptions, "Conversations or token ids; only what the assistant says counts."),
)
"""The text tasks."""
