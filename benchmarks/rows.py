"""The benchmark's rows as data: what each trains, on which tokens, and with which of the peer's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Documents = Literal["full", "packed", "skewed", "corpus"]

SEED = 1234
PLAIN = ("optim.lr=1e-5", "optim.warmup=0", "optim.schedule=constant")
"""Neither side's step time depends on the learning rate; a small one keeps random tokens from mattering."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One piece of work for both sides.

    `documents` says what a row of tokens holds: `full`, one random document as long as the row; `packed`, random
    documents of exponential length; `skewed`, the same with every other document made of one token; `corpus`, text of
    Python's standard library. `rows` are rows of `seq_len` tokens a device and step. `recompute` lists what the peer
    recomputes; where it then runs out of memory the next entry is tried, so that it runs at the least it can.
    `of_several` are further overrides on several devices.
    """

    name: str
    recipe: str
    documents: Documents
    layers: int
    layers_of_several: int
    seq_len: int
    rows: int
    micro_batch: int
    peer_micro_batch: int
    sparse: bool
    overrides: tuple[str, ...] = PLAIN
    of_several: tuple[str, ...] = ()
    recompute: tuple[str, ...] = ("", "moe_act", "moe_act,layernorm")
    precision_aware: Literal["never", "several"] = "never"
    fp32_gradients: bool = False

    def cut(self, world: int) -> int:
        """Layers of the model on `world` devices."""
        return self.layers if world == 1 else self.layers_of_several


_SPARSE = {"sparse": True, "layers": 8, "layers_of_several": 12}
_DENSE = {"sparse": False, "layers": 12, "layers_of_several": 12, "recompute": ("", "layernorm", "layernorm,mlp")}

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            name="moe-4k",
            recipe="qwen3_30b_a3b_h200",
            documents="full",
            seq_len=4096,
            rows=8,
            micro_batch=4,
            peer_micro_batch=1,  # as NVIDIA's recipe
            precision_aware="several",
            # To take less memory than the peer, whose gradients are in bfloat16 too; with one row the host is slow.
            of_several=("data.micro_batch=2", "parallel.recompute=selective", "precision=bf16_gradients"),
            **_SPARSE,
        ),
        Row(
            name="moe-32k",
            recipe="qwen3_30b_a3b_h200_32k",
            documents="packed",
            seq_len=32768,
            rows=1,
            micro_batch=1,
            peer_micro_batch=1,
            recompute=("moe_act", "moe_act,layernorm"),
            **_SPARSE,
        ),
        Row(
            name="moe-skewed",
            recipe="qwen3_30b_a3b_h200_32k",
            documents="skewed",
            seq_len=32768,
            rows=1,
            micro_batch=1,
            peer_micro_batch=1,
            recompute=("moe_act", "moe_act,layernorm"),
            **_SPARSE,
        ),
        Row(
            name="dense-4k",
            recipe="qwen3_8b_h200",
            documents="full",
            seq_len=4096,
            rows=8,
            micro_batch=4,
            peer_micro_batch=4,
            **_DENSE,
        ),
        Row(
            name="dense-32k",
            recipe="qwen3_8b_h200_32k",
            documents="packed",
            seq_len=32768,
            rows=1,
            micro_batch=1,
            peer_micro_batch=1,
            **_DENSE,
        ),
        Row(
            name="curves",
            recipe="qwen3_30b_a3b_h200",
            documents="corpus",
            seq_len=4096,
            rows=1,
            micro_batch=1,
            peer_micro_batch=1,
            # Both sides sum gradients in float32, at a rate where rounding does not grow: at 1e-4, with Megatron's sums
            # in bfloat16, the curves part after 80 steps (docs/log).
            fp32_gradients=True,
            overrides=(
                "optim.lr=2e-5",
                "optim.warmup=20",
                "optim.schedule=constant",
                "model.config.output_router_logits=false",
            ),
            **_SPARSE,
        ),
    )
}

CORPUS = ("data.source=python_library", "data.tokenizer={train: 4096}")

TINY_MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
TINY_LENGTH = 64
"""What `--tiny` makes of a model and of the length of a row, to try the benchmark itself on a CPU."""
