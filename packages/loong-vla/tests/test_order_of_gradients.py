"""Gradients come in the order in which buckets are laid out for reduction, so that this can be done beside the pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from policy_tiny import make_dataset, make_run

from loong_core.parallel.torch_engine import in_order_of_gradients
from loong_vla import open_stream


@pytest.mark.parametrize("recipe", ["pi05_tiny_cpu", "groot_tiny_cpu"])
def test_no_gradient_has_those_of_later_blocks_wait(recipe: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_dataset(tmp_path / "set"), recipe)
    stream = open_stream.open_stream(run, 0)
    batch = stream.batches(0)[0]
    stream.close()
    model = run.model.train()
    names = {parameter: name for name, parameter in model.named_parameters()}
    came: dict[Any, int] = {}

    def arrived(parameter: Any) -> None:
        came[parameter] = len(came)

    for parameter in names:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(arrived)
    prediction = model(batch)
    (prediction - model.target(batch)).square().sum().backward()

    order = in_order_of_gradients(model)
    assert set(order) == set(came), "trained, but without a gradient: buckets behind it are reduced last"
    block = {parameter: number for number, unit in enumerate(model.units()) for parameter in unit.parameters()}
    for index, parameter in enumerate(order):
        early = [
            names[later]
            for later in order[index + 1 :]
            if later in block and block[later] != block.get(parameter) and came[later] < came[parameter]
        ]
        assert not early, f"{names[parameter]} comes after {early}"
