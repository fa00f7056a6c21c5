"""The load-balancing loss of transformers, whose statistics span all layers at once, without touching the graph.

The loss is coefficient x experts x sum_e f_e P_e with f_e the assignments and P_e the probability that expert e got
per token, both averaged over the tokens of ALL layers of a micro-batch. f_e carries no gradient, so the derivative
for a router's probabilities is one vector of the size of the experts, known when the forward pass ends. Routers
therefore add it in their backward pass (as megatron-core does with its per-layer loss); layers that are recomputed
need no special care.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from loong_core.parallel import gradient_buffer

if TYPE_CHECKING:
    from loong_core.ops import Ops
    from loong_core.references.routing import Routing


class Balance:
    """Statistics of one micro-batch on its way through a model: collected by routers, closed by the decoder.

    `groups` are the process groups over which the tokens of a micro-batch are spread; `loss_group` is the one whose
    ranks each add the loss once, weighted with their own counted tokens (context parallelism).
    """

    def __init__(self, experts: int, coefficient: float, groups: list[Any], loss_group: Any) -> None:
        self.experts, self.coefficient = experts, coefficient
        self.groups = [group for group in groups if group is not None and group.size() > 1]
        self.loss_group = loss_group if loss_group is not None and loss_group.size() > 1 else None
        self.valid: Tensor | None = None
        self._rows: Tensor | int | None = None
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.slope: Tensor | None = None
        self.weight: Tensor | None = None

    def start(self, valid: Tensor | None) -> None:
        """Begin a micro-batch. `valid` [tokens on this rank] marks what counts, in the routers' order; None: all."""
        self.valid, self.slope, self.weight = valid, None, None
        self._rows = None if valid is None else valid.sum()
        self._seen.clear()

    def record(self, layer: int, routing: Routing) -> None:
        """Keep the statistics of one layer; nothing is computed, its experts wait. A recomputed layer counts once."""
        if self._rows is None:
            self._rows = len(routing.experts)
        self._seen[layer] = routing.counts, routing.sums

    def close(self, output: Tensor) -> Tensor:
        """The loss of the micro-batch, coefficient applied: a scalar that hangs on `output`, the same on every rank."""
        seen = [self._seen[layer] for layer in sorted(self._seen)]
        # float64: the counts of a long batch over many layers exceed what float32 adds exactly
        counts, sums = (torch.stack(part).double().sum(0) for part in zip(*seen, strict=True))
        assert self._rows is not None, "a layer was recorded"
        total = torch.cat([counts, sums, counts.new_ones(1) * (self._rows * len(seen))])
        for group in self.groups:
            dist.all_reduce(total, group=group)
        counts, sums, rows = total.split([self.experts, self.experts, 1])
        scale = self.coefficient * self.experts
        self.slope = (scale * counts / rows / rows).float()
        value = (scale * (counts / rows * (sums / rows)).sum()).float()
        return _Close.apply(output, value, self)


class _Close(torch.autograd.Function):
    """Learns the weight of the loss. It hangs on the model's output, so autograd runs it before any router."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, value: Tensor, balance: Balance) -> Tensor:
        ctx.balance = balance
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        balance = ctx.balance
        weight = gradient.float().clone()
        if balance.loss_group is not None:  # every rank's loss moves every rank's tokens
            dist.all_reduce(weight, group=balance.loss_group)
        balance.weight = weight
        return None, None, None


class _Attach(torch.autograd.Function):
    """The identity on router logits; backward adds the derivative of the balancing loss."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, balance: Balance) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.balance, ctx.valid = balance, balance.valid
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        balance = ctx.balance
        if balance.weight is None:  # nobody used the loss
            return gradient, None
        (logits,) = ctx.saved_tensors
        probabilities = torch.softmax(logits.float(), dim=-1)
        mean_slope = (probabilities * balance.slope).sum(-1, keepdim=True)
        extra = balance.weight * probabilities * (balance.slope - mean_slope)
        if ctx.valid is not None:
            extra = extra * ctx.valid[:, None]
        return gradient + extra.to(gradient.dtype), None


class _Logits(torch.autograd.Function):
    """`hidden @ weight.T` in float32 without a float32 copy of `hidden`: products of 16-bit numbers are exact there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.weight = weight
        return _wide(hidden, weight.t())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        narrow = gradient.to(hidden.dtype)
        of_hidden = narrow @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_hidden, None
        of_weight = _wide(narrow.t(), hidden)
        buffer, empty = gradient_buffer.buffer_to_fill(ctx.weight)
        if buffer is None:
            return of_hidden, of_weight.to(weight.dtype)
        (buffer.copy_ if empty else buffer.add_)(of_weight)
        gradient_buffer.mark_added(ctx.weight)
        return of_hidden, None


def _wide(one: Tensor, other: Tensor) -> Tensor:
    """The matrix product in float32 (float64 stays)."""
    if one.is_cuda and one.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(one, other, out_dtype=torch.float32)
    wide = torch.float64 if one.dtype == torch.float64 else torch.float32
    return one.to(wide) @ other.to(wide)


class BalancedRouter(TopKRouter):
    """megatron-core's router with the choice made by the op `route`, which also reports to a `Balance`."""

    sparse: bool = False
    """Whether calling it gives a `Routing` of [tokens, chosen experts], or megatron-core's pair of dense tensors."""

    def __init__(
        self,
        config: Any,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        *,
        ops: Ops,
        balance: Balance | None,
        normalise: bool,
    ) -> None:
        """`normalise`: weights are divided by their sum over the chosen experts."""
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.balance, self.normalise = balance, normalise
        self._route = ops.route

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> Any:
        """Hidden states [..., hidden] -> where each token goes, see `sparse`."""
        hidden = input.reshape(-1, input.shape[-1])
        logits: Tensor = _Logits.apply(hidden, self.weight)
        if self.balance is not None:
            logits = _Attach.apply(logits, self.balance)
        valid = None if self.balance is None else self.balance.valid
        routing: Routing = self._route(logits, self.topk, normalise=self.normalise, valid=valid)
        if self.balance is not None:
            self.balance.record(self.layer_number, routing)
        return routing if self.sparse else self._dense(routing, logits)

    @staticmethod
    def _dense(routing: Routing, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and choice, [tokens, experts] each, as megatron-core's dispatchers take them."""
        where = routing.experts.long()
        probabilities = torch.zeros_like(logits, dtype=routing.weights.dtype).scatter(1, where, routing.weights)
        return probabilities, torch.zeros_like(logits, dtype=torch.bool).scatter(1, where, True)
