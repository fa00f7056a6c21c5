"""Which model a recipe means: weights folder, config.json, family, shape; looked at without reading a tensor."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from loong_core.errors import CheckpointError, RecipeError, Unsupported, UserError
from loong_core.findings import Findings
from loong_core.recipe import Recipe, TrainTokenizer
from loong_core.recipe_load import load_file
from loong_core.registry import Registry, architecture_of, resolve
from loong_core.suggest import did_you_mean
from loong_core.types import ModelFamily, ModelShape

OWN_KEYS = "loong.json"
"""File beside a config.json with keys that its public loader refuses and the model cannot be built without."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CONVERT = (
    "they can run code when opened, so loong reads safetensors only. Convert once, where you trust them: load the "
    "model with transformers and call save_pretrained(folder), which writes safetensors"
)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained. `config` is the Hugging Face config.json with the recipe's changes applied."""

    family: ModelFamily
    config: dict[str, Any]
    shape: ModelShape
    notes: tuple[str, ...] = ()


def find_model(recipe: Recipe, registry: Registry, findings: Findings, purpose: str) -> Model | None:
    """The model of a recipe, or None with the problems collected.

    To `train`, the weight files have to be sound; to `plan`, a config.json is enough, and what is wrong with the files
    is noted; a `worker` does not look at them again.
    """
    section = recipe.model
    named = findings.attempt("model.family", lambda: _named(section.family, registry))
    notes: list[str] = []
    damage: list[str] = []
    if section.weights is not None and purpose != "worker":
        damage = weights_problems(section.weights, registry)
    if purpose == "train":
        findings.absorb("model.weights", damage)
    else:
        notes += [f"model.weights: {text} `loong train` will refuse them." for text in damage]
    if section.family is not None and named is None:
        return None
    key = "model.weights" if section.weights is not None else "model.config"
    config: dict[str, Any] | None = None
    try:
        config = _config(recipe, named, registry, findings)
    except CheckpointError as error:
        if not damage or purpose != "train":
            findings.absorb(key, error.problems)
    except UserError as error:
        findings.absorb(key, error.problems)
    if config is None:
        return None
    family = named
    with findings.at(key if named is None else "model.family"):
        family = named or registry.family_for(config)
        _check_family(family, config, registry, notes)
    if family is None:
        return None
    describe, shape = family.describe, None
    with findings.at(key):
        shape = cast(ModelShape, resolve(describe, f"family {family.name}")(family, config))
    if shape is None:
        return None
    _check_settings(recipe, shape, findings)
    return Model(family=family, config=config, shape=shape, notes=tuple(notes))


def weights_problems(path: Path, registry: Registry) -> list[str]:
    """Everything wrong with a weights folder that names, sizes and headers can tell."""
    if problem := _unusable_folder(path):
        return [problem]
    for candidate in registry.table("checkpoint_formats").values():
        if resolve(candidate.claims, candidate.name)(path):
            return [str(problem) for problem in resolve(candidate.check, candidate.name)(path)]
    return [_unclaimed(path, registry)]


def _unusable_folder(path: Path) -> str:
    wanted = "Give the folder that holds config.json and safetensors files, or a native checkpoint."
    if path.is_file():
        pickled = f"{path.name} is a pickle file: {_CONVERT}. " if path.suffix in PICKLES else ""
        return f"{path} is a file. {pickled}{wanted}"
    if not path.exists():
        hub = ""
        if len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists():
            hub = f" If it is the name of a public model, download it first (`hf download {path} --local-dir FOLDER`)."
        near = did_you_mean(path.name, [item.name for item in path.parent.iterdir()]) if path.parent.is_dir() else ""
        return f"the folder {path} does not exist.{near}{hub} {wanted}"
    if not path.is_dir():
        return f"{path} is not a folder. {wanted}"
    if not os.access(path, os.R_OK | os.X_OK):
        return f"the folder {path} cannot be read: permission denied. Change its permissions."
    return ""


def _unclaimed(path: Path, registry: Registry) -> str:
    formats = registry.table("checkpoint_formats")
    broken = registry.plugins.failures()
    if not formats:
        return f"no checkpoint format is installed. Install loong-ckpt. {broken}".strip()
    names = sorted(item.name for item in path.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return f"{path} holds no config.json and pickled weights ({', '.join(pickles[:4])}): {_CONVERT}."
    held = f"It holds {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}." if names else "It is empty."
    inner = next((item for item in names if (path / item / "config.json").is_file()), None)
    hint = f" Did you mean {path / inner}?" if inner else ""
    return (
        f"{path} has no config.json and is no native checkpoint. {held}{hint} Give the folder that holds config.json "
        f"and the safetensors files. Formats: {', '.join(sorted(formats))}. {broken}"
    ).rstrip()


def _named(name: str | None, registry: Registry) -> ModelFamily | None:
    return None if name is None else cast(ModelFamily, registry.get("model_families", name))


def _config(
    recipe: Recipe, family: ModelFamily | None, registry: Registry, findings: Findings
) -> dict[str, Any] | None:
    """config.json of the weights, of a path, of a preset, or in place; None when a problem was already reported."""
    weights, given = recipe.model.weights, recipe.model.config
    if weights is not None:
        if isinstance(given, str):
            findings.add(
                "model.config",
                f"{given!r} is not allowed together with model.weights, which bring their own config.json. Allowed: a "
                "mapping of keys to replace in it, or null.",
            )
        base = config_of_weights(weights, registry)
        return {**base, **(given if isinstance(given, dict) else {})}
    if isinstance(given, dict):
        return dict(given)
    if given is not None:
        return _config_named(given, family, registry)
    if not findings.suspect("model"):
        findings.add("model", f"it names neither weights nor a config. {_how_to_name(family, registry)}")
    return None


def _how_to_name(family: ModelFamily | None, registry: Registry) -> str:
    sizes = sorted(presets_of(family)) if family is not None else []
    listed = (
        f" (of {family.name}: {', '.join(sizes)})" if family is not None and sizes else " (`loong models` lists them)"
    )
    return (
        "Set model.weights to a folder with config.json and safetensors files, or, for random weights, model.config to "
        f"a preset{listed}, to a config.json, or to its keys."
    )


def config_of_weights(weights: Path, registry: Registry) -> dict[str, Any]:
    """The config.json of a folder of weights or of a checkpoint, with the keys that lie beside it.

    Raises CheckpointError where the folder is none of both.
    """
    if problem := _unusable_folder(weights):
        raise CheckpointError(problem)
    if (weights / "config.json").is_file():
        own = read_config(weights / OWN_KEYS) if (weights / OWN_KEYS).is_file() else {}
        return {**own, **read_config(weights / "config.json")}
    if (weights / "recipe.yaml").is_file():
        saved = load_file(weights / "recipe.yaml").model
        family = _named(saved.family, registry)
        if isinstance(saved.config, str):
            return _config_named(saved.config, family, registry)
        base = config_of_weights(saved.weights, registry) if saved.weights is not None else {}
        return {**base, **(saved.config or {})}
    raise CheckpointError(_unclaimed(weights, registry))


def _config_named(given: str, family: ModelFamily | None, registry: Registry) -> dict[str, Any]:
    path = Path(given)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise RecipeError(f"the folder {path} has no config.json. Give one that has, or a preset.")
        return read_config(path / "config.json")
    if path.is_file():
        return read_config(path)
    families = [family] if family is not None else list(registry.table("model_families").values())
    known = {(one.name, size): config for one in families for size, config in presets_of(one).items()}
    matches = [key for key in known if given in (key[1], f"{key[0]}:{key[1]}")]
    if len(matches) == 1:
        config = dict(known[matches[0]])
        if family is None and architecture_of(config) is None:
            config["architectures"] = list(registry.get("model_families", matches[0][0]).hf_architectures[:1])
        return config
    if matches:
        owners = ", ".join(name for name, _ in matches)
        raise RecipeError(f"the preset {given!r} exists in several families ({owners}). Set model.family.")
    names = sorted({size for _, size in known})
    whose = f" of family {family.name}" if family is not None else ""
    raise RecipeError(
        f"{given!r} is neither a file, nor a folder, nor a preset{whose}.{did_you_mean(given, names)} "
        f"Presets{whose}: {', '.join(names) or 'none'}. Or give the keys of a config.json in place."
    )


def presets_of(family: ModelFamily | None) -> Mapping[str, Mapping[str, Any]]:
    """Preset name -> config.json of a family."""
    if family is None or family.presets is None:
        return {}
    found = resolve(family.presets, f"family {family.name}")
    return cast("Mapping[str, Mapping[str, Any]]", found() if callable(found) else found)


def read_config(path: Path) -> dict[str, Any]:
    """The contents of a config.json. Raises CheckpointError when it is no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}. Check the path and its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Copy or download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object. Give the config.json of a model.")
    return config


def _check_family(family: ModelFamily, config: Mapping[str, Any], registry: Registry, notes: list[str]) -> None:
    """A family named against a config.json that another one claims is a mistake; against an unknown one, a choice."""
    name = architecture_of(config)
    if name is None or name in family.hf_architectures:
        return
    if not family.hf_architectures:
        return  # it shares another family's architecture (qwen1_5 and qwen2), so naming it is a choice
    families = registry.table("model_families").values()
    if claiming := [other.name for other in families if name in other.hf_architectures]:
        raise Unsupported(
            f"the family {family.name!r} is set, but config.json names {name!r}, which belongs to "
            f"{' or '.join(claiming)}. Remove model.family, or set it to {claiming[0]}."
        )
    notes.append(f"model.family: {family.name} is used for the architecture {name}, which no installed family claims.")


def _check_settings(recipe: Recipe, shape: ModelShape, findings: Findings) -> None:
    for pattern in recipe.model.freeze:
        if not any(fnmatch.fnmatchcase(spec.role, pattern) for spec in shape.parameters):
            roles = sorted({spec.role for spec in shape.parameters})
            findings.add(
                "model.freeze", f"no parameter matches {pattern!r}. Roles are like {', '.join(roles[:8])}, ..."
            )
    tokenizer = recipe.data.tokenizer
    if isinstance(tokenizer, TrainTokenizer) and 0 < shape.vocabulary < tokenizer.train:
        findings.add(
            "data.tokenizer.train",
            f"{tokenizer.train} tokens do not fit the model's vocabulary of {shape.vocabulary}. Allowed: 260 to "
            f"{shape.vocabulary}. Lower it, or raise vocab_size in model.config.",
        )
