"""Tokens that travel to experts on other ranks and back, in pieces, beside one process that has all experts."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from tiny_models import SPARSE

from loong_core.testing import tiny
from loong_core.testing.ranks import run_ranks

RANKS, TOKENS, CHOSEN, EXPERTS, WIDTH, FFN = 3, 7, 2, 6, 5, 4

CONFIG = SPARSE | {"num_hidden_layers": 2}


def drawn() -> tuple[Any, ...]:
    """Tokens, weights and choice of all ranks, the experts' weights, and the gradient of the output. Of the last rank's
    experts none is chosen by the first tokens."""
    import torch

    generator = torch.Generator().manual_seed(7)

    def normal(*sizes: int) -> Any:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    rows = RANKS * TOKENS
    chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:CHOSEN] for _ in range(rows)])
    chosen.unflatten(0, (RANKS, TOKENS))[:, :3] %= 4
    weights = torch.rand(rows, CHOSEN, generator=generator, dtype=torch.float64)
    return (
        normal(rows, WIDTH),
        weights,
        chosen,
        normal(EXPERTS, 2 * FFN, WIDTH),
        normal(EXPERTS, WIDTH, FFN),
        normal(rows, WIDTH),
    )


def alone() -> list[Any]:
    """Output, and gradients of tokens, weights and experts."""
    from loong_core.references.experts import experts

    hidden, weights, chosen, up, down, gradient = drawn()
    inputs = [tensor.requires_grad_() for tensor in (hidden, weights, up, down)]
    output = experts(hidden**2, up, down, weights, chosen)
    output.backward(gradient)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


def exchanged(
    pieces: int, frozen: tuple[str, ...] = (), twice: bool = False, again: bool = False, early: bool = False
) -> list[Any]:
    """The same of this rank's tokens and experts, by `exchange`: its forward pass computed `twice`, or the tokens
    gathered `again`, or sent `early`. Squares keep the tokens themselves for backward."""
    import torch
    import torch.distributed as dist
    from torch.utils.checkpoint import checkpoint

    from loong_core.parallel import transport
    from loong_core.references.experts import experts
    from loong_core.references.sum_parts import sum_parts
    from loong_llm.exchange import Share, exchange, start

    rank, count = dist.get_rank(), EXPERTS // RANKS
    mine, held = slice(rank * TOKENS, (rank + 1) * TOKENS), slice(rank * count, (rank + 1) * count)
    hidden, weights, chosen, up, down, gradient = drawn()
    parts = {"hidden": hidden[mine], "weights": weights[mine], "up": up[held], "down": down[held]}
    inputs = {name: part.clone().requires_grad_(name not in frozen) for name, part in parts.items()}
    share = Share(dist.group.WORLD, count, pieces, transport.between(dist.group.WORLD, "auto", sum_parts), again)
    seen, kept, gathered = [], [], []

    def compute(tokens: Any, own: Any, choice: Any, pairs: Any) -> Any:
        seen.append(pairs())
        assert pairs() == ((choice >= share.first) & (choice < share.first + count)).sum()
        squares = tokens**2
        found = experts(squares, inputs["up"], inputs["down"], own, choice, first=share.first, pairs=pairs)
        gathered.append(tokens.untyped_storage())
        kept.append(weakref.ref(found))
        return found

    def run(hidden: Any, weights: Any) -> Any:
        arriving = start(hidden, share) if early else None
        return exchange(hidden, weights, chosen[mine], [inputs["up"], inputs["down"]], share, compute, arriving)

    if twice:
        output = checkpoint(run, inputs["hidden"], inputs["weights"], use_reentrant=True)
    else:
        output = run(inputs["hidden"], inputs["weights"])
    gc.collect()
    assert not any(reference() is not None for reference in kept), "what was sent is kept"
    if not twice:
        assert all((storage.nbytes() == 0) == again for storage in gathered)
    output.backward(gradient[mine])
    assert len(seen) == len(share.cuts(TOKENS)) * (2 if twice else 1)
    with torch.no_grad():
        torch.testing.assert_close(run(inputs["hidden"], inputs["weights"]), output.detach(), rtol=0, atol=0)
    return [output.detach(), *(tensor.grad for tensor in inputs.values())]


def expected(values: list[Any]) -> list[list[Any]]:
    """Of each rank its rows of what one process finds."""
    output, hidden, weights, up, down = values
    return [[part.chunk(RANKS)[rank] for part in (output, hidden, weights, up, down)] for rank in range(RANKS)]


@pytest.mark.parametrize("pieces", [1, 2, 3, 100])
@pytest.mark.parametrize("way", [{}, {"twice": True}, {"again": True}, {"early": True}])
def test_experts_on_three_ranks_are_as_on_one(pieces: int, way: dict[str, bool]) -> None:
    def work(rank: int) -> bool:
        import torch

        for found, exact in zip(exchanged(pieces, **way), expected(alone())[rank], strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        return True

    assert all(run_ranks(RANKS, work, init=True, megatron=False))


@pytest.mark.parametrize("frozen", [("hidden",), ("weights",), ("up", "down"), ("hidden", "weights")])
def test_what_is_frozen_has_no_gradient(frozen: tuple[str, ...]) -> None:
    def work(rank: int) -> bool:
        import torch

        names = ("output", "hidden", "weights", "up", "down")
        for name, found, exact in zip(names, exchanged(2, frozen), expected(alone())[rank], strict=True):
            if name in frozen:
                assert found is None
            else:
                torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        return True

    assert all(run_ranks(RANKS, work, init=True, megatron=False))


def test_the_next_piece_travels_while_one_is_computed() -> None:
    """All pieces are sent before the first is computed, and each result as soon as it is there."""

    def work(rank: int) -> list[str]:
        from unittest import mock

        import torch.distributed as dist

        from loong_llm import exchange

        log: list[str] = []

        class Noted:
            def __init__(self, name: str, handle: Any) -> None:
                self.name, self.handle = name, handle

            def wait(self) -> None:
                log.append(f"wait for {self.name}")
                self.handle.wait()

        def noted(name: str, function: Any) -> Any:
            def call(*args: Any, **settings: Any) -> Any:
                log.append(name)
                found = function(*args, **settings)
                return Noted(name, found) if settings.get("async_op") else found

            return call

        gradients = exchange.gradients
        with (
            mock.patch.object(dist, "all_gather_into_tensor", noted("gather", dist.all_gather_into_tensor)),
            mock.patch.object(dist, "reduce_scatter_tensor", noted("scatter", dist.reduce_scatter_tensor)),
            mock.patch.object(exchange, "gradients", noted("compute", gradients)),
        ):
            exchanged(2)
        return log

    log = run_ranks(RANKS, work, init=True, megatron=False)[0]
    begin = log.index("compute") - 3
    backward = ["gather", "gather", "wait for gather", "compute", "scatter", "wait for gather", "compute", "scatter"]
    assert log[begin : begin + len(backward)] == backward
    # The choice of experts, and their weights, which are not waited for yet; two pieces of tokens. What the first piece
    # gave leaves before the second is waited for.
    forward = ["gather", "gather", "wait for gather", "gather", "gather"]
    forward += ["wait for gather", "wait for gather", "scatter", "wait for gather", "scatter"]
    assert log[: len(forward)] == forward


def test_weights_gradients_are_computed_while_tokens_gradients_travel() -> None:
    """An op that writes them into buffers is asked to once the gradient of its tokens is on its way."""

    def work(rank: int) -> list[str]:
        import torch
        import torch.distributed as dist
        from torch import Tensor

        from loong_core.parallel.gradient_buffer import buffer_to_fill, deliver
        from loong_core.parallel.transport import Collectives
        from loong_llm.exchange import Share, exchange

        log: list[str] = []

        class Noted(Collectives):
            def scatter(self, everyones: Tensor, mine: Tensor) -> Any:
                log.append("scatter")
                return super().scatter(everyones, mine)

        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, tokens: Tensor, scale: Tensor) -> Tensor:
                ctx.save_for_backward(tokens, scale)
                return tokens * scale

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
                tokens, scale = ctx.saved_tensors
                buffer, _ = buffer_to_fill(scale)

                def product() -> None:
                    log.append("product")
                    buffer.add_((gradient * tokens).sum(0))

                deliver(scale, product)
                return gradient * scale, None

        generator = torch.Generator().manual_seed(rank)
        hidden = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
        scale = torch.arange(1.0, WIDTH + 1).requires_grad_()
        scale.main_grad = torch.zeros(WIDTH)
        weights, chosen = torch.ones(TOKENS, 1), torch.zeros(TOKENS, 1, dtype=torch.int64)
        share = Share(dist.group.WORLD, 1, 2, Noted(dist.group.WORLD))
        exchange(
            hidden, weights, chosen, [scale], share, lambda tokens, *_: Scaled.apply(tokens, scale)
        ).sum().backward()
        torch.testing.assert_close(hidden.grad, 2 * scale.detach().expand(TOKENS, WIDTH))
        total = hidden.detach().sum(0)
        dist.all_reduce(total)
        torch.testing.assert_close(scale.main_grad, total)
        return log

    for log in run_ranks(2, work, init=True, megatron=False):
        assert log == ["scatter", "scatter", "scatter", "product", "scatter", "product"]


def test_the_first_and_the_last_piece_are_half_as_large() -> None:
    from loong_llm.exchange import Share

    def cuts(pieces: int, tokens: int) -> list[int]:
        found = Share(None, 1, pieces, None).cuts(tokens)
        assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
        return [end - begin for begin, end in found]

    assert cuts(1, 8) == [8]
    assert cuts(2, 8) == [4, 4]
    assert cuts(3, 8) == [2, 4, 2]
    assert cuts(4, 32768) == [5461, 10923, 10922, 5462]
    assert cuts(5, 3) == [1, 1, 1]
    assert cuts(2, 1) == [1]
    assert cuts(3, 0) == [0]


@pytest.mark.parametrize("apart", [False, True])
def test_tokens_leave_before_they_are_routed_where_that_holds_up_nothing(apart: bool, tmp_path: Path) -> None:
    def work(rank: int) -> list[str]:
        from unittest import mock

        from loong_core.parallel.transport import Collectives
        from loong_llm.moe import Mixture
        from loong_llm.router import BalancedRouter

        log: list[str] = []
        gather, route = Collectives.gather, BalancedRouter.forward

        def gathered(self: Any, mine: Any, into: Any = None) -> Any:
            if mine.shape[1:] == (CONFIG["hidden_size"],):
                log.append("tokens leave")
            return gather(self, mine, into)

        def routed(self: Any, *args: Any, **kwargs: Any) -> Any:
            log.append("routed")
            return route(self, *args, **kwargs)

        settings = tiny.settings("qwen3_moe", CONFIG, parallel={"ep": 2})
        _, engine = tiny.start(settings, tmp_path, False)
        (mixture, *_) = (module for module in engine.modules[0].modules() if isinstance(module, Mixture))
        import torch

        with (
            mock.patch.object(Collectives, "gather", gathered),
            mock.patch.object(Collectives, "apart", apart),
            mock.patch.object(BalancedRouter, "forward", routed),
        ):
            mixture(torch.randn(4, 1, CONFIG["hidden_size"]))
        return log

    for log in run_ranks(2, work):
        assert log == (["tokens leave", "routed"] if apart else ["routed", "tokens leave"])


@pytest.mark.parametrize(
    ("options", "ranks", "tokens", "pieces", "carrier"),
    [
        ({}, 4, 7, 1, "Collectives"),
        ({}, 4, 8, 2, "Collectives"),
        ({}, 2, 8, 1, "Collectives"),
        ({"exchange": "auto"}, 4, 8, 2, "Copies"),
        ({"exchange": "auto", "exchange_pieces": 3}, 2, 7, 3, "Copies"),
    ],
)
def test_many_tokens_go_in_two_pieces(
    options: dict[str, Any], ranks: int, tokens: int, pieces: int, carrier: str, tmp_path: Path
) -> None:
    def work(rank: int) -> list[list[Any]]:
        from unittest import mock

        import torch

        from loong_core.parallel import transport
        from loong_llm import exchange, moe

        class Copies(transport.Collectives):
            """Another transport."""

        seen: list[list[Any]] = []

        def between(group: Any, name: str, sum_parts: Any) -> Any:
            return (transport.Collectives if name == "collectives" else Copies)(group)

        def noted(*args: Any) -> Any:
            share = args[4]
            seen.append([len(share.cuts(tokens)), type(share.transport).__name__])
            return exchange.exchange(*args)

        with (
            mock.patch.object(transport, "between", between),
            mock.patch.object(moe, "exchange", noted),
            mock.patch.object(exchange, "MANY", 8),
        ):
            config = CONFIG | {"num_experts": 8}
            settings = tiny.settings("qwen3_moe", config, parallel={"ep": ranks, "options": options})
            _, engine = tiny.start(settings, tmp_path, False)
            (mixture, *_) = (module for module in engine.modules[0].modules() if isinstance(module, moe.Mixture))
            mixture(torch.randn(tokens, 1, CONFIG["hidden_size"]))
        return seen

    assert run_ranks(ranks, work) == [[[pieces, carrier]]] * ranks


@pytest.mark.parametrize(
    ("parallel", "found"),
    [
        ({}, (None, False)),
        ({"options": {"exchange_pieces": 3}}, (3, False)),
        ({"recompute": "selective"}, (None, True)),
    ],
)
def test_layers_exchange_as_the_recipe_says(parallel: dict[str, Any], found: tuple[int, bool], tmp_path: Path) -> None:
    def work(rank: int) -> list[tuple[int, bool]]:
        from loong_llm.moe import Mixture

        _, engine = tiny.start(tiny.settings("qwen3_moe", CONFIG, parallel=parallel), tmp_path, False)
        mixtures = [module for module in engine.modules[0].modules() if isinstance(module, Mixture)]
        return [(mixture.meeting.pieces, mixture.meeting.again) for mixture in mixtures]

    assert run_ranks(1, work) == [[list(found)] * CONFIG["num_hidden_layers"]]
