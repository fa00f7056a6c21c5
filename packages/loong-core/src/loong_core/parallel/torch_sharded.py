"""Parameters, gradients and optimizer state in slices of rows, gathered unit by unit: torch's FSDP2, and HSDP.

A slice is kept in float32, the master weight itself; what is sent and computed with is rounded from it. FSDP2 wants one
dtype per unit and no parameter in two of them: `fits` tells which parameters it can take, the others stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from loong_core.parallel.adamw import Shard

if TYPE_CHECKING:
    from torch import Tensor, nn

METHODS = ("sample",)
"""What models are called by, besides `forward`."""


class Slice(NamedTuple):
    """This rank's rows of a parameter, flattened, from element `start` of the whole on, and their gradient."""

    values: Tensor
    start: int
    gradient: Tensor | None


class ShardedStore:
    """`module` cut into slices over groups of `size` neighbouring ranks; every group holds the whole model.

    `exact` are float32 values that parameters were rounded from, flat, by parameter. `kept` are parameters that stay
    whole and are somebody else's business.
    """

    def __init__(
        self,
        module: Any,
        units: Sequence[Any],
        *,
        size: int,
        kept: set[nn.Parameter],
        exact: Mapping[nn.Parameter, Tensor],
        compute: torch.dtype,
    ) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        self.device = next(module.parameters()).device
        self.replica = rank // size, world // size
        """Which copy of the model this rank belongs to, of how many."""
        names = ("replica", "slice")
        mesh = init_device_mesh(self.device.type, (world // size, size), mesh_dim_names=names)
        mesh = mesh if size < world else mesh["slice"]
        self._module = module
        self._several = size < world
        taken = {p: where for where in _places(module) if (p := getattr(*where)) not in kept}
        policy = MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        done: set[nn.Parameter] = set()
        for unit in [*units, module]:
            for parameter in unit.parameters():
                if parameter in taken and parameter not in done and parameter.requires_grad:
                    _widen(parameter, exact.get(parameter))
                    done.add(parameter)
            fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=kept)
            for parameter in list(taken):
                if isinstance(getattr(*taken[parameter]), DTensor) and parameter.numel():
                    parameter.data = parameter.data.new_empty(0)  # or whoever knows it would keep it alive
        for method in METHODS:
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)
        for part in {*units, module}:  # sums, not means
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        self._sharded = {parameter: getattr(*where) for parameter, where in taken.items()}
        self._gradients = self._hang_gradients()
        self.slices = {parameter: self._slice(tensor) for parameter, tensor in self._sharded.items()}

    def _hang_gradients(self) -> Tensor:
        """One float32 buffer for the gradients of all slices: FSDP2 adds to the `.grad` that it finds."""
        trained = [tensor for tensor in self._sharded.values() if tensor.requires_grad]
        local = [tensor.to_local() for tensor in trained]

        buffer = torch.zeros(sum(part.numel() for part in local), dtype=torch.float32, device=self.device)
        begin = 0
        for tensor, part in zip(trained, local, strict=True):
            place = buffer[begin : begin + part.numel()].view(part.shape)
            begin += part.numel()
            tensor.grad = DTensor.from_local(
                place,
                tensor.device_mesh,
                tensor.placements,
                run_check=False,
                shape=tensor.shape,
                stride=tensor.stride(),
            )
        return buffer

    def _slice(self, tensor: Any) -> Slice:
        mesh = tensor.device_mesh
        size, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
        rows = min(-(-tensor.shape[0] // size) * rank, tensor.shape[0])
        gradient = tensor.grad._local_tensor.view(-1) if tensor.requires_grad else None
        values = tensor.detach()._local_tensor.view(-1)
        return Slice(values, rows * math.prod(tensor.shape[1:]), gradient)

    # ------------------------------------------------------------------------------------------------ a step
    def begin(self) -> None:
        """Start a step: gradients are zeros."""
        self._gradients.zero_()
        self._module.set_is_last_backward(False)
        if self._several:
            self._module.set_requires_all_reduce(False)

    def expect_last(self) -> None:
        """The next backward pass is the step's last: copies of the model exchange what they have summed."""
        self._module.set_is_last_backward(True)
        if self._several:
            self._module.set_requires_all_reduce(True)

    def finish(self) -> None:
        """FSDP2 has reduced everything."""

    def reshard(self) -> None:
        """Give up gathered parameters that a pass without gradients has left: the next update would not reach them."""
        for module in self._module.modules():
            if hasattr(module, "reshard"):
                module.reshard()

    # ------------------------------------------------------------------------------------------------ the update
    def counted(self) -> list[Tensor]:
        """Gradients that this rank adds to the norm: all it holds, on the first copy of the model."""
        return [self._gradients] if self.replica[0] == 0 and self._gradients.numel() else []

    def shards(self, make: Callable[[Tensor, Tensor, bool], Shard], decayed: set[Any]) -> Iterator[Any]:
        """(parameter, what this rank updates of it), with state that `make` brings for a range."""
        for parameter, part in self.slices.items():
            if part.gradient is not None and part.values.numel():
                made = make(part.values, part.gradient, parameter in decayed)
                yield parameter, Shard(**{**vars(made), "start": part.start})


def fits(module: nn.Module, units: Sequence[nn.Module], dtype: torch.dtype) -> set[nn.Parameter]:
    """The parameters that may be cut: of the policy's `dtype`, not scalars, in one unit or in none."""
    owner: dict[nn.Parameter, int] = {}
    several = set()
    for index, unit in enumerate(units):
        for parameter in unit.parameters():
            if owner.setdefault(parameter, index) != index:
                several.add(parameter)
    inside = {part for unit in units for part in unit.modules()}
    for place, name in _places(module):
        parameter = getattr(place, name)
        if place not in inside and parameter in owner:
            several.add(parameter)
    return {p for p in module.parameters() if p.dtype == dtype and p.dim() and p not in several}


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, attribute) of every parameter, a tied one as often as it occurs."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield part, name


def _widen(parameter: nn.Parameter, exact: Tensor | None) -> None:
    """Make `parameter` the float32 master weight."""
    wide = parameter.detach().float() if exact is None else exact.to(parameter.device).view(parameter.shape)
    parameter.data = wide
