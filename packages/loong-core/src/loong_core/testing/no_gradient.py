"""What the suites of ops without gradients share; each of these takes arguments of its own kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

from loong_core.ops import choose
from loong_core.plugins import load
from loong_core.registry import Registry, resolve
from loong_core.testing.contract import Contract
from loong_core.types import OpRequest


class NoGradientContract(Contract):
    """Set `implementation`. `backend` and `device` are where it runs; `op` is the suite's."""

    required: ClassVar[tuple[str, ...]] = ("implementation",)
    op: ClassVar[str]
    implementation: ClassVar[str]
    backend: ClassVar[str] = "cpu"
    device: ClassVar[str] = "cpu"

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The implementation."""
        return resolve(Registry(load()).get("ops", f"{self.op}.{self.implementation}").target)  # type: ignore[no-any-return]

    def test_can_be_chosen(self) -> None:
        """A recipe may name it, whatever the run's activations are."""
        for dtype in ("float32", "bfloat16"):
            request = OpRequest(backend=self.backend, dtype=dtype, degrees={"dp": 1}, fields={})
            chosen = choose(Registry(load()).ops(), request, {self.op: self.implementation})
            assert chosen[self.op].name == self.implementation
