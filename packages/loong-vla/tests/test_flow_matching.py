"""The flow matching loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from loong_vla.tasks import TASKS, FlowOptions, loss

CONTEXT: Any = SimpleNamespace(model=SimpleNamespace(target=lambda batch: batch["target"]))


def batch_of(samples: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(samples)
    mask = torch.zeros(samples, 5, 4, dtype=torch.bool)
    mask[:, :3, :2] = True
    return {"target": torch.randn(samples, 5, 4, generator=generator), "action_mask": mask}


def test_only_what_counts_is_summed_and_has_gradient() -> None:
    batch = batch_of(3)
    output = torch.zeros(3, 5, 4, requires_grad=True)
    total, count, _ = loss(output, batch, CONTEXT)
    assert count == 18
    torch.testing.assert_close(total, batch["target"][batch["action_mask"]].square().sum())
    total.backward()
    assert output.grad is not None
    torch.testing.assert_close(output.grad, -2 * batch["target"] * batch["action_mask"])


def test_sums_add_up_over_micro_batches() -> None:
    batch, output = batch_of(4), torch.ones(4, 5, 4)
    parts = [loss(output[i : i + 2], {k: v[i : i + 2] for k, v in batch.items()}, CONTEXT) for i in (0, 2)]
    whole = loss(output, batch, CONTEXT)
    torch.testing.assert_close(sum(part.sum for part in parts), whole.sum)
    assert sum(int(part.count) for part in parts) == whole.count


def test_low_precision_predictions_are_compared_in_float32() -> None:
    batch = batch_of(2)
    output = torch.randn(2, 5, 4).bfloat16()
    found = loss(output, batch, CONTEXT).sum
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(output.float(), batch, CONTEXT).sum)


def test_descriptor_and_options() -> None:
    (task,) = TASKS
    assert task.name == "flow_matching" and task.encoder is None
    assert FlowOptions().count == "auto"
    with pytest.raises(ValidationError):
        FlowOptions(count="some")  # type: ignore[arg-type]
