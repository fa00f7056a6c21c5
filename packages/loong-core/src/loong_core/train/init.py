"""Random initial weights that depend on the seed and the parameter's role, never on the parallel layout."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from loong_core.weights import shard

if TYPE_CHECKING:
    from loong_core.train.engine import Engine
    from loong_core.types import ParameterSpec


def initialise(engine: Engine, seed: int, std: float) -> None:
    """Fill this rank's parameters: normal(0, `std`), ones or zeros as each spec says.

    Every full tensor is drawn from a generator of its own, seeded by (seed, role), and then cut, so that all layouts
    start from the same weights. Drawn on the CPU in float32: devices have different generators.
    """
    with torch.no_grad():
        for parameter in engine.parameters():
            spec = parameter.spec
            rank, size = engine.cut(parameter)
            parameter.assign(shard(draw(spec, seed, std), rank, size, spec.axis, spec.blocks, spec.padded))
    engine.weights_changed()


def draw(spec: ParameterSpec, seed: int, std: float) -> torch.Tensor:
    """The full float32 tensor of `spec.shape`."""
    if spec.init != "normal":
        return torch.full(spec.shape, 1.0 if spec.init == "ones" else 0.0)
    digest = hashlib.sha256(f"{seed}/{spec.role}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") % (2**63))
    return torch.empty(spec.shape).normal_(0.0, std, generator=generator)
