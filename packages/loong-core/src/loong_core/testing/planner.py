"""The contract of a parallel planner: `plan` is pure and reports all that is wrong; layouts train the same model."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pytest

from loong_core.errors import RecipeError
from loong_core.plugins import load
from loong_core.recipe import Recipe
from loong_core.recipe_load import from_mapping
from loong_core.registry import Registry, resolve
from loong_core.testing import tiny
from loong_core.testing.contract import Contract
from loong_core.testing.ranks import run_ranks
from loong_core.types import Cluster, ModelShape, ParallelPlan, ParallelPlanner

if TYPE_CHECKING:
    from loong_core.types import PrecisionPolicy

STEPS = 3
TOLERANCE = 5e-5
"""Relative difference of a loss in float32 between one rank and two, over a few steps."""


class Impossible(NamedTuple):
    """A request that no plan can serve, and the number that its message has to name."""

    changes: Mapping[str, Mapping[str, Any]]
    number: str


class PlannerContract(Contract):
    """Set `planner`, and a `family` with a tiny `config` (a config.json) that fits every layout on two ranks.

    `layouts` are `parallel` sections; `impossible` are requests that must be refused by name, the first two of them
    also in one recipe (so neither may hide the other).
    """

    required: ClassVar[tuple[str, ...]] = ("planner", "family", "config")
    planner: ClassVar[str]
    family: ClassVar[str]
    config: ClassVar[Mapping[str, Any]]
    layouts: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    worlds: ClassVar[Sequence[int]] = (1, 2, 8)
    impossible: ClassVar[Sequence[Impossible]] = (
        Impossible({"parallel": {"tp": 7}}, "7"),
        Impossible({"parallel": {"layout": [99]}}, "99"),
        Impossible({"data": {"global_batch": 9, "micro_batch": 2}}, "9"),
    )

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per layout, world, and impossible request."""
        for name in ("layout", "world", "request_"):
            values = {"layout": self.layouts, "world": self.worlds, "request_": self.impossible}[name]
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=[_label(value) for value in values])

    def test_plan_is_deterministic(self, world: int) -> None:
        """Equal arguments give equal plans, and arguments are left as they are."""
        shape, recipe, cluster, policy = self._arguments(world)
        before = recipe.model_copy(deep=True)
        assert self._plan(shape, recipe, cluster, policy) == self._plan(shape, recipe, cluster, policy)
        assert recipe == before

    def test_plan_needs_no_tensor_library(self) -> None:
        """Planning imports no torch: it runs on a laptop, in the parent process."""
        module = self._descriptor().plan.partition(":")[0]
        script = f"import sys, {module}; print('torch' in sys.modules or 'megatron' in sys.modules)"
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert result.stdout.strip() == "False", result.stdout + result.stderr

    def test_products_equal_the_world(self, world: int) -> None:
        """Degrees multiply to the number of ranks, for dense layers and for experts; stages hold every layer once."""
        shape, recipe, cluster, policy = self._arguments(world)
        plan = self._plan(shape, recipe, cluster, policy)
        assert plan.planner == self.planner and plan.world == world
        assert plan.tp * plan.pp * plan.cp * plan.dp == world
        assert world % (plan.etp * plan.ep * plan.pp) == 0
        assert len(plan.stages) == plan.pp * plan.vpp
        assert [layer for stage in plan.stages for layer in stage] == list(range(shape.layers))
        assert plan.micro_batch * plan.micro_batches * plan.dp == recipe.data.global_batch

    def test_plan_is_resolved_and_counts_exactly(self) -> None:
        """No `auto` is left, parameters are those of the shape, and the memory estimate has a total."""
        shape, recipe, cluster, policy = self._arguments(1)
        plan = self._plan(shape, recipe, cluster, policy)
        assert "auto" not in [getattr(plan, field.name) for field in dataclasses.fields(plan)]
        assert plan.parameters == sum(spec.size for spec in shape.parameters)
        assert plan.memory["total"] > 0 and plan.flops_per_step > 0

    def test_impossible_request_names_its_number(self, request_: Impossible) -> None:
        """What cannot be is refused with the number the user wrote."""
        assert request_.number in self._refusal([request_])

    def test_all_problems_at_once(self) -> None:
        """The first two impossible requests in one recipe are both reported."""
        together = self.impossible[:2]
        text = self._refusal(together)
        missing = [request.number for request in together if request.number not in text]
        assert not missing, f"not named: {missing}, in: {text}"

    def test_two_ranks_train_as_one(self, layout: Mapping[str, Any], single: list[float], tmp_path: Path) -> None:
        """Losses of a few steps on two ranks are those of one process, and the same on both ranks."""
        recipe = tiny.settings(self.family, self.config, parallel={"planner": self.planner, **layout})
        found = run_ranks(2, _losses, recipe, tmp_path)
        assert found[0] == found[1], "the ranks report different losses"
        assert tiny.worst(found[0], single) <= TOLERANCE, f"{found[0]} on two ranks, {single} in one process"

    @pytest.fixture(scope="class")
    @classmethod
    def single(cls, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
        """The losses of one process."""
        recipe = tiny.settings(cls.family, cls.config, parallel={"planner": cls.planner})
        found: list[float] = run_ranks(1, _losses, recipe, tmp_path_factory.mktemp("single"))[0]
        return found

    # ------------------------------------------------------------------------------------------------- helpers
    def _descriptor(self) -> ParallelPlanner:
        return Registry(load()).table("parallel_planners")[self.planner]

    def _arguments(
        self, world: int, changes: Sequence[Mapping[str, Mapping[str, Any]]] = ()
    ) -> tuple[ModelShape, Recipe, Cluster, PrecisionPolicy]:
        registry = Registry(load())
        family = registry.table("model_families")[self.family]
        mapping = tiny.settings(self.family, self.config)
        mapping["data"] = {**mapping["data"], "global_batch": 16}
        for change in ({"parallel": {"planner": self.planner}}, *changes):
            for section, values in change.items():
                mapping[section] = {**mapping.get(section, {}), **values}
        shape = resolve(family.describe)(family, self.config)
        cluster = Cluster(devices_per_node=world, memory=2**34, backend="cpu", capabilities=frozenset({"bf16"}))
        return shape, from_mapping(mapping), cluster, registry.table("precision_policies")["fp32"]

    def _plan(self, *arguments: Any) -> ParallelPlan:
        plan: ParallelPlan = resolve(self._descriptor().plan)(*arguments)
        return plan

    def _refusal(self, requests: Sequence[Impossible]) -> str:
        with pytest.raises(RecipeError) as caught:
            self._plan(*self._arguments(8, [request.changes for request in requests]))
        return str(caught.value)


def _losses(rank: int, recipe: Mapping[str, Any], folder: Path) -> list[float]:
    return tiny.losses(recipe, folder, STEPS)


def _label(value: Any) -> str:
    if isinstance(value, Impossible):
        value = {key: inner for section in value.changes.values() for key, inner in section.items()}
    if isinstance(value, Mapping):
        return "-".join(f"{key}{inner}" for key, inner in value.items()) or "default"
    return str(value)
