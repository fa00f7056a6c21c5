"""Reads a Hugging Face `config.json` by dotted rules, and refuses what a decoder would otherwise silently ignore.

Both generations of files are read: transformers 5 keeps everything about rotary embeddings under `rope_parameters`,
older files have `rope_theta` and `rope_scaling` at the top level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from loong_core.errors import RecipeError, Unsupported

ROPE_RULES: dict[str, str] = {
    "rope_base": "rope_parameters.rope_theta|rope_theta?",
    "rope_type": "rope_parameters.rope_type|rope_parameters.type|rope_scaling.rope_type|rope_scaling.type?",
    "rope_factor": "rope_parameters.factor|rope_scaling.factor?",
    "rope_low_frequency": "rope_parameters.low_freq_factor|rope_scaling.low_freq_factor?",
    "rope_high_frequency": "rope_parameters.high_freq_factor|rope_scaling.high_freq_factor?",
    "rope_original_positions": "rope_parameters.original_max_position_embeddings"
    "|rope_scaling.original_max_position_embeddings|max_position_embeddings?",
}
"""Where the settings of rotary embeddings stand, for `ModelFamily.from_hf`."""

ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("rope_factor",),
    "llama3": ("rope_factor", "rope_low_frequency", "rope_high_frequency", "rope_original_positions"),
}
"""The rope types that `loong_llm.rope` computes, with the settings each needs."""


def look_up(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None where it, or a mapping on the way to it, is absent or null."""
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def read(config: Mapping[str, Any], rules: Mapping[str, str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Loong's fields of a `config.json`.

    A rule is a dotted path, several alternatives separated by `|` (the first that is set wins), with `?` at the end
    when the field may be absent; then `defaults` decides (None without one). A null in the file counts as absent.
    `defaults` without a rule are fields that the family fixes.

    Raises:
        RecipeError: with every missing key of the file.
    """
    fields = dict(defaults)
    problems = []
    for name, rule in rules.items():
        paths = rule.removesuffix("?").split("|")
        value = next((found for path in paths if (found := look_up(config, path)) is not None), None)
        if value is not None:
            fields[name] = value
        elif name not in defaults:
            fields[name] = None
            if not rule.endswith("?"):
                wanted = " or ".join(f"`{path}`" for path in paths)
                problems.append(
                    f"config.json: {wanted} is missing. Add it to the file, or to model.config in the recipe."
                )
    if problems:
        raise RecipeError(problems)
    return fields


class Refusal(NamedTuple):
    """A key of `config.json` that asks for something the decoder cannot do, unless `allowed(value)`."""

    path: str
    allowed: Callable[[Any], bool]
    reason: str


def _zero(value: Any) -> bool:
    return not value


def _full_attention(value: Any) -> bool:
    return isinstance(value, Sequence) and set(value) <= {"full_attention"}


_EDIT = "set {value} in model.config of the recipe if that is what you want"

REFUSALS: tuple[Refusal, ...] = (
    Refusal("hidden_act", lambda value: value in ("silu", "swish"), "allowed: silu (SwiGLU)"),
    Refusal("use_sliding_window", _zero, "attention windows are not built; " + _EDIT.format(value="it to false")),
    Refusal("layer_types", _full_attention, 'allowed: only "full_attention"'),
    Refusal(
        "attention_dropout",
        _zero,
        "dropout is a setting of the run: " + _EDIT.format(value="it to 0.0") + ", and the rate in model.dropout",
    ),
    Refusal(
        "pretraining_tp",
        lambda value: value in (0, 1),
        "sliced reference matmuls are not reproduced; " + _EDIT.format(value="it to 1"),
    ),
    Refusal("clip_qkv", _zero, "clipping of queries, keys and values is not built"),
    Refusal("quantization_config", _zero, "quantised weights cannot be trained; use the unquantised checkpoint"),
    Refusal("rope_parameters", lambda value: isinstance(value, Mapping), "it must be an object"),
    Refusal("rope_scaling", lambda value: isinstance(value, Mapping), "it must be an object"),
    Refusal("rope_parameters.partial_rotary_factor", lambda value: value == 1, "allowed: 1.0"),
    Refusal("partial_rotary_factor", lambda value: value == 1, "allowed: 1.0"),
    Refusal("logit_softcapping", _zero, "not built"),
    Refusal("final_logit_softcapping", _zero, "not built"),
    Refusal("attn_logit_softcapping", _zero, "not built"),
)


def refusals(config: Mapping[str, Any], rows: Sequence[Refusal] = REFUSALS) -> list[str]:
    """One message for each setting of `config` that training would silently change."""
    problems = []
    for path, allowed, reason in rows:
        value = look_up(config, path)
        if value is not None and not allowed(value):
            problems.append(f"config.json: `{path}` = {value!r} is not supported: {reason}.")
    return problems


def rope_problems(fields: Mapping[str, Any]) -> list[str]:
    """What is wrong with the rotary settings among `fields`."""
    kind = fields["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_NEEDS:
        return [f"config.json: rope type {kind!r} is not supported: allowed are {', '.join(ROPE_NEEDS)}."]
    return [
        f"config.json: rope type {kind!r} needs a positive number at {ROPE_RULES[name].split('|')[0]!r}, "
        f"not {fields.get(name)!r}."
        for name in ROPE_NEEDS[kind]
        if not is_positive_number(fields.get(name))
    ]


def is_positive_number(value: Any) -> bool:
    """Whether `value` is an int or float above zero (a bool is not a number)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and is_positive_number(value)


def _is_share(value: Any) -> bool:
    return is_positive_number(value) or (value == 0 and not isinstance(value, bool))


def _is_list_of_layers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(value == 0 or _is_count(value) for value in value)


KINDS: dict[str, tuple[Callable[[Any], bool], frozenset[str]]] = {
    "a positive integer": (
        _is_count,
        frozenset(
            {"layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocabulary"}
            | {"top_k", "expert_ffn", "sparse_step"}
        ),
    ),
    "a whole number": (lambda value: value == 0 or _is_count(value), frozenset({"experts"})),
    "a positive number": (is_positive_number, frozenset({"norm_epsilon", "rope_base"})),
    "a number that is not negative": (_is_share, frozenset({"init_std", "aux_coefficient"})),
    "true or false": (
        lambda value: isinstance(value, bool),
        frozenset(["tied_embeddings", "qk_norm", "qkv_bias", "out_bias", "mlp_bias", "norm_top_k", "aux_loss"]),
    ),
    "an integer": (lambda value: isinstance(value, int) and not isinstance(value, bool), frozenset({"pad_token"})),
    "a list of layer numbers": (_is_list_of_layers, frozenset({"dense_layers"})),
}
"""What a field must be, in words, with the check and the fields it holds for."""


def kind_problems(fields: Mapping[str, Any], rules: Mapping[str, str]) -> list[str]:
    """What is wrong with the type or the range of fields that are set."""
    problems = []
    for words, (holds, names) in KINDS.items():
        for name in sorted(names & fields.keys()):
            if fields[name] is not None and not holds(fields[name]):
                key = rules.get(name, name).removesuffix("?").split("|")[0]
                problems.append(f"config.json: `{key}` must be {words}, not {fields[name]!r}.")
    return problems


def refuse(problems: Sequence[str]) -> None:
    """Raise `Unsupported` with all `problems`, if there are any."""
    if problems:
        raise Unsupported(problems)
