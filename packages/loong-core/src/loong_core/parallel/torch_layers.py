"""Layers in plain torch for any device: what megatron-core's own "local" provider lacks is a norm under sequence
parallelism, attention under context parallelism, and a duplicated linear layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from loong_core.errors import Unsupported
from loong_core.parallel.core_attention import core_attention

if TYPE_CHECKING:
    from loong_core.ops import Ops


class TorchNorm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dim, as `config.normalization` says; also under sequence parallelism.

    `rms_norm` is the op of that name, or `residual_rms_norm`, which hands x through beside its result.
    """

    rms_norm: ClassVar[Callable[[torch.Tensor, torch.Tensor, float], Any]]

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        """`weight` (and `bias`, LayerNorm) of [hidden_size]; zero-centred where the config says so (weight + 1)."""
        super().__init__()
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise Unsupported(f"normalization {config.normalization!r}: allowed are RMSNorm and LayerNorm.")
        self.epsilon = eps
        self.zero_centred = bool(config.layernorm_zero_centered_gamma)
        start = torch.zeros if self.zero_centred else torch.ones
        where = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(start(hidden_size, **where))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, **where)) if config.normalization != "RMSNorm" else None
        for parameter in self.parameters():
            # megatron-core sums the gradients of such parameters over the tensor-parallel ranks
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> Any:
        """[..., hidden_size] -> the same shape and dtype, and x where the op hands it through. Statistics: float32."""
        weight = self.weight.float() + 1.0 if self.zero_centred else self.weight
        if self.bias is None:
            return type(self).rms_norm(x, weight, self.epsilon)
        normal = torch.nn.functional.layer_norm(
            x.float(), weight.shape, weight.float(), self.bias.float(), self.epsilon
        )
        return normal.to(x.dtype)


def norm(ops: Ops, has_residual: bool = False) -> type[TorchNorm]:
    """The norm that calls this run's op. megatron-core builds classes, not partial functions, in some places.

    Where `has_residual` says that x is added to later, and one implementation computes both ops, an RMSNorm returns
    `(normed, x)`, which megatron-core's layers take: the gradients of both then meet in one pass. A norm that a recipe
    or a plugin chose for `rms_norm` is that of the layers too; the references would gain nothing.
    """
    names = {ops.choices[name].name for name in ("rms_norm", "residual_rms_norm")}
    fused = has_residual and len(names) == 1 and "torch" not in names
    op = ops.residual_rms_norm if fused else ops.rms_norm
    return type("TorchNorm", (TorchNorm,), {"rms_norm": staticmethod(op)})


class DuplicatedLinear(torch.nn.Module):
    """A linear layer whose whole weight is on every tensor-parallel rank; returns `(output, bias or None)`."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Callable[[torch.Tensor], Any],
        bias: bool = True,
        skip_bias_add: bool = False,
        **_: Any,
    ) -> None:
        """`weight` [output_size, input_size]; further arguments of megatron-core's linear layers have no effect."""
        super().__init__()
        where = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, **where))
        self.bias = torch.nn.Parameter(torch.zeros(output_size, **where)) if bias else None
        self.skip_bias_add = skip_bias_add
        if config.perform_initialization:
            init_method(self.weight)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[..., input_size] -> [..., output_size], and the bias where it is left to the caller to add."""
        if self.skip_bias_add:
            return torch.nn.functional.linear(x, self.weight), self.bias
        return torch.nn.functional.linear(x, self.weight, self.bias), None


class TorchLayerProvider:
    """megatron-core's `BackendSpecProvider` (and `linear`) without Transformer Engine or Apex."""

    def __init__(self, ops: Ops) -> None:
        """`ops` are the run's bound ops: the norm and the attention of every layer."""
        self._norms = {has_residual: norm(ops, has_residual) for has_residual in (False, True)}
        self._attention = core_attention(ops)

    def linear(self) -> type:
        """The layer that is not cut by tensor parallelism."""
        return DuplicatedLinear

    def column_parallel_linear(self) -> type:
        """The layer whose outputs are cut."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """The layer whose inputs are cut."""
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Norm and linear are two modules with every provider, so that parameter names are the same."""
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        """There is none."""
        return None

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """The norm; the config says which. With `has_residual` it may return x too (`norm`)."""
        return self._norms[has_residual]

    def core_attention(self) -> type:
        """The attention of this run's ops."""
        return self._attention

    def activation_func(self) -> None:
        """The config's own."""
        return None

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Callable[..., Any]:
        """Experts one after the other: torch has no grouped matmul on every device. loong's families use the op
        `experts` in its place."""
        return partial(
            SequentialMLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        )
