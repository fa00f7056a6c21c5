"""The torch engine: every rank is a replica of the model, whole or sharded, behind the `Engine` protocol.

Weights are loaded into whole modules; `optimizer` then moves them into flat buffers (`torch_flat`) or cuts them into
slices (`torch_sharded`). As in the megatron engine the gradient is that of the sum over counted elements, and the
division by the global count happens once, in the update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from loong_core.log import logger
from loong_core.parallel import torch_state
from loong_core.parallel.build import BuildContext, LossContext
from loong_core.parallel.fetch import Fetched
from loong_core.parallel.torch_ahead import FIRST, Ahead
from loong_core.parallel.torch_flat import FlatStore
from loong_core.parallel.torch_graph import Graphs
from loong_core.parallel.torch_holdings import Holdings
from loong_core.parallel.torch_optimizer import TorchAdamW
from loong_core.parallel.torch_options import TorchOptions
from loong_core.parallel.torch_units import prepare_units
from loong_core.registry import resolve
from loong_core.train.engine import Batch, LocalParameter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loong_core.parallel.torch_sharded import ShardedStore
    from loong_core.recipe import OptimSection
    from loong_core.train.run import Run
    from loong_core.types import ParallelPlan


def build(run: Run) -> TorchEngine:
    """Build the whole model on this rank's device. The parameters hold no meaningful values yet."""
    context = BuildContext(
        plan=run.plan,
        precision=run.precision,
        ops=run.ops,
        layers=None,
        groups=None,
        device=run.device,
        chunks=(tuple(range(run.shape.layers)),),
        first=(True,),
        last=(True,),
        dropout=run.recipe.model.dropout,
        deterministic=run.recipe.run.deterministic,
    )
    modules = resolve(run.family.builder)(run.shape, context)
    assert len(modules) == 1, f"{run.family.name}: the torch engine trains one module, its builder made {len(modules)}"
    return TorchEngine(run, modules[0])


def _mixed(*numbers: int) -> int:
    """A seed that differs for every combination of numbers."""
    digest = hashlib.sha256(":".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") % (2**63)


class TorchEngine:
    """See `loong_core.train.engine.Engine`.

    With `shard` full or hybrid, `parameters()` gives what this rank holds from `optimizer` on: its rows along dim 0.
    """

    def __init__(self, run: Run, module: nn.Module) -> None:
        self.modules = [module]
        self.plan: ParallelPlan = run.plan
        self.device = run.device
        self.gradient_scale = torch.ones((), device=self.device)
        """What gradients are to be multiplied by: the buffers hold those of the loss's sum."""
        self.trainer: TorchAdamW | None = None
        self.holdings = Holdings(module)
        self._options = TorchOptions(**run.plan.options)
        self._run = run
        self._module: Any = module
        self._loss = resolve(run.task.loss)
        self._loss_context = LossContext(
            ops=run.ops, tensor_group=None, vocabulary=run.shape.vocabulary, plan=run.plan, model=module
        )
        self._flat: FlatStore | None = None
        self._sharded: ShardedStore | None = None
        self._graphs: Graphs | None = None
        self._ahead: Ahead | None = None
        self._names: list[str] = []
        self._copies = torch.cuda.Stream(self.device) if torch.device(self.device).type == "cuda" else None

    # ------------------------------------------------------------------------------------------ set-up
    def optimizer(self, section: OptimSection) -> None:
        """Lay out parameters and gradients as planned, and build the optimizer over them."""
        options, precision = self._options, self._run.precision
        self.holdings.settle()
        exact = self.holdings.take_exact()
        units = cast("list[nn.Module]", self._module.units())
        prepare_units(units, self.plan, options, self.device)
        listed = dict(self._module.named_parameters())
        decayed = {p for name, p in listed.items() if p.dim() > 1 and not name.endswith(".bias")}
        trained = in_order_of_gradients(self._module)
        whole = trained
        if options.shard in ("full", "hybrid") and self.plan.dp > 1:
            from loong_core.parallel.torch_sharded import ShardedStore, fits

            dtype: torch.dtype = getattr(torch, precision.parameters)
            cut = fits(self._module, units, dtype)
            whole = [parameter for parameter in trained if parameter not in cut]
            size = options.shard_size if options.shard == "hybrid" else None
            self._sharded = ShardedStore(
                self._module,
                units,
                size=size or self.plan.world,
                kept={parameter for parameter in listed.values() if parameter not in cut},
                exact={parameter: values for parameter, values in exact.items() if parameter in cut},
                compute=dtype,
            )
        else:
            self._run_ahead_and_by_graphs(options)
        with self._on_the_stream_of_graphs():
            self._flat = FlatStore(
                whole,
                decayed=decayed,
                sharded=options.shard != "none",
                gradients=getattr(torch, precision.gradients),
                bucket_size=options.bucket_size,
                overlap=options.overlap,
            )
        self.trainer = TorchAdamW(
            self._flat,
            self._sharded,
            section,
            precision,
            self._run.ops.adamw,
            self._run.ops.sum_of_squares,
            decayed=decayed,
            trained=set(trained),
            ema=options.ema,
            device=self.device,
        )
        self.holdings.lay_out(self.trainer, self._sharded, options)
        self._set_masters(exact)

    def _run_ahead_and_by_graphs(self, options: TorchOptions) -> None:
        """What the options ask for, as far as device and model allow it."""
        on_a_gpu = torch.device(self.device).type == "cuda"
        graphs = options.graphs if options.cuda_graph and on_a_gpu else 0
        if options.ahead:
            frozen = self._module.frozen_part() if hasattr(self._module, "frozen_part") else None
            if frozen is None:
                logger.warning("parallel.options.ahead = true has no effect: nothing of this model is frozen first.")
            else:
                self._ahead = Ahead(frozen, self._on_device, graphs, self.device, self.idle_bytes)
        if graphs:
            priority = 0 if self._ahead is None else FIRST
            self._graphs = Graphs(
                self._backward, "forward and backward", graphs, self.device, priority, self.idle_bytes
            )

    @contextmanager
    def _on_the_stream_of_graphs(self) -> Iterator[None]:
        """Whatever is done here comes after all that was begun before, and before all that follows."""
        if self._graphs is None:
            yield
            return
        here = torch.cuda.current_stream()
        self._graphs.stream.wait_stream(here)
        with torch.cuda.stream(self._graphs.stream):
            yield
        here.wait_stream(self._graphs.stream)

    def _set_masters(self, exact: dict[Any, Tensor]) -> None:
        assert self.trainer is not None
        for parameter, values in exact.items():
            if self.trainer.trains(parameter) and (self._sharded is None or parameter not in self._sharded.slices):
                self.trainer.set_master(parameter, values)
        self.trainer.restart_average()

    @property
    def _stores(self) -> list[Any]:
        return [store for store in (self._flat, self._sharded) if store is not None]

    # ------------------------------------------------------------------------------------------ a step
    def forward_backward(
        self, batches: Sequence[Batch], step: int, coming: Callable[[], Sequence[Batch] | None] | None = None
    ) -> dict[str, float]:
        """Gradients of the mean loss of `batches`; dropout is a function of seed, step and rank alone."""
        assert self._flat is not None
        torch.manual_seed(_mixed(self._run.recipe.run.seed, step + 1, self._run.rank))
        self._module.train()
        placed = None if self._ahead is None else self._ahead.take(batches, step)
        for store in self._stores:
            store.begin()
        sums = None
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            here = self._on_device(batch) if placed is None else placed[index]
            found = self._micro_batch(here, step, last)
            sums = found if sums is None else sums + found
        for store in self._stores:
            store.finish()
        assert sums is not None, "a step without micro-batches"
        dist.all_reduce(sums)
        self.gradient_scale = 1.0 / sums[self._names.index("count")].clamp(min=1).float()
        fetched = Fetched(sums)
        assert self.trainer is not None
        self.trainer.measure(self.gradient_scale)
        if self._ahead is not None and coming is not None and (following := coming()) is not None:
            self._ahead.begin(following, step + 1)
        return self._means(fetched.get())

    def _micro_batch(self, batch: Batch, step: int, last: bool) -> Tensor:
        """Forward and backward; what is reported, as sums in the order of `_names`."""
        if self._graphs is not None and self._graphs.works:
            found: Tensor = self._graphs(batch, step, self._flat, last)
            return found
        if last:
            for store in self._stores:
                store.expect_last()
        return self._backward(batch)

    def _backward(self, batch: Batch) -> Tensor:
        total, report = self._forward(self._module, batch)
        total.backward()
        if self._flat is not None:
            self._flat.flush()
        return report

    def _forward(self, module: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        result = self._loss(module(batch), batch, self._loss_context)
        total = result.sum
        report = {"count": result.count, **result.extra}
        auxiliary = module.auxiliary_losses()
        for name, value in auxiliary.items():
            # Weighted by the counted elements, so that micro-batches and ranks average as the main loss does.
            total = total + value * result.count
            report[name] = value * result.count
        if auxiliary:
            report["lm_loss"] = result.sum
        report["loss"] = total
        self._names = sorted(report)
        return total, torch.stack([report[name].detach().double() for name in self._names])

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Loss of `batches` in evaluation mode, without gradients."""
        self._module.eval()
        with torch.no_grad():
            sums = torch.stack([self._forward(self._module, self._on_device(batch))[1] for batch in batches]).sum(0)
        self._module.train()
        if self._sharded is not None:
            self._sharded.reshard()
        dist.all_reduce(sums)
        return self._means(sums)

    def _means(self, sums: Tensor) -> dict[str, float]:
        """Means over counted elements, of sums over micro-batches and ranks."""
        values = dict(zip(self._names, sums.tolist(), strict=True))
        counted = values.pop("count")
        return {"counted": counted} | {name: value / max(counted, 1.0) for name, value in values.items()}

    def _on_device(self, batch: Batch) -> Batch:
        """The batch where the model is, with what the model wants to know of it. Copies come from pinned memory: from
        any other the host waits for them, and for all that the device still has to do."""
        if hasattr(self._module, "packing"):
            batch = {**batch, **self._module.packing(batch)}
        if self._copies is None:
            return {name: tensor.to(self.device) for name, tensor in batch.items()}
        pinned = {name: tensor if tensor.is_pinned() else tensor.pin_memory() for name, tensor in batch.items()}
        here = torch.cuda.current_stream()
        with torch.cuda.stream(self._copies):  # beside the update of the step before
            found = {name: tensor.to(self.device, non_blocking=True) for name, tensor in pinned.items()}
        here.wait_stream(self._copies)
        for tensor in found.values():
            tensor.record_stream(here)
        return found

    def step(self, lr: float) -> float:
        """One AdamW update at learning rate `lr`; returns the global gradient norm before clipping."""
        assert self.trainer is not None
        return self.trainer.step(lr, self.gradient_scale)

    # ------------------------------------------------------------------------------------- parameters
    def parameters(self) -> Iterable[LocalParameter]:
        """This rank's parameters, up to date; tied ones once."""
        return self.holdings.parameters()

    def cut(self, parameter: LocalParameter) -> tuple[int, int]:
        """There is no tensor parallelism: 0 of 1."""
        return 0, 1

    def gather(self, parameter: LocalParameter) -> Tensor | None:
        """The full tensor on rank 0, None elsewhere: the weight, or its moving average where that is exported."""
        return self.holdings.gather(parameter.spec.role)

    def weights_changed(self) -> None:
        """Make the parameters, as they are now, the master weights."""
        if self._ahead is not None:
            self._ahead.forget()
        if self.trainer is not None:
            self.trainer.take_parameters()
            self._set_masters(self.holdings.take_exact())

    # ------------------------------------------------------------------------------------------ state
    def save_state(self, folder: Path) -> None:
        """Write weights and optimizer state as layout-independent tensors."""
        torch_state.save(folder, self.holdings, self.trainer)

    def load_state(self, folder: Path, optimizer: bool = True) -> None:
        """Read what `save_state` wrote under any layout; `optimizer=False` reads the weights alone."""
        if self._ahead is not None:
            self._ahead.forget()
        torch_state.load(folder, self.holdings, self.trainer, optimizer and self.trainer is not None)
        if self._flat is not None:
            self._flat.gather()
            self._flat.gathered()

    def idle_bytes(self) -> int:
        """What CUDA graphs use while they run."""
        return sum(0 if part is None else part.idle_bytes for part in (self._graphs, self._ahead))

    def close(self) -> None:
        """Nothing to release: torch's process group belongs to the worker."""


def in_order_of_gradients(module: nn.Module) -> list[nn.Parameter]:
    """Trained parameters, those first whose gradients come first, as far as modules are registered in the order of
    execution. One that comes before its turn only waits; one that comes after it has the later ones wait."""
    return [parameter for parameter in reversed(list(module.parameters())) if parameter.requires_grad]
