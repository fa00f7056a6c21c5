"""What a Pi0.5 policy consists of, worked out from its `config.json` in plain Python: plans need no GPU.

The file is LeRobot's (`type: pi05`) or OpenPI's. Both name the sizes of their two transformers by a variant; `sizes`, a
key of loong's own, sets any of them for policies that nobody published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loong_core.errors import RecipeError, Unsupported
from loong_core.types import ModelFamily, ModelShape, ParameterSpec
from loong_vla.pi05_costs import costs

VARIANTS: dict[str, dict[str, int]] = {
    "gemma_2b": {"hidden": 2048, "ffn": 16384, "layers": 18, "heads": 8, "kv_heads": 1, "head_dim": 256},
    "gemma_300m": {"hidden": 1024, "ffn": 4096, "layers": 18, "heads": 8, "kv_heads": 1, "head_dim": 256},
}
"""Sizes behind `paligemma_variant` and `action_expert_variant`, as OpenPI and LeRobot define them."""

OWN_KEYS = ("skip_padding",)
"""Keys of config.json that only loong knows and that say nothing of the weights. LeRobot refuses keys it does not know,
among them `sizes`, but then it could not build such a policy either."""

_SHARED = ("layers", "heads", "kv_heads", "head_dim")


def describe(family: ModelFamily, config: Mapping[str, Any]) -> ModelShape:
    """The full model that `config` describes.

    What it computes and keeps is estimated (`pi05_costs`) by rows of a sample's prefix, `sample_tokens`.

    Raises:
        RecipeError: a key is missing, of the wrong kind, or does not fit another.
        Unsupported: the configuration asks for something that loong would not compute.
    """
    fields = resolve(family, config)
    parameters = tuple(_parameters(fields))
    estimated = costs(fields, parameters, _cameras(config))
    return ModelShape(
        family=family.name,
        fields={**fields, "sample_tokens": estimated.tokens},
        layers=fields["layers"],
        hidden=fields["hidden"],
        parameters=parameters,
        vocabulary=fields["vocabulary"],
        active_parameters=estimated.active,
        attention_width=estimated.width,
        activation_replicated=estimated.kept,
    )


def _cameras(config: Mapping[str, Any]) -> int:
    """How many cameras the policy names."""
    inputs = config.get("input_features")
    entries = inputs.values() if isinstance(inputs, Mapping) else ()
    return sum(isinstance(entry, Mapping) and entry.get("type") == "VISUAL" for entry in entries)


def resolve(family: ModelFamily, config: Mapping[str, Any]) -> dict[str, Any]:
    """The family's fields of `config`, checked, with derived ones filled in (see `describe` for what is raised)."""
    fields, problems = _read(family, config)
    refused = [f"config.json: `{key}` is not supported: {why}." for key, why in _REFUSED.items() if config.get(key)]
    if refused:
        raise Unsupported(refused)
    for key, prefix in (("prefix_variant", ""), ("expert_variant", "expert_")):
        name = fields.pop(key, None)
        if not isinstance(name, str) or name not in VARIANTS:
            if name is not None:
                known = ", ".join(VARIANTS)
                problems.append(f"config.json: there is no Gemma variant {name!r}. Allowed: {known}.")
            continue
        for size, value in VARIANTS[name].items():
            if not prefix or size not in _SHARED:
                fields[prefix + size] = value
            elif not problems and fields[size] != value:
                problems.append(f"config.json: both transformers need the same {size}: {fields[size]} and {value}.")
    problems += [] if problems else _apply_sizes(fields, config.get("sizes") or {})
    if not problems:
        problems = _kind_problems(fields) or _relations(fields)
    if problems:
        raise RecipeError(problems)
    fields["query_rows"] = fields["heads"] * fields["head_dim"]
    fields["image_tokens"] = (fields["image_size"] // fields["patch"]) ** 2
    return fields


_REFUSED = {
    "use_peft": "adapters of PEFT cannot be trained on; merge them into the weights first",
    "pi0": "this is a Pi0 policy, whose state is a token of its own",
}


def _read(family: ModelFamily, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    fields, problems = dict(family.arch), []
    for name, rule in family.from_hf.items():
        paths = rule.removesuffix("?").split("|")
        value = next((config[path] for path in paths if config.get(path) is not None), None)
        if value is not None:
            fields[name] = value
        elif name not in fields:
            wanted = " or ".join(f"`{path}`" for path in paths)
            problems.append(f"config.json: {wanted} is missing. Add it to the file, or to model.config in the recipe.")
    size = fields["image_size"]
    if isinstance(size, (list, tuple)):
        if len(set(size)) != 1:
            problems.append(f"config.json: `image_resolution` must be square, not {list(size)}.")
        fields["image_size"] = size[0] if size else 0
    return fields, problems


def _apply_sizes(fields: dict[str, Any], sizes: object) -> list[str]:
    if not isinstance(sizes, Mapping):
        return [f"config.json: `sizes` must be an object of sizes, not {sizes!r}."]
    known = sorted(name for name in fields if name in _COUNTS)
    unknown = [name for name in sizes if name not in known]
    fields.update({name: value for name, value in sizes.items() if name in known})
    return [f"config.json: `sizes` has no {name!r}. Allowed: {', '.join(known)}." for name in unknown]


_COUNTS = (
    *("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocabulary", "expert_hidden", "expert_ffn"),
    *("vision_hidden", "vision_ffn", "vision_layers", "vision_heads", "patch", "image_size"),
    *("horizon", "action_size", "state_size", "prompt_length", "sampling_steps"),
)
_FLAGS = ("freeze_vision", "expert_only", "skip_padding")
_NUMBERS = ("shortest_period", "longest_period", "rope_base", "norm_epsilon", "vision_norm_epsilon")


def _kind_problems(fields: Mapping[str, Any]) -> list[str]:
    def wrong(names: tuple[str, ...], words: str, kinds: type | tuple[type, ...], flags: bool = False) -> list[str]:
        return [
            f"config.json: {name} must be {words}, not {fields[name]!r}."
            for name in names
            if not isinstance(fields[name], kinds)
            or isinstance(fields[name], bool) != flags
            or (not flags and fields[name] <= 0)
        ]

    return [
        *wrong(_COUNTS, "a positive integer", int),
        *wrong(_NUMBERS, "a positive number", (int, float)),
        *wrong(_FLAGS, "true or false", bool, flags=True),
    ]


def _relations(fields: Mapping[str, Any]) -> list[str]:
    rules = (
        (fields["image_size"] % fields["patch"] == 0, f"images of {fields['image_size']} pixels are not a whole "
         f"number of patches of {fields['patch']}"),
        (fields["heads"] % fields["kv_heads"] == 0, "kv_heads does not divide heads"),
        (fields["head_dim"] % 2 == 0, "head_dim is odd; rotary embeddings need pairs"),
        (fields["expert_hidden"] % 2 == 0, "expert_hidden is odd; the embedding of time is sines and cosines"),
        (fields["vision_hidden"] % fields["vision_heads"] == 0, "vision_heads does not divide vision_hidden"),
        (fields["longest_period"] > fields["shortest_period"], "`max_period` must be longer than `min_period`"),
    )  # fmt: skip
    return [f"config.json: {problem}." for holds, problem in rules if not holds]


# ------------------------------------------------------------------------------------------------ parameters
def _parameters(fields: Mapping[str, Any]) -> Iterator[ParameterSpec]:
    for spec in (*_vision(fields), *_prefix_ends(fields), *_layers(fields), *_action_ends(fields)):
        in_tower = spec.role.startswith("vision.")
        in_language = spec.role.startswith("projector") or spec.role == "embed" or ".prefix." in spec.role
        frozen = fields["expert_only"] and (in_tower or in_language) or fields["freeze_vision"] and in_tower
        yield spec if not frozen else ParameterSpec(**{**_as_dict(spec), "frozen": True})


def _as_dict(spec: ParameterSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in spec.__slots__}


def _linear(role: str, rows: int, columns: int, bias: bool = True, **more: Any) -> Iterator[ParameterSpec]:
    yield ParameterSpec(role=role, shape=(rows, columns), **more)
    if bias:
        yield ParameterSpec(role=f"{role}_bias", shape=(rows,), **{**more, "init": "zeros"})


def _layer_norm(role: str, width: int, **more: Any) -> Iterator[ParameterSpec]:
    yield ParameterSpec(role=role, shape=(width,), init="ones", **more)
    yield ParameterSpec(role=f"{role}_bias", shape=(width,), init="zeros", **more)


def _vision(fields: Mapping[str, Any]) -> Iterator[ParameterSpec]:
    width, inner, patch = fields["vision_hidden"], fields["vision_ffn"], fields["patch"]
    yield ParameterSpec(role="vision.patch", shape=(width, 3, patch, patch), place="first")
    yield ParameterSpec(role="vision.patch_bias", shape=(width,), place="first", init="zeros")
    yield ParameterSpec(role="vision.positions", shape=(fields["image_tokens"], width), place="first")
    for layer in range(fields["vision_layers"]):
        role = f"vision.layers.{layer}"
        at: dict[str, Any] = {"layer": layer, "place": "first"}  # the planners' layers are those of the prefix
        yield from _layer_norm(f"{role}.attn.norm", width, **at)
        yield from _linear(f"{role}.attn.qkv", 3 * width, width, **at)
        yield from _linear(f"{role}.attn.out", width, width, **at)
        yield from _layer_norm(f"{role}.mlp.norm", width, **at)
        yield from _linear(f"{role}.mlp.up", inner, width, **at)
        yield from _linear(f"{role}.mlp.down", width, inner, **at)
    yield from _layer_norm("vision.norm", width, place="first")


def _prefix_ends(fields: Mapping[str, Any]) -> Iterator[ParameterSpec]:
    yield from _linear("projector", fields["hidden"], fields["vision_hidden"], place="first")
    yield ParameterSpec(role="embed", shape=(fields["vocabulary"], fields["hidden"]), place="first")


def _layers(fields: Mapping[str, Any]) -> Iterator[ParameterSpec]:
    width, expert = fields["hidden"], fields["expert_hidden"]
    keys, queries = 2 * fields["kv_heads"] * fields["head_dim"], fields["query_rows"]
    for layer in range(fields["layers"]):
        role = f"layers.{layer}.prefix"
        yield ParameterSpec(role=f"{role}.attn.norm", shape=(width,), layer=layer, init="zeros")
        if layer == fields["layers"] - 1:
            yield from _linear(f"{role}.attn.kv", keys, width, False, layer=layer)
        else:
            yield from _linear(f"{role}.attn.qkv", queries + keys, width, False, layer=layer)
            yield from _linear(f"{role}.attn.out", width, queries, False, layer=layer)
            yield ParameterSpec(role=f"{role}.mlp.norm", shape=(width,), layer=layer, init="zeros")
            yield from _linear(f"{role}.mlp.up", 2 * fields["ffn"], width, False, layer=layer)
            yield from _linear(f"{role}.mlp.down", width, fields["ffn"], False, layer=layer)
        role = f"layers.{layer}.expert"
        yield from _linear(f"{role}.attn.modulation", 3 * expert, expert, layer=layer, init="zeros")
        yield from _linear(f"{role}.attn.qkv", queries + keys, expert, False, layer=layer)
        yield from _linear(f"{role}.attn.out", expert, queries, False, layer=layer)
        yield from _linear(f"{role}.mlp.modulation", 3 * expert, expert, layer=layer, init="zeros")
        yield from _linear(f"{role}.mlp.up", 2 * fields["expert_ffn"], expert, False, layer=layer)
        yield from _linear(f"{role}.mlp.down", expert, fields["expert_ffn"], False, layer=layer)


def _action_ends(fields: Mapping[str, Any]) -> Iterator[ParameterSpec]:
    width = fields["expert_hidden"]
    yield from _linear("modulation", 3 * width, width, place="last", init="zeros")
    yield from _linear("actions.embed", width, fields["action_size"], place="first")
    yield from _linear("actions.time_in", width, width, place="first")
    yield from _linear("actions.time_out", width, width, place="first")
    yield from _linear("velocity", fields["action_size"], width, place="last")
