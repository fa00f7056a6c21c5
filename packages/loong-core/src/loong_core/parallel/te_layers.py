"""Layers by Transformer Engine, norm and linear unfused, so that parameters are named as with plain torch; what the
run's ops compute faster is theirs to compute."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

from loong_core.errors import Unsupported
from loong_core.parallel.core_attention import core_attention
from loong_core.parallel.torch_layers import norm

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.ops import Ops


BEYOND_A_PRODUCT = ("sequence_parallel", "fp8", "fp4", "quant_recipe", "delay_wgrad_compute", "cpu_offloading")
"""Settings of megatron-core under which a linear layer of Transformer Engine is more than the op `linear`."""


class TELayerProvider:
    """megatron-core's `BackendSpecProvider` over Transformer Engine; attention is that of the run's ops."""

    def __init__(self, ops: Ops) -> None:
        """Raises `Unsupported` where Transformer Engine is not installed."""
        if importlib.util.find_spec("transformer_engine") is None:
            raise Unsupported(
                "backend cuda: its layers need Transformer Engine, which is not installed here. "
                'Install it with the nvidia extra: pip install "loong-train[nvidia]".'
            )
        self._upstream = TESpecProvider()
        self._attention = core_attention(ops)
        # The reference takes many passes where Transformer Engine takes one; any other row was chosen to beat that.
        ours = ops.choices["rms_norm"].name != "torch"
        self._norms = {has_residual: norm(ops, has_residual) for has_residual in (False, True)} if ours else None
        self._product = ops.linear if ops.choices["linear"].name != "torch" else None

    def linear(self) -> type:
        """The layer that is not cut by tensor parallelism."""
        return accumulating(self._upstream.linear(), self._product)

    def column_parallel_linear(self) -> type:
        """The layer whose outputs are cut."""
        return accumulating(self._upstream.column_parallel_linear(), self._product)

    def row_parallel_linear(self) -> type:
        """The layer whose inputs are cut."""
        return accumulating(self._upstream.row_parallel_linear(), self._product)

    def fuse_layernorm_and_linear(self) -> bool:
        """Norm and linear are two modules with every provider, so that parameter names are the same."""
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        """There is none."""
        return None

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """The run's `rms_norm`, or Transformer Engine's norm; the config says which kind. With `has_residual` it may
        return x too (`loong_core.parallel.torch_layers.norm`)."""
        if self._norms is not None and rms_norm:
            return self._norms[has_residual]
        return self._upstream.layer_norm(rms_norm, for_qk, has_residual)

    def core_attention(self) -> type:
        """The attention of this run's ops."""
        return self._attention

    def activation_func(self) -> Any:
        """Transformer Engine's activation, which megatron-core uses only where the config asks for it."""
        return self._upstream.activation_func()

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Callable[..., Any]:
        """All experts of a rank in one grouped matmul. loong's families use the op `experts` in its place."""
        return self._upstream.grouped_mlp_modules(moe_use_grouped_gemm)


def accumulating(linear: type, product: Callable[..., Tensor] | None = None) -> type:
    """`linear`, a layer of Transformer Engine, adding its weight gradient straight into its buffer.

    megatron-core has one switch for all linear layers, and its own, of which the output layer is made, want Apex for
    it; so only what Transformer Engine builds sees the switch on. `product`, an op `linear`, computes in its place
    where a layer is nothing but the product of one rank. That is settled when a layer is built: a buffer that an op
    has written to is not zeroed for the next step (`loong_core.parallel.gradient_buffer`).
    """

    def build(self: Any, *args: Any, config: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.gradient_accumulation_fusion = True
        linear.__init__(self, *args, config=config, **kwargs)  # type: ignore[misc]
        self.is_product = self.tp_size == 1 and not any(getattr(config, name) for name in BEYOND_A_PRODUCT)

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., inputs] -> [..., outputs], and the bias where it is left to the caller to add."""
        if product is None or not self.is_product:
            result: tuple[Tensor, Tensor | None] = linear.forward(self, x)  # type: ignore[attr-defined]
            return result
        if self.te_return_bias:
            return product(x, self.weight), self.bias.to(x.dtype)
        return product(x, self.weight, self.bias if self.use_bias else None), None

    return type(linear.__name__, (linear,), {"__init__": build, "forward": forward})
