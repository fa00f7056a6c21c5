"""Random initial weights that depend on the seed and the parameter's role, never on the parallel layout."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from loong_core.weights import shard

if TYPE_CHECKING:
    from loong_core.train.engine import Engine, LocalParameter
    from loong_core.types import ParameterSpec

THREADS = min(16, os.cpu_count() or 1)


def initialise(engine: Engine, seed: int, std: float) -> None:
    """Fill this rank's parameters: normal(0, `std`), ones or zeros as each spec says.

    Every full tensor is drawn from a generator of its own, seeded by (seed, role), and then cut, so that all layouts
    start from the same weights. Drawn on the CPU in float32: devices have different generators.
    """
    parameters = list(engine.parameters())

    def values(parameter: LocalParameter) -> torch.Tensor:
        spec, (rank, size) = parameter.spec, engine.cut(parameter)
        return shard(draw(spec, seed, std), rank, size, spec.axis, spec.blocks, spec.padded)

    with torch.no_grad(), ThreadPoolExecutor(THREADS) as pool:
        # One generator draws one number after the other, so many tensors are drawn side by side; few lie ready.
        ready = deque(pool.submit(values, parameter) for parameter in parameters[: 2 * THREADS])
        for index, parameter in enumerate(parameters):
            parameter.assign(ready.popleft().result())
            if (later := index + 2 * THREADS) < len(parameters):
                ready.append(pool.submit(values, parameters[later]))
    engine.weights_changed()


def draw(spec: ParameterSpec, seed: int, std: float) -> torch.Tensor:
    """The full float32 tensor of `spec.shape`."""
    if spec.init != "normal":
        return torch.full(spec.shape, 1.0 if spec.init == "ones" else 0.0)
    digest = hashlib.sha256(f"{seed}/{spec.role}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") % (2**63))
    return torch.empty(spec.shape).normal_(0.0, std, generator=generator)
