"""The robot benchmark's rows as data: what each trains, on which cameras, and beside which settings of the peer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SEED = 1234
CONSTANT = {"warmup": 0, "schedule": "constant"}
"""The learning rate of every row, at the recipe's peak: no step's time depends on it."""
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
PI05_TASK = "pick up the black bowl between the plate and the ramekin and place it on the plate"
GROOT_TASK = "put both the alphabet soup and the tomato sauce in the basket, then close the drawer of the cabinet"

PEER_SETTINGS: dict[str, dict[str, Any]] = {
    "docs": {"dtype": "bfloat16", "gradient_checkpointing": True, "compile_model": False},
    "plain": {"dtype": "bfloat16", "gradient_checkpointing": False, "compile_model": False},
    "compiled": {
        "dtype": "bfloat16",
        "gradient_checkpointing": False,
        "compile_model": True,
        "compile_mode": "default",
    },
    "float32": {"dtype": "float32", "gradient_checkpointing": False, "compile_model": False},
    "defaults": {},
}
"""LeRobot's switches by name. Pi0.5: docs is its documented recipe (which, as OpenPI always does, computes every layer
three times), plain the same without recomputation, compiled its fastest, float32 its bare defaults, for comparing
losses. GR00T has defaults alone: no switch makes it faster."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One piece of work for both sides.

    `recipe` is a shipped one. `cameras` real ones are seen, `absent` ones are masked; `size` is the side of the images
    in the dataset. `config` are keys of the model's config.json, `peers` names of `PEER_SETTINGS`. `measured` are
    samples a second of others, measured before on one H200 at the same batch, whose code is in no package index.
    """

    name: str
    family: str
    preset: str
    recipe: str
    batch: int
    size: int
    task: str
    cameras: tuple[str, ...] = (FRONT, WRIST)
    absent: int = 0
    frames: int = 120
    config: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    measured: dict[str, float] = field(default_factory=dict)

    def batch_of(self, tiny: bool) -> int:
        """Samples of a step and device."""
        return min(self.batch, 4) if tiny else self.batch


_PI05 = {
    "family": "pi05",
    "preset": "pi05",
    "recipe": "pi05_full",
    "size": 224,
    "task": PI05_TASK,
    "absent": 1,
    "frames": 60,
}
_GROOT = {"recipe": "groot_n17_finetune", "task": GROOT_TASK}
_N17 = {
    **_GROOT,
    "family": "groot_n17",
    "preset": "groot_n17",
    "size": 256,
    "peers": ("defaults",),
    "config": {"embodiments": [10], "backbone_config": {"image_token_id": 6}},
}
_N16 = {
    **_GROOT,
    "family": "groot_n16",
    "preset": "groot_n16",
    "size": 224,
    "config": {"embodiments": [10], "backbone_config": {"image_token_index": 6}},
}
_OPENPI, _EAGER = "OpenPI's PyTorch trainer", "GR00T N1.6 eager, public port"

PI05_ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(name="pi05-14", batch=14, peers=("docs", "plain"), measured={_OPENPI: 13.6}, **_PI05),
        Row(name="pi05-32", batch=32, peers=("docs",), measured={_OPENPI: 16.3}, **_PI05),
        Row(
            name="pi05-14-all-tokens",
            batch=14,
            config={"skip_padding": False},
            peers=("plain", "compiled"),
            measured={_OPENPI: 13.6},
            **_PI05,
        ),
        Row(
            name="pi05-curves",
            batch=4,
            config={"skip_padding": False},
            overrides=("optim.lr=1e-7", "optim.warmup=10"),
            peers=("float32",),
            **_PI05,
        ),
    )
}
"""The last is for its losses: LeRobot keeps float32 weights there, as loong does in all of them."""
GROOT_ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        *(Row(name=f"groot-n17-{batch}", batch=batch, **_N17) for batch in (16, 32, 64)),
        *(
            Row(name=f"groot-n16-{batch}", batch=batch, measured={_EAGER: speed}, **_N16)
            for batch, speed in ((16, 73.6), (32, 121.5))
        ),
    )
}

CURVES = "pi05-curves"

# ------------------------------------------------------------------------------------- sizes to try the script with
TINY_PI05: dict[str, Any] = {
    "chunk_size": 6,
    "n_action_steps": 6,
    "image_resolution": [28, 28],
    "sizes": {
        **{"layers": 2, "hidden": 32, "ffn": 48, "heads": 8, "kv_heads": 1, "head_dim": 8, "vocabulary": 330},
        **{"expert_hidden": 32, "expert_ffn": 40, "patch": 14},
        **{"vision_hidden": 24, "vision_ffn": 40, "vision_layers": 2, "vision_heads": 4},
    },
}
TINY_BACKBONE: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "image_token_id": 6,
    "video_token_id": 7,
    "vision_start_token_id": 4,
    "vision_end_token_id": 5,
    "tie_word_embeddings": True,
    "text_config": {
        **{"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 12, "num_hidden_layers": 3, "vocab_size": 330, "rms_norm_eps": 1e-6},
        **{"model_type": "qwen3_vl_text", "rope_theta": 5000000, "tie_word_embeddings": True},
        **{"attention_bias": False, "hidden_act": "silu"},
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [2, 2, 2], "rope_type": "default"},
    },
    "vision_config": {
        **{"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 44, "out_hidden_size": 48},
        **{"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 25},
        **{"deepstack_visual_indexes": [0, 2], "hidden_act": "gelu_pytorch_tanh", "model_type": "qwen3_vl"},
    },
}
TINY_GROOT: dict[str, Any] = {
    **{"backbone_embedding_dim": 48, "select_layer": 2, "hidden_size": 20, "input_embedding_dim": 32},
    **{"max_state_dim": 11, "max_action_dim": 9, "action_horizon": 7, "max_num_embodiments": 12, "max_seq_len": 16},
    **{"image_target_size": [16, 16], "image_crop_size": [14, 14], "state_dropout_prob": 0.0},
    "diffusion_model_cfg": {
        **{"positional_embeddings": None, "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 8},
        **{"norm_type": "ada_norm", "dropout": 0.0, "final_dropout": True, "output_dim": 20},
        "interleave_self_attention": True,
    },
    "vl_self_attention_cfg": {
        **{"positional_embeddings": None, "num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 12},
        **{"dropout": 0.0, "final_dropout": True},
    },
}
TINY_SIZES = {"pi05": 28, "groot_n17": 16, "groot_n16": 16}
"""What `--tiny` makes of models and images, to try the benchmark itself on a CPU (without dropout: losses agree)."""
