"""Every wrong key and value of a recipe is found at once, placed, and answered with what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from loong_core.recipe import DataSection, EvalSection, Recipe, TrainTokenizer
from loong_core.recipe_check import annotation_of, check, describe
from loong_core.recipe_load import shipped, to_mapping
from loong_core.recipe_yaml import Document, parse
from loong_core.registry import open_registry

FULL = to_mapping(Recipe(data=DataSection(tokenizer=TrainTokenizer(train=300), eval=EvalSection())))
FREE = {("task", "options"), ("data", "options"), ("parallel", "options"), ("parallel", "components"), ("ops",)}


def problems(text: str) -> list[str]:
    document = parse(text, "r.yaml")
    return [str(problem) for problem in check(document, Recipe)[1]]


def keys(value: Any, key: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and key not in FREE | {("model", "config")}:
        for name, inner in value.items():
            yield (*key, name)
            yield from keys(inner, (*key, name))


def misspellings(word: str) -> set[str]:
    """One letter lost, doubled, swapped with its neighbour, replaced, or added."""
    cuts = range(len(word))
    found = {word[:at] + word[at + 1 :] for at in cuts} | {word[:at] + word[at] + word[at:] for at in cuts}
    found |= {word[:at] + word[at + 1] + word[at] + word[at + 2 :] for at in range(len(word) - 1)}
    found |= {word[:at] + "k" + word[at + 1 :] for at in cuts} | {
        word[:at] + "z" + word[at:] for at in range(len(word) + 1)
    }
    return found - {word, ""}


def renamed(value: dict[str, Any], key: tuple[str, ...], name: str) -> dict[str, Any]:
    head, *rest = key
    inner = {head: value[head]} if rest else {name: value[head]}
    return {**{k: v for k, v in value.items() if k != head}, **(
        {head: renamed(value[head], tuple(rest), name)} if rest else inner)}  # fmt: skip


def _documents() -> dict[str, dict[str, Any]]:
    files = shipped(open_registry())
    return {"every key": FULL} | {name: parse(path.read_text(), str(path)).value for name, path in files.items()}


@pytest.mark.parametrize("name", _documents())
def test_a_key_misspelt_by_one_edit_is_rejected_and_corrected(name: str) -> None:
    recipe = _documents()[name]
    tried, right, first = 0, 0, 0
    for key in keys(recipe):
        siblings = {other[-1] for other in keys(FULL) if other[:-1] == key[:-1]} | (
            {"base"} if len(key) == 1 else set()
        )
        for wrong in misspellings(key[-1]) - siblings:
            found = check(Document(renamed(recipe, key, wrong)), Recipe)[1]
            texts = [problem.text for problem in found if problem.key == (*key[:-1], wrong)]
            assert len(texts) == 1, (key, wrong)
            hint = re.search(r"Did you mean (.*?)\?", texts[0])
            suggestions = re.findall(r"`(.*?)`", hint.group(1)) if hint else []
            tried += 1
            right += key[-1] in suggestions
            first += suggestions[:1] == [key[-1]]
    assert right / tried >= 0.95, f"{right} of {tried}"
    assert first / tried >= 0.85, f"{first} of {tried}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  lrr: 1\n", "r.yaml:2: `optim.lrr`: unknown key. Did you mean `lr`? Allowed: betas, clip, eps, lr,"),
        ("modell: {}\n", "r.yaml:1: `modell`: unknown key. Did you mean `model`? Allowed: backend,"),
        (
            "data:\n  eval:\n    evry: 1\n",
            "r.yaml:3: `data.eval.evry`: unknown key. Did you mean `every`? Allowed: batches,",
        ),
        ("data: {tokenizer: {trian: 300}}", "`data.tokenizer.trian`: unknown key. Did you mean `train`?"),
        ("lr: 1\n", "`lr`: unknown key. Did you mean `optim.lr`?"),
        ("data: {steps: 3}\n", "`data.steps`: unknown key. Did you mean `run.steps`?"),
        ("run: {precision: bf16}\n", "`run.precision`: unknown key. Did you mean `precision` (at the top level)?"),
        ("optim.lr: 1\n", "in a file, nest it: `optim: {lr: ...}`"),
        ("checkpoint: {async_: true}\n", "Did you mean `async`?"),
        ("run: {steps: many}\n", "r.yaml:1: `run.steps`: 'many' is not allowed. Allowed: a whole number >= 1."),
        ("run: {steps: 0}\n", "`run.steps`: 0 is not allowed. Allowed: a whole number >= 1."),
        ("run: {steps: 1.5}\n", "`run.steps`: 1.5 is not allowed."),
        ("run: {steps: true}\n", "`run.steps`: true is not allowed. Allowed: a whole number >= 1."),
        ("run: {steps: null}\n", "`run.steps`: null is not allowed."),
        ("optim: {lr: .inf}\n", "`optim.lr`: inf is not a finite number."),
        ("optim: {clip: -1}\n", "`optim.clip`: -1 is not allowed. Allowed: a number > 0 or null."),
        ("optim: {betas: [0.9]}\n", "`optim.betas[1]`: this key is missing."),
        ("optim: 3\n", "`optim`: 3 is not allowed. Allowed: a mapping with the keys name, lr,"),
        ("optim: [1]\n", "`optim`: [1] is not allowed."),
        ("optim: {schedule: cosin}\n", "Allowed: constant, cosine, linear, wsd."),
        ("parallel: {tp: big}\n", "`parallel.tp`: 'big' is not allowed. Allowed: a whole number >= 1 or auto."),
        ("parallel: {layout: [1, x]}\n", "`parallel.layout[1]`: 'x' is not allowed. Allowed: a whole number."),
        ("data: {tokenizer: {train: 5}}", "`data.tokenizer.train`: 5 is not allowed. Allowed: a whole number >= 260."),
        ("data: {tokenizer: {}}", "`data.tokenizer.train`: this key is missing. Allowed: a whole number >= 260."),
        ("data: {tokenizer: [1]}", "`data.tokenizer`: [1] is not allowed."),
        ("data: {path: {a: 1}}", "`data.path`: {'a': 1} is not allowed. Allowed: a path, a list"),
        ("data: {shuffle: maybe}", "`data.shuffle`: 'maybe' is not allowed. Allowed: true or false."),
        ("precision: [bf16]", "`precision`: ['bf16'] is not allowed. Allowed: text."),
        ("log: {to: console}", "`log.to`: 'console' is not allowed. Allowed: a list (each item: text)."),
    ],
)
def test_messages(text: str, message: str) -> None:
    found = problems(text)
    assert len(found) == 1, found
    assert message in found[0]


def test_everything_is_reported_together_and_checking_can_go_on() -> None:
    document = parse("run: {steps: x, nme: y, seed: 5}\noptim: {lr: -1, clip: 2}\nbackennd: cpu\n", "r.yaml")
    recipe, found = check(document, Recipe)
    assert {problem.key for problem in found} == {("run", "steps"), ("run", "nme"), ("optim", "lr"), ("backennd",)}
    assert isinstance(recipe, Recipe)
    assert (recipe.run.seed, recipe.optim.clip, recipe.run.steps) == (5, 2.0, 1000)


def test_what_people_write_is_understood() -> None:
    text = """
run: {name: 2024, deterministic: no, steps: 1e3}
model:
data: {path: 2024, shuffle: on, options: }
precision: 16
optim: {lr: 1e-4, betas: [0.9, .999], clip: null}
model: {config: 3}
""".replace("model:\n", "", 1)
    recipe, found = check(parse(text, "r.yaml"), Recipe)
    assert found == []
    assert isinstance(recipe, Recipe)
    assert (recipe.run.name, recipe.run.deterministic, recipe.run.steps) == ("2024", False, 1000)
    assert (recipe.data.path, recipe.data.shuffle, recipe.precision) == (Path("2024"), True, "16")
    assert (recipe.optim.lr, recipe.optim.betas, recipe.model.config) == (1e-4, (0.9, 0.999), "3")


def test_an_empty_section_takes_the_defaults() -> None:
    recipe, found = check(parse("optim:\nops:\ndata: {eval: }\n", "r.yaml"), Recipe)
    assert found == [] and recipe == Recipe()


@pytest.mark.parametrize("key", [key for key in keys(FULL) if key])
def test_every_key_can_say_what_it_accepts(key: tuple[str, ...]) -> None:
    words = describe(annotation_of(Recipe, key))
    assert words and "<" not in words.replace(" < ", "") and "typing" not in words


def test_options_of_a_plugin_are_checked_alike() -> None:
    class Options(BaseModel):
        model_config = {"extra": "forbid"}
        width: int = 1

    document = parse("data:\n  options:\n    widht: 2\n", "r.yaml")
    part = Document(document.value["data"]["options"], document.places)
    _, found = check(part, Options, ("data", "options"))
    assert [str(problem) for problem in found] == [
        "r.yaml:3: `data.options.widht`: unknown key. Did you mean `width`? Allowed: width."
    ]
