"""A tiny decoder for the torch engine's tests, with one of everything an engine can get wrong.

Its embedding is tied to its head, its queries, keys and values are three listed parameters in one tensor, its final
scale stays float32 under every policy, `memory` is frozen, and `idle` is trained but used by nothing. A plugin offers
it with `loong_model_families` returning `[FAMILY]` and `loong_tasks` returning `[TASK]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from loong_core.train.engine import LossSum
from loong_core.types import ModelFamily, ModelShape, ParameterSpec, Row, Task
from loong_core.weights import copy

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.parallel.build import LossContext
    from loong_core.recipe import Recipe
    from loong_core.train.engine import Batch

CONFIG: dict[str, Any] = {"architectures": ["TinyDecoder"], "vocabulary": 61, "hidden": 24, "layers": 2, "heads": 3}


def describe(family: ModelFamily, config: Mapping[str, Any]) -> ModelShape:
    """The parameters of a decoder of `vocabulary`, `hidden`, `layers` and `heads`."""
    fields = {name: config[name] for name in ("vocabulary", "hidden", "layers", "heads")}
    width, vocabulary = fields["hidden"], fields["vocabulary"]
    specs = [ParameterSpec(role="embed", shape=(vocabulary, width), place="first")]
    for layer in range(fields["layers"]):
        role = f"layers.{layer}"
        specs += [ParameterSpec(role=f"{role}.{part}", shape=(width, width), layer=layer) for part in "qkv"]
        specs += [
            ParameterSpec(role=f"{role}.norm", shape=(width,), layer=layer, init="ones"),
            ParameterSpec(role=f"{role}.up", shape=(2 * width + 1, width), layer=layer),
            ParameterSpec(role=f"{role}.up_bias", shape=(2 * width + 1,), layer=layer, init="zeros"),
            ParameterSpec(role=f"{role}.down", shape=(width, 2 * width + 1), layer=layer),
        ]
    specs += [
        ParameterSpec(role="memory", shape=(5, width), place="last", frozen=True),
        ParameterSpec(role="idle", shape=(7, width), place="last"),
        ParameterSpec(role="scale", shape=(width,), place="last", init="ones"),
    ]
    return ModelShape(
        family=family.name,
        fields=fields,
        layers=fields["layers"],
        hidden=width,
        parameters=tuple(specs),
        vocabulary=vocabulary,
        tied_embeddings=True,
        active_parameters=sum(spec.size for spec in specs if spec.place == "layer"),
        attention_width=fields["layers"] * width,
        activation_replicated=10.0 * width,
    )


def loss(logits: Tensor, batch: Batch, context: LossContext) -> LossSum:
    """Summed cross entropy of the counted targets."""
    import torch.nn.functional as functional

    targets = batch["targets"]
    total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return LossSum(total, (targets != -100).sum())


def encoder(recipe: Recipe) -> Callable[[Row], list[dict[str, Any]]]:
    """One sample of a row's `input_ids`; every next token counts."""
    import numpy as np

    def encode(row: Row) -> list[dict[str, Any]]:
        tokens = np.asarray(row.fields["input_ids"], dtype=np.int64)
        return [{"tokens": tokens[:-1], "targets": tokens[1:]}]

    return encode


def _rows() -> Iterator[Any]:
    for role in ("embed", "memory", "idle", "scale"):
        yield copy(role, role)
    for part in ("q", "k", "v", "norm", "up", "up_bias", "down"):
        yield copy(f"layers.*.{part}", f"layers.*.{part}")


FAMILY = ModelFamily(
    name="tiny_decoder",
    hf_architectures=("TinyDecoder",),
    describe="loong_core.testing.decoder:describe",
    builder="loong_core.testing.decoder_model:build",
    arch={},
    from_hf={},
    weights=tuple(_rows()),
    task="tiny_text",
    planner="torch",
)
TASK = Task(name="tiny_text", encoder="loong_core.testing.decoder:encoder", loss="loong_core.testing.decoder:loss")
PLUGIN = """
from loong_core import hookimpl
from loong_core.testing import decoder


@hookimpl
def loong_model_families():
    return [decoder.FAMILY]


@hookimpl
def loong_tasks():
    return [decoder.TASK]
"""
"""A plugin of one file (LOONG_PLUGIN_FILES) that offers the decoder."""
