"""One training run of megatron-core on batches and initial weights that loong made; a process of its own per rank.

    python benchmarks/megatron_peer.py JOB.json        (or by torch.distributed.run, one process a device)

The job: `recipe` (resolved), `batches` (by benchmarks/batches.py), `out`, `backend` (cuda or cpu), `steps`, `warmup`,
`micro_batch`, `ep`, `recompute` (modules, comma separated), `precision_aware`, `fp32_gradients`, `force_balance`,
`ep_overlap`.
On a CPU megatron-core's own unfused layers stand in for Transformer Engine's: same arithmetic, not the same speed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import megatron_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Job = dict[str, Any]
STARTED = time.perf_counter()


class MicroBatch(NamedTuple):
    """What one forward pass takes, on the device before the clock starts; `weight` [batch, sequence] of each token's
    loss makes the sum over ranks and micro-batches the mean over the counted tokens of the global batch."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    weight: Tensor
    mask: Tensor | None
    packing: Any


# ------------------------------------------------------------------------------------------------------- data
def micro_batches(path: Path, job: Job, rank: int, world: int, device: torch.device) -> list[list[MicroBatch]]:
    """This rank's micro-batches of every step: rows `(m * world + rank) * micro_batch` on, as loong cuts them."""
    from safetensors.torch import load_file

    data = load_file(str(path))
    size = job["micro_batch"]
    number = data["tokens"].shape[1] // (size * world)
    steps = []
    for step in range(job["steps"]):
        counted = int((data["targets"][step] >= 0).sum())
        firsts = [(m * world + rank) * size for m in range(number)]
        parts = [{name: values[step, at : at + size].long() for name, values in data.items()} for at in firsts]
        steps.append([_micro_batch(part, number * world / counted, device) for part in parts])
    return steps


def _micro_batch(part: dict[str, Tensor], scale: float, device: torch.device) -> MicroBatch:
    targets = part["targets"]
    mask = packing = None
    if "segments" in part:
        mask, packing = (_mask(part["segments"]), None) if device.type == "cpu" else (None, _packing(part["segments"]))
    return MicroBatch(
        part["tokens"].to(device),
        targets.clamp(min=0).to(device),
        part["positions"].to(device),
        ((targets >= 0).float() * scale).to(device),
        mask,
        packing,
    )


def boundaries(segments: Tensor) -> list[int]:
    """Where the sequences of one row begin, and its end; the padding of a row is a sequence of its own."""
    import torch

    starts = torch.nonzero(segments[0, 1:] != segments[0, :-1]).flatten() + 1
    return [0, *starts.tolist(), segments.shape[1]]


def _packing(segments: Tensor) -> Any:
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    assert segments.shape[0] == 1, "packed rows are trained one at a time"
    edges = boundaries(segments)
    offsets = torch.tensor(edges, dtype=torch.int32, device="cuda")
    longest = max(end - begin for begin, end in zip(edges, edges[1:], strict=False))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _mask(segments: Tensor) -> Tensor:
    """[batch, 1, sequence, sequence], true where attention is forbidden: later tokens and other documents."""
    import torch

    length = segments.shape[1]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (later | (segments[:, :, None] != segments[:, None, :]))[:, None]


# ------------------------------------------------------------------------------------------------------ a run
def start(backend: str) -> tuple[int, int, torch.device]:
    """This process's rank, the number of them, and its device; joins the world."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if backend == "cpu":
        from loong_core.backends import cpu

        cpu.setup(rank)  # before anything of megatron-core: it makes torch.cuda mean the CPU
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if backend == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    collective, bound = ("gloo", None) if backend == "cpu" else ("nccl", device)
    if world == 1:
        dist.init_process_group(collective, store=dist.HashStore(), rank=0, world_size=1, device_id=bound)
    else:
        dist.init_process_group(collective, device_id=bound)
    return rank, world, device


def wrap(model: nn.Module, config: Any, job: Job, optim: Any, half: bool) -> tuple[nn.Module, Any]:
    """The model in megatron-core's gradient buffers, and its distributed optimizer."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    overlap = job["backend"] == "cuda"
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        grad_reduce_in_fp32=not half or job["fp32_gradients"],
        average_in_collective=False,
    )
    inner = Float16Module(config, model) if half else model
    chunk = DistributedDataParallel(config=config, ddp_config=ddp, module=inner)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=optim.clip or 0.0,
            bf16=half,
            params_dtype=torch.bfloat16 if half else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=overlap,
            use_precision_aware_optimizer=job["precision_aware"],
        ),
        [chunk],
        use_gloo_process_groups=False,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if overlap:
        config.no_sync_func = chunk.no_sync
        config.param_sync_func = chunk.start_param_sync
    return chunk, optimizer


def loss_of(batch: MicroBatch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What megatron-core's schedule calls with the model's losses per token."""
    total = (output.float() * batch.weight).sum()
    # A copy: the schedule divides `total` in place.
    return total, {"loss": total.detach().clone()}


def forward(batches: Iterator[MicroBatch], chunk: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    """One micro-batch through the model; a plan of it instead where megatron-core overlaps communication."""
    batch = next(batches)
    extra = {"labels": batch.labels}
    if batch.packing is not None:
        extra["packed_seq_params"] = batch.packing
    run = chunk.build_schedule_plan if return_schedule_plan else chunk
    return run(batch.tokens, batch.positions, batch.mask, **extra), partial(loss_of, batch)


class RouterWatch:
    """Counts the tokens of every expert while it is attached; for the first step, which is not timed."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, Tensor] = {}
        routers = [(name, module) for name, module in model.named_modules() if name.endswith(".mlp.router")]
        self._handles = [module.register_forward_hook(partial(self._count, name)) for name, module in routers]

    def _count(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        chosen = output[1].detach().bool().sum(0)
        self.counts[name] = self.counts[name] + chosen if name in self.counts else chosen

    def close(self) -> list[float]:
        """Stop counting; the busiest expert's share of the mean, layer by layer, over all ranks."""
        import torch.distributed as dist

        for handle in self._handles:
            handle.remove()
        for counts in self.counts.values():
            dist.all_reduce(counts)
        return [float(counts.max() / counts.float().mean()) for counts in self.counts.values()]


class Clock:
    """Marks between steps: events on the device's own queue, on a CPU its clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks, self.walls = device, [], []

    def mark(self) -> None:
        """A step ends and the next one begins."""
        import torch

        self.walls.append(time.perf_counter())
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def read(self) -> tuple[list[float], list[float]]:
        """Milliseconds of each step: by the device's events, and by the host's clock."""
        import torch

        wall = [(end - begin) * 1e3 for begin, end in zip(self.walls, self.walls[1:], strict=False)]
        if self.device.type == "cpu":
            return wall, wall
        torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [begin.elapsed_time(end) for begin, end in pairs], wall


def train(chunk: Any, optimizer: Any, config: Any, job: Job, recipe: Any, steps: list[list[MicroBatch]]) -> Job:
    """Every step of the job; memory is that of the timed steps."""
    import torch
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from loong_core.train.schedule import learning_rate

    schedule, clock = get_forward_backward_func(), Clock(steps[0][0].tokens.device)
    losses, norms, routing = [], [], []
    watch = RouterWatch(chunk)
    for number, batches in enumerate(steps):
        clock.mark()
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = schedule(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=[chunk],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=job["micro_batch"],
            forward_only=False,
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe.optim, number + 1, recipe.run.steps)
            group["weight_decay"] = recipe.optim.weight_decay * group.get("wd_mult", 1.0)
        _, norm, _ = optimizer.step()
        losses.append(torch.stack([report["loss"] for report in reports]).sum() / len(batches))
        norms.append(float(norm))
        if number == 0:
            routing = watch.close()
        if number + 1 == job["warmup"] and job["backend"] == "cuda":
            torch.cuda.reset_peak_memory_stats()
    clock.mark()
    milliseconds, wall = clock.read()
    values = torch.stack(losses)
    dist.all_reduce(values)
    result = {"ms": milliseconds, "wall_ms": wall, "loss": (values / dist.get_world_size()).tolist(), "norm": norms}
    return result | {"memory_bytes": _peak(job["backend"]), "busiest_expert": routing}


def _peak(backend: str) -> int:
    """Bytes that torch had allocated at most, on the fullest rank; 0 on a CPU."""
    import torch
    import torch.distributed as dist

    if backend == "cpu":
        return 0
    peak = torch.tensor([torch.cuda.max_memory_allocated()], device="cuda")
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak)


def main(path: Path) -> None:
    """Run the job and write its result."""
    job: Job = json.loads(path.read_text(encoding="utf-8"))
    rank, world, device = start(job["backend"])
    stand_in = megatron_model.stand_in_for_apex()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from loong_core import recipe_load, validate
    from loong_core.registry import open_registry
    from loong_core.train.start import DEFAULT_STD

    registry = open_registry()
    prepared = validate.prepare(recipe_load.load(job["recipe"], [], registry), registry, worker=True)
    shape, recipe = prepared.shape, prepared.recipe
    half = prepared.precision.parameters == "bfloat16"
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=job["ep"], expert_tensor_parallel_size=1, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.run.seed)
    chosen = megatron_model.settings(shape.fields, shape.layers, job, job["ep"], half)
    config = TransformerConfig(**chosen)
    fused = job["backend"] == "cuda"
    model = megatron_model.build(config, shape.fields, shape.vocabulary, recipe.data.seq_len, fused).to(device)
    chunk, optimizer = wrap(model, config, job, recipe.optim, half)
    std = float(shape.fields.get("init_std") or DEFAULT_STD)
    ep_rank = parallel_state.get_expert_model_parallel_rank()
    held = megatron_model.assign(chunk, optimizer, shape, recipe.run.seed, std, ep_rank, job["ep"])
    steps = micro_batches(Path(job["batches"]), job, rank, world, device)
    dist.barrier()
    started = time.perf_counter() - STARTED
    result = train(chunk, optimizer, config, job, recipe, steps)
    shown = {
        name: value if isinstance(value, bool | int | float | str | list) else str(value)
        for name, value in chosen.items()
        if not callable(value)
    }
    result |= {"startup_seconds": started, "parameters_per_rank": held, "config": shown, "torch": torch.__version__}
    result |= {"apex_stand_in": stand_in, "masters": "rounded" if half and job["precision_aware"] else "exact"}
    if rank == 0:
        Path(job["out"]).write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
