"""The contract of a precision policy: the formats it names are the ones in memory, and training stays close to fp32."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from loong_core.errors import UserError
from loong_core.plugins import load
from loong_core.recipe_load import load as load_recipe
from loong_core.registry import Registry
from loong_core.testing import tiny
from loong_core.testing.contract import Contract
from loong_core.testing.ranks import run_ranks
from loong_core.types import PrecisionPolicy
from loong_core.validate import prepare

STEPS = 5
DTYPES = ("parameters", "activations", "gradients", "master", "optimizer_state")


class PrecisionContract(Contract):
    """Set `policy`, and a `family` with a tiny `config` (a config.json). `drift` bounds the relative difference of the
    loss from the fp32 run over a few steps; `backend` is where it is tried."""

    required: ClassVar[tuple[str, ...]] = ("policy", "family", "config")
    policy: ClassVar[str]
    family: ClassVar[str]
    config: ClassVar[Mapping[str, Any]]
    backend: ClassVar[str] = "cpu"
    drift: ClassVar[float] = 0.02

    @classmethod
    def descriptor(cls) -> PrecisionPolicy:
        """The policy itself."""
        return Registry(load()).table("precision_policies")[cls.policy]

    @classmethod
    def recipe(cls, policy: str) -> dict[str, Any]:
        """A tiny run under `policy`, at a learning rate that lets the loss fall without amplifying rounding."""
        return tiny.settings(cls.family, cls.config, precision=policy, backend=cls.backend, optim={"lr": 1e-3})

    @pytest.fixture(scope="class")
    @classmethod
    def measured(cls, tmp_path_factory: pytest.TempPathFactory) -> Any:
        """Formats and losses under the policy."""
        return run_ranks(1, _measure, cls.recipe(cls.policy), tmp_path_factory.mktemp("policy"))[0]

    def test_names_are_torch_dtypes(self) -> None:
        """Every format it names exists in torch."""
        import torch

        named = {name: getattr(self.descriptor(), name) for name in DTYPES}
        wrong = {
            name: value for name, value in named.items() if not isinstance(getattr(torch, value, None), torch.dtype)
        }
        assert not wrong, f"no torch dtypes: {wrong}"

    def test_missing_capability_is_named(self, tmp_path: Path) -> None:
        """The backend has every capability it needs; one without is refused before a run, naming them."""
        needs = self.descriptor().needs
        backend = Registry(load()).table("backends")[self.backend]
        assert needs <= backend.capabilities, f"{self.backend} lacks {sorted(needs - backend.capabilities)}"
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(self.recipe(self.policy)))
        bare = _BareRegistry(load())
        if not needs:
            prepare(load_recipe(str(path), [], bare), bare, purpose="plan")
            return
        with pytest.raises(UserError) as caught:
            prepare(load_recipe(str(path), [], bare), bare, purpose="plan")
        assert all(need in str(caught.value) for need in needs)

    def test_formats_are_honoured(self, measured: Any) -> None:
        """Parameters, gradients, master weights and optimizer state have the dtypes it names; the loss is finite."""
        policy = self.descriptor()
        assert measured["parameters"] == [f"torch.{policy.parameters}"]
        assert measured["gradients"] == [f"torch.{policy.gradients}"]
        assert measured["output"] == f"torch.{policy.activations}"
        assert measured["master"] == [f"torch.{policy.master}"]
        assert measured["optimizer_state"] == [f"torch.{policy.optimizer_state}"]

    def test_training_stays_close_to_fp32(self, measured: Any, tmp_path: Path) -> None:
        """Every loss of a few steps lies within `drift` of the fp32 run."""
        exact = run_ranks(1, _losses, self.recipe("fp32"), tmp_path)[0]
        assert tiny.worst(measured["losses"], exact) <= self.drift, f"{measured['losses']} against {exact}"
        assert exact[0] != exact[STEPS - 1], "the fp32 run did not move"


class _BareRegistry(Registry):
    """The installed plugins, with backends that have no capability."""

    def table(self, kind: Any) -> Any:
        found = super().table(kind)
        if kind != "backends":
            return found
        return {name: dataclasses.replace(backend, capabilities=frozenset()) for name, backend in found.items()}


def _losses(rank: int, recipe: Mapping[str, Any], folder: Path) -> list[float]:
    return tiny.losses(recipe, folder, STEPS)


def _measure(rank: int, recipe: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Formats as they are in memory; master weights as what they are to the update, whatever bits they are kept in."""
    import torch

    from loong_core.parallel.adamw import MASTER, MOMENTS, ShardedAdamW

    run, engine = tiny.start(recipe, folder)
    losses = []
    for step in range(STEPS):
        losses.append(engine.forward_backward(tiny.batches(run, step), step)["loss"])
        gradients = [p.gradient for p in engine.parameters()]
        engine.step(run.recipe.optim.lr)
    losses.append(engine.evaluate(tiny.batches(run, STEPS))["loss"])
    (optimizer,) = [item for item in gc.get_objects() if isinstance(item, ShardedAdamW)]
    shards, everything = optimizer.shards(), slice(None)
    masters = [shard.parameter if shard.remainder is None else shard.read(MASTER, everything) for shard in shards]
    with torch.no_grad():
        # With targets a model answers with their losses, in float32.
        inputs = {name: tensor for name, tensor in tiny.batches(run)[0].items() if name != "targets"}
        output = engine.modules[-1](inputs)
    return {
        "losses": losses,
        "parameters": _dtypes(p.tensor for p in engine.parameters()),
        "gradients": _dtypes(gradients),
        "output": str(output.dtype),
        "master": _dtypes(masters),
        "optimizer_state": _dtypes(shard.read(name, everything) for shard in shards for name in MOMENTS),
    }


def _dtypes(tensors: Any) -> list[str]:
    import torch

    return sorted({str(tensor.dtype) for tensor in tensors if isinstance(tensor, torch.Tensor)})
