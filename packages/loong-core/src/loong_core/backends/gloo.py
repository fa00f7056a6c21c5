"""What gloo lacks of NCCL, spelled with what it has; `cpu_device.activate()` installs these wrappers.

gloo only sums, gathers and scatters equal sizes only, and wants split sizes as lists. A wrapper keeps the signature
of the `torch.distributed` function it wraps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

Collective = Callable[..., Any]


class PremulSum(float):
    """Stands for NCCL's PREMUL_SUM with this factor."""


class Finished:
    """The handle of a collective that was over before it was returned."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _sum_only(tensor: torch.Tensor, op: Any, group: Any) -> Any:
    """AVG and PREMUL_SUM become a SUM of inputs that are scaled in place."""
    if isinstance(op, PremulSum):
        tensor.mul_(float(op))
        return dist.ReduceOp.SUM
    if op == dist.ReduceOp.AVG:
        tensor.div_(dist.get_world_size(group))
        return dist.ReduceOp.SUM
    return op


def _all_reduce(function: Collective) -> Collective:
    def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        return function(tensor, _sum_only(tensor, op, group), group, async_op)

    return all_reduce


def _reduce_scatter_tensor(function: Collective) -> Collective:
    def reduce_scatter_tensor(
        output: torch.Tensor,
        input: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        return function(output, input, _sum_only(input, op, group), group, async_op)

    return reduce_scatter_tensor


def _all_to_all_single(function: Collective) -> Collective:
    """megatron-core's expert dispatcher moves split sizes to the host only if they are on CUDA."""

    def listed(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        return function(output, input, listed(output_split_sizes), listed(input_split_sizes), **kwargs)

    return all_to_all_single


def _uneven(tensors: Sequence[torch.Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors}) > 1


def _all_gather(function: Collective) -> Collective:
    """Uneven parts (expert tensor parallelism gathers token counts that differ): broadcast each from its owner."""

    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if not _uneven(tensor_list):
            return function(tensor_list, tensor, group=group, async_op=async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for owner, part in enumerate(tensor_list):
            dist.broadcast(part, group=group, group_src=owner)
        return Finished() if async_op else None

    return all_gather


def _reduce_scatter(function: Collective) -> Collective:
    """gloo has no reduce-scatter of lists: reduce each part to its owner."""

    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        for owner, part in enumerate(input_list):
            # gloo's reduce uses every rank's buffer as scratch space: callers keep their inputs
            part = part.clone(memory_format=torch.contiguous_format)
            dist.reduce(part, group_dst=owner, op=_sum_only(part, op, group), group=group)
            if owner == dist.get_rank(group):
                output.copy_(part)
        return Finished() if async_op else None

    return reduce_scatter


def _as_gloo(function: Collective) -> Collective:
    """A process group asked to be NCCL (or UCC) is made of gloo."""

    def made_of_gloo(*args: Any, **kwargs: Any) -> Any:
        args = tuple("gloo" if isinstance(value, str) and value in ("nccl", "ucc") else value for value in args)
        if kwargs.get("backend") in ("nccl", "ucc"):
            kwargs["backend"] = "gloo"
        return function(*args, **kwargs)

    return made_of_gloo


WRAPPERS: dict[str, Callable[[Collective], Collective]] = {
    "new_group": _as_gloo,
    "init_process_group": _as_gloo,
    "all_reduce": _all_reduce,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "_make_nccl_premul_sum": lambda function: PremulSum,
    "all_to_all_single": _all_to_all_single,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
}
"""Name of a function in `torch.distributed` -> what wraps it."""
