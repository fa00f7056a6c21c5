"""What an engine hands to a family's `builder`, and what the builder must hand back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.ops import Ops
    from loong_core.parallel.transport import TransportName
    from loong_core.train.engine import Batch, LocalParameter
    from loong_core.types import ParallelPlan, PrecisionPolicy


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """Everything a builder may know of the run; it asks no global state.

    `layers` satisfies megatron-core's `BackendSpecProvider`; `groups` is its `ProcessGroupCollection`; both are None
    under the torch engine. `chunks` holds, for every pipeline chunk of this rank in order, the global indices of its
    layers. The chunk with `first[i]` owns the embedding, the one with `last[i]` the final norm and the head.
    `dispatch`, `exchange` and `exchange_pieces` are how tokens meet experts of other ranks (`MegatronOptions`).
    """

    plan: ParallelPlan
    precision: PrecisionPolicy
    ops: Ops
    layers: Any
    groups: Any
    device: str
    chunks: tuple[tuple[int, ...], ...]
    first: tuple[bool, ...]
    last: tuple[bool, ...]
    dropout: float = 0.0
    deterministic: bool = False
    dispatch: str = "auto"
    exchange: TransportName = "collectives"
    exchange_pieces: int | None = None


class Chunk(Protocol):
    """One pipeline chunk of a model: an `nn.Module` the megatron schedules can drive.

    `forward(batch)` takes this rank's (already context-parallel) slice of a micro-batch and returns hidden states, or
    on the last chunk the model's output (language models: where the batch has `targets` the cross entropy of each,
    [batch, sequence] in float32, otherwise logits [batch, sequence, padded vocabulary / tp]).
    """

    config: Any
    """The `TransformerConfig` the chunk was built with."""

    def forward(self, batch: Batch) -> Tensor: ...

    def set_input_tensor(self, input_tensor: Any) -> None: ...

    def local_parameters(self) -> Iterable[LocalParameter]:
        """Every trainable or frozen parameter of the chunk with its `ParameterSpec`; a tied copy on the last stage is
        not listed."""

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Scalar losses of the last forward, coefficients applied, to be added per counted token; the same value on
        all ranks that share the micro-batch, empty where there are none. Called after `forward` on the last chunk."""


class WholeModel(Protocol):
    """A model that the torch engine trains: one `nn.Module`, whole, which is sharded once its weights are loaded.

    It registers its modules in the order of execution: gradients are reduced in the reverse of it while the backward
    pass runs, and one that comes later than its turn has the following ones wait.

    A model may also have `packing(batch) -> tensors to add`: called with each micro-batch on the CPU, before it goes to
    the device, so that lengths which depend on the data are known without waiting for the device.
    """

    def forward(self, batch: Batch) -> Tensor:
        """What the task's loss takes."""

    def units(self) -> list[Any]:
        """Blocks in the order of execution, none inside another: what is sharded, compiled and computed again as one.
        Their parameters are read within their own `forward` alone."""

    def local_parameters(self) -> Iterable[LocalParameter]:
        """Every parameter with its `ParameterSpec`, a tied one once."""

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """As those of `Chunk`."""


@dataclass(frozen=True, kw_only=True)
class LossContext:
    """What a task's loss may know: the bound ops, the tensor-parallel group of the output, the true vocabulary.

    `model` is the module that made the output, under the torch engine; the megatron engine leaves it None.
    """

    ops: Ops
    tensor_group: Any
    vocabulary: int
    plan: ParallelPlan
    model: Any = None
