"""Hand-computed estimates, and the number of live forward passes against megatron-core's own schedule."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from loong_core.errors import Unsupported
from loong_core.parallel.layout import Degrees, Inventory, split_layers
from loong_core.parallel.memory import chunks_in_flight, dtype_bytes, estimate
from loong_core.testing.shapes import decoder_shape
from loong_core.types import PrecisionPolicy

BF16 = PrecisionPolicy(name="bf16", parameters="bfloat16", activations="bfloat16")
FP32 = PrecisionPolicy(name="fp32", parameters="float32", activations="float32")


def total_of(
    degrees: Degrees,
    precision: PrecisionPolicy,
    recompute: str = "none",
    tokens: int = 64,
    fused_loss: bool = True,
    **shape_of: int,
) -> dict[str, int]:
    shape = decoder_shape(**shape_of)
    stages = split_layers(shape.layers, degrees.pp, degrees.vpp)
    counts = Inventory(shape).per_stage(degrees, stages)
    return estimate(shape, degrees, stages, counts, precision, tokens, 8, recompute, fused_loss)  # type: ignore[arg-type]


def test_one_process_by_hand() -> None:
    shape = decoder_shape()
    number = sum(spec.size for spec in shape.parameters)
    found = total_of(Degrees(world=1), BF16)
    assert found["parameters"] == 2 * number
    assert found["gradients"] == 4 * number
    assert found["master"] == 2 * number  # beside the two bytes of the parameter
    assert found["optimizer"] == 8 * number
    per_layer = 2 * (48 + 16) + 4 * 96 + 4 * 48
    assert found["activations"] == 2 * 64 * (4 * per_layer + 2 * 48)
    assert found["logits"] == 2 * 64 * 131 * 2 + 131 * 48 * 4
    assert found["total"] == sum(value for use, value in found.items() if use != "total")


def test_gradients_in_bfloat16_take_two_bytes_less_a_trained_parameter() -> None:
    number = sum(spec.size for spec in decoder_shape().parameters)
    wide, narrow = (total_of(Degrees(world=1), policy) for policy in (BF16, replace(BF16, gradients="bfloat16")))
    assert wide.pop("total") - narrow.pop("total") == wide.pop("gradients") - narrow.pop("gradients") == 2 * number
    assert wide == narrow


def test_float32_parameters_are_their_own_master() -> None:
    assert total_of(Degrees(world=1), FP32)["master"] == 0


def test_optimizer_is_sharded_and_experts_over_their_own_ranks() -> None:
    dense = total_of(Degrees(world=1), BF16)
    sharded = total_of(Degrees(world=4, cp=2), BF16)
    assert sharded["optimizer"] == pytest.approx(dense["optimizer"] / 4, abs=64)
    assert sharded["parameters"] == dense["parameters"]
    # Four ranks hold a quarter of the experts each: there is one replica of them, so nothing of them is sharded.
    whole = total_of(Degrees(world=1), BF16, experts=8)
    spread = total_of(Degrees(world=4, ep=4), BF16, experts=8)
    experts = 4 * 8 * 3 * 48 * 96
    others = whole["optimizer"] // 8 - experts
    assert spread["optimizer"] == pytest.approx(8 * (experts / 4 + others / 4), abs=64)


def test_sequence_parallelism_divides_the_rest() -> None:
    plain = total_of(Degrees(world=2, tp=2, etp=2), BF16)["activations"]
    parallel = total_of(Degrees(world=2, tp=2, etp=2, sp=True), BF16)["activations"]
    assert parallel < plain < total_of(Degrees(world=1), BF16)["activations"]


def test_recomputation_is_ordered() -> None:
    kinds = ("none", "selective", "full")
    sizes = [total_of(Degrees(world=1), BF16, kind, layers=12)["activations"] for kind in kinds]
    assert sizes[0] == sizes[1] > sizes[2] > 0


def test_context_parallelism_divides_tokens() -> None:
    whole, cut = total_of(Degrees(world=2), BF16), total_of(Degrees(world=2, cp=2), BF16)
    assert cut["activations"] * 2 == whole["activations"]
    head = 4 * 131 * 48
    assert (cut["logits"] - head) * 2 == whole["logits"] - head


def test_the_fullest_stage_counts() -> None:
    first = total_of(Degrees(world=4, pp=4), BF16, layers=8, vocabulary=16)
    assert first["logits"] == 0, "the first stage holds four micro-batches, the last only one"
    last = total_of(Degrees(world=4, pp=4), BF16, layers=8, vocabulary=100_000)
    assert last["logits"] > 0


@pytest.mark.parametrize(("tokens", "chunk"), [(1000, 1000), (8192, 2048), (32768, 3276.8), (65536, 4096)])
def test_a_fused_loss_holds_chunks_of_logits(tokens: int, chunk: float) -> None:
    size = {"vocabulary": 1000, "hidden": 48, "tokens": tokens}
    fused = total_of(Degrees(world=1), BF16, **size)["logits"]
    assert fused == round(2 * chunk * 1000 * 2 + 1000 * 48 * 4)
    whole = total_of(Degrees(world=1), BF16, fused_loss=False, **size)["logits"]
    assert whole == tokens * 1000 * (2 + 2)
    halves = total_of(Degrees(world=2, tp=2, etp=2), BF16, **size)["logits"]
    assert halves * 2 == pytest.approx(fused, abs=2)


def test_unknown_dtype_is_named() -> None:
    with pytest.raises(Unsupported, match="float7.*float32"):
        dtype_bytes("float7")


SCHEDULE = """
import sys
from types import SimpleNamespace
from loong_core.backends import cpu_device
cpu_device.activate()
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
for line in sys.stdin:
    pp, vpp, stage, micro = map(int, line.split())
    group = SimpleNamespace(size=lambda: pp, rank=lambda: stage)
    fake = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None)
    total, _, warm_up, remaining = get_pp_rank_microbatches(micro, vpp, pp, False, p2p_communicator=fake)
    print(min(warm_up + 1, total))
"""


def test_chunks_in_flight_agree_with_megatron() -> None:
    cases = [
        (pp, vpp, stage, micro)
        for pp in (2, 3, 4)
        for vpp in (1, 2, 3)
        for stage in range(pp)
        for micro in (1, 2, pp, 4 * pp)
        if vpp == 1 or micro % pp == 0
    ]
    text = "\n".join(" ".join(map(str, case)) for case in cases)
    done = subprocess.run([sys.executable, "-c", SCHEDULE], input=text, capture_output=True, text=True, check=True)
    expected = [int(line) for line in done.stdout.split()]
    found = [chunks_in_flight(Degrees(world=pp, pp=pp, vpp=vpp), stage, micro) for pp, vpp, stage, micro in cases]
    assert found == expected


def test_exchanged_tokens_are_kept_by_every_layer() -> None:
    shape = decoder_shape(experts=4)
    degrees = Degrees(world=2, ep=2)
    stages = split_layers(shape.layers, 1)
    counts = Inventory(shape).per_stage(degrees, stages)
    plain, more = (
        estimate(shape, degrees, stages, counts, BF16, 64, 1, "none", True, exchanged) for exchanged in (0.0, 10.0)
    )
    assert more["activations"] - plain["activations"] == 64 * shape.layers * 10 * 2
