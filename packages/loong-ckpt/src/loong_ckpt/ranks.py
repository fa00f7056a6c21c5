"""What the ranks of a run agree on, with tensors only: no object is ever pickled between processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from loong_core.errors import CheckpointError, LoongError

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.train.run import Run
    from loong_core.types import ParallelPlan, ParameterSpec

MESSAGE_BYTES = 4096


def tensor_cut(spec: ParameterSpec, plan: ParallelPlan, rank: int) -> tuple[int, int]:
    """Which tensor-parallel part of a parameter global rank `rank` holds: (index, number of parts).

    Tensor parallelism varies fastest over global ranks, in megatron-core's order and in ours; experts are cut by
    their own degree.
    """
    size = plan.tp if spec.expert is None else plan.etp
    return rank % size, size


def sum_over_ranks(values: Tensor, run: Run) -> Tensor:
    """Element-wise sum of `values` over all ranks, on the CPU."""
    import torch.distributed as dist

    if run.world == 1:
        return values
    values = values.to(run.device)
    dist.all_reduce(values)
    return values.cpu()


def broadcast_number(value: int, run: Run) -> int:
    """Rank 0's value, on every rank."""
    import torch

    return int(sum_over_ranks(torch.tensor([value if run.rank == 0 else 0]), run)[0])


def agree(problem: BaseException | None, run: Run) -> None:
    """Collective. If any rank has a problem, raise on every rank, so that none waits for one that gave up.

    A rank re-raises its own problem; the others raise a `CheckpointError` that names ranks and messages.
    """
    import torch

    if run.world > 1 and int(sum_over_ranks(torch.tensor([int(problem is not None)]), run)[0]):
        messages = _messages(problem, run)
        problem = problem or CheckpointError(*messages)
    if problem is not None:
        raise problem


def _messages(problem: BaseException | None, run: Run) -> list[str]:
    """Every rank's message, cut to `MESSAGE_BYTES`."""
    import torch
    import torch.distributed as dist

    text = "" if problem is None else f"rank {run.rank}: {problem}"
    encoded = text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    mine = torch.frombuffer(bytearray(encoded), dtype=torch.uint8).to(run.device)
    everyone = [torch.empty_like(mine) for _ in range(run.world)]
    dist.all_gather(everyone, mine)
    texts = [bytes(part.cpu().tolist()).rstrip(b"\0").decode(errors="replace") for part in everyone]
    return [text for text in texts if text]


def attempt(action: Callable[[], object]) -> BaseException | None:
    """Run `action`; hand back what it raised, so that a rank can go on taking part in collectives."""
    try:
        action()
    except (LoongError, OSError, RuntimeError, ValueError) as error:
        return error
    return None


def together(action: Callable[[], object], run: Run, only_main: bool = False) -> None:
    """Collective: run `action` on every rank (or on rank 0 only), and raise everywhere if it failed anywhere."""
    agree(None if only_main and run.rank != 0 else attempt(action), run)


def role_counts(roles: list[str], run: Run) -> dict[str, int]:
    """Collective. How many times each parameter of the model is in some rank's `roles`."""
    import torch

    position = {spec.role: index for index, spec in enumerate(run.shape.parameters)}
    counts = torch.zeros(len(position), dtype=torch.int64)
    for role in roles:
        counts[position[role]] += 1
    return dict(zip(position, sum_over_ranks(counts, run).tolist(), strict=True))
