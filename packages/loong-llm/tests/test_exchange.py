"""Tokens that travel to experts on other ranks and back, in pieces, beside one process that has all experts."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from loong_core.testing import tiny
from loong_core.testing.ranks import run_ranks

RANKS, TOKENS, CHOSEN, EXPERTS, WIDTH, FFN = 3, 7, 2, 6, 5, 4

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


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
    output = experts(hidden, up, down, weights, chosen)
    output.backward(gradient)
    return [output.detach(), *(tensor.grad for tensor in inputs)]


def exchanged(pieces: int, frozen: tuple[str, ...] = (), again: bool = False) -> list[Any]:
    """The same of this rank's tokens and experts, by `exchange`; with `again` its forward pass is computed twice."""
    import torch
    import torch.distributed as dist
    from torch.utils.checkpoint import checkpoint

    from loong_core.parallel import transport
    from loong_core.references.experts import experts
    from loong_llm.exchange import Share, exchange

    rank, count = dist.get_rank(), EXPERTS // RANKS
    mine, held = slice(rank * TOKENS, (rank + 1) * TOKENS), slice(rank * count, (rank + 1) * count)
    hidden, weights, chosen, up, down, gradient = drawn()
    parts = {"hidden": hidden[mine], "weights": weights[mine], "up": up[held], "down": down[held]}
    inputs = {name: part.clone().requires_grad_(name not in frozen) for name, part in parts.items()}
    share = Share(dist.group.WORLD, rank * count, count, pieces, transport.between(dist.group.WORLD, "auto"))
    seen, kept = [], []

    def compute(tokens: Any, own: Any, choice: Any, pairs: Any) -> Any:
        seen.append(pairs())
        assert pairs() == ((choice >= share.first) & (choice < share.first + count)).sum()
        found = experts(tokens, inputs["up"], inputs["down"], own, choice, first=share.first, pairs=pairs)
        kept.append(weakref.ref(found))
        return found

    def run(hidden: Any, weights: Any) -> Any:
        return exchange(hidden, weights, chosen[mine], [inputs["up"], inputs["down"]], share, compute)

    if again:
        output = checkpoint(run, inputs["hidden"], inputs["weights"], use_reentrant=True)
    else:
        output = run(inputs["hidden"], inputs["weights"])
    gc.collect()
    assert not any(reference() is not None for reference in kept), "what was sent is kept"
    output.backward(gradient[mine])
    assert len(seen) == min(pieces, TOKENS) * (2 if again else 1)
    with torch.no_grad():
        torch.testing.assert_close(run(inputs["hidden"], inputs["weights"]), output.detach(), rtol=0, atol=0)
    return [output.detach(), *(tensor.grad for tensor in inputs.values())]


def expected(values: list[Any]) -> list[list[Any]]:
    """Of each rank its rows of what one process finds."""
    output, hidden, weights, up, down = values
    return [[part.chunk(RANKS)[rank] for part in (output, hidden, weights, up, down)] for rank in range(RANKS)]


@pytest.mark.parametrize("pieces", [1, 2, 3, 100])
@pytest.mark.parametrize("again", [False, True])
def test_experts_on_three_ranks_are_as_on_one(pieces: int, again: bool) -> None:
    def work(rank: int) -> bool:
        import torch

        for found, exact in zip(exchanged(pieces, again=again), expected(alone())[rank], strict=True):
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

        gradients = exchange._gradients
        with (
            mock.patch.object(dist, "all_gather_into_tensor", noted("gather", dist.all_gather_into_tensor)),
            mock.patch.object(dist, "reduce_scatter_tensor", noted("scatter", dist.reduce_scatter_tensor)),
            mock.patch.object(exchange, "_gradients", noted("compute", gradients)),
        ):
            exchanged(2)
        return log

    log = run_ranks(RANKS, work, init=True, megatron=False)[0]
    begin = log.index("compute") - 3
    backward = ["gather", "gather", "wait for gather", "compute", "scatter", "wait for gather", "compute", "scatter"]
    assert log[begin : begin + len(backward)] == backward
    # The choice of experts; two pieces of tokens and the weights. What the first piece gave leaves before the second is
    # waited for.
    forward = ["gather", "wait for gather", *["gather"] * 3]
    forward += ["wait for gather", "wait for gather", "scatter", "wait for gather", "scatter"]
    assert log[: len(forward)] == forward


@pytest.mark.parametrize(("options", "pieces"), [({}, 1), ({"exchange_pieces": 3}, 3)])
def test_layers_have_the_pieces_of_the_recipe(options: dict[str, Any], pieces: int, tmp_path: Path) -> None:
    def work(rank: int) -> list[int]:
        from loong_llm.moe import Mixture

        _, engine = tiny.start(tiny.settings("qwen3_moe", CONFIG, parallel={"options": options}), tmp_path, False)
        return [module.pieces for module in engine.modules[0].modules() if isinstance(module, Mixture)]

    assert run_ranks(1, work) == [[pieces] * CONFIG["num_hidden_layers"]]
