"""The engine's update beside torch's AdamW with clipping, on one rank and on several; and what must leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from loong_core.testing import tiny
from loong_core.testing.ranks import run_ranks

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
EXPERTS = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
STEPS = 3


def settings(model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    family = "qwen3_moe" if "num_experts" in model else "qwen3"
    return tiny.settings(family, model, optim={"clip": 0.05, "weight_decay": 0.3}, **changes)


def tensors(engine: Any) -> dict[str, Any]:
    return {parameter.spec.role: parameter.tensor.detach().clone() for parameter in engine.parameters()}


def bits(engine: Any) -> list[Any]:
    """Everything a step may change, as it lies in memory."""
    import torch

    optimizer = engine._optimizer
    found = [tensor.view(torch.uint8) for tensor in tensors(engine).values()]
    for shard in optimizer.shards():
        state = [shard.exp_avg, shard.exp_avg_sq, *([] if shard.remainder is None else [shard.remainder])]
        found += [tensor.clone().view(torch.uint8) for tensor in state]
    return [*found, torch.tensor(optimizer.steps)]


# ------------------------------------------------------------------------------------------ beside torch's AdamW
def beside_torch(rank: int, recipe: dict[str, Any], folder: Path) -> tuple[float, float, int]:
    """Worst relative differences, of weights and of norms, to torch's update of the whole model; how often it clips."""
    import torch
    import torch.distributed as dist

    run, engine = tiny.start(recipe, folder)
    section = run.recipe.optim
    whole = {role: tensor.requires_grad_() for role, tensor in tensors(engine).items()}
    groups = [
        {"params": [tensor for tensor in whole.values() if (tensor.dim() > 1) == matrix], "weight_decay": decay}
        for matrix, decay in ((True, section.weight_decay), (False, 0.0))
    ]
    reference = torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps)
    worst = off = 0.0
    clipped = 0
    for step in range(STEPS):
        engine.forward_backward(tiny.batches(run, step), step)
        for parameter in engine.parameters():
            # A rank holds the reduced gradient of its own range only, and zeros elsewhere once the rest is cleared.
            gradient = parameter.gradient * engine.gradient_scale
            if dist.get_world_size() > 1:
                part = engine._optimizer.shard(parameter.trained)
                mask = torch.zeros(parameter.trained.numel())
                if part is not None:
                    mask[part.start : part.stop] = 1.0
                mask = mask[parameter.offset : parameter.offset + gradient.numel()]
                gradient = gradient * mask.view_as(gradient)
                dist.all_reduce(gradient, group=engine.replica_group(parameter))
            whole[parameter.spec.role].grad = gradient
        found = engine.step(section.lr)
        exact = norm_of(engine, whole)
        clipped += exact > section.clip
        off = max(off, abs(found - exact) / exact)
        coefficient = min(1.0, section.clip / (exact + 1e-6))
        for tensor in whole.values():
            tensor.grad.mul_(coefficient)
        reference.step()
        for role, tensor in tensors(engine).items():
            worst = max(worst, float((tensor - whole[role]).abs().max() / whole[role].detach().abs().max()))
    return worst, off, clipped


def norm_of(engine: Any, whole: dict[str, Any]) -> float:
    """Of all gradients: experts are on different ranks, everything else on all."""
    import torch
    import torch.distributed as dist

    specs = {parameter.spec.role: parameter.spec for parameter in engine.parameters()}
    squared = torch.zeros(2, dtype=torch.float64)
    for role, tensor in whole.items():
        squared[int(specs[role].expert is not None)] += tensor.grad.double().square().sum()
    experts = squared[1:] / engine.groups.expt_dp.size()
    dist.all_reduce(experts)
    return float((squared[0] + experts[0]).sqrt())


@pytest.mark.parametrize(
    ("model", "world", "parallel"), [(DENSE, 1, {}), (DENSE, 2, {}), (EXPERTS, 1, {}), (EXPERTS, 2, {"ep": 2})]
)
def test_updates_are_torchs(model: dict[str, Any], world: int, parallel: dict[str, Any], tmp_path: Path) -> None:
    for worst, off, clipped in run_ranks(world, beside_torch, settings(model, parallel=parallel), tmp_path):
        assert worst < 2e-6 and off < 2e-6
        assert clipped == STEPS  # otherwise clipping is not tested


def norms(rank: int, recipe: dict[str, Any], folder: Path) -> list[float]:
    run, engine = tiny.start(recipe, folder)
    found = []
    for step in range(STEPS):
        engine.forward_backward(tiny.batches(run, step), step)
        found.append(engine.step(1e-3))
    return found


def test_every_gradient_counts_once_in_the_norm(tmp_path: Path) -> None:
    """Norms' gradients are on every tensor-parallel rank, the tied embedding's on the first and the last stage."""
    (exact,) = run_ranks(1, norms, settings(EXPERTS), tmp_path)
    for parallel in ({"tp": 2}, {"pp": 2}, {"tp": 2, "options": {"overlap": False}}):
        for found in run_ranks(2, norms, settings(EXPERTS, parallel=parallel), tmp_path):
            assert found == pytest.approx(exact, rel=1e-5)


# ------------------------------------------------------------------------------------------ a norm that is not finite
def poisoned(rank: int, recipe: dict[str, Any], folder: Path, value: str) -> dict[str, Any]:
    import torch

    run, engine = tiny.start(recipe, folder)
    engine.forward_backward(tiny.batches(run), 0)
    engine.step(1e-2)
    before = bits(engine)
    measure = engine._optimizer.measure

    def measured(scale: Any) -> None:
        if rank == 0:
            engine._optimizer.shards()[0].gradient[0] = float(value)
        measure(scale)

    with mock.patch.object(engine._optimizer, "measure", measured):
        engine.forward_backward(tiny.batches(run, 1), 1)
    norm = engine.step(1e-2)
    kept = all(torch.equal(one, other) for one, other in zip(before, bits(engine), strict=True))
    engine.forward_backward(tiny.batches(run, 1), 1)
    return {"norm": str(norm), "kept": kept, "after": engine.step(1e-2)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("value", "world"), [("nan", 1), ("inf", 2)])
def test_a_norm_that_is_not_finite_changes_nothing(value: str, world: int, precision: str, tmp_path: Path) -> None:
    """On no rank, whoever met it; and the next step is an ordinary one."""
    for found in run_ranks(world, poisoned, settings(DENSE, precision=precision), tmp_path, value):
        assert found["norm"] == value and found["kept"]
        assert 0 < found["after"] < 1e3


# ------------------------------------------------------------------------------------------ masters of bfloat16
def masters(rank: int, recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from loong_core.parallel.adamw import MASTER
    from loong_core.references.adamw import split

    run, engine = tiny.start(recipe, folder)
    everything = slice(None)
    optimizer = engine._optimizer

    def read() -> list[Any]:
        return [shard.read(MASTER, everything) for shard in optimizer.shards()]

    # What was drawn in float32 is in the masters.
    drawn_finer = any(bool((master != master.bfloat16()).any()) for master in read())
    for step in range(STEPS):
        engine.forward_backward(tiny.batches(run, step), step)
        engine.step(1e-3)
    rounded = all(
        torch.equal(split(master)[0], shard.parameter) for master, shard in zip(read(), optimizer.shards(), strict=True)
    )
    state, before = folder / "state", read()
    if rank == 0:
        state.mkdir()
    dist.barrier()
    engine.save_state(state)
    weights = tensors(engine)
    for shard in optimizer.shards():
        for tensor in (shard.parameter, shard.exp_avg, shard.exp_avg_sq, shard.remainder):
            tensor.zero_()
    engine.load_state(state)
    loaded = all(torch.equal(one, other) for one, other in zip(before, read(), strict=True))
    same = all(torch.equal(tensor, weights[role]) for role, tensor in tensors(engine).items())
    engine.weights_changed()
    pairs = zip(optimizer.shards(), read(), strict=True)
    taken = all(torch.equal(shard.parameter.float(), master) for shard, master in pairs)
    size = sum(tensor.nbytes for s in optimizer.shards() for tensor in (s.exp_avg, s.exp_avg_sq, s.remainder)) / sum(
        shard.parameter.numel() for shard in optimizer.shards()
    )
    return {
        "drawn_finer": drawn_finer, "rounded": rounded, "loaded": loaded, "same": same, "taken": taken, "size": size,
    }  # fmt: skip


@pytest.mark.parametrize("world", [1, 2])
def test_masters_are_kept_in_two_bytes_and_saved_in_four(world: int, tmp_path: Path) -> None:
    for found in run_ranks(world, masters, settings(EXPERTS, precision="bf16"), tmp_path):
        assert found.pop("size") == 10.0
        assert all(found.values()), found


# ------------------------------------------------------------------------------------------ older checkpoints
def halves(rank: int, recipe: dict[str, Any], folder: Path) -> dict[str, list[float]]:
    """What is loaded where weights were saved half to even, as torch rounds: 1 beside masters of 1 + 2^-8."""
    from unittest import mock

    import torch
    import torch.distributed as dist

    from loong_core.parallel.adamw import MASTER, Shard

    _, engine = tiny.start(recipe, folder)
    read, everything = Shard.read, slice(None)

    def older(shard: Shard, name: str, where: slice) -> Any:
        found = read(shard, name, where)
        return torch.full_like(found, 1 + 2**-8) if name == MASTER else found

    state = folder / "state"
    if rank == 0:
        state.mkdir()
    dist.barrier()
    with torch.no_grad(), mock.patch.object(Shard, "read", older):
        for parameter in engine.parameters():
            parameter.tensor.fill_(1.0)
        engine.save_state(state)
    engine.load_state(state)
    weights = torch.cat([tensor.float().flatten() for tensor in tensors(engine).values()])
    kept = torch.cat([shard.read(MASTER, everything) for shard in engine._optimizer.shards()])
    return {"weights": weights.unique().tolist(), "masters": kept.unique().tolist()}


@pytest.mark.parametrize("world", [1, 2])
def test_every_rank_rounds_a_loaded_master_alike(world: int, tmp_path: Path) -> None:
    recipe = settings(EXPERTS, precision="bf16", parallel={"options": {"overlap": False}})
    for found in run_ranks(world, halves, recipe, tmp_path):
        assert found == {"weights": [1 + 2**-7], "masters": [1 + 2**-8]}
