"""Tasks: descriptors that resolve without a tensor library, and the loss as a sum and a count."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from loong_core.parallel.build import LossContext
from loong_core.registry import resolve
from loong_core.types import ParallelPlan
from loong_llm.tasks import TASKS, loss


def test_every_reference_resolves() -> None:
    assert [task.name for task in TASKS] == ["pretrain", "midtrain", "sft"]
    for task in TASKS:
        assert task.options is not None
        assert callable(resolve(task.encoder))
        assert callable(resolve(task.loss))
        assert resolve(task.options).model_validate({})


def test_naming_tasks_imports_no_tensor_library() -> None:
    code = "import sys, loong_llm.tasks; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loss_is_a_sum_and_a_count_with_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, requires_grad=True)
    targets = torch.tensor([[1, -100, 6], [-100, 0, 2]])
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none").view(2, 3)
    ops: Any = SimpleNamespace()
    context = LossContext(ops=ops, tensor_group=None, vocabulary=7, plan=ParallelPlan(planner="test", world=1))
    result = loss(losses, {"targets": targets}, context)
    assert int(result.count) == 4
    torch.testing.assert_close(result.sum / result.count, cross_entropy(logits.reshape(-1, 7), targets.reshape(-1)))
    result.sum.backward()
    assert logits.grad is not None
    assert logits.grad[0, 1].abs().sum() == 0
