"""What the training loop knows of an engine: a few verbs and a view of the parameters.

The loop drives whichever engine the planner built, on any device, for any modality. Everything here is per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loong_core.recipe import OptimSection
    from loong_core.types import ParameterSpec

Batch = dict[str, "Tensor"]
"""One micro-batch, the same on every rank of a data-parallel replica. Text: `tokens`, `targets` (shifted already,
-100 = not counted), `positions`, all [micro_batch, seq_len] int64, and `segments` (the number of the packed sample a
token belongs to, -1 = padding), present when rows are packed or padded."""


class LossSum(NamedTuple):
    """A loss as a sum and the number of counted elements, so that averaging happens once, over the global batch.

    `sum` is a scalar tensor with gradient, `count` a scalar tensor without. `extra` are further reported sums.
    """

    sum: Tensor
    count: Tensor
    extra: dict[str, Tensor] = {}


class LocalParameter(NamedTuple):
    """A parameter this rank holds: what it is globally, and the local part of it (never a copy).

    Several may lie in one trained tensor (the stacked experts of a layer): `tensor` then is a view of `owner` that
    begins `offset` elements into it. Where `owner` is None, `tensor` itself is trained.
    """

    spec: ParameterSpec
    tensor: Tensor
    owner: Tensor | None = None
    offset: int = 0

    @property
    def trained(self) -> Tensor:
        """The leaf that autograd and the optimizer know."""
        return self.tensor if self.owner is None else self.owner

    def assign(self, values: Tensor) -> None:
        """Set the local part to `values` (any dtype and device). What a parameter of lower precision cannot hold is
        kept beside it, on the CPU, until the optimizer takes it for its master weights (`take_exact`)."""
        self.tensor.detach().copy_(values)
        if values.dtype.itemsize > self.tensor.dtype.itemsize:
            self.keep_exact(values.detach().float().cpu())

    def keep_exact(self, values: Tensor) -> None:
        """Keep `values` (float32, any device, shaped as `tensor`) for `take_exact`, as they are and where they are."""
        self.trained.__dict__.setdefault("exact", {})[self.offset] = values

    @property
    def gradient(self) -> Tensor | None:
        """Where the engine accumulates: the buffer megatron-core hung on the parameter, or torch's own. The megatron
        engine keeps the gradient of the sum there; times its `gradient_scale` it is that of the mean."""
        found = getattr(self.trained, "main_grad", None)
        whole: Tensor | None = self.trained.grad if found is None else found
        if whole is None:
            return None
        return whole.reshape(-1)[self.offset : self.offset + self.tensor.numel()].view(self.tensor.shape)

    def take_exact(self) -> Tensor | None:
        """The values last assigned, in float32, if the parameter could not hold them; they are handed out once."""
        kept: dict[int, Tensor] = self.trained.__dict__.get("exact", {})
        return kept.pop(self.offset, None)


class Engine(Protocol):
    """A model with its gradients and its optimizer under one parallel layout. Every method is collective."""

    modules: list[nn.Module]
    """The model's pipeline chunks on this rank, unwrapped."""

    def optimizer(self, section: OptimSection) -> None:
        """Prepare gradients and optimizer. Called once, after weights are loaded and plugins have seen the model."""

    def forward_backward(
        self, batches: Sequence[Batch], step: int, coming: Callable[[], Sequence[Batch] | None] | None = None
    ) -> dict[str, float]:
        """Accumulate gradients of the global batch's mean loss. Returns `loss` and what else the task reports,
        reduced over all ranks: the same numbers on every rank. `counted` is the number of counted elements.
        Randomness (dropout) is a function of seed, 0-based `step` and rank, so there is no random state to save.
        `coming` gives the next step's batches where they are there already, for an engine that begins with what does
        not depend on this step."""

    def step(self, lr: float) -> float:
        """Clip, update, clear gradients. Returns the global gradient norm before clipping (same on every rank)."""

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """As `forward_backward`, without gradients and in evaluation mode."""

    def save_state(self, folder: Path) -> None:
        """Write weights and optimizer state into `folder` (exists, empty) in a layout-independent form."""

    def load_state(self, folder: Path, optimizer: bool = True) -> None:
        """The reverse, under this engine's own layout. `optimizer=False` reads the weights alone."""

    def parameters(self) -> Iterable[LocalParameter]:
        """This rank's parameters in the order of the model's parameter list; tied copies only once."""

    def cut(self, parameter: LocalParameter) -> tuple[int, int]:
        """Which part of the full tensor is held here, of how many: rank and size of its tensor parallelism."""

    def gather(self, parameter: LocalParameter) -> Tensor | None:
        """The full tensor, without padding, on the one rank that shall write it; None on the others. Collective over
        the ranks that hold parts of the same parameter."""

    def weights_changed(self) -> None:
        """Tell the engine that parameters were overwritten (master copies are refreshed)."""

    def idle_bytes(self) -> int:
        """Bytes of device memory that steps use without the allocator counting them as allocated."""

    def close(self) -> None:
        """Release process groups and threads."""
