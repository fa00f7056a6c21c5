"""The suites' own safety: forgotten attributes and silent overrides are errors when the class is defined."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from loong_core.testing import Contract


class Example(Contract):
    """A suite of one test."""

    required = ("name",)

    def test_kept(self) -> None:
        """Holds."""


def empty(self: object) -> None:
    """A test that passes."""


def fresh() -> types.FunctionType:
    """A copy of `empty` that a mark can be put on without touching the others."""
    return types.FunctionType(empty.__code__, globals(), "empty")


def test_use_without_its_attribute_is_refused() -> None:
    with pytest.raises(TypeError, match=r"has to set name; see Example"):
        type("TestForgetful", (Example,), {})


def test_silent_override_is_refused() -> None:
    for value in (empty, None, pytest.mark.xfail(fresh())):
        with pytest.raises(TypeError, match=r"test_kept overrides a test of the contract.*xfail\(reason"):
            type("TestSilent", (Example,), {"name": "x", "test_kept": value})


def test_conditional_xfail_is_refused() -> None:
    marked = pytest.mark.xfail(False, reason="only sometimes")(fresh())
    with pytest.raises(TypeError, match="overrides"):
        type("TestConditional", (Example,), {"name": "x", "test_kept": marked})


def test_xfail_with_a_reason_and_further_tests_are_fine() -> None:
    marked = pytest.mark.xfail(reason="the device has no float64")(fresh())
    made = type("TestHonest", (Example,), {"name": "x", "test_kept": marked, "test_more": empty})
    assert issubclass(made, Example)


def test_override_of_an_override_is_refused_too() -> None:
    middle = type("Middle", (Example,), {})
    with pytest.raises(TypeError, match="overrides"):
        type("TestLow", (middle,), {"name": "x", "test_kept": empty})


def test_every_suite_is_exported_and_the_package_alone_imports_no_pytest() -> None:
    script = (
        "import sys, loong_core.testing as t; assert 'pytest' not in sys.modules; assert 'torch' not in sys.modules\n"
        "for name in t.__all__: assert issubclass(getattr(t, name), t.Contract), name"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        import loong_core.testing

        _ = loong_core.testing.Nothing
