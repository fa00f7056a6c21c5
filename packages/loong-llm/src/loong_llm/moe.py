"""A mixture of experts over stacked weights: tokens go to experts by index, nothing is permuted or padded.

Shape legend: t tokens of this rank, k experts chosen for each token, e experts held here, n hidden size, f size of an
expert on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor, nn

from loong_core.parallel import transport
from loong_llm.exchange import Share, exchange, pieces_of, start

if TYPE_CHECKING:
    from loong_core.ops import Ops
    from loong_core.parallel.options import Way
    from loong_core.references.experts import Pairs
    from loong_core.references.routing import Routing
    from loong_llm.sharded_experts import ShardedExperts


class Experts(nn.Module):
    """All SwiGLU experts of a rank in two stacked weights: `up` [e,2f,n] and `down` [e,n,f]."""

    ops: ClassVar[Ops]

    def __init__(self, count: int, config: Any, pg_collection: Any = None, **_: Any) -> None:
        """`count` experts; megatron-core's arguments."""
        super().__init__()
        cut = pg_collection.expt_tp.size()
        size = config.moe_ffn_hidden_size // cut
        where: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.up = nn.Parameter(torch.empty(count, 2 * size, config.hidden_size, **where))
        self.down = nn.Parameter(torch.empty(count, config.hidden_size, size, **where))
        replicated = config.expert_model_parallel_size == 1 and cut == config.tensor_model_parallel_size
        for weight, axis in ((self.up, 1), (self.down, 2)):
            set_tensor_model_parallel_attributes(weight, True, axis, 1)
            # Such gradients are reduced among the ranks that hold the same experts, not among all replicas.
            weight.allreduce = replicated  # type: ignore[attr-defined]

    def forward(
        self,
        hidden: Tensor,
        tokens_per_expert: Tensor | None,
        weights: Tensor,
        chosen: Tensor | None = None,
        *,
        first: int = 0,
        pairs: Pairs = None,
    ) -> tuple[Tensor, None]:
        """hidden [t,n] through the experts `chosen` [t,k] with `weights` [t,k] -> ([t,n], no bias); see the op
        `experts`. Without `chosen` tokens are sorted by expert, as megatron-core's dispatcher leaves them:
        tokens_per_expert [e] and weights [t]."""
        if chosen is None:
            assert tokens_per_expert is not None, "either the choice or the counts say which expert serves a token"
            counts = tokens_per_expert.to(hidden.device)
            numbers = torch.arange(len(counts), device=hidden.device, dtype=torch.int32)
            chosen = torch.repeat_interleave(numbers, counts, output_size=hidden.shape[0])[:, None]
            weights = weights.reshape(-1, 1)
        return type(self).ops.experts(hidden, self.up, self.down, weights, chosen, first=first, pairs=pairs), None


class HeldExperts(Experts):
    """Experts that are computed with elsewhere. Calling them gives their weights: the hooks by which megatron-core
    finishes a parameter's gathering run on calls."""

    def forward(self, *_: Any, **__: Any) -> Any:
        """`up` [e,2f,n] and `down` [e,n,f]."""
        return self.up, self.down


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """How the tokens of a rank meet experts of others: the `way`, `by` a transport; with gather in `pieces`, and with
    tokens gathered `again` for backward; with weights by what the layers of all chunks share, `sharded`."""

    way: Way
    by: transport.TransportName = "collectives"
    pieces: int | None = None
    again: bool = False
    sharded: ShardedExperts | None = None


class Mixture(MoELayer):
    """Router and experts of a layer, and how they meet.

    With the experts of a layer on few ranks every rank takes the tokens of all of them and adds its own experts' part;
    results are summed where the token lives (`exchange`). A token with 8 experts on 4 ranks visits nearly all of them,
    so it travels once instead of twice, messages have a fixed size, and nothing is permuted. With many tokens on each
    rank the experts can come to them instead (`sharded_experts`). Otherwise megatron-core's all-to-all dispatcher sends
    each (token, expert) pair.
    """

    def __init__(self, config: Any, *args: Any, meeting: Meeting, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.meeting = meeting
        self.transport: transport.Transport | None = None
        if meeting.way == "gather":
            self.transport = transport.between(self.ep_group, meeting.by, self.experts.ops.sum_parts)
        self.place = meeting.sharded.add(self.experts) if meeting.sharded is not None else 0
        self.router.sparse = meeting.way != "alltoall"

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Any = None
    ) -> tuple[Tensor, None]:
        """hidden_states [s,b,n] -> ([s,b,n], no bias)."""
        if self.meeting.way == "alltoall":
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.transport is not None:
            output = self._exchanged(hidden, self.transport)
        elif self.meeting.sharded is not None:
            output = self._visited(hidden, self.meeting.sharded)
        else:
            routing: Routing = self.router(hidden)
            output, _ = self.experts(hidden, None, routing.weights, routing.experts)
        return output.view(hidden_states.shape), None

    def _visited(self, hidden: Tensor, sharded: ShardedExperts) -> Tensor:
        """hidden [t,n] -> [t,n] by the experts of all ranks, which come here."""
        routing: Routing = self.router(hidden)

        def compute(tokens: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
            output: Tensor = type(self.experts).ops.experts(tokens, up, down, weights, routing.experts)
            return output

        return sharded.forward(self.place, hidden, routing.weights, compute)

    def _exchanged(self, hidden: Tensor, carrier: transport.Transport) -> Tensor:
        """hidden [t,n] -> [t,n] by the experts of all ranks, to which the tokens go."""
        pieces = self.meeting.pieces or pieces_of(len(hidden), self.ep_group.size())
        share = Share(self.ep_group, self.num_local_experts, pieces, carrier, self.meeting.again)
        # The router's own messages are short and waited for: they must not queue behind the tokens.
        arriving = start(hidden, share) if carrier.apart else None
        routing: Routing = self.router(hidden)

        def compute(tokens: Tensor, weights: Tensor, chosen: Tensor, pairs: Pairs) -> Tensor:
            output: Tensor = self.experts(tokens, None, weights, chosen, first=share.first, pairs=pairs)[0]
            return output

        trained = list(self.experts.parameters())
        return exchange(hidden, routing.weights, routing.experts, trained, share, compute, arriving)
