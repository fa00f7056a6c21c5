"""The megatron engine: megatron-core's groups, schedules and gradient buffers behind the `Engine` protocol.

Only this file initialises megatron's parallel state. The gradient is that of the mean over all counted elements of
the global batch: every micro-batch contributes a sum (megatron's `calculate_per_token_loss`), and the division by the
global count happens once, in the update, so the cut over ranks and micro-batches does not change it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from loong_core.errors import Unsupported
from loong_core.parallel import gradient_buffer, megatron_state, peer_copies, segments
from loong_core.parallel.adamw import ShardedAdamW
from loong_core.parallel.build import BuildContext, LossContext
from loong_core.parallel.context import slice_batch
from loong_core.parallel.fetch import Fetched
from loong_core.parallel.options import MegatronOptions
from loong_core.registry import resolve
from loong_core.train.engine import Batch, LocalParameter
from loong_core.weights import unshard

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loong_core.recipe import OptimSection
    from loong_core.train.run import Run
    from loong_core.types import ParallelPlan, PrecisionPolicy


def build(run: Run) -> MegatronEngine:
    """Initialise megatron's process groups for `run.plan` and build this rank's chunks of the model.

    The parameters hold no meaningful values yet, and there is no optimizer: `optimizer()` follows once weights are
    loaded and plugins have seen the model.
    """
    plan = run.plan
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        virtual_pipeline_model_parallel_size=plan.vpp if plan.vpp > 1 else None,
        context_parallel_size=plan.cp,
        expert_model_parallel_size=plan.ep,
        expert_tensor_parallel_size=plan.etp,
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    tensor_parallel.model_parallel_cuda_manual_seed(_mixed(run.recipe.run.seed, 0))
    stages = range(groups.pp.rank(), plan.pp * plan.vpp, plan.pp)
    options = MegatronOptions(**run.recipe.parallel.options)
    context = BuildContext(
        plan=plan,
        precision=run.precision,
        ops=run.ops,
        layers=resolve(run.backend.layer_provider)(run.ops),
        groups=groups,
        device=run.device,
        chunks=tuple(plan.stages[stage] for stage in stages),
        first=tuple(stage == 0 for stage in stages),
        last=tuple(stage == plan.pp * plan.vpp - 1 for stage in stages),
        dropout=run.recipe.model.dropout,
        deterministic=run.recipe.run.deterministic,
        dispatch=options.dispatch,
        exchange=options.exchange,
        exchange_pieces=options.exchange_pieces,
    )
    return MegatronEngine(run, groups, resolve(run.family.builder)(run.shape, context))


def _mixed(seed: int, step: int) -> int:
    """A seed that differs for every (seed, step) and stays far below 2**31, which megatron adds rank offsets to."""
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % (2**30)


def _sums_in_float32(precision: PrecisionPolicy) -> bool:
    """megatron-core has two kinds of gradient buffers: in float32, and in the dtype of their parameters."""
    if precision.gradients not in ("float32", precision.parameters):
        raise Unsupported(
            f"precision {precision.name}: the megatron engine sums gradients in float32 or in the parameters' dtype, "
            f"{precision.parameters}; not in {precision.gradients}."
        )
    return precision.gradients == "float32"


def _means(names: list[str], sums: Fetched) -> dict[str, float]:
    """What a step reports, as means over counted elements."""
    values = dict(zip(names, sums.get().tolist(), strict=True))
    counted = values.pop("count")
    return {"counted": counted} | {name: value / max(counted, 1.0) for name, value in values.items()}


def _clear_gradients(chunk: Any) -> None:
    """As `zero_grad_buffer` of megatron-core's wrapper, which zeroes more than it needs to."""
    for parameter in chunk.params_with_grad:
        parameter.grad_added_to_main_grad = False
    for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
        gradient_buffer.clear(buffer.buckets)
        for gradient in buffer.extra_main_grads:
            gradient.zero_()
    for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
        group.reset()


class MegatronEngine:
    """See `loong_core.train.engine.Engine`."""

    def __init__(self, run: Run, groups: ProcessGroupCollection, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.groups = groups
        self.plan: ParallelPlan = run.plan
        self.device = run.device
        self._run = run
        self._options = MegatronOptions(**run.recipe.parallel.options)
        self._loss = resolve(run.task.loss)
        self._loss_context = LossContext(
            ops=run.ops, tensor_group=groups.tp, vocabulary=run.shape.vocabulary, plan=run.plan
        )
        self._wrapped: list[DistributedDataParallel] = []
        self._optimizer: ShardedAdamW | None = None
        self.gradient_scale = torch.ones((), device=self.device)
        """What the gradient buffers are to be multiplied by: they hold the gradient of the loss's sum."""
        self._schedule = get_forward_backward_func()
        self._names: list[str] | None = None

    # ------------------------------------------------------------------------------------------ set-up
    def optimizer(self, section: OptimSection) -> None:
        """Wrap the chunks for gradient reduction and build the optimizer over their buffers."""
        data_parallel = self.plan.dp * self.plan.cp > 1
        overlap = self._options.overlap is True and data_parallel
        gathers_ahead = self._options.overlap is not False and data_parallel
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=_sums_in_float32(self._run.precision),
            overlap_grad_reduce=overlap,
            overlap_param_gather=gathers_ahead,
            bucket_size=self._options.bucket_size,
        )
        self._wrapped = [
            DistributedDataParallel(
                config=cast(Any, module).config,
                ddp_config=settings,
                module=module,
                disable_bucketing=index > 0,
                pg_collection=self.groups,
            )
            for index, module in enumerate(self.modules)
        ]
        for chunk in self._wrapped:
            chunk.overlap_param_gather_with_optimizer_step = gathers_ahead  # the optimizer begins it, see there
        self._optimizer = ShardedAdamW(
            self._wrapped,
            section,
            self._run.precision,
            self._run.ops.adamw,
            self._run.ops.sum_of_squares,
            self._counts,
            self.device,
        )
        megatron_state.set_masters(self, self._optimizer)
        for module in self.modules:
            config = cast(Any, module).config
            config.finalize_model_grads_func = self._finish_gradients
            if overlap:
                config.no_sync_func = self._per_chunk([chunk.no_sync for chunk in self._wrapped])
            if gathers_ahead:
                config.param_sync_func = self._per_chunk([chunk.start_param_sync for chunk in self._wrapped])

    @staticmethod
    def _per_chunk(functions: list[Any]) -> Any:
        return functions if len(functions) > 1 else functions[0]

    # ------------------------------------------------------------------------------------------ a step
    def forward_backward(
        self, batches: Sequence[Batch], step: int, coming: Callable[[], Sequence[Batch] | None] | None = None
    ) -> dict[str, float]:
        """Gradients of the mean loss of `batches`; dropout is a function of seed, step and rank alone. Everything
        depends on this step, so `coming` is not asked."""
        tensor_parallel.model_parallel_cuda_manual_seed(_mixed(self._run.recipe.run.seed, step + 1))
        for chunk in self._wrapped:
            chunk.train()
            _clear_gradients(chunk)
        names, sums = self._sweep(cast(Any, self._wrapped), batches, forward_only=False)
        assert self._optimizer is not None
        self._optimizer.measure(self.gradient_scale)  # the device has work while the host waits for the losses
        return _means(names, sums)

    def _counts(self, parameter: Any) -> bool:
        """Whether the norm takes the parameter's gradient from this rank: not where tensor parallelism or tied
        embeddings hold it twice. Data-parallel ranks hold different ranges of it."""
        return not getattr(parameter, "shared", False) and tensor_parallel.param_is_not_tensor_parallel_duplicate(
            parameter, tp_group=self.groups.tp, expert_tp_group=self.groups.expt_tp
        )

    def _finish_gradients(self, chunks: Any, counted: Tensor | None, **others: Any) -> None:
        """Reduce the gradients. The division by the global count is left to the update: it would be one more pass over
        the buffers. Only the last pipeline stage has counted."""
        for chunk in chunks:
            gradient_buffer.settle(chunk.params_with_grad)
        finalize_model_grads(chunks, None, **others)
        if counted is None:  # a builder without `calculate_per_token_loss`: every micro-batch was divided already
            return
        dist.broadcast(counted, src=dist.get_global_rank(self.groups.pp, self.plan.pp - 1), group=self.groups.pp)
        dist.all_reduce(counted, group=self.groups.dp_cp)
        self.gradient_scale = 1.0 / counted.clamp(min=1)

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Loss of `batches` in evaluation mode, without gradients."""
        self._gather_parameters()
        for module in self.modules:
            module.eval()
        with torch.no_grad():
            names, sums = self._sweep(self.modules, batches, forward_only=True)
        for module in self.modules:
            module.train()
        return _means(names, sums)

    def _sweep(
        self, chunks: list[nn.Module], batches: Sequence[Batch], forward_only: bool
    ) -> tuple[list[str], Fetched]:
        """All micro-batches; what was reported of them: names, and sums over micro-batches and ranks."""
        reports = self._schedule(
            forward_step_func=self._forward_step,
            data_iterator=self._per_chunk([iter(batches) for _ in chunks]),
            model=self._per_chunk(list(chunks)),
            num_microbatches=len(batches),
            seq_length=self._run.recipe.data.seq_len,
            micro_batch_size=self._run.recipe.data.micro_batch,
            forward_only=forward_only,
        )
        return self._reduced(reports)

    def _forward_step(self, batches: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
        batch = self._on_device(slice_batch(next(batches), self.plan.cp, self.groups.cp.rank()))
        module = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk
        return chunk(batch), partial(self._loss_sum, batch, module)

    def _on_device(self, batch: Batch) -> Batch:
        """The batch where the model is. Copies come from pinned memory: from any other the host waits for them, and for
        all that the device still has to do."""
        pinned = torch.device(self.device).type == "cuda"
        host = {name: tensor.pin_memory() if pinned else tensor for name, tensor in batch.items()}
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in host.items()}
        if "segments" in moved:
            segments.prepare(batch["segments"], moved["segments"])
        return moved

    def _loss_sum(self, batch: Batch, module: Any, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        result = self._loss(output, batch, self._loss_context)
        total = result.sum
        report = {"count": result.count, **result.extra}
        for name, value in module.auxiliary_losses().items():
            # Weighted by the counted tokens, so that micro-batches and ranks average as the main loss does.
            total = total + value * result.count
            report[name] = (value * result.count).detach()
        if len(report) > 1 + len(result.extra):
            report["lm_loss"] = result.sum.detach()
        report["loss"] = total.detach()
        return total, result.count.to(torch.int), report

    def _reduced(self, reports: list[dict[str, Tensor]]) -> tuple[list[str], Fetched]:
        """Sums over micro-batches and ranks. Ranks that hold no output add zeros."""
        names = self._report_names(reports)
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        if self.groups.tp.rank() == 0:
            for report in reports:
                sums += torch.stack([report[name].detach().double() for name in names])
        dist.all_reduce(sums)
        return names, Fetched(sums)

    def _report_names(self, reports: list[dict[str, Tensor]]) -> list[str]:
        """The reported names. Only last stages have reports, so the last rank, which is one, tells the others."""
        if self.plan.pp == 1:
            return sorted(reports[0])
        if self._names is None:
            text = json.dumps(sorted(reports[0]) if reports else []).encode()
            size = torch.tensor([len(text)], device=self._run.device)
            dist.broadcast(size, src=self.plan.world - 1)
            data = torch.zeros(int(size), dtype=torch.uint8)
            if dist.get_rank() == self.plan.world - 1:
                data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            data = data.to(self._run.device)
            dist.broadcast(data, src=self.plan.world - 1)
            self._names = json.loads(bytes(data.tolist()))
        return self._names

    def step(self, lr: float) -> float:
        """One AdamW update at learning rate `lr`; returns the global gradient norm before clipping."""
        assert self._optimizer is not None
        for chunk in self._wrapped:
            for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
                if group.param_gather_handle is not None:  # no forward pass has waited for it
                    group.finish_param_sync(skip_next_bucket_dispatch=True)
            # Whoever looked at the parameters since the backward pass had them gathered, as they were then.
            chunk.reset_param_sync_dispatch_state()
        return self._optimizer.step(lr, self.gradient_scale)

    # ------------------------------------------------------------------------------------- parameters
    def parameters(self) -> Iterable[LocalParameter]:
        """This rank's parameters, up to date; tied copies only once."""
        self._gather_parameters()
        return itertools.chain.from_iterable(cast(Any, module).local_parameters() for module in self.modules)

    def state_parameters(self) -> list[LocalParameter]:
        """As `parameters`, and the copy of tied embeddings on the last stage: it has an optimizer state of its own."""
        listed = list(self.parameters())
        known = {id(parameter.trained) for parameter in listed}
        spare = [p for module in self.modules for p in module.parameters() if id(p) not in known]
        if spare:
            embed = next(spec for spec in self._run.shape.parameters if spec.role == "embed")
            listed.extend(LocalParameter(embed, parameter) for parameter in spare)
        return listed

    def tensor_group(self, parameter: LocalParameter) -> Any:
        """The ranks that hold the tensor-parallel parts of this parameter."""
        return self.groups.tp if parameter.spec.expert is None else self.groups.expt_tp

    def cut(self, parameter: LocalParameter) -> tuple[int, int]:
        """Rank and size of the parameter's tensor parallelism."""
        group = self.tensor_group(parameter)
        return group.rank(), group.size()

    def replica_group(self, parameter: LocalParameter) -> Any:
        """The ranks that hold the same part of this parameter."""
        return self.groups.dp_cp if parameter.spec.expert is None else self.groups.expt_dp

    def gather(self, parameter: LocalParameter) -> Tensor | None:
        """The full tensor on tensor-parallel rank 0 of the first replica, None elsewhere."""
        spec, group = parameter.spec, self.tensor_group(parameter)
        if self.replica_group(parameter).rank() != 0:
            return None
        tensor = parameter.tensor.detach()
        if spec.axis is None or group.size() == 1:
            return unshard([tensor], spec.axis, spec.blocks, self._extent(spec)) if group.rank() == 0 else None
        parts = [torch.empty_like(tensor) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return unshard(parts, spec.axis, spec.blocks, self._extent(spec)) if group.rank() == 0 else None

    @staticmethod
    def _extent(spec: Any) -> int | None:
        return spec.shape[spec.axis] if spec.padded else None

    def weights_changed(self) -> None:
        """Bring the tied copy on the last stage, and master weights if there are any, up to date."""
        if self._run.shape.tied_embeddings and self.plan.pp > 1 and self.groups.pp.rank() in (0, self.plan.pp - 1):
            self._copy_tied()
        if self._optimizer is not None:
            self._optimizer.take_parameters()
            megatron_state.set_masters(self, self._optimizer)

    def _copy_tied(self) -> None:
        """Send the embedding of the first stage to its copy on the last, in full precision: both have a master."""
        mine = [p for p in self.state_parameters() if p.spec.role == "embed"][-1]
        exact = mine.take_exact()
        values = (mine.tensor.detach() if exact is None else exact).float().to(self._run.device)
        dist.broadcast(values, src=dist.get_global_rank(self.groups.pp, 0), group=self.groups.embd)
        mine.assign(values)

    def _gather_parameters(self) -> None:
        """Finish a pending overlapped gather, so that the modules hold the updated parameters."""
        for chunk in self._wrapped:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    # ------------------------------------------------------------------------------------------ state
    def save_state(self, folder: Path) -> None:
        """Write weights and optimizer state as layout-independent tensors."""
        self._gather_parameters()
        megatron_state.save(folder, self, self._optimizer)

    def load_state(self, folder: Path, optimizer: bool = True) -> None:
        """Read what `save_state` wrote under any layout; `optimizer=False` reads the weights alone."""
        megatron_state.load(folder, self, self._optimizer if optimizer else None)

    def idle_bytes(self) -> int:
        """Memory in which copies between GPUs begin."""
        return peer_copies.shared_bytes()

    def close(self) -> None:
        """Forget megatron's groups; torch's process group belongs to the worker."""
        parallel_state.destroy_model_parallel()
