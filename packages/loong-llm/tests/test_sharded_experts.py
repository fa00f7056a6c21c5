"""Experts that travel to the tokens of other ranks, layer by layer, beside one process that has all of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_models import SPARSE

from loong_core.testing import tiny
from loong_core.testing.ranks import run_ranks

RANKS, CHOSEN, EXPERTS, WIDTH, FFN, LAYERS, MICRO_BATCHES = 3, 2, 6, 5, 4, 4, 2
TOKENS = (7, 0, 4)
"""Of each rank. Nothing that travels depends on them."""

CONFIG = SPARSE | {"mlp_only_layers": [1]}


def drawn(micro: int) -> tuple[Any, ...]:
    """Of a micro-batch the tokens of all ranks, weights and choice in every layer, and the gradient of the output."""
    import torch

    generator = torch.Generator().manual_seed(70 + micro)
    rows = sum(TOKENS)
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:CHOSEN] for _ in range(LAYERS * rows)])
    chosen[:3] %= 4  # nobody chooses the last rank's experts
    weights = torch.rand(LAYERS, rows, CHOSEN, generator=generator, dtype=torch.float64)
    hidden, gradient = torch.randn(2, rows, WIDTH, generator=generator, dtype=torch.float64)
    return hidden, weights, chosen.view(LAYERS, rows, CHOSEN), gradient


def stacks() -> list[tuple[Any, Any]]:
    """`up` and `down` of all experts of every layer."""
    import torch

    generator = torch.Generator().manual_seed(7)
    shapes = (EXPERTS, 2 * FFN, WIDTH), (EXPERTS, WIDTH, FFN)
    return [
        tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) / 2 for shape in shapes)
        for _ in range(LAYERS)
    ]


def buffered() -> Any:
    """The op `experts`, of which the weights' gradients go to buffers, where they have one, as on a GPU."""
    import torch
    from torch import Tensor

    from loong_core.parallel.gradient_buffer import buffer_to_fill, deliver
    from loong_core.references.experts import experts

    class Buffered(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
            ctx.save_for_backward(hidden, up, down, weights, chosen)
            return experts(hidden, up, down, weights, chosen)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
            hidden, up, down, weights, chosen = ctx.saved_tensors
            parts = [part.detach().requires_grad_() for part in (hidden, up, down, weights)]
            with torch.enable_grad():
                output = experts(*parts, chosen)
            found = list(torch.autograd.grad(output, parts, gradient))
            for index, weight in ((1, up), (2, down)):
                buffer, empty = buffer_to_fill(weight)
                if buffer is None:
                    continue
                value = found[index]
                deliver(weight, lambda to=buffer, value=value, empty=empty: (to.copy_ if empty else to.add_)(value))
                found[index] = None
            return (*found, None)

    return Buffered.apply


def attention(hidden: Any) -> Any:
    """What a layer computes before its experts."""
    import torch

    return torch.sin(hidden)


def alone() -> list[Any]:
    """Outputs and gradients of the tokens of all micro-batches, and gradients of weights, summed over them."""
    import torch

    from loong_core.references.experts import experts

    layers = [tuple(part.requires_grad_() for part in layer) for layer in stacks()]
    found = []
    for micro in range(MICRO_BATCHES):
        hidden, weights, chosen, gradient = drawn(micro)
        inputs = hidden.requires_grad_(), weights.requires_grad_()
        for layer, own, choice in zip(layers, weights, chosen, strict=True):
            hidden = hidden + experts(torch.sin(hidden), *layer, own, choice)
        hidden.backward(gradient)
        found += [hidden.detach(), *(tensor.grad for tensor in inputs)]
    return [*found, *(part.grad for layer in layers for part in layer)]


def visited(
    *, twice: bool = False, frozen: tuple[str, ...] = (), buffers: bool = False, late: bool = True
) -> list[Any]:
    """The same of this rank's tokens and experts: layers computed `twice`; with `buffers` for gradients, by an op that
    knows of them; without `late`, gradients land before the rest of their layer's backward."""
    import torch
    import torch.distributed as dist
    from torch.utils.checkpoint import checkpoint

    from loong_core.references.experts import experts
    from loong_core.references.sum_parts import sum_parts
    from loong_llm.sharded_experts import ShardedExperts

    op = buffered() if buffers else experts
    rank, count = dist.get_rank(), EXPERTS // RANKS
    held = slice(rank * count, (rank + 1) * count)
    layers = [tuple(part[held].clone() for part in layer) for layer in stacks()]
    for layer in layers:
        for name, part in zip(("up", "down"), layer, strict=True):
            part.requires_grad_(name not in frozen)
            if buffers:
                part.main_grad = torch.full_like(part, float("nan"))
                part.main_grad_empty = True
    sharded = ShardedExperts(dist.group.WORLD, "auto", sum_parts, recomputes=twice)
    sharded.begin_chunk()
    places = [sharded.add(lambda layer=layer: layer) for layer in layers]
    begin = sum(TOKENS[:rank])
    mine = slice(begin, begin + TOKENS[rank])

    def run(hidden: Any, weights: Any, chosen: Any) -> Any:
        sharded.start(0)

        def layer(place: int, hidden: Any, own: Any) -> Any:
            if late:
                sharded.enter(place)

            def compute(tokens: Any, own: Any, up: Any, down: Any) -> Any:
                return op(tokens, up, down, own, chosen[place])

            return hidden + sharded.forward(place, attention(hidden), own, compute)

        for place, own in zip(places, weights, strict=True):
            call = partial(checkpoint, layer, use_reentrant=True) if twice else layer
            hidden = call(place, hidden, own)
        return hidden

    found = []
    for micro in range(MICRO_BATCHES):
        hidden, weights, chosen, gradient = drawn(micro)
        inputs = hidden[mine].clone(), weights[:, mine].clone()
        for name, tensor in zip(("hidden", "weights"), inputs, strict=True):
            tensor.requires_grad_(name not in frozen)
        output = run(*inputs, chosen[:, mine])
        output.backward(gradient[mine])
        with torch.no_grad():
            torch.testing.assert_close(run(*inputs, chosen[:, mine]), output.detach(), rtol=0, atol=0)
        found += [output.detach(), *(tensor.grad for tensor in inputs)]
    parts = [part for layer in layers for part in layer]
    if buffers:
        assert all(part.grad is None or not part.grad.any() for part in parts)
        return [*found, *(part.main_grad if part.requires_grad else None for part in parts)]
    return [*found, *(part.grad for part in parts)]


def expected(rank: int) -> list[Any]:
    """Of a rank its rows of what one process finds."""
    begin, count = sum(TOKENS[:rank]), EXPERTS // RANKS
    mine, held = slice(begin, begin + TOKENS[rank]), slice(rank * count, (rank + 1) * count)
    values = alone()
    outputs = [value[mine] if value.dim() == 2 else value[:, mine] for value in values[: 3 * MICRO_BATCHES]]
    return [*outputs, *(value[held] for value in values[3 * MICRO_BATCHES :])]


@pytest.mark.parametrize("way", [{}, {"twice": True}, {"buffers": True}, {"late": False}], ids=str)
def test_experts_on_three_ranks_are_as_on_one(way: dict[str, bool]) -> None:
    def work(rank: int) -> bool:
        import torch

        for found, exact in zip(visited(**way), expected(rank), strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        return True

    assert all(run_ranks(RANKS, work, init=True, megatron=False))


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("frozen", [("hidden",), ("weights",), ("up",), ("up", "down"), ("hidden", "weights")], ids=str)
def test_what_is_frozen_has_no_gradient(frozen: tuple[str, ...], buffers: bool) -> None:
    def work(rank: int) -> bool:
        import torch

        names = ["output", "hidden", "weights"] * MICRO_BATCHES + ["up", "down"] * LAYERS
        found = visited(frozen=frozen, buffers=buffers)
        for name, value, exact in zip(names, found, expected(rank), strict=True):
            if name in frozen:
                assert value is None
            else:
                torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)
        return True

    assert all(run_ranks(RANKS, work, init=True, megatron=False))


FORWARD = "fetch 0, fetch 1, wait for 0, compute 0, fetch 2, wait for 1, compute 1, fetch 3, wait for 2, compute 2, "
FORWARD += "wait for 3, compute 3, "
ORDERS = {
    # The first two steps of backward find their layers where the last ones of forward have left them.
    False: FORWARD + "back 3, fetch 1, send, attention, wait for sums, back 2, fetch 0, send, attention, "
    "wait for sums, wait for 1, back 1, send, attention, wait for sums, wait for 0, back 0, send, attention, "
    "wait for sums",
    True: FORWARD + "compute 3, back 3, fetch 1, send, attention, wait for sums, compute 2, back 2, fetch 0, send, "
    "attention, wait for sums, wait for 1, compute 1, back 1, send, attention, wait for sums, wait for 0, compute 0, "
    "back 0, send, attention, wait for sums",
}


@pytest.mark.parametrize("twice", [False, True])
def test_layers_travel_while_others_are_computed_and_gradients_while_the_rest_of_a_layer_is(twice: bool) -> None:
    def work(rank: int) -> list[str]:
        from unittest import mock

        import torch
        from torch import Tensor

        from loong_core.parallel.transport import Collectives
        from loong_core.references import experts as module
        from loong_llm import sharded_experts

        log: list[str] = []
        marks = {float(up[0, 0, 0]): f"{place}" for place, (up, _) in enumerate(stacks())}

        class Noted:
            def __init__(self, name: str, handle: Any) -> None:
                self.name, self.handle = name, handle

            def wait(self) -> None:
                log.append(f"wait for {self.name}")
                self.handle.wait()

        gather, scatter, op, back = Collectives.gather, Collectives.scatter, module.experts, sharded_experts.gradients

        def gathered(self: Any, mine: Tensor, into: Any = None) -> Any:
            everyones, handle = gather(self, mine, into)
            if rank or (name := marks.get(float(mine.flatten()[0]))) is None:
                return everyones, handle
            log.append(f"fetch {name}")
            return everyones, Noted(name, handle)

        def scattered(self: Any, everyones: Tensor, mine: Tensor) -> Any:
            log.append("send")
            return Noted("sums", scatter(self, everyones, mine))

        def computed(hidden: Tensor, up: Tensor, *others: Any, **settings: Any) -> Tensor:
            log.append(f"compute {marks[float(up.detach()[0, 0, 0])]}")
            return op(hidden, up, *others, **settings)

        def backwards(output: Any, inputs: Any, gradient: Tensor) -> Any:
            log.append(f"back {marks[float(inputs[2].detach()[0, 0, 0])]}")
            return back(output, inputs, gradient)

        def sine(hidden: Tensor) -> Tensor:
            found = torch.sin(hidden)
            if found.requires_grad:
                found.register_hook(lambda _: log.append("attention"))
            return found

        with (
            mock.patch.dict(globals(), {"attention": sine}),
            mock.patch.object(Collectives, "gather", gathered),
            mock.patch.object(Collectives, "scatter", scattered),
            mock.patch.object(module, "experts", computed),
            mock.patch.object(sharded_experts, "gradients", backwards),
        ):
            visited(frozen=("down",), twice=twice)
        return log

    log = run_ranks(RANKS, work, init=True, megatron=False)[0]
    steps = ORDERS[twice].split(", ")
    assert log[: len(steps)] == steps


def test_gradients_are_summed_over_ranks_in_the_precision_of_their_buffers() -> None:
    """Found in bfloat16, they are not rounded again."""

    def work(rank: int) -> bool:
        import torch
        import torch.distributed as dist

        from loong_core.references.experts import experts
        from loong_core.references.sum_parts import sum_parts
        from loong_llm.sharded_experts import ShardedExperts

        generator = torch.Generator().manual_seed(rank)
        up, down = torch.randn(1, 2 * FFN, WIDTH), torch.randn(1, WIDTH, FFN)
        shards = [part.bfloat16().requires_grad_() for part in (up, down)]
        for shard in shards:
            shard.main_grad = torch.zeros(shard.shape)
        sharded = ShardedExperts(dist.group.WORLD, "auto", sum_parts, recomputes=False)
        sharded.begin_chunk()
        place = sharded.add(lambda: tuple(shards))
        hidden = torch.randn(40, WIDTH, generator=generator).bfloat16().requires_grad_()
        chosen = torch.randint(0, RANKS, (40, 1), generator=generator)
        weights, found = torch.ones(40, 1), []

        def compute(tokens: Any, own: Any, *stacks: Any) -> Any:
            for stack in stacks:
                stack.register_hook(lambda gradient: found.append(gradient.float()))
            return experts(tokens, *stacks, own, chosen)

        sharded.start(0)
        sharded.forward(place, hidden, weights, compute).sum().backward()
        for shard in shards:
            (exact,) = [gradient for gradient in found if gradient.shape[1:] == shard.shape[1:]]
            dist.all_reduce(exact)
            torch.testing.assert_close(shard.main_grad, exact[rank : rank + 1], rtol=1e-6, atol=1e-6)
            assert not torch.equal(shard.main_grad, shard.main_grad.bfloat16().float())
        return True

    assert all(run_ranks(RANKS, work, init=True, megatron=False))


@pytest.mark.parametrize("changes", [{}, {"recompute": "full"}, {"pp": 2, "vpp": 2, "ep": 2}], ids=str)
def test_an_update_reaches_the_next_pass(changes: dict[str, Any], tmp_path: Path) -> None:
    """Weights that have changed are gathered again: in training, in evaluation, and where nothing else was done."""
    config = CONFIG | ({"num_hidden_layers": 4, "mlp_only_layers": []} if "pp" in changes else {})
    ranks = 4 if "pp" in changes else 2
    data = {"global_batch": 8}

    def losses(rank: int) -> tuple[list[float], list[float]]:
        found = []
        for dispatch in ("gather", "weights"):
            parallel = {"ep": 2, **changes, "options": {"dispatch": dispatch}}
            settings = tiny.settings("qwen3_moe", config, parallel=parallel, data=data, launch={"devices": ranks})
            found.append(tiny.losses(settings, tmp_path, 3))
        return found[0], found[1]

    for gathered, visited in run_ranks(ranks, losses):
        assert tiny.worst(visited, gathered) < 1e-5
        assert len({round(loss, 4) for loss in visited}) == 4


def test_layers_meet_experts_as_the_recipe_says(tmp_path: Path) -> None:
    def work(rank: int) -> list[list[Any]]:
        from loong_llm.moe import HeldExperts, Mixture

        found = []
        for options in ({}, {"dispatch": "weights"}, {"dispatch": "alltoall"}):
            for ep in (1, 2):
                settings = tiny.settings(
                    "qwen3_moe", CONFIG, parallel={"ep": ep, "options": options}, launch={"devices": 2}
                )
                _, engine = tiny.start(settings, tmp_path, False)
                mixtures = [module for module in engine.modules[0].modules() if isinstance(module, Mixture)]
                assert [isinstance(mixture.experts, HeldExperts) for mixture in mixtures] == [
                    mixture.meeting.way == "weights" for mixture in mixtures
                ]
                found.append([(mixture.meeting.way, mixture.place) for mixture in mixtures])
                engine.close()
        return found

    for found in run_ranks(2, work):
        assert [{way for way, _ in layers} for layers in found] == [
            {"local"}, {"gather"}, {"local"}, {"weights"}, {"alltoall"}, {"alltoall"},
        ]  # fmt: skip
        assert [place for _, place in found[3]] == [0, 1, 2]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_of_a_layer_land_where_it_begins(recompute: str, tmp_path: Path) -> None:
    """Of layers without experts none do, nor in evaluation."""

    def work(rank: int) -> list[list[list[Any]]]:
        from unittest import mock

        from loong_llm.sharded_experts import ShardedExperts

        log: list[list[Any]] = []
        enter, forward, landing = ShardedExperts.enter, ShardedExperts.forward, ShardedExperts._landing

        def noted(name: str, call: Any) -> Any:
            def run(self: Any, place: int, *args: Any) -> Any:
                log.append([name, place])
                return call(self, place, *args)

            return run

        parallel = {"ep": 2, "recompute": recompute, "options": {"dispatch": "weights"}}
        settings = tiny.settings(
            "qwen3_moe", CONFIG, parallel=parallel, launch={"devices": 2}, data={"global_batch": 2}
        )
        run, engine = tiny.start(settings, tmp_path)
        seen = []
        with (
            mock.patch.object(ShardedExperts, "enter", noted("enter", enter)),
            mock.patch.object(ShardedExperts, "forward", noted("experts", forward)),
            mock.patch.object(ShardedExperts, "_landing", noted("landing", landing)),
        ):
            for call in (
                lambda: engine.forward_backward(tiny.batches(run), 0),
                lambda: engine.evaluate(tiny.batches(run)),
            ):
                log.clear()
                call()
                seen.append(list(log))
        engine.close()
        return seen

    trained = [[name, place] for place in range(3) for name in ("enter", "landing", "experts")]
    plain = [[name, place] for place in range(3) for name in ("enter", "experts", "landing")]
    again = [[name, place] for place in (2, 1, 0) for name in ("enter", "landing", "experts")]
    for training, evaluation in run_ranks(2, work):
        assert training == (trained if recompute == "none" else plain + again)
        assert evaluation == plain
