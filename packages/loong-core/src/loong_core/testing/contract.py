"""What all contract suites share: a suite checks its own use when the subclass is defined, before any test runs."""

from __future__ import annotations

from typing import Any, ClassVar


class Contract:
    """Base of the suites. A subclass whose name starts with `Test` is a use of the suite.

    Two mistakes are errors at definition: an attribute of `required` that is not set, and a contract test that is
    overridden (or set to None) without `@pytest.mark.xfail(reason=...)`, because it would pass in silence.
    """

    required: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            inherited = any(name in vars(base) for base in cls.__mro__[1:] if issubclass(base, Contract))
            if name.startswith("test_") and inherited and not _expected_to_fail(value):
                raise TypeError(
                    f"{cls.__qualname__}.{name} overrides a test of the contract. Keep the contract's test, or mark "
                    'the new one @pytest.mark.xfail(reason="..."), so that every report shows what is not kept and why.'
                )
        missing = [name for name in cls.required if not hasattr(cls, name)]
        if cls.__name__.startswith("Test") and missing:
            raise TypeError(f"{cls.__qualname__} has to set {', '.join(missing)}; see {cls.__mro__[1].__qualname__}.")


def _expected_to_fail(test: object) -> bool:
    """Whether `test` is marked xfail with a reason, without a condition that may switch the mark off."""
    marks = getattr(test, "pytestmark", [])
    return any(mark.name == "xfail" and not mark.args and mark.kwargs.get("reason") for mark in marks)
