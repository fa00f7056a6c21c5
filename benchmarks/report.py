"""Figures of a finished row: work by formula, medians, rates, and how far the losses of the two sides lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PEAK = 989e12
"""Dense bf16 FLOP/s of an H200 by its data sheet, which MFU is quoted against."""
REACHED = 790e12
"""FLOP/s of a bf16 matmul of 8192 x 8192 x 8192 on an H200 (measured 769 to 798), for floors."""
GIB = 2**30
SETTLED = 20
"""Steps of a loss curve before its differences count."""

Side = dict[str, Any]


def forward_flops(config: Mapping[str, Any], tokens: float, squares: float) -> dict[str, float]:
    """FLOPs of one forward pass by part, from the keys of a `config.json`.

    `tokens` are those that are not padding, `squares` the sum over documents of their squared lengths. Causal
    attention counts half; embedding lookup, norms, rope and softmax do not count.
    """
    layers, hidden, width = config["num_hidden_layers"], config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    if experts := config.get("num_experts"):
        mlp = config["num_experts_per_tok"] * 3 * config["moe_intermediate_size"] + experts
    else:
        mlp = 3 * config["intermediate_size"]
    return {
        "attention_linear": 2 * tokens * layers * hidden * (2 * queries + 2 * keys),
        "attention": 2 * squares * layers * queries,
        "mlp": 2 * tokens * layers * hidden * mlp,
        "head": 2 * tokens * hidden * config["vocab_size"],
    }


def measure(batches: Mapping[str, np.ndarray], config: Mapping[str, Any], warmup: int, world: int) -> dict[str, Any]:
    """The work of one step, as the mean over the timed steps: the same figures for both sides."""
    tokens = squares = documents = 0.0
    steps = batches["tokens"].shape[0]
    for step in range(warmup, steps):
        if "segments" not in batches:
            rows, length = batches["tokens"].shape[1:]
            tokens, squares, documents = tokens + rows * length, squares + rows * length**2, documents + rows
            continue
        for row in batches["segments"][step]:
            sizes = np.bincount(row[row >= 0])
            tokens, documents = tokens + float(sizes.sum()), documents + len(sizes)
            squares += float((sizes.astype(np.float64) ** 2).sum())
    timed = steps - warmup
    tokens, squares, documents = tokens / timed, squares / timed, documents / timed
    parts = forward_flops(config, tokens, squares)
    needed = 3 * sum(parts.values())
    return {
        "tokens_per_step": tokens,
        "documents_per_step": documents,
        "counted_tokens": (batches["targets"] >= 0).sum((1, 2)).tolist(),
        "forward_tflop": {name: value / 1e12 for name, value in parts.items()},
        "tflop_per_step": needed / 1e12,
        "floor_ms_790": needed / world / REACHED * 1e3,
    }


def side(ms: Sequence[float], losses: Sequence[float], memory: float, warmup: int, work: Mapping[str, Any]) -> Side:
    """Figures of one side; `ms` and `losses` of every step, rates from the median of the timed ones."""
    timed = list(ms[warmup:])
    median = statistics.median(timed)
    per_device = work["tflop_per_step"] * 1e12 / work["world"] / (median / 1e3)
    return {
        "median_ms": median,
        "least_ms": min(timed),
        "most_ms": max(timed),
        "tokens_per_second": work["tokens_per_step"] / (median / 1e3),
        "tflops_per_device": per_device / 1e12,
        "mfu_989": per_device / PEAK,
        "peak_memory_gib": memory / GIB,
        "ms": list(ms),
        "loss": list(losses),
    }


def compare(loong: Side, megatron: Side) -> dict[str, Any]:
    """What the two finished sides say together; differences are relative to megatron's loss."""
    pairs = zip(loong["loss"], megatron["loss"], strict=True)
    apart = [abs(one - other) / abs(other) for one, other in pairs]
    settled = apart[SETTLED:]
    tails = [statistics.fmean(found["loss"][-10:]) for found in (loong, megatron)]
    return {
        "speedup": megatron["median_ms"] / loong["median_ms"],
        "memory_share": loong["peak_memory_gib"] / megatron["peak_memory_gib"] if megatron["peak_memory_gib"] else None,
        "loss_difference_first_step": apart[0],
        "loss_difference_last_step": apart[-1],
        "loss_difference_last_10_steps": abs(tails[0] - tails[1]) / abs(tails[1]),
        "loss_difference_largest": max(apart),
        "loss_difference_largest_after_20": max(settled) if settled else None,
    }


_COLUMNS = ("row", "loong ms", "megatron ms", "speedup", "floor ms", "MFU", "MFU", "GiB", "GiB", "loss apart")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a short table; of two columns with one name the first is loong's."""
    lines = [_COLUMNS]
    for found in results:
        ours, theirs = found.get("loong") or {}, found.get("megatron") or {}
        both = found.get("comparison") or {}
        apart = both.get("loss_difference_largest_after_20")
        apart = both.get("loss_difference_first_step") if apart is None else apart
        lines.append(
            (
                found["row"],
                _number(ours, "median_ms", "{:.1f}"),
                _number(theirs, "median_ms", "{:.1f}"),
                _number(both, "speedup", "{:.2f}"),
                f"{found['work']['floor_ms_790']:.1f}",
                _number(ours, "mfu_989", "{:.1%}"),
                _number(theirs, "mfu_989", "{:.1%}"),
                _number(ours, "peak_memory_gib", "{:.1f}"),
                _number(theirs, "peak_memory_gib", "{:.1f}"),
                "-" if apart is None else f"{apart:.2e}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    return "\n".join("  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in lines)


def _number(found: Mapping[str, Any], name: str, form: str) -> str:
    value = found.get(name)
    return ("failed" if "error" in found else "-") if value is None else form.format(value)
