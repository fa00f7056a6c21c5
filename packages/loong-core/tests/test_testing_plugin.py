"""`PluginContract` finds what it promises to find: each kind of fault is planted in a real plugin file once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from loong_core import hookspecs
from loong_core.testing import PluginContract
from loong_core.testing.plugin import names_of, references_of, signature_problems
from loong_core.types import Backend, OpImpl, RecipeFolder

HEADER = "from loong_core import Backend, DataSource, hookimpl\n"
SOURCE = "    return [DataSource(name={name!r}, reader={reader!r}, check='json:loads')]\n"


def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> PluginContract:
    """The contract applied to a single-file plugin."""
    path = tmp_path / f"{name}.py"
    path.write_text(HEADER + text)
    monkeypatch.setenv("LOONG_PLUGIN_FILES", str(path))
    return type(f"Test{name}", (PluginContract,), {"plugin": name})()


def hook(name: str = "acme", reader: str = "json:load", before: str = "") -> str:
    return f"@hookimpl\ndef loong_data_sources():\n{before}" + SOURCE.format(name=name, reader=reader)


def test_sound_plugin_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = suite(tmp_path, monkeypatch, "sound_one", hook())
    for name in [name for name in dir(contract) if name.startswith("test_")]:
        getattr(contract, name)()


@pytest.mark.parametrize(
    ("number", "text", "test", "message"),
    [
        (1, "import no_such_module\n", "test_plugin_loads", "no_such_module"),
        (2, "@hookimpl\ndef loong_modle_families():\n    return []\n", "test_plugin_loads", "loong_model_families"),
        (3, "", "test_plugin_loads", "implements no hook"),
        (4, hook(name="Acme-One"), "test_names_are_lower_snake", "Acme-One"),
        (5, hook(reader="json:no_such_function"), "test_references_resolve", "no_such_function"),
        (6, hook(before="    import torch\n"), "test_providers_import_no_tensor_library", "torch"),
        (7, "@hookimpl\ndef loong_step_end(run, metrics: list):\n    pass\n", "test_hooks_match_the_specs", "metrics"),
    ],
)
def test_each_fault_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, text: str, test: str, message: str
) -> None:
    contract = suite(tmp_path, monkeypatch, f"faulty_{number}", text)
    with pytest.raises(AssertionError, match=message):
        getattr(contract, test)()


def test_reference_that_needs_absent_hardware_can_be_excused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = suite(tmp_path, monkeypatch, "needs_vendor", hook(reader="vendor_runtime:read"))
    with pytest.raises(AssertionError, match="vendor_runtime"):
        contract.test_references_resolve()
    type(contract).optional_modules = frozenset({"vendor_runtime"})
    contract.test_references_resolve()


def families() -> list[Any]:
    return []


def wrong_return() -> dict[str, int]:
    return {}


def renamed(recipes: Any, cluster: Any) -> Iterable[str]:
    return ()


def test_signatures_are_compared_by_meaning() -> None:
    families.__annotations__["return"] = "list[loong_core.ModelFamily]"
    assert signature_problems(hookspecs.loong_model_families, families) == []
    assert "annotated to return" in signature_problems(hookspecs.loong_model_families, wrong_return)[0]
    problems = signature_problems(hookspecs.loong_validate, renamed)
    assert len(problems) == 2 and "no argument 'recipes'" in problems[0] and "'cluster'" in problems[1]


def test_fields_are_read_from_the_descriptor() -> None:
    backend = Backend(
        name="a",
        device_type="cpu",
        collective="gloo",
        probe="m:p",
        setup="m:s",
        layer_provider="m:l",
        capabilities=frozenset({"bf16"}),
    )
    assert references_of(backend) == ["m:p", "m:s", "m:l"]
    assert names_of(backend) == ["a", "bf16"]
    assert names_of(OpImpl(op="rms_norm", name="fast", target="m:f")) == ["fast", "rms_norm"]
    assert references_of(RecipeFolder(name="a", path=Path())) == []
