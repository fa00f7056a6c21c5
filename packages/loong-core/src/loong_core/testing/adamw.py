"""The contract of the op `adamw`: it writes in place and has no gradient, hence a suite of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from loong_core.op_declarations import DECLARATIONS
from loong_core.testing.no_gradient import NoGradientContract

if TYPE_CHECKING:
    from torch import Tensor

SETTINGS: dict[str, Any] = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1}
STEPS = 3
GUARD = 8
"""Elements before and after every tensor that must stay as they are; the odd cases make it 3, a misaligned start."""


@dataclass(frozen=True)
class _State:
    """What one call reads and writes: every tensor lies inside a larger one whose other elements are guarded."""

    tensors: dict[str, Tensor | None]
    wholes: dict[str, Tensor]
    guard: int

    def bits(self) -> dict[str, Tensor]:
        """A copy of everything, guards included, as integers: NaN compare equal."""
        import torch

        return {name: whole.clone().view(torch.uint8) for name, whole in self.wholes.items()}

    def guards(self) -> list[Tensor]:
        return [part for whole in self.wholes.values() for part in (whole[: self.guard], whole[-self.guard :])]


class AdamWContract(NoGradientContract):
    """Set `implementation`. `backend` and `device` are where it runs.

    The measure is the declaration's: largest |difference| / largest |definition in float64|, for the master weights and
    both moments, after a few steps.
    """

    op: ClassVar[str] = "adamw"
    sizes: ClassVar[tuple[int, ...]] = (1, 5, 1000, 4099)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per size and kind of parameter; "narrow gradient": a remainder, and a gradient in bfloat16."""
        if "size" in metafunc.fixturenames:
            metafunc.parametrize("size", self.sizes)
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", ("float32", "remainder", "bfloat16", "narrow gradient"))

    def test_update(self, size: int, kind: str) -> None:
        """Master weights and moments of a few steps agree with the definition, and nothing beside them is written."""
        state = self._draw(size, kind, guard=3 if size % 2 else GUARD)
        before = [guard.clone() for guard in state.guards()]
        exact = {name: tensor.double().cpu() for name, tensor in self._wide(state).items()}
        for step in range(1, STEPS + 1):
            self._call(state, step)
            if kind == "bfloat16":  # rounded at every step: the definition goes on from what was rounded
                if step == 1:
                    self._compare(state, _defined(exact, state, step), 2**-8)
                exact = {name: tensor.double().cpu() for name, tensor in self._wide(state).items()}
            else:
                exact = _defined(exact, state, step)
        self._compare(state, exact, DECLARATIONS["adamw"].tolerances["float32"])
        assert all(map(_same, state.guards(), before)), "it wrote outside its tensors"

    def test_parameter_is_the_rounded_master(self, size: int) -> None:
        """What is exported is the nearest bfloat16 of the master weight, and the pair is the one `split` makes."""
        from loong_core.references.adamw import join, split

        state = self._draw(size, "remainder")
        self._call(state, 1)
        parameter, remainder = state.tensors["parameter"], state.tensors["remainder"]
        assert parameter is not None and remainder is not None
        rounded, low = split(join(parameter, remainder))
        assert _same(parameter, rounded) and _same(remainder, low)

    def test_small_updates_add_up(self) -> None:
        """Updates far below half a step of bfloat16 are kept in the remainder."""
        import torch

        from loong_core.references.adamw import join

        state = self._draw(64, "remainder")
        for name, value in (("parameter", 1), ("gradient", 1), ("exp_avg", 0), ("exp_avg_sq", 0), ("remainder", 0)):
            state.tensors[name].fill_(value)  # type: ignore[union-attr]
        for step in range(1, 11):
            self._call(state, step, lr=1e-5, decay=0.0, scale=torch.ones(()))
        master = join(state.tensors["parameter"], state.tensors["remainder"])  # type: ignore[arg-type]
        assert bool(((1.0 - master) / 1e-4 - 1.0).abs().max() < 2e-2)

    def test_scale_that_is_not_finite_writes_nothing(self, kind: str) -> None:
        """A gradient norm that overflowed or is NaN costs no weight and no moment, whatever the gradients hold."""
        import torch

        state = self._draw(77, kind)
        state.tensors["gradient"][:7] = float("nan")  # type: ignore[index]
        before = state.bits()
        for value in ("nan", "inf", "-inf"):
            self._call(state, 1, scale=torch.tensor(float(value)))
        after = state.bits()
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_learning_rate_zero_keeps_every_bit(self, kind: str) -> None:
        """At lr 0 the moments move, the parameters do not."""
        state = self._draw(77, kind)
        before = state.bits()
        self._call(state, 1, lr=0.0)
        after = state.bits()
        assert all(_same(after[name], before[name]) for name in ("parameter", "remainder") if name in before)
        assert not _same(after["exp_avg"], before["exp_avg"])

    def test_gradient_stays_and_bits_repeat(self, kind: str) -> None:
        """It does not write into the gradient, and the same call gives the same bits."""
        one, other = self._draw(1000, kind), self._draw(1000, kind)
        before = one.bits()["gradient"]
        self._call(one, 2)
        self._call(other, 2)
        assert _same(one.bits()["gradient"], before)
        assert all(_same(*pair) for pair in zip(one.bits().values(), other.bits().values(), strict=True))

    def test_nothing_to_update(self, kind: str) -> None:
        """Tensors without elements are fine."""
        self._call(self._draw(0, kind), 1)

    # ------------------------------------------------------------------------------------------------- helpers
    def _draw(self, size: int, kind: str, guard: int = GUARD) -> _State:
        """Parameters of very different sizes, so that remainders matter, and moments as after some steps."""
        import torch

        from loong_core.references.adamw import split

        generator = torch.Generator().manual_seed(size)

        def normal() -> Tensor:
            return torch.randn(size + 2 * guard, generator=generator)

        master = normal() * 10.0 ** (normal() * 2).clamp(-6, 3)
        wholes = {"gradient": normal(), "exp_avg": normal() * 0.1, "exp_avg_sq": normal().square() * 0.1}
        if kind == "narrow gradient":
            wholes["gradient"] = wholes["gradient"].bfloat16()
        if kind in ("remainder", "narrow gradient"):
            wholes["parameter"], wholes["remainder"] = split(master)
        else:
            wholes["parameter"] = master.to(getattr(torch, kind))
        wholes = {name: whole.to(self.device) for name, whole in wholes.items()}
        tensors: dict[str, Tensor | None] = {name: whole[guard : guard + size] for name, whole in wholes.items()}
        tensors.setdefault("remainder", None)
        return _State(tensors, wholes, guard)

    def _call(self, state: _State, step: int, **changes: Any) -> None:
        scale = changes.pop("scale", _scale()).to(self.device)
        names = ("parameter", "gradient", "exp_avg", "exp_avg_sq", "remainder")
        self.function(*(state.tensors[name] for name in names), **(SETTINGS | changes), step=step, scale=scale)

    @staticmethod
    def _wide(state: _State) -> dict[str, Tensor]:
        """Master weights and moments in float32."""
        from loong_core.references.adamw import join

        parameter, remainder = state.tensors["parameter"], state.tensors["remainder"]
        assert parameter is not None
        master = parameter.float() if remainder is None else join(parameter, remainder)
        return {"master": master, **{name: state.tensors[name].float() for name in ("exp_avg", "exp_avg_sq")}}  # type: ignore[union-attr]

    def _compare(self, state: _State, exact: dict[str, Tensor], limit: float) -> None:
        for name, found in self._wide(state).items():
            off = float((found.cpu().double() - exact[name]).abs().max() / exact[name].abs().max())
            assert off <= limit, f"{name} is off by {off}, allowed is {limit}"


def _scale() -> Tensor:
    import torch

    return torch.tensor(0.37, dtype=torch.float32)


def _defined(before: dict[str, Tensor], state: _State, step: int) -> dict[str, Tensor]:
    """Algorithm 2 of Loshchilov and Hutter in float64."""
    gradient = state.tensors["gradient"]
    assert gradient is not None
    scaled = gradient.cpu().double() * _scale().double()
    one, two = SETTINGS["betas"]
    first = one * before["exp_avg"] + (1 - one) * scaled
    second = two * before["exp_avg_sq"] + (1 - two) * scaled**2
    change = (first / (1 - one**step)) / ((second / (1 - two**step)).sqrt() + SETTINGS["eps"])
    master = before["master"] - SETTINGS["lr"] * (change + SETTINGS["decay"] * before["master"])
    return {"master": master, "exp_avg": first, "exp_avg_sq": second}


def _same(one: Tensor, other: Tensor) -> bool:
    import torch

    return bool(torch.equal(one, other))
