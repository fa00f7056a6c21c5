"""The torch engine: every way to share out a model trains it as one process does, and continues as if never stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loong_core.testing import decoder, tiny
from loong_core.testing.ranks import run_ranks

STEPS = 3
TOLERANCE = {"fp32": 2e-5, "bf16": 4e-3, "bf16_gradients": 1e-2}
"""Relative, of losses and gradient norms; ranks round activations' gradients differently in bfloat16."""
OPTIM = {"lr": 2e-3, "eps": 1e-3, "warmup": 0, "schedule": "constant", "weight_decay": 0.1, "clip": 0.5}
"""A large epsilon: without it Adam makes steps of size lr out of rounding errors of gradients near zero."""
SHARDS: dict[str, dict[str, Any]] = {
    "none": {"shard": "none", "bucket_size": 1500},
    "optimizer": {"shard": "optimizer", "bucket_size": 900},
    "late": {"shard": "optimizer", "overlap": False},
    "full": {"shard": "full"},
    "hybrid": {"shard": "hybrid", "shard_size": 2},
}


@pytest.fixture(scope="module", autouse=True)
def offered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The decoder as a plugin."""
    path = tmp_path_factory.mktemp("plugin") / "tiny_decoder_for_engine.py"
    path.write_text(decoder.PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOONG_PLUGIN_FILES", str(path))
        yield


def recipe(precision: str = "fp32", micro_batch: int = 1, **changes: Any) -> dict[str, Any]:
    options = changes.pop("options", {})
    optim = OPTIM | changes.pop("optim", {})
    parallel = {"planner": "torch", "options": options, **changes.pop("parallel", {})}
    data = {"global_batch": 8, "micro_batch": micro_batch}
    return tiny.settings(
        "tiny_decoder", decoder.CONFIG, precision=precision, parallel=parallel, data=data, optim=optim, **changes
    )


def advance(run: Any, engine: Any, steps: range) -> list[list[float]]:
    found = []
    for step in steps:
        loss = engine.forward_backward(tiny.batches(run, step), step)["loss"]
        found.append([loss, engine.step(OPTIM["lr"])])
    return found


def weights(engine: Any) -> dict[str, list[float]]:
    full = {parameter.spec.role: engine.gather(parameter) for parameter in list(engine.parameters())}
    return {role: tensor.float().flatten().tolist() for role, tensor in full.items() if tensor is not None}


def trained(rank: int, recipes: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    found = {}
    for name, settings in recipes.items():
        run, engine = tiny.start(settings, folder)
        numbers = advance(run, engine, range(STEPS))
        numbers.append([engine.evaluate(tiny.batches(run, STEPS))["loss"], 1.0])
        found[name] = {"numbers": numbers, "weights": weights(engine)}
        engine.close()
    return found


def worst(one: list[list[float]], other: list[list[float]]) -> float:
    pairs = zip(sum(one, []), sum(other, []), strict=True)
    return max(abs(value - exact) / abs(exact) for value, exact in pairs)


def farthest(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    assert sorted(one) == sorted(other)
    return max(abs(a - b) for role in one for a, b in zip(one[role], other[role], strict=True))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, one micro-batch."""
    recipes = {precision: recipe(precision, 8) for precision in TOLERANCE}
    found: dict[str, Any] = run_ranks(1, trained, recipes, tmp_path_factory.mktemp("single"))[0]
    return found


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_sharding_equals_one_process(world: int, precision: str, single: Any, tmp_path: Path) -> None:
    shards = {name: options for name, options in SHARDS.items() if name != "hybrid" or world == 4}
    if world == 1:
        shards = {name: SHARDS[name] for name in ("none", "full")}
    recipes = {name: recipe(precision, options=options) for name, options in shards.items()}
    recipes["wide"] = recipe(precision, 8 // world, options={"shard": "auto"})
    found = run_ranks(world, trained, recipes, tmp_path)
    exact = single[precision]
    for name in recipes:
        first = found[0][name]
        assert all(other[name]["numbers"] == first["numbers"] for other in found), f"{name}: ranks disagree"
        assert all(other[name]["weights"] == {} for other in found[1:]), f"{name}: gathered on another rank"
        assert worst(first["numbers"], exact["numbers"]) < TOLERANCE[precision], name
        assert farthest(first["weights"], exact["weights"]) < (1e-5 if precision == "fp32" else 4e-3), name


def test_losses_fall(tmp_path: Path) -> None:
    """The numbers above are those of training: on one batch again and again, the loss goes down."""

    def work(rank: int) -> list[float]:
        run, engine = tiny.start(recipe("bf16"), tmp_path)
        losses = []
        for _ in range(20):
            losses.append(engine.forward_backward(tiny.batches(run), 0)["loss"])
            engine.step(OPTIM["lr"])
        return losses

    losses = run_ranks(1, work)[0]
    assert losses[-1] < losses[0] - 0.3


# --------------------------------------------------------------------------------------------------- what is trained
def test_frozen_and_unused_parameters(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Any]:
        found = {}
        for name in ("optimizer", "full"):
            run, engine = tiny.start(recipe(options=SHARDS[name], optim={"weight_decay": 0.5}), tmp_path)
            before = weights(engine)
            advance(run, engine, range(1))
            after = weights(engine)
            records = engine.holdings.records()
            states = {role: engine.holdings.state(record) is not None for role, record in records.items()}
            found[name] = [before, after, states]
        return found

    for name, (before, after, states) in run_ranks(2, work)[0].items():
        assert before["memory"] == after["memory"] and not states["memory"], name
        decayed = [value * (1 - OPTIM["lr"] * 0.5) for value in before["idle"]]
        assert after["idle"] == pytest.approx(decayed, rel=1e-6), name
        assert before["embed"] != after["embed"] and all(states[role] for role in states if role != "memory"), name


def test_frozen_by_the_recipe(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Any]:
        from loong_core.train.start import freeze

        found = {}
        for name in ("optimizer", "full"):
            run, engine = tiny.start(recipe(options=SHARDS[name], model={"freeze": ["layers.0.*"]}), tmp_path, False)
            freeze(run, engine)
            engine.optimizer(run.recipe.optim)
            before = weights(engine)
            advance(run, engine, range(2))
            after = weights(engine)
            found[name] = sorted(role for role in before if before[role] == after[role])
        return found

    parts = ("down", "k", "norm", "q", "up", "up_bias", "v")
    for unchanged in run_ranks(2, work)[0].values():
        assert unchanged == [*(f"layers.0.{part}" for part in parts), "memory"]


def test_computing_activations_again_changes_nothing(tmp_path: Path) -> None:
    recipes = {
        f"{shard}-{again}": recipe(options=SHARDS[shard], parallel={"recompute": again}, model={"dropout": 0.2})
        for shard in ("optimizer", "full")
        for again in ("none", "full")
    }
    found = run_ranks(2, trained, recipes, tmp_path)[0]
    for shard in ("optimizer", "full"):
        assert found[f"{shard}-full"] == found[f"{shard}-none"]


def test_dropout_depends_on_seed_step_and_rank_alone(tmp_path: Path) -> None:
    def work(rank: int) -> list[float]:
        import torch

        run, engine = tiny.start(recipe(model={"dropout": 0.3}), tmp_path)
        rows = tiny.batches(run)
        losses = []
        for step in (0, 1, 0):
            torch.rand(7)
            losses.append(engine.forward_backward(rows, step)["loss"])
        losses.append(engine.evaluate(rows)["loss"])
        return losses

    first, second, again, without = run_ranks(2, work)[0]
    assert first == again and len({first, second, without}) == 3


def test_what_may_be_sliced() -> None:
    def work(rank: int) -> list[str]:
        import torch
        from torch import nn

        from loong_core.parallel.torch_sharded import fits

        model = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in ("a", "b", "c", "d", "e")})
        model["b"].weight = model["a"].weight  # in two units
        model.register_parameter("tied", model["c"].weight)  # in a unit and outside
        model.register_parameter("scalar", nn.Parameter(torch.ones(())))
        model["d"].double()
        model.register_parameter("outside", nn.Parameter(torch.ones(2)))
        taken = fits(model, [model[name] for name in "abcd"], torch.float32)
        return sorted(name for name, parameter in model.named_parameters() if parameter in taken)

    assert run_ranks(1, work)[0] == ["e.weight", "outside"]


# --------------------------------------------------------------------------------------------------------- resuming
def resumed(rank: int, names: list[str], folder: Path) -> dict[str, Any]:
    found = {}
    for name in names:
        options = SHARDS[name] | {"ema": 0.9}
        settings = recipe("bf16", options=options, model={"dropout": 0.1})
        run, engine = tiny.start(settings, folder)
        advance(run, engine, range(2))
        state = folder / name
        if rank == 0:
            state.mkdir()
        run.barrier()
        engine.save_state(state)
        continued = advance(run, engine, range(2, 4))
        exact = weights(engine)
        run, engine = tiny.start(settings, folder)
        engine.load_state(state)
        found[name] = [continued, advance(run, engine, range(2, 4)), exact == weights(engine)]
    return found


@pytest.mark.parametrize("world", [1, 4])
def test_resume_is_exact(world: int, tmp_path: Path) -> None:
    names = [*SHARDS] if world == 4 else ["none"]
    for name, (continued, again, equal) in run_ranks(world, resumed, names, tmp_path)[0].items():
        assert continued == again and equal, name


def test_resume_under_other_layouts(tmp_path: Path) -> None:
    """4 ranks, then 1, then 2, each sharded in another way: the losses of a run that never stopped."""

    def work(rank: int, options: dict[str, Any], first: int) -> dict[str, list[list[float]]]:
        found = {}
        for precision in TOLERANCE:
            run, engine = tiny.start(recipe(precision, options=options), tmp_path)
            if first:
                engine.load_state(tmp_path / f"{precision}-{first}")
            found[precision] = advance(run, engine, range(first, first + 2))
            state = tmp_path / f"{precision}-{first + 2}"
            if rank == 0:
                state.mkdir()
            run.barrier()
            engine.save_state(state)
        return found

    def unbroken(rank: int) -> dict[str, list[list[float]]]:
        return {precision: advance(*tiny.start(recipe(precision, 8), tmp_path), range(8)) for precision in TOLERANCE}

    parts = [
        run_ranks(world, work, SHARDS[name], 2 * index)[0]
        for index, (world, name) in enumerate([(4, "full"), (1, "none"), (2, "optimizer"), (4, "hybrid")])
    ]
    whole = run_ranks(1, unbroken)[0]
    for precision, tolerance in TOLERANCE.items():
        assert worst(sum((part[precision] for part in parts), []), whole[precision]) < 3 * tolerance, precision


def test_weights_alone_start_another_run(tmp_path: Path) -> None:
    """Float32 masters survive, also where the next run is not sharded and has no optimizer yet."""

    def work(rank: int) -> list[Any]:
        run, engine = tiny.start(recipe("bf16", options=SHARDS["full"]), tmp_path)
        advance(run, engine, range(2))
        if rank == 0:
            (tmp_path / "state").mkdir()
        run.barrier()
        engine.save_state(tmp_path / "state")
        before = weights(engine)
        run, engine = tiny.start(recipe("bf16", options=SHARDS["optimizer"]), tmp_path, optimizer=False)
        engine.load_state(tmp_path / "state", optimizer=False)
        engine.optimizer(run.recipe.optim)
        after = weights(engine)
        if rank == 0:
            (tmp_path / "again").mkdir()
        run.barrier()
        engine.save_state(tmp_path / "again")
        return [before, after, engine.trainer.steps]

    before, after, steps = run_ranks(2, work)[0]
    assert before == after and steps == 0
    one, other = (masters(tmp_path / name) for name in ("state", "again"))
    assert one == other
    assert any(value != round_to_bfloat16(value) for value in one["embed"])


def masters(folder: Path) -> dict[str, list[float]]:
    from safetensors.torch import load_file

    pieces: dict[str, list[tuple[int, list[float]]]] = {}
    for path in folder.glob("*.safetensors"):
        for key, values in load_file(path).items():
            name, role, begin = key.split("/")[0], key.split("/")[1].split("@")[0], int(key.split("@")[1])
            if name == "master":
                pieces.setdefault(role, []).append((begin, values.tolist()))
    return {role: sum((values for _, values in sorted(parts)), []) for role, parts in pieces.items()}


def round_to_bfloat16(value: float) -> float:
    import torch

    return float(torch.tensor(value).bfloat16())


def test_a_moving_average_of_the_masters(tmp_path: Path) -> None:
    def work(rank: int, name: str) -> list[Any]:
        options = SHARDS[name] | {"ema": 0.75}
        run, engine = tiny.start(recipe(options=options), tmp_path)
        average = weights(engine)
        for step in range(3):
            advance(run, engine, range(step, step + 1))
            for role, values in weights(engine).items():
                average[role] = [0.75 * old + 0.25 * new for old, new in zip(average[role], values, strict=True)]
        state = tmp_path / name
        if rank == 0:
            state.mkdir()
        run.barrier()
        engine.save_state(state)
        run, engine = tiny.start(recipe(options=options | {"export": "ema"}), tmp_path)
        engine.load_state(state)
        return [average, weights(engine)]

    for name in ("none", "optimizer", "full"):
        average, exported = run_ranks(2, work, name)[0]
        assert farthest(average, exported) < 1e-6, name


# -------------------------------------------------------------------------------------------------- what goes wrong
def test_states_that_cannot_be_read(tmp_path: Path) -> None:
    def work(rank: int) -> list[str]:
        from loong_core.errors import CheckpointError
        from loong_core.train.start import freeze

        def problem(settings: dict[str, Any], folder: Path) -> str:
            run, engine = tiny.start(settings, tmp_path, optimizer=False)
            freeze(run, engine)
            engine.optimizer(run.recipe.optim)
            try:
                engine.load_state(folder)
            except CheckpointError as error:
                return str(error)
            return "no problem"

        state, other, frozen = tmp_path / "state", tmp_path / "other", tmp_path / "frozen"
        for folder, changes in ((state, {}), (frozen, {"model": {"freeze": ["embed"]}})):
            folder.mkdir()
            run, engine = tiny.start(recipe(**changes), tmp_path, optimizer=False)
            freeze(run, engine)
            engine.optimizer(run.recipe.optim)
            engine.save_state(folder)
        other.mkdir()
        wider = recipe()
        wider["model"] = {"family": "tiny_decoder", "config": {**decoder.CONFIG, "vocabulary": 67}}
        found = [problem(recipe(), other), problem(wider, state), problem(recipe(), frozen), problem(recipe(), state)]
        (state / "state-00000.safetensors").unlink()
        return [*found, problem(recipe(), state)]

    absent, shape, frozen, fine, gone = run_ranks(1, work)[0]
    assert "planner" in absent
    assert "embed is stored as [61, 24], and the model has [67, 24]" in shape
    assert "embed was not trained when this was saved" in frozen
    assert fine == "no problem"
    assert "state-00000.safetensors cannot be opened" in gone


def test_a_norm_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Any]:
        found = {}
        for name in ("optimizer", "full"):
            run, engine = tiny.start(recipe(options=SHARDS[name]), tmp_path)
            before, measure = weights(engine), engine.trainer.measure
            broken = next(p for p in engine.parameters() if p.spec.role == "scale")

            def measured(scale: Any, broken: Any = broken, measure: Any = measure) -> None:
                broken.gradient.fill_(float("inf"))
                measure(scale)

            engine.trainer.measure = measured
            engine.forward_backward(tiny.batches(run), 0)
            norm = engine.step(1e-2)
            found[name] = [str(norm), before == weights(engine), engine.trainer.steps]
        return found

    for norm, same, steps in run_ranks(2, work)[0].values():
        assert norm in ("inf", "nan") and same and steps == 0
