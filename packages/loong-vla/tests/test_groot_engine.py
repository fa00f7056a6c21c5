"""GR00T on the torch engine: every way to share it out trains it alike, with what is frozen left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from groot_tiny import N17, batch_of

from loong_core.testing import tiny
from loong_core.testing.ranks import run_ranks

STEPS = 2
OPTIM = {"lr": 2e-3, "eps": 1e-3, "warmup": 0, "schedule": "constant", "weight_decay": 0.1, "clip": 0.5}
"""A large epsilon: without it Adam makes steps of size lr out of rounding errors of gradients near zero."""
SHARDS: dict[str, dict[str, Any]] = {
    "none": {"shard": "none", "bucket_size": 5000},
    "optimizer": {"shard": "optimizer", "bucket_size": 3000},
    "full": {"shard": "full"},
}


def recipe(**options: Any) -> dict[str, Any]:
    config = {**N17, "architectures": ["Gr00tN1d7"], "embodiments": [1, 4]}
    return tiny.settings(
        "groot_n17",
        config,
        optim=OPTIM,
        task={"name": "flow_matching"},
        parallel={"planner": "torch", "options": options},
        data={"source": "lerobot", "global_batch": 4, "micro_batch": 1},
    )


def micro_batches(run: Any, step: int) -> list[dict[str, Any]]:
    """Four samples of two robots, one of which lacks a camera."""
    cameras, words, robots = [[1, 1], [1, 0], [1, 1], [1, 1]], [4, 6, 5, 3], [1, 4, 4, 1]
    whole = batch_of(cameras, words, robots, seed=step)
    mine = range(run.rank, 4, run.world)
    return [{name: tensor[index : index + 1] for name, tensor in whole.items()} for index in mine]


def trained(rank: int, options: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    found = {}
    for name, settings in options.items():
        run, engine = tiny.start(recipe(**settings), folder)
        numbers = []
        for step in range(STEPS):
            loss = engine.forward_backward(micro_batches(run, step), step)["loss"]
            numbers += [loss, engine.step(OPTIM["lr"])]
        numbers.append(engine.evaluate(micro_batches(run, STEPS))["loss"])
        full = {parameter.spec.role: engine.gather(parameter) for parameter in list(engine.parameters())}
        sums = {role: tensor.double().square().sum().item() for role, tensor in full.items() if tensor is not None}
        found[name] = {"numbers": numbers, "weights": sums}
        engine.close()
    return found


def ahead(rank: int, top: int, folder: Path) -> list[Any]:
    """Numbers of five steps: without looking ahead, with, and with batches that are not always there in time; and how
    often the model got rows of the frozen part."""
    found: list[Any] = []
    for options, known in (({}, ()), ({"ahead": True}, (1, 2, 3, 4)), ({"ahead": True}, (2, 4))):
        settings = recipe(**options)
        settings["model"]["config"] |= {"tune_top_llm_layers": top}
        run, engine = tiny.start(settings, folder)
        forward, seen = engine._module.forward, 0

        def counting(batch: Any, forward: Any = forward) -> Any:
            nonlocal seen
            seen += "frozen" in batch
            return forward(batch)

        engine._module.forward = counting
        numbers = []
        for step in range(5):

            def coming(step: int = step + 1, run: Any = run, known: Any = known) -> Any:
                return micro_batches(run, step) if step in known else None

            numbers += [engine.forward_backward(micro_batches(run, step), step, coming)["loss"], engine.step(2e-3)]
            if step == 2:
                numbers.append(engine.evaluate(micro_batches(run, 9))["loss"])
        found += [numbers, seen]
        engine.close()
    return found


@pytest.mark.parametrize("top", [0, 1, 2])
def test_what_is_frozen_may_be_computed_ahead(top: int, tmp_path: Path) -> None:
    exact, none, always, all_of_them, sometimes, half = run_ranks(1, ahead, top, tmp_path, megatron=False)[0]
    assert always == exact and sometimes == exact
    # Four micro-batches a step. Of three layers DeepStack adds to two: with the two upper ones trained, one is trained.
    # What was not there in time is computed in its step, in the same way.
    assert (none, all_of_them, half) == ((0, 20, 20) if top < 2 else (0, 0, 0))


def test_every_way_to_share_it_out(tmp_path: Path) -> None:
    alone = run_ranks(1, trained, {"none": SHARDS["none"]}, tmp_path, timeout=300, megatron=False)[0]["none"]
    assert alone["numbers"][0] != alone["numbers"][2]
    shared = run_ranks(2, trained, SHARDS, tmp_path, timeout=300, megatron=False)[0]
    for name, found in shared.items():
        assert found["numbers"] == pytest.approx(alone["numbers"], rel=3e-5), name
        assert found["weights"] == pytest.approx(alone["weights"], rel=3e-5), name


def begun_in_vain(rank: int, folder: Path) -> list[Any]:
    """Losses of a step that comes again, and of one whose frozen weights have changed, with the next step begun."""
    found = []
    for options in ({}, {"ahead": True}):
        run, engine = tiny.start(recipe(**options), folder)
        losses = []
        for step, coming in ((0, 1), (0, 1), (1, 2)):
            batches = micro_batches(run, coming)
            losses.append(engine.forward_backward(micro_batches(run, step), step, lambda made=batches: made)["loss"])
        engine._module.embed.data.mul_(1.5)
        engine.weights_changed()
        losses.append(engine.forward_backward(micro_batches(run, 2), 2)["loss"])
        found.append(losses)
        engine.close()
    return found


def test_what_was_begun_for_another_step_or_other_weights_is_dropped(tmp_path: Path) -> None:
    exact, found = run_ranks(1, begun_in_vain, tmp_path, megatron=False)[0]
    assert found == exact
    assert exact[0] == exact[1] and len(set(exact)) == 3
