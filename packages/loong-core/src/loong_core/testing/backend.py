"""The contract of a hardware backend: asking is safe and cheap, and what it declares it can do, it does."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from loong_core.plugins import load
from loong_core.registry import Registry, resolve
from loong_core.testing import tiny
from loong_core.testing.contract import Contract
from loong_core.testing.plugin import HEAVY, LOWER_SNAKE
from loong_core.types import Backend, Probe

if TYPE_CHECKING:
    from loong_core.train.run import Run

CALL = """
import json, sys
from loong_core.registry import resolve
print(json.dumps(resolve(sys.argv[1])(*json.loads(sys.argv[2]))))
"""

STEPS = 6


class BackendContract(Contract):
    """Set `backend`, and a `family` with a tiny `config` (a config.json) to train one step of. Where the probe finds no
    device, the tests that need one are skipped with its reason.

    `demonstrations` maps a capability the core knows nothing of to a reference `f(run) -> None or what went wrong`,
    called in a worker of this backend.
    """

    required: ClassVar[tuple[str, ...]] = ("backend", "family", "config")
    backend: ClassVar[str]
    family: ClassVar[str]
    config: ClassVar[Mapping[str, Any]]
    precision: ClassVar[str] = "fp32"
    demonstrations: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def descriptor(cls) -> Backend:
        """The backend itself."""
        backend: Backend = Registry(load()).get("backends", cls.backend)
        return backend

    @pytest.fixture(scope="class")
    @classmethod
    def measured(cls, tmp_path_factory: pytest.TempPathFactory) -> Any:
        """What a worker of this backend tells of itself, in a process of its own."""
        backend = cls.descriptor()
        probe: Probe = resolve(backend.probe)()
        if probe.devices < 1:
            pytest.skip(f"backend {cls.backend} finds no device here: {probe.reason}")
        recipe = tiny.settings(
            cls.family, cls.config, backend=cls.backend, precision=cls.precision, launch={"devices": 1}
        )
        unknown = {name: cls.demonstrations.get(name) for name in sorted(backend.capabilities)}
        folder = tmp_path_factory.mktemp(cls.backend)
        environ = {**backend.env, **os.environ}
        return _call("loong_core.testing.backend:exercise", [recipe, str(folder), unknown], environ)

    def test_probe_is_safe_and_cheap(self) -> None:
        """It returns a `Probe` and never raises, also where no tool or library is found; it imports nothing heavy."""
        for environ in (dict(os.environ), {"PATH": "", "HOME": "/nonexistent", "LD_LIBRARY_PATH": ""}):
            found = _call("loong_core.testing.backend:ask", [self.descriptor().probe], environ)
            assert not found["error"], found["error"]
            assert not found["heavy"], f"the probe imported {', '.join(found['heavy'])}"
            assert found["devices"] > 0 or found["reason"], "no device and no reason"
            assert found["memory"] >= 0

    def test_descriptor_is_plain(self) -> None:
        """Environment and capabilities are texts; an unknown device has an unknown peak."""
        backend = self.descriptor()
        assert all(isinstance(text, str) for pair in backend.env.items() for text in pair)
        assert all(LOWER_SNAKE.fullmatch(name) for name in backend.capabilities)
        assert backend.device_type and backend.collective
        if backend.peak_flops is not None:
            assert resolve(backend.peak_flops)("no such device", "bfloat16") == 0.0

    def test_worker_runs_on_its_device(self, measured: Any) -> None:
        """`setup` returns a device of the declared type, and parameters live there."""
        assert measured["device"].split(":")[0] == self.descriptor().device_type
        assert measured["parameter_devices"] == [self.descriptor().device_type]

    def test_layer_provider(self, measured: Any) -> None:
        """It answers every question of megatron-core's `BackendSpecProvider`."""
        assert not measured["provider"], "\n".join(measured["provider"])

    def test_capabilities_are_shown(self, measured: Any) -> None:
        """Every declared capability is demonstrated by a small computation."""
        assert not measured["capabilities"], "\n".join(measured["capabilities"])

    def test_it_trains(self, measured: Any) -> None:
        """A few steps on one batch lower its loss, and every weight tensor receives a gradient."""
        losses = measured["losses"]
        assert losses[-1] < losses[0], f"the loss of one repeated batch went {losses}"
        assert measured["norm"] > 0
        assert not measured["still"], f"never moved: {measured['still']}"


def _call(ref: str, arguments: list[Any], environ: Mapping[str, str]) -> Any:
    """The JSON result of a function in a fresh interpreter that sees the same modules."""
    paths = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        [sys.executable, "-c", CALL, ref, json.dumps(arguments)],
        env={"OMP_NUM_THREADS": "1", **environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"{ref} failed:\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
    return json.loads(result.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------- in the fresh interpreter
def ask(probe: str) -> dict[str, Any]:
    """Call a probe and look at what it imported."""
    try:
        found = resolve(probe)()
        error = "" if isinstance(found, Probe) else f"it returned {type(found).__name__}, not Probe"
    except Exception as caught:
        found, error = Probe(devices=0), f"it raised {type(caught).__name__}: {caught}"
    heavy = [name for name in HEAVY if name in sys.modules]
    facts = found._asdict() if isinstance(found, Probe) else {}
    return {"error": error, "heavy": heavy, **facts}


def exercise(recipe: Mapping[str, Any], folder: str, capabilities: Mapping[str, str | None]) -> dict[str, Any]:
    """Train a few steps on one batch, and try every declared capability."""
    run, engine = tiny.start(recipe, Path(folder))
    devices = sorted({parameter.tensor.device.type for parameter in engine.parameters()})
    before = {p.spec.role: p.tensor.detach().clone() for p in engine.parameters()}
    losses, norm = [], 0.0
    for step in range(STEPS):
        losses.append(engine.forward_backward(tiny.batches(run), step)["loss"])
        norm = engine.step(run.recipe.optim.lr)
    still = [p.spec.role for p in engine.parameters() if bool((p.tensor == before[p.spec.role]).all())]
    shown = {name: _shown(name, ref, run) for name, ref in capabilities.items()}
    return {
        "device": run.device,
        "parameter_devices": devices,
        "provider": provider_problems(resolve(run.backend.layer_provider)(run.ops)),
        "capabilities": [f"{name}: {problem}" for name, problem in shown.items() if problem is not None],
        "losses": losses,
        "norm": norm,
        "still": still,
    }


def provider_problems(provider: Any) -> list[str]:
    """Which questions of megatron-core's `BackendSpecProvider` an object does not answer."""
    from megatron.core.models.backends import BackendSpecProvider

    problems = []
    for name, asked in inspect.getmembers(BackendSpecProvider, inspect.isfunction):
        if not getattr(asked, "__isabstractmethod__", False):
            continue
        answer = getattr(provider, name, None)
        if not callable(answer):
            problems.append(f"it has no method {name}")
            continue
        wanted = list(inspect.signature(asked).parameters.values())[1:]
        given = inspect.signature(answer).parameters
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in given.values())
        missing = [parameter.name for parameter in wanted if parameter.name not in given and not open_ended]
        if missing:
            problems.append(f"{name} takes no argument {', '.join(missing)}")
        elif not any(parameter.default is parameter.empty for parameter in wanted):
            answer()
    return problems


# ------------------------------------------------------------------------------------------------ capabilities
def _shown(name: str, ref: str | None, run: Run) -> str | None:
    """What went wrong in showing a capability; None when it was shown."""
    demonstrate: Callable[[Run], str | None] | None = KNOWN.get(name) if ref is None else resolve(ref)
    if demonstrate is None:
        return "nobody shows it. Name a function in `demonstrations` of the test."
    try:
        return demonstrate(run)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _matmul(dtype: str) -> Callable[[Run], str | None]:
    """A product and its gradient in `dtype`, close to the one in float64."""

    def demonstrate(run: Run) -> str | None:
        import torch

        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(16, 16, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
        moved = left.clone().to(run.device).requires_grad_()
        product = moved @ right.to(run.device)
        product.sum().backward()
        exact = left.double() @ right.double()
        difference = float((product.detach().cpu().double() - exact).abs().max() / exact.abs().max())
        if not difference < 2e-2 or product.dtype != getattr(torch, dtype):
            return f"a product is off by {difference:.1e} in {product.dtype}"
        return None if moved.grad is not None and bool(moved.grad.isfinite().all()) else "its gradient is not finite"

    return demonstrate


def _streams(run: Run) -> str | None:
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        result = torch.ones(4, device=run.device) * 2
    stream.synchronize()
    return None if result.sum().item() == 8 else "work on a second stream is wrong"


def _transformer_engine(run: Run) -> str | None:
    import torch
    import transformer_engine.pytorch as engine

    layer = engine.Linear(32, 32, params_dtype=torch.bfloat16, device=run.device)
    output = layer(torch.ones(16, 32, dtype=torch.bfloat16, device=run.device))
    return None if bool(output.isfinite().all()) else "a linear layer of it gives numbers that are not finite"


KNOWN: dict[str, Callable[[Run], str | None]] = {
    "bf16": _matmul("bfloat16"),
    "fp16": _matmul("float16"),
    "cuda_streams": _streams,
    "transformer_engine": _transformer_engine,
}
"""Capability -> how it is shown."""
