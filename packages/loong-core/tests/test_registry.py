"""Tables of descriptors: lazily made, one owner per name, every miss explained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loong_core import hookimpl, plugins
from loong_core.errors import NotFound, PluginError, RunError, Unsupported, UserError
from loong_core.registry import Registry, resolve
from loong_core.types import ModelFamily, OpImpl, RecipeFolder


def family(name: str, *architectures: str) -> ModelFamily:
    return ModelFamily(
        name=name, hf_architectures=architectures, describe="a:b", builder="a:b", arch={}, from_hf={}, weights=()
    )


def registry(**modules: dict[str, Any]) -> Registry:
    """A registry over the core and plugins made of `hook name -> function`."""
    loaded = plugins.load([], {})
    for name, hooks in modules.items():
        plugin = SimpleNamespace(**{hook: hookimpl(function) for hook, function in hooks.items()})
        plugins._add(loaded, plugins.PluginInfo(name, name), lambda plugin=plugin: plugin)
        assert loaded.infos[name].error is None
    return Registry(loaded)


def folder(name: str) -> RecipeFolder:
    return RecipeFolder(name=name, path=Path("."))


def test_providers_are_called_once_and_in_name_order() -> None:
    calls: list[str] = []

    def provider(name: str):
        def loong_recipes():
            calls.append(name)
            return (folder(f"{name}{number}") for number in (1, 2))

        return {"loong_recipes": loong_recipes}

    found = registry(zeta=provider("zeta"), alpha=provider("alpha"))
    assert calls == []
    assert list(found.table("recipes")) == ["alpha1", "alpha2", "zeta1", "zeta2"]
    assert found.get("recipes", "zeta2").name == "zeta2"
    assert calls == ["alpha", "zeta"]
    assert found.owner("recipes", "zeta1").startswith("'zeta'")


def test_a_miss_names_the_nearest_all_and_the_broken() -> None:
    def broken():
        raise ModuleNotFoundError("No module named 'gone'")

    found = registry(
        mine={"loong_model_families": lambda: [family("qwen3"), family("llama")]},
        bad={"loong_model_families": broken},
    )
    with pytest.raises(NotFound) as error:
        found.get("model_families", "qwen_3")
    text = str(error.value)
    for part in ("'qwen_3'", "Did you mean 'qwen3'?", "llama, qwen3", "bad (", "No module named 'gone'"):
        assert part in text
    assert "bad" in found.plugins.failed


@pytest.mark.parametrize("wrong", ["a text", [family("x")], folder("alone"), 3])
def test_a_wrong_descriptor_names_plugin_hook_and_type(wrong: Any) -> None:
    found = registry(mine={"loong_recipes": lambda: wrong})
    if isinstance(wrong, RecipeFolder):
        assert "alone" in found.table("recipes")  # one descriptor instead of a list of one is understood
        return
    with pytest.raises(PluginError, match=r"'mine'.*loong_recipes.*RecipeFolder.*returned"):
        found.table("recipes")


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_descriptor_needs_a_name(name: Any) -> None:
    found = registry(mine={"loong_recipes": lambda: [folder(name)]})
    with pytest.raises(PluginError, match="'mine'.*name"):
        found.table("recipes")


def test_a_duplicate_names_both_owners() -> None:
    found = registry(one={"loong_recipes": lambda: [folder("same")]}, two={"loong_recipes": lambda: [folder("same")]})
    with pytest.raises(PluginError, match=r"'same'.*'one'.*'two'.*LOONG_PLUGINS"):
        found.table("recipes")
    twice = registry(one={"loong_recipes": lambda: [folder("same"), folder("same")]})
    with pytest.raises(PluginError, match=r"twice by plugin 'one'"):
        twice.table("recipes")


def test_ops_may_share_a_name_across_ops_only() -> None:
    rows = [OpImpl(op=op, name="mine", target="a:b") for op in ("attention", "rms_norm")]
    found = registry(mine={"loong_ops": lambda: rows})
    assert {"attention.mine", "rms_norm.mine"} <= set(found.table("ops"))
    with pytest.raises(PluginError, match="attention.mine"):
        registry(mine={"loong_ops": lambda: [rows[0], rows[0]]}).table("ops")


def test_family_by_architecture() -> None:
    found = registry(mine={"loong_model_families": lambda: [family("llama", "LlamaForCausalLM"), family("old")]})
    assert found.family_for({"architectures": ["LlamaForCausalLM", "x"]}).name == "llama"
    with pytest.raises(Unsupported, match=r"LlamaForCausallm.*Did you mean 'LlamaForCausalLM'.*llama \(Llama"):
        found.family_for({"architectures": ["LlamaForCausallm"]})
    for config in ({}, {"architectures": []}, {"architectures": "Llama"}, {"architectures": None}):
        with pytest.raises(Unsupported, match="model.family"):
            found.family_for(config)


def test_events_reach_plugins_and_name_the_guilty() -> None:
    seen: list[Any] = []

    def good(run, metrics):
        seen.append((run, metrics))

    def bad(run):
        raise ZeroDivisionError("oops")

    found = registry(good={"loong_step_end": good}, guilty={"loong_run_start": bad})
    found.events.step_end("run", {"loss": 1.0})  # type: ignore[arg-type]
    assert seen == [("run", {"loss": 1.0})]
    with pytest.raises(RunError, match=r"'guilty'.*loong_run_start.*ZeroDivisionError: oops"):
        found.events.run_start(None)  # type: ignore[arg-type]
    for call in (
        lambda: found.events.model_built([], None),  # type: ignore[arg-type]
        lambda: found.events.checkpoint_saved(None, Path()),  # type: ignore[arg-type]
        lambda: found.events.run_end(None, None),  # type: ignore[arg-type]
    ):
        call()


def test_a_users_error_in_a_hook_stays_one() -> None:
    def refuse(recipe, cluster):
        raise UserError("no")

    found = registry(mine={"loong_validate": refuse})
    with pytest.raises(UserError, match="^no$"):
        found.validate(None, None)  # type: ignore[arg-type]


def test_validate_flattens_and_the_first_planner_wins() -> None:
    found = registry(
        a={"loong_validate": lambda recipe: ["one"], "loong_choose_planner": lambda: "mine"},
        b={"loong_validate": lambda: None},
        c={"loong_validate": lambda cluster: (text for text in ("two", "three"))},
    )
    assert sorted(found.validate(None, None)) == ["one", "three", "two"]  # type: ignore[arg-type]
    assert found.choose_planner(None, None) == "mine"  # type: ignore[arg-type]


def test_a_plugin_that_cannot_add_commands_does_not_stop_the_command_line() -> None:
    def bad(group):
        raise ImportError("nothing here")

    added: list[Any] = []
    found = registry(a={"loong_cli_commands": bad}, b={"loong_cli_commands": lambda group: added.append(group)})
    found.add_commands("app")
    assert added == ["app"]
    assert "nothing here" in found.plugins.infos["a"].reason()


@pytest.mark.parametrize(
    ("ref", "text"),
    [
        ("no_colon", "malformed"),
        (":x", "malformed"),
        ("loong_core.errors:", "malformed"),
        ("a_module_nobody_has:x", "No module named"),
        ("loong_core.errors:Nothing", "Nothing"),
        ("loong_core.errors:UserError.nothing", "nothing"),
    ],
)
def test_a_reference_that_does_not_resolve(ref: str, text: str) -> None:
    with pytest.raises(PluginError, match=text) as error:
        resolve(ref, "family x")
    assert "family x" in str(error.value)


def test_resolve() -> None:
    assert resolve("loong_core.errors:UserError") is UserError
    assert resolve("loong_core.errors:UserError.mro")()[0] is UserError
