"""The arithmetic of a training step by formula: matrix products and attention of what a policy's output depends on.

Forward once, and backward twice for what is trained; nothing for padding, absent cameras, recomputation, look-ups,
norms or activations. What published implementations compute besides, though no output depends on it, has a name of its
own, `idle`, which `training` leaves out. A multiplication with its addition are two operations. Plain Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

IDLE = "idle"
Fields = Mapping[str, Any]


class Seen(NamedTuple):
    """What one sample shows: images that are no padding, and tokens of the prompt besides those of images."""

    images: float
    text: float


def forward(fields: Fields, seen: Seen) -> dict[str, float]:
    """FLOPs of one forward pass over a sample, by part. `fields` are those of a policy's `ModelShape`."""
    return {name: part.forward for name, part in _parts(fields, seen).items()}


def training(fields: Fields, seen: Seen) -> float:
    """FLOPs of one training step on a sample."""
    parts = (part for name, part in _parts(fields, seen).items() if name != IDLE)
    return sum(part.forward + 2 * part.trained for part in parts)


def repeated(fields: Fields, seen: Seen) -> float:
    """FLOPs that `parallel.recompute: full` adds to `training`: once more forward through all that has a backward pass.
    The few layers outside of the repeated blocks are counted with them."""
    return sum(part.trained for name, part in _parts(fields, seen).items() if name != IDLE)


class _Part(NamedTuple):
    """Forward FLOPs, and how many of them have a backward pass."""

    forward: float
    trained: float


def _parts(fields: Fields, seen: Seen) -> dict[str, _Part]:
    return _groot(fields, seen) if "tower" in fields else _pi05(fields, seen)


def _all(flops: float, trained: bool = True) -> _Part:
    return _Part(flops, flops if trained else 0.0)


def _linear(rows: float, *sizes: tuple[int, int]) -> float:
    return 2.0 * rows * sum(inputs * outputs for inputs, outputs in sizes)


def _attention(queries: float, keys: float, width: int) -> float:
    """Scores and values of all heads, `width` numbers a row."""
    return 4.0 * queries * keys * width


# --------------------------------------------------------------------------------------------------------------- Pi0.5
def _pi05(fields: Fields, seen: Seen) -> dict[str, _Part]:
    sees, reads = not (fields["freeze_vision"] or fields["expert_only"]), not fields["expert_only"]
    layers, heads = fields["layers"], fields["query_rows"]
    prefix, horizon = seen.images * fields["image_tokens"] + seen.text, fields["horizon"]
    keys, rest = _gemma(fields, "", prefix)
    expert = sum(_gemma(fields, "expert_", horizon)) * layers
    own, joint = _attention(prefix, prefix, heads), _attention(horizon, prefix + horizon, heads)
    width = fields["expert_hidden"]
    expert += (2 * layers + 1) * _linear(1, (width, 3 * width)) + 2 * _linear(1, (width, width))
    expert += 2 * _linear(horizon, (fields["action_size"], width))
    projector = _linear(seen.images * fields["image_tokens"], (fields["vision_hidden"], fields["hidden"]))
    return {
        "vision": _all(_siglip(fields, seen.images), sees),
        "prefix": _all(projector + keys * layers + (rest + own) * (layers - 1), reads),
        "expert": _all(expert + joint * layers),
        # The last prefix layer beyond its keys and values, and a prefix whose scores with the suffix are masked.
        IDLE: _Part(rest + own + _attention(prefix, horizon, heads) * layers, 0.0),
    }


def _gemma(fields: Fields, side: str, rows: float) -> tuple[float, float]:
    """One layer's products over rows of the prefix or the expert: keys and values, and the others."""
    width, inner = fields[f"{side}hidden"], fields[f"{side}ffn"]
    group = fields["kv_heads"] * fields["head_dim"]
    return _linear(rows, (width, 2 * group)), _linear(rows, (width, 2 * fields["query_rows"]), (width, 3 * inner))


def _siglip(fields: Fields, images: float) -> float:
    patches, width = fields["image_tokens"], fields["vision_hidden"]
    return images * (
        _linear(patches, (3 * fields["patch"] ** 2, width)) + fields["vision_layers"] * _block(patches, width, fields)
    )


def _block(patches: float, width: int, fields: Fields) -> float:
    """A layer of a vision tower over the patches of an image."""
    inner = fields["vision_ffn"]
    return _linear(patches, (width, 4 * width), (width, 2 * inner)) + _attention(patches, patches, width)


# --------------------------------------------------------------------------------------------------------------- GR00T
def _groot(fields: Fields, seen: Seen) -> dict[str, _Part]:
    images, text = seen.images * fields["image_tokens"], seen.text
    rows, layers, hidden = images + text, fields["layers"], fields["hidden"]
    layer = _qwen_layer(fields, rows)
    trained = layers if fields["tune_llm"] or fields["tune_visual"] else min(fields["tune_top_layers"], layers)
    refiner = fields["refiner_layers"] * (_linear(rows, (hidden, 12 * hidden)) + _attention(rows, rows, hidden))
    head, idle = _diffusion(fields, text, images)
    return {
        "vision": _all(_tower(fields, seen.images), fields["tune_visual"]),
        "language": _Part(layer * layers, layer * trained),
        "refiner": _all(refiner, fields["tune_vlln"]),
        "head": _all(head, fields["tune_diffusion"]),
        "ends": _all(_ends(fields), fields["tune_projector"]),
        IDLE: _Part(idle, 0.0),
    }


def _tower(fields: Fields, images: float) -> float:
    width, merged, hidden = fields["vision_hidden"], fields["vision_hidden"] * fields["merge"] ** 2, fields["hidden"]
    patches = fields["image_tokens"] * fields["merge"] ** 2
    pixels = 3 * fields["patch_frames"] * fields["patch"] ** 2
    inner = merged if fields["tower"] == "qwen3_vl" else hidden
    merging = _linear(fields["image_tokens"], (merged, inner), (inner, hidden)) * (1 + len(fields["deepstack"]))
    blocks = fields["vision_layers"] * _block(patches, width, fields)
    return images * (_linear(patches, (pixels, width)) + blocks + merging)


def _qwen_layer(fields: Fields, rows: float) -> float:
    """A causal layer of the language model; scores count half."""
    hidden, size = fields["hidden"], fields["head_dim"]
    heads, groups = fields["heads"] * size, fields["kv_heads"] * size
    products = _linear(rows, (hidden, 2 * heads), (hidden, 2 * groups), (hidden, 3 * fields["ffn"]))
    return products + _attention(rows, rows, heads) / 2


def _diffusion(fields: Fields, text: float, images: float) -> tuple[float, float]:
    """The transformer over state and actions; and what cross-attention spends on rows that it masks."""
    width, hidden, rows = fields["dit_hidden"], fields["hidden"], 1 + fields["horizon"]
    looking, inner = -(-fields["dit_layers"] // 2), _linear(rows, (width, 8 * width))
    own = inner + _linear(rows, (width, 4 * width)) + _attention(rows, rows, width)
    reading = -(-looking // fields["text_every"])  # blocks that read text, of those that look at all
    read = reading * text + (looking - reading) * images
    masked = reading * images + (looking - reading) * text
    cross = looking * (inner + _linear(rows, (width, 2 * width)))
    modulation = (fields["dit_layers"] + 1) * _linear(1, (width, 2 * width))
    ends = _linear(1, (fields["time_waves"], width), (width, width)) + _linear(rows, (width, fields["dit_out"]))

    def seen(keys: float) -> float:
        return _linear(keys, (hidden, 2 * width)) + _attention(rows, keys, width)

    total = (fields["dit_layers"] - looking) * own + cross + seen(read) + modulation + ends
    return total, seen(masked)


def _ends(fields: Fields) -> float:
    """State and actions in, actions out: the layers of one embodiment."""
    width, inner, horizon = fields["dit_hidden"], fields["head_hidden"], fields["horizon"]
    state = _linear(1, (fields["state_size"], inner), (inner, width))
    actions = _linear(horizon, (fields["action_size"], width), (2 * width, width), (width, width))
    return state + actions + _linear(horizon, (fields["dit_out"], inner), (inner, fields["action_size"]))
