"""The parameters of a GR00T model, role by role: this list is the one place that knows their shapes.

`loong_vla.groot.build` makes the parameters from it, so a role is also the path of a parameter in the module. Parts of
a few roles lie in one trained tensor (`fused`), because they are multiplied with the same input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from loong_core.types import ParameterSpec

Fields = Mapping[str, Any]

SLOT_SHAPES: dict[str, tuple[str, str]] = {
    "state_in": ("state_size", "head_hidden"),
    "state_out": ("head_hidden", "dit_hidden"),
    "action_in": ("action_size", "dit_hidden"),
    "action_time": ("twice_dit_hidden", "dit_hidden"),
    "action_out": ("dit_hidden", "dit_hidden"),
    "decoder_in": ("dit_out", "head_hidden"),
    "decoder_out": ("head_hidden", "action_size"),
}
"""The layers of which every embodiment has its own, with their inputs and outputs (weights lie the other way round than
those of linear layers)."""

FUSED = ("dit.modulation", "dit.text_kv", "dit.image_kv")
"""Trained tensors that hold the parameters of several roles, one after the other along the first axis; each has its
biases in a tensor named with `_bias`."""


def specs(fields: Fields) -> Iterator[ParameterSpec]:
    """Every parameter of the model. What belongs to no stack of layers is placed first or last."""
    tower = _qwen_tower if fields["tower"] == "qwen3_vl" else _siglip_tower
    for part, place in ((_language, "first"), (tower, "first"), (_refiner, "last"), (_slots, "last"), (_dit, "last")):
        for spec in part(fields):
            yield spec if spec.layer is not None else replace(spec, place=place)  # type: ignore[arg-type]


def fused(fields: Fields) -> dict[str, list[str]]:
    """Tensor -> the roles that lie in it, in order."""
    blocks = range(fields["dit_layers"])
    text, images = cross_blocks(fields)
    return {
        "dit.modulation": [*(f"dit.layers.{block}.modulation" for block in blocks), "dit.out_modulation"],
        "dit.text_kv": [f"dit.layers.{block}.kv" for block in text],
        "dit.image_kv": [f"dit.layers.{block}.kv" for block in images],
    }


def cross_blocks(fields: Fields) -> tuple[list[int], list[int]]:
    """Numbers of the DiT's blocks that read text, and of those that read images."""
    period = 2 * fields["text_every"]
    even = range(0, fields["dit_layers"], 2)
    return [block for block in even if block % period == 0], [block for block in even if block % period]


def trained_layer(fields: Fields, layer: int) -> bool:
    """Whether layer `layer` of the language model is trained."""
    return bool(fields["tune_llm"] or layer >= fields["layers"] - fields["tune_top_layers"])


# ------------------------------------------------------------------------------------------------- building blocks
def _linear(role: str, outputs: int, inputs: int, **more: Any) -> Iterator[ParameterSpec]:
    """A linear layer with a bias."""
    yield ParameterSpec(role=role, shape=(outputs, inputs), **more)
    yield ParameterSpec(role=f"{role}_bias", shape=(outputs,), **{**more, "init": "zeros"})


def _norm(role: str, width: int, **more: Any) -> Iterator[ParameterSpec]:
    """A layer norm with weight and bias."""
    yield ParameterSpec(role=role, shape=(width,), **{**more, "init": "ones"})
    yield ParameterSpec(role=f"{role}_bias", shape=(width,), **{**more, "init": "zeros"})


def _block(role: str, width: int, inner: int, **more: Any) -> Iterator[ParameterSpec]:
    """A pre-norm transformer block whose layers all have biases."""
    yield from _norm(f"{role}.norm1", width, **more)
    yield from _linear(f"{role}.qkv", 3 * width, width, **more)
    yield from _linear(f"{role}.out", width, width, **more)
    yield from _norm(f"{role}.norm2", width, **more)
    yield from _linear(f"{role}.up", inner, width, **more)
    yield from _linear(f"{role}.down", width, inner, **more)


# --------------------------------------------------------------------------------------------------------- backbone
def _language(fields: Fields) -> Iterator[ParameterSpec]:
    hidden, width, ffn, frozen = fields["hidden"], fields["head_dim"], fields["ffn"], not fields["tune_llm"]
    vocabulary = fields["vocabulary"]
    yield ParameterSpec(role="embed", shape=(vocabulary, hidden), frozen=frozen)
    for layer in range(fields["layers"]):
        spec = partial(ParameterSpec, layer=layer, frozen=not trained_layer(fields, layer))
        role = f"llm.layers.{layer}"
        yield spec(role=f"{role}.norm1", shape=(hidden,), init="ones")
        yield spec(role=f"{role}.qkv", shape=((fields["heads"] + 2 * fields["kv_heads"]) * width, hidden))
        yield spec(role=f"{role}.q_norm", shape=(width,), init="ones")
        yield spec(role=f"{role}.k_norm", shape=(width,), init="ones")
        yield spec(role=f"{role}.out", shape=(hidden, fields["heads"] * width))
        yield spec(role=f"{role}.norm2", shape=(hidden,), init="ones")
        yield spec(role=f"{role}.up", shape=(2 * ffn, hidden))
        yield spec(role=f"{role}.down", shape=(hidden, ffn))
    if fields["final_norm"]:
        yield ParameterSpec(role="llm.norm", shape=(hidden,), init="ones", frozen=frozen)


def _qwen_tower(fields: Fields) -> Iterator[ParameterSpec]:
    width, patch, frozen = fields["vision_hidden"], fields["patch"], not fields["tune_visual"]
    merged, hidden = width * fields["merge"] ** 2, fields["hidden"]
    yield ParameterSpec(role="vision.patch", shape=(width, 3, fields["patch_frames"], patch, patch), frozen=frozen)
    yield ParameterSpec(role="vision.patch_bias", shape=(width,), frozen=frozen, init="zeros")
    yield ParameterSpec(role="vision.positions", shape=(fields["vision_positions"], width), frozen=frozen)
    for layer in range(fields["vision_layers"]):
        yield from _block(f"vision.layers.{layer}", width, fields["vision_ffn"], layer=layer, frozen=frozen)
    mergers = [("vision.merger", width, {}), *_deep_mergers(fields, merged)]
    for role, norm, more in mergers:
        yield from _norm(f"{role}.norm", norm, frozen=frozen, **more)
        yield from _linear(f"{role}.up", merged, merged, frozen=frozen, **more)
        yield from _linear(f"{role}.down", hidden, merged, frozen=frozen, **more)


def _deep_mergers(fields: Fields, merged: int) -> list[tuple[str, int, dict[str, Any]]]:
    return [(f"vision.deep.{index}", merged, {"layer": index}) for index in range(len(fields["deepstack"]))]


def _siglip_tower(fields: Fields) -> Iterator[ParameterSpec]:
    width, frozen, hidden = fields["vision_hidden"], not fields["tune_visual"], fields["hidden"]
    merged = width * fields["merge"] ** 2
    yield from _linear("vision.patch", width, 3 * fields["patch"] ** 2, frozen=frozen)
    yield ParameterSpec(role="vision.positions", shape=(fields["vision_positions"], width), frozen=frozen)
    for layer in range(fields["vision_layers"]):
        yield from _block(f"vision.layers.{layer}", width, fields["vision_ffn"], layer=layer, frozen=frozen)
    yield from _norm("vision.norm", width, frozen=frozen)
    yield from _norm("vision.merger.norm", merged, frozen=frozen)
    yield from _linear("vision.merger.up", hidden, merged, frozen=frozen)
    yield from _linear("vision.merger.down", hidden, hidden, frozen=frozen)


# ------------------------------------------------------------------------------------------------------ action head
def _refiner(fields: Fields) -> Iterator[ParameterSpec]:
    hidden, frozen = fields["hidden"], not fields["tune_vlln"]
    yield from _norm("refiner.norm", hidden, frozen=frozen)
    for layer in range(fields["refiner_layers"]):
        yield from _block(f"refiner.layers.{layer}", hidden, 4 * hidden, layer=layer, frozen=frozen)


def _slots(fields: Fields) -> Iterator[ParameterSpec]:
    sizes = {**fields, "twice_dit_hidden": 2 * fields["dit_hidden"]}
    for slot in range(fields["slots"]):
        spec = partial(
            ParameterSpec, expert=slot, frozen=not (fields["tune_projector"] and slot in fields["embodiments"])
        )
        for part, (inputs, outputs) in SLOT_SHAPES.items():
            yield spec(role=f"slots.{slot}.{part}", shape=(sizes[inputs], sizes[outputs]))
            yield spec(role=f"slots.{slot}.{part}_bias", shape=(sizes[outputs],), init="zeros")
    frozen = not fields["tune_projector"]
    yield ParameterSpec(role="positions", shape=(fields["positions"], fields["dit_hidden"]), frozen=frozen)
    if fields["mask_token"]:
        yield ParameterSpec(role="mask_token", shape=(1, 1, fields["dit_hidden"]), frozen=frozen)


def _dit(fields: Fields) -> Iterator[ParameterSpec]:
    for spec in _dit_trained(fields):
        yield spec if fields["tune_diffusion"] else replace(spec, frozen=True)


def _dit_trained(fields: Fields) -> Iterator[ParameterSpec]:
    width, inner = fields["dit_hidden"], 4 * fields["dit_hidden"]
    yield from _linear("dit.time_in", width, fields["time_waves"])
    yield from _linear("dit.time_out", width, width)
    for block in range(fields["dit_layers"]):
        role = f"dit.layers.{block}"
        yield from _linear(f"{role}.modulation", 2 * width, width, layer=block)
        if block % 2:
            yield from _linear(f"{role}.qkv", 3 * width, width, layer=block)
        else:
            yield from _linear(f"{role}.q", width, width, layer=block)
            yield from _linear(f"{role}.kv", 2 * width, fields["hidden"], layer=block)
        yield from _linear(f"{role}.out", width, width, layer=block)
        yield from _linear(f"{role}.up", inner, width, layer=block)
        yield from _linear(f"{role}.down", width, inner, layer=block)
    yield from _linear("dit.out_modulation", 2 * width, width)
    yield from _linear("dit.out", fields["dit_out"], width)
