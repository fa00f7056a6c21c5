"""The load-balancing loss of transformers, whose statistics span all layers at once, without touching the graph.

The loss is coefficient x experts x sum_e f_e P_e with f_e the assignments and P_e the probability that expert e got
per token, both averaged over the tokens of ALL layers of a micro-batch. f_e carries no gradient, so the derivative
for a router's probabilities is one vector of the size of the experts, known when the forward pass ends. Routers
therefore add it in their backward pass (as megatron-core does with its per-layer loss); layers that are recomputed
need no special care.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


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
        self._seen: dict[int, Tensor] = {}
        self.slope: Tensor | None = None
        self.weight: Tensor | None = None

    def start(self, valid: Tensor | None) -> None:
        """Begin a micro-batch. `valid` [tokens on this rank] marks what counts, in the routers' order; None: all."""
        self.valid, self.slope, self.weight = valid, None, None
        self._seen.clear()

    def record(self, layer: int, logits: Tensor, chosen: Tensor) -> None:
        """Statistics of one layer: logits and chosen are [tokens, experts]. A recomputed layer counts once."""
        if layer in self._seen:
            return
        probabilities = torch.softmax(logits.detach().float(), dim=-1)
        if self.valid is None:
            counts, sums = chosen.sum(0), probabilities.sum(0)
            rows = counts.new_tensor([logits.shape[0]])
        else:
            counts, sums = (chosen & self.valid[:, None]).sum(0), (probabilities * self.valid[:, None]).sum(0)
            rows = self.valid.sum()[None]
        self._seen[layer] = torch.cat([counts.float(), sums, rows.float()])

    def close(self, output: Tensor) -> Tensor:
        """The loss of the micro-batch, coefficient applied: a scalar that hangs on `output`, the same on every rank."""
        # float64: the counts of a long batch over many layers exceed what float32 adds exactly
        total = torch.stack([self._seen[layer] for layer in sorted(self._seen)]).double().sum(0)
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


class BalancedRouter(TopKRouter):
    """A top-k router that reports to a `Balance`; without one it is megatron-core's own."""

    def __init__(
        self, config: Any, pg_collection: Any = None, is_mtp_layer: bool = False, *, balance: Balance | None
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.balance = balance

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [sequence, batch, experts] -> probabilities and choice, [tokens, experts] each."""
        if self.balance is None:
            return super().routing(logits, padding_mask)
        shape = logits.shape
        logits = _Attach.apply(logits.reshape(-1, shape[-1]), self.balance)
        probabilities, chosen = super().routing(logits.view(shape), padding_mask)
        self.balance.record(self.layer_number, logits, chosen)
        return probabilities, chosen
