"""Bytes a rank needs, from the layout alone: an estimate to plan with, not a measurement.

Sources. Weights, gradients and optimizer: megatron-core's buffers keep parameters and gradients whole on every rank;
AdamW's two moments, and what the parameters lack of their masters, are sharded over dp x cp ranks (ZeRO stage 1,
Rajbhandari et al. 2020); experts over their own data-parallel ranks. Activations: Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models": what tensor parallelism divides, what only sequence parallelism
divides, and how many micro-batches a stage holds (section 4.2.3; for interleaved schedules the number of warm-up
steps of Narayanan et al. 2021). Their quadratic attention term is absent: the attention ops keep no score matrix.
Logits: the op `linear_cross_entropy` holds those of a chunk of tokens, and from forward to backward the head's gradient
in float32; its reference, which runs where no faster one can, holds the logits of all tokens and their gradient.
Not counted: the device context, communication buffers and fragmentation; plan for 90 % of a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from loong_core.errors import Unsupported
from loong_core.parallel.layout import Count, Degrees
from loong_core.types import ModelShape, PrecisionPolicy

NOBODY = Count()
Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
"""From fastest to leanest."""

LOSS_CHUNK = 4096
"""Most tokens whose logits a fused loss holds at a time; it takes a tenth of the tokens where they are fewer."""
LEAST_LOSS_CHUNK = 2048
"""Tokens of a chunk where a tenth of all would be less."""

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element of a torch dtype, by name."""
    if dtype not in _BYTES:
        raise Unsupported(f"dtype {dtype!r} of the precision policy is unknown here; allowed: {', '.join(_BYTES)}")
    return _BYTES[dtype]


def estimate(
    shape: ModelShape,
    degrees: Degrees,
    stages: Sequence[Sequence[int]],
    counts: Sequence[Count],
    precision: PrecisionPolicy,
    micro_batch_tokens: int,
    micro_batches: int,
    recompute: Recompute,
    fused_loss: bool = True,
    exchanged: float = 0.0,
    visiting: Count = NOBODY,
) -> dict[str, int]:
    """Bytes on the rank that needs most, by use: `parameters`, `gradients`, `master`, `optimizer`, `activations`,
    `logits`, and their `total`.

    `counts[i]` is what a rank of pipeline stage i holds; `micro_batch_tokens` the tokens of one micro-batch, before
    context parallelism cuts them. Without `fused_loss` the logits of a whole micro-batch are held. `exchanged` are
    elements per token and layer, beside the shape's own, that an exchange of tokens between ranks leaves for backward:
    fewer with selective recomputation, which spares nothing else. `visiting` is a layer's experts where all of them
    come to each rank: two layers are there at a time, and gradients of three are written, read by others or added up.
    """
    tokens = micro_batch_tokens / degrees.cp
    ranks = []
    for stage in range(degrees.pp):
        layers = sum(len(stages[chunk]) for chunk in range(stage, len(stages), degrees.pp))
        uses = _weights(counts[stage], degrees, precision)
        uses["parameters"] += 2 * visiting.total * dtype_bytes(precision.parameters)
        uses["gradients"] += 3 * visiting.expert_trained * dtype_bytes(precision.gradients)
        uses["activations"] = round(
            tokens * _activations(shape, degrees, layers, stage, micro_batches, recompute, exchanged)
        ) * dtype_bytes(precision.activations)
        uses["logits"] = round(_logits(shape, degrees, precision, tokens, fused_loss)) if stage == degrees.pp - 1 else 0
        uses["total"] = sum(uses.values())
        ranks.append(uses)
    return max(ranks, key=lambda uses: uses["total"])


def _weights(count: Count, degrees: Degrees, precision: PrecisionPolicy) -> dict[str, int]:
    trained = count.dense_trained + count.expert_trained
    sharded = -(-count.dense_trained // (degrees.dp * degrees.cp)) + -(-count.expert_trained // degrees.expert_dp)
    # A master weight is its parameter and a remainder (`loong_core.references.adamw.split`).
    remainder = max(0, dtype_bytes(precision.master) - dtype_bytes(precision.parameters))
    return {
        "parameters": count.total * dtype_bytes(precision.parameters),
        "gradients": trained * dtype_bytes(precision.gradients),
        "master": sharded * remainder,
        "optimizer": 2 * sharded * dtype_bytes(precision.optimizer_state),
    }


def chunks_in_flight(degrees: Degrees, stage: int, micro_batches: int) -> int:
    """Forward passes of one chunk whose backward pass is still to come, at the fullest moment of a pipeline stage."""
    if degrees.pp == 1:
        return 1
    if degrees.vpp == 1:
        return min(micro_batches, degrees.pp - stage)
    warm_up = 2 * (degrees.pp - stage - 1) + (degrees.vpp - 1) * degrees.pp
    return min(micro_batches * degrees.vpp, warm_up + 1)


def _activations(
    shape: ModelShape,
    degrees: Degrees,
    layers: int,
    stage: int,
    micro_batches: int,
    recompute: Recompute,
    exchanged: float,
) -> float:
    """Elements a stage keeps per token of a micro-batch."""
    whole = degrees.tp if degrees.sp else 1
    layer = shape.activation_sharded / degrees.tp + (shape.activation_replicated + exchanged) / whole
    held = chunks_in_flight(degrees, stage, micro_batches) * layers / degrees.vpp
    result = held * layer
    if recompute == "full":
        # Every layer keeps its input; one at a time is computed again in full.
        result = held * shape.hidden / whole + (layer if layers else 0.0)
    head_input = 2 * shape.hidden / whole if stage == degrees.pp - 1 and shape.vocabulary else 0.0
    return result + head_input


def _logits(shape: ModelShape, degrees: Degrees, precision: PrecisionPolicy, tokens: float, fused_loss: bool) -> float:
    """Bytes on the last stage: two chunks of logits and the float32 sum of the head's gradient over chunks, or all
    logits and their gradient."""
    width = -(-shape.vocabulary // degrees.tp)
    logits = width * dtype_bytes(precision.activations)
    if not fused_loss:
        return 2.0 * tokens * logits
    chunk = min(tokens, LOSS_CHUNK, max(tokens / 10, LEAST_LOSS_CHUNK))
    return 2.0 * chunk * logits + 4.0 * width * shape.hidden
