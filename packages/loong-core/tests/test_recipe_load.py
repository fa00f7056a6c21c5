"""Files, bases, overrides, shipped names: one recipe, and the place of every value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from loong_core.errors import NotFound, PluginError, RecipeError
from loong_core.recipe import Recipe
from loong_core.recipe_load import (
    decode_options,
    dump,
    from_mapping,
    json_schema,
    load,
    load_file,
    read,
    shipped,
    to_mapping,
)
from loong_core.registry import Registry, open_registry


class WidthOptions(BaseModel):
    """Options a test descriptor refers to."""

    model_config = {"extra": "forbid"}
    width: int = 1


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry with two folders of recipes, brought by a single-file plugin."""
    for folder, names in {"house": ("small", "twice"), "guest": ("twice", "other")}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.yaml").write_text(f"# {name}\nrun: {{name: {folder}-{name}, steps: 7}}\n")
    plugin = tmp_path / f"recipes_of_{tmp_path.name}.py"
    plugin.write_text(
        "from pathlib import Path\nfrom loong_core import RecipeFolder, hookimpl\n@hookimpl\ndef loong_recipes():\n"
        "    return [RecipeFolder(name=n, path=Path(__file__).parent / n) for n in ('house', 'guest')]\n"
    )
    monkeypatch.setenv("LOONG_PLUGINS", "")
    monkeypatch.setenv("LOONG_PLUGIN_FILES", str(plugin))
    monkeypatch.chdir(tmp_path)
    return open_registry()


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def test_files_and_overrides(registry: Registry) -> None:
    name = write("r.yaml", "run: {steps: 5}\noptim:\n  lr: 1e-3\n")
    found = load(name, ["optim.lr=1e-4", "data.path=[a.jsonl, b]", "data.eval.every=3", "run.name=no"], registry)
    assert (found.recipe.optim.lr, found.recipe.run.steps, found.recipe.run.name) == (1e-4, 5, "no")
    assert found.recipe.data.path == [Path("a.jsonl"), Path("b")]
    assert found.recipe.data.eval is not None and found.recipe.data.eval.every == 3
    assert found.where("optim.lr") == "override 'optim.lr=1e-4'"
    assert found.where("run.steps") == "r.yaml:1"
    assert found.where("optim.betas") == "r.yaml:2"
    assert found.where("precision") == "r.yaml"
    assert found.origins["run.steps"] == "r.yaml:1"


def test_json_recipes_have_lines(registry: Registry) -> None:
    name = write("r.json", '{\n\t"run": {\n\t\t"stepz": 3\n\t}\n}\n')
    with pytest.raises(RecipeError, match=r"^r.json:3: `run.stepz`"):
        load(name, [], registry)
    for text in ('{"run": {"steps": 3,}}', "run: {steps: 3}", '{"run": {"steps": NaN}}x'):
        with pytest.raises(RecipeError, match=r"r.json:1: this is not valid JSON"):
            load(write("r.json", text), [], registry)


def test_overrides_merge_mappings_replace_the_rest_and_unset(registry: Registry) -> None:
    name = write("r.yaml", "ops: {a: x}\ndata: {tokenizer: folder, eval: {every: 2}}\noptim: {clip: 1}\n")
    words = [
        "ops={b: y}",
        "data.tokenizer.train=300",
        "data.eval=null",
        "optim.clip=null",
        "run.steps=3",
        "run.steps=4",
    ]
    recipe = load(name, words, registry).recipe
    assert recipe.ops == {"a": "x", "b": "y"}
    assert recipe.data.tokenizer.train == 300  # type: ignore[union-attr]
    assert recipe.data.eval is None and recipe.optim.clip is None and recipe.run.steps == 4


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run.steps", "Write key=value"),
        ("=3", "Write key=value"),
        ("run..steps=3", "Write key=value"),
        ("run.steps=", "run.steps=null"),
        ("run.stepz=3", "Did you mean `steps`?"),
        ("run.steps.more=3", "not allowed"),
        ("data.path.0=x", "Give the whole list"),
        ("data.path[0]=x", "Give the whole list"),
        ("base=quickstart", "cannot be overridden"),
        ("--run.steps=3", "without dashes"),
        ("run.name=[a", "not valid YAML"),
        ("run.name=!!python/name:os.system", "tag"),
    ],
)
def test_wrong_overrides_are_quoted(registry: Registry, word: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(write("r.yaml", ""), [word, "optim.lr=-1"], registry)
    assert any(message in problem and f"override {word!r}" in problem for problem in error.value.problems)
    assert any("`optim.lr`: -1" in problem for problem in error.value.problems)


def test_shipped_recipes_by_name(registry: Registry) -> None:
    assert set(shipped(registry)) == {"house:small", "house:twice", "guest:twice", "guest:other"}
    assert load("small", [], registry).recipe.run.name == "house-small"
    assert load("guest:twice", [], registry).recipe.run.name == "guest-twice"
    with pytest.raises(RecipeError, match="ambiguous. Write one of: guest:twice, house:twice"):
        load("twice", [], registry)
    for name in ("smal", "house:smal"):
        with pytest.raises(NotFound, match=r"Did you mean '(house:)?small'.*Shipped recipes: guest:other"):
            load(name, [], registry)


def test_a_run_folder_is_its_recipe(registry: Registry) -> None:
    Path("runs/mine").mkdir(parents=True)
    write("runs/mine/recipe.yaml", "run: {steps: 9}\n")
    assert load("runs/mine", [], registry).recipe.run.steps == 9


@pytest.mark.parametrize("name", ["absent.yaml", "no/such", "house"])
def test_a_recipe_that_is_not_there(registry: Registry, name: str) -> None:
    with pytest.raises(NotFound) as error:
        load(name, [], registry)
    assert name in str(error.value) and "shipped" in str(error.value)


def test_base_by_name_and_by_file(registry: Registry) -> None:
    Path("deep").mkdir()
    write("deep/base.yaml", "run: {steps: 3, seed: 1}\nmodel: {config: {a: 1, b: 2}}\n")
    name = write("deep/r.yaml", "base: base.yaml\nrun: {seed: 2}\nmodel: {config: {b: 3}}\n")
    found = load(name, [], registry)
    assert (found.recipe.run.steps, found.recipe.run.seed, found.recipe.base) == (3, 2, None)
    assert found.recipe.model.config == {"a": 1, "b": 3}
    assert found.where("run.steps") == "deep/base.yaml:1" and found.where("run.seed") == "deep/r.yaml:2"
    assert load(write("s.yaml", "base: house:small\n"), [], registry).recipe.run.steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: absent.yaml", "r.yaml:1: `base`: there is no file absent.yaml"),
        ("base: house:smalll", "r.yaml:1: `base`: There is no recipe 'house:smalll'.*Did you mean 'house:small'"),
        ("base: [a]", "r.yaml:1: `base`: .*Allowed: package:name, or a file"),
        ("run: {}\nbase: chain.yaml", "chain.yaml:2: `base`: chain.yaml is itself the base of r.yaml"),
        ("- a", "r.yaml:1: a recipe is a mapping"),
        ("just text", "r.yaml:1: a recipe is a mapping"),
    ],
)
def test_wrong_files(registry: Registry, text: str, message: str) -> None:
    write("chain.yaml", "run: {}\nbase: house:small\n")
    with pytest.raises((RecipeError, NotFound), match=message):
        load(write("r.yaml", text), [], registry)


def test_bytes_that_are_no_text(registry: Registry) -> None:
    Path("r.yaml").write_bytes(b"run: {name: \xff}")
    with pytest.raises(RecipeError, match="r.yaml: byte 12 is not UTF-8"):
        load("r.yaml", [], registry)
    Path("r.yaml").write_bytes("run: {name: größe}".encode("utf-8-sig"))
    assert load("r.yaml", [], registry).recipe.run.name == "größe"


def test_problems_come_in_the_order_of_the_file(registry: Registry) -> None:
    found = read(write("r.yaml", "run: {stepz: 1}\noptim: {lr: x}\nbackennd: 1\n"), [], registry)
    assert [str(problem)[:8] for problem in found.problems] == ["r.yaml:1", "r.yaml:2", "r.yaml:3"]
    assert found.recipe == Recipe()


TEXTS = st.text(min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(
    name=TEXTS,
    config=st.dictionaries(TEXTS, st.none() | st.booleans() | st.integers() | TEXTS | st.lists(TEXTS), max_size=4),
    lr=st.floats(0, 1e6),
    path=st.none() | st.lists(TEXTS, min_size=1, max_size=3),
    every=st.none() | st.integers(1, 10**9),
)  # fmt: skip
def test_dump_loads_back_equal(name, config, lr, path, every, tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = from_mapping({
        "run": {"name": name}, "model": {"config": config}, "optim": {"lr": lr}, "data": {"path": path},
        "checkpoint": {"every": every, "async": False},
    })  # fmt: skip
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump(recipe), encoding="utf-8")
    assert load_file(file) == recipe
    assert from_mapping(json.loads(json.dumps(to_mapping(recipe)))) == recipe


def test_the_schema_knows_every_key() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {*to_mapping(Recipe()), "base"}
    checkpoint = schema["$defs"]["CheckpointSection"]
    assert "async" in checkpoint["properties"] and checkpoint["additionalProperties"] is False
    assert "Peak learning rate" in json.dumps(schema)


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import loong_core

    monkeypatch.setattr(loong_core, "WidthOptions", WidthOptions, raising=False)
    assert decode_options({"width": 3}, "loong_core:WidthOptions", "the source 'x'") == WidthOptions(width=3)
    assert decode_options({}, None, "the source 'x'") is None
    with pytest.raises(RecipeError, match=r"the source 'x': `options.widht`: unknown key. Did you mean `width`"):
        decode_options({"widht": 3}, "loong_core:WidthOptions", "the source 'x'")
    with pytest.raises(RecipeError, match=r"the source 'x' has no options. Remove"):
        decode_options({"width": 3}, None, "the source 'x'")
    with pytest.raises(PluginError, match="must be a pydantic model"):
        decode_options({}, "loong_core.errors:UserError", "the source 'x'")
