"""Initial weights: the same numbers however they are drawn, on whatever layout, device and number of threads."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loong_core.train import init
from loong_core.train.engine import LocalParameter
from loong_core.types import ParameterSpec
from loong_core.weights import shard

SEED, STD = 11, 0.02
PIECE = 64


class Parameters:
    """An engine that is nothing but parameters, cut `size` ways."""

    def __init__(self, parameters: Sequence[LocalParameter], rank: int = 0, size: int = 1) -> None:
        self._parameters, self._cut, self.changed = parameters, (rank, size), 0

    def parameters(self) -> Sequence[LocalParameter]:
        return self._parameters

    def cut(self, parameter: LocalParameter) -> tuple[int, int]:
        return self._cut

    def weights_changed(self) -> None:
        self.changed += 1


def expected(spec: ParameterSpec) -> Tensor:
    """The definition: one generator a tensor, the whole tensor in one go."""
    if spec.init != "normal":
        return torch.full(spec.shape, float(spec.init == "ones"))
    digest = hashlib.sha256(f"{SEED}/{spec.role}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    return torch.empty(spec.shape).normal_(0.0, STD, generator=generator)


def alone(spec: ParameterSpec, dtype: torch.dtype, device: str = "cpu") -> LocalParameter:
    return LocalParameter(spec, torch.full(spec.shape, torch.nan, dtype=dtype, device=device))


def stacked(dtype: torch.dtype, experts: int = 5, device: str = "cpu") -> list[LocalParameter]:
    owner = torch.full((experts, 9, 13), torch.nan, dtype=dtype, device=device)
    return [
        LocalParameter(
            ParameterSpec(role=f"layers.0.moe.experts.{i}.up", shape=(9, 13), expert=i), owner[i], owner, i * 117
        )
        for i in range(experts)
    ]


def model(dtype: torch.dtype, device: str = "cpu") -> list[LocalParameter]:
    specs = [
        ParameterSpec(role="norm", shape=(7,), init="ones"),
        ParameterSpec(role="bias", shape=(33,), init="zeros"),
        ParameterSpec(role="tiny", shape=(3, 5)),
        ParameterSpec(role="scalar", shape=()),
        ParameterSpec(role="nothing", shape=(0, 4)),
        ParameterSpec(role="embed", shape=(131, 17), place="first"),
    ]
    return [*stacked(dtype, device=device), *(alone(spec, dtype, device) for spec in specs)]


def require_expected(parameters: Sequence[LocalParameter]) -> None:
    """Every parameter holds its numbers, rounded to nearest even, and keeps what the rounding took."""
    for parameter in parameters:
        full, exact = expected(parameter.spec), parameter.take_exact()
        assert torch.equal(parameter.tensor.cpu(), full.to(parameter.tensor.dtype)), parameter.spec.role
        if parameter.tensor.dtype.itemsize < 4:
            assert exact is not None and torch.equal(exact.cpu(), full), parameter.spec.role
        else:
            assert exact is None


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "PIECE", PIECE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cores", [1, 3])
def test_values_are_those_of_one_draw(dtype: torch.dtype, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "threads", lambda processes: cores)
    parameters = model(dtype)
    engine = Parameters(parameters)
    init.initialise(engine, SEED, STD)  # type: ignore[arg-type]
    require_expected(parameters)
    assert engine.changed == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_do_not_depend_on_buffers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to a device: through a buffer that is used again and again."""
    monkeypatch.setattr(init, "_in_place", lambda into, kept: None)
    parameters = model(dtype)
    init.initialise(Parameters(parameters), SEED, STD)  # type: ignore[arg-type]
    require_expected(parameters)


@pytest.mark.parametrize("numbers", [0, 1, 15, 16, 17, 63, 64, 65, 79, 80, 81, 127, 128, 143, 144, 145, 1000, 1024])
def test_pieces_continue_the_stream(numbers: int) -> None:
    whole = torch.empty(numbers).normal_(0.0, STD, generator=torch.Generator().manual_seed(1))
    parts, generator = torch.empty(numbers), torch.Generator().manual_seed(1)
    ranges = list(init._pieces(numbers))
    for begin, end in ranges:
        parts[begin:end].normal_(0.0, STD, generator=generator)
    assert torch.equal(parts, whole)
    assert sum(end - begin for begin, end in ranges) == numbers
    assert max(end - begin for begin, end in ranges) < PIECE + 16


def test_the_real_piece_keeps_blocks_of_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert init.PIECE > PIECE and init.PIECE % 16 == 0


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_cut_parameters(rank: int) -> None:
    """Ranks of a tensor-parallel group hold their parts of the same full tensors."""
    specs = [
        ParameterSpec(role="embed", shape=(10, 6), axis=0, padded=True),
        ParameterSpec(role="layers.0.mlp.up", shape=(12, 6), axis=0, blocks=2),
        ParameterSpec(role="layers.0.mlp.down", shape=(8, 9), axis=1),
        ParameterSpec(role="layers.0.norm", shape=(6,), init="ones"),
        ParameterSpec(role="layers.0.router", shape=(5, 20)),
    ]
    parts = [shard(expected(spec), rank, 3, spec.axis, spec.blocks, spec.padded) for spec in specs]
    parameters = [
        LocalParameter(spec, torch.full(part.shape, torch.nan, dtype=torch.bfloat16))
        for spec, part in zip(specs, parts, strict=True)
    ]
    init.initialise(Parameters(parameters, rank, 3), SEED, STD)  # type: ignore[arg-type]
    for parameter, part in zip(parameters, parts, strict=True):
        assert torch.equal(parameter.tensor, part.bfloat16())
        exact = parameter.take_exact()
        assert exact is not None and torch.equal(exact, part)


def test_a_parameter_that_is_no_plain_block_of_memory() -> None:
    spec = ParameterSpec(role="layers.0.down", shape=(20, 12))
    parameter = LocalParameter(spec, torch.zeros(12, 20).t())
    init.initialise(Parameters([parameter]), SEED, STD)  # type: ignore[arg-type]
    assert torch.equal(parameter.tensor, expected(spec))


def test_the_largest_is_drawn_first_and_an_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "threads", lambda processes: 1)
    seen: list[int] = []

    def fill(parameter: LocalParameter, *rest: Any) -> None:
        seen.append(math.prod(parameter.spec.shape))
        if len(seen) == 3:
            raise MemoryError("no room")

    monkeypatch.setattr(init, "_fill", fill)
    engine = Parameters(model(torch.float32))
    with pytest.raises(MemoryError, match="no room"):
        init.initialise(engine, SEED, STD)  # type: ignore[arg-type]
    assert seen[:2] == [131 * 17, 9 * 13]
    assert engine.changed == 0


def test_another_seed_or_role_gives_other_numbers() -> None:
    spec = ParameterSpec(role="embed", shape=(20, 3))
    one = init.draw(spec, SEED, STD)
    assert not torch.equal(one, init.draw(spec, SEED + 1, STD))
    assert not torch.equal(one, init.draw(replace(spec, role="head"), SEED, STD))


def test_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init.os, "sched_getaffinity", lambda _: set(range(16)))
    assert [init.threads(processes) for processes in (1, 4, 5, 32)] == [16, 4, 3, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("room", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device(dtype: torch.dtype, room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through page-locked buffers; exact values lie on the device where there is room, on the CPU otherwise."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: page-locked buffers and copies to it are what is tested")
    if not room:
        monkeypatch.setattr(init, "_free_bytes", lambda device: 100)
    large = alone(ParameterSpec(role="head", shape=(1031, 257)), dtype, "cuda")
    parameters = [large, *model(dtype, "cuda")]
    init.initialise(Parameters(parameters), SEED, STD)  # type: ignore[arg-type]
    if dtype == torch.bfloat16:
        kept = large.trained.__dict__["exact"][0]
        assert kept.is_cuda == room
    require_expected(parameters)
