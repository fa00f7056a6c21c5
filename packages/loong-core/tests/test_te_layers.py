"""Transformer Engine's linear layers as far as a machine without a GPU shows it: who computes, and what is returned.

`tests/e2e/test_fused_ops.py` compares whole models where there is a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from loong_core.testing.ranks import run_ranks

PLAIN = {
    "sequence_parallel": False,
    "fp8": None,
    "fp4": None,
    "quant_recipe": None,
    "delay_wgrad_compute": False,
    "cpu_offloading": False,
    "gradient_accumulation_fusion": False,
}


def stand_in(config: Any, bias: bool, skip_bias_add: bool, tp_size: int, product: Any) -> Any:
    """A layer over a class with the attributes of megatron-core's `TELinear`, whose own forward gives a hundredth."""
    import torch

    from loong_core.parallel.te_layers import accumulating

    class Linear(torch.nn.Module):
        def __init__(self, inputs: int, outputs: int, *, config: Any, bias: bool, skip_bias_add: bool) -> None:
            super().__init__()
            self.config, self.tp_size = config, tp_size
            self.use_bias, self.te_return_bias = bias, skip_bias_add and bias
            generator = torch.Generator().manual_seed(1)
            self.weight = torch.nn.Parameter(torch.randn(outputs, inputs, generator=generator))
            self.bias = torch.nn.Parameter(torch.ones(outputs)) if bias else torch.Tensor()

        def forward(self, x: Any) -> Any:
            return torch.nn.functional.linear(x, self.weight) / 100, None

    layer = accumulating(Linear, product)(5, 3, config=config, bias=bias, skip_bias_add=skip_bias_add)
    assert type(layer).__name__ == "Linear" and isinstance(layer, Linear)
    assert layer.config.gradient_accumulation_fusion and not config.gradient_accumulation_fusion
    return layer


def outcome(given: bool, bias: bool, skip: bool, tp_size: int, settings: dict[str, Any]) -> list[Any]:
    """[calls of the op, output / (x @ weight.T), whether a bias is returned] of a layer."""
    import torch

    calls = []

    def product(x: Any, weight: Any, bias: Any = None) -> Any:
        calls.append(bias is not None)
        return torch.nn.functional.linear(x, weight, bias)

    config = SimpleNamespace(**{**PLAIN, **settings})
    layer = stand_in(config, bias, skip, tp_size, product if given else None)
    x = torch.arange(10.0).reshape(2, 1, 5)
    out, returned = layer(x)
    assert returned is None or torch.equal(returned, layer.bias)
    added = out - torch.nn.functional.linear(x, layer.weight)
    of = "bias" if torch.allclose(added, torch.ones(3), atol=1e-5) else "none" if not added.any() else "own"
    return [calls, of, returned is not None]


@pytest.mark.parametrize(
    ("bias", "skip", "expected"),
    [
        (False, False, [[False], "none", False]),
        (False, True, [[False], "none", False]),
        (True, False, [[True], "bias", False]),
        (True, True, [[False], "none", True]),
    ],
)
def test_the_op_computes_and_the_bias_goes_where_it_did(bias: bool, skip: bool, expected: list[Any]) -> None:
    assert run_ranks(1, lambda rank: outcome(True, bias, skip, 1, {})) == [expected]


@pytest.mark.parametrize(
    ("given", "tp_size", "settings"),
    [
        (False, 1, {}),
        (True, 2, {}),
        (True, 1, {"sequence_parallel": True}),
        (True, 1, {"fp8": "hybrid"}),
        (True, 1, {"delay_wgrad_compute": True}),
    ],
    ids=["torch", "tp2", "sp", "fp8", "delayed"],
)
def test_what_is_more_than_a_product_stays_with_transformer_engine(
    given: bool, tp_size: int, settings: dict[str, Any]
) -> None:
    assert run_ranks(1, lambda rank: outcome(given, False, False, tp_size, settings)) == [[[], "own", False]]


def test_the_settings_that_are_asked_exist() -> None:
    def missing(rank: int) -> list[str]:
        from megatron.core.transformer.transformer_config import TransformerConfig

        from loong_core.parallel.te_layers import BEYOND_A_PRODUCT

        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        return [name for name in BEYOND_A_PRODUCT if getattr(config, name)]

    assert run_ranks(1, missing, init=True) == [[]]


@pytest.mark.parametrize("name", ["torch", "fast"])
def test_the_provider_hands_its_layers_the_op_that_was_chosen(name: str) -> None:
    def products(rank: int) -> list[bool]:
        import importlib.util

        from loong_core.ops import OPS, OpRequest, bind
        from loong_core.parallel import te_layers
        from loong_core.types import OpImpl

        te_layers.accumulating = lambda linear, product: product  # type: ignore[assignment]
        te_layers.TESpecProvider = lambda: SimpleNamespace(  # type: ignore[assignment]
            linear=int, column_parallel_linear=int, row_parallel_linear=int
        )
        importlib.util.find_spec = lambda *_: object()  # type: ignore[assignment]
        fast = OpImpl(op="linear", name="fast", target="loong_core.references.linear:linear", rank=1)
        ops = bind([*OPS, fast], OpRequest("cpu", "float32", {}, {}), {"linear": name})
        layers = te_layers.TELayerProvider(ops)
        made = [layers.linear(), layers.column_parallel_linear(), layers.row_parallel_linear()]
        return [product is ops.linear for product in made]

    assert run_ranks(1, products) == [[name == "fast"] * 3]
