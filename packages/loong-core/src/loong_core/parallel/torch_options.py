"""Settings of the torch planner, decoded from `parallel.options`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from loong_core.recipe import Section

Shard = Literal["none", "optimizer", "full", "hybrid"]


class TorchOptions(Section):
    shard: Shard | Literal["auto"] = "auto"
    """What the ranks share out among them: none (plain data parallelism), optimizer (its state: ZeRO-1), full
    (parameters, gradients and state: FSDP2) or hybrid (full within groups of `shard_size`). auto: the least that fits,
    from optimizer on, which also sends least."""
    shard_size: PositiveInt | None = None
    """Ranks that share one copy of the model with hybrid; null: those of one machine."""
    compile: bool = False
    """torch.compile each of the model's units."""
    cuda_graph: bool = False
    """Capture forward and backward of a micro-batch as a CUDA graph, one for every combination of shapes."""
    graphs: PositiveInt = 16
    """Combinations of shapes that are captured at most; further ones run without a graph."""
    ahead: bool = False
    """Compute what is frozen of the next step's micro-batches beside this step (policies with a frozen backbone; not
    with shard full or hybrid)."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the master weights with this decay per step."""
    export: Literal["weights", "ema"] = "weights"
    """Which weights checkpoints in public formats are made of."""
    overlap: bool = True
    """Reduce gradients while the backward pass still runs."""
    bucket_size: PositiveInt = 40_000_000
    """Parameters whose gradients are reduced together."""
