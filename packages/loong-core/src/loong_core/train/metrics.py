"""What is reported of a step, and the sinks it goes to. `metrics.jsonl` is the record; the others are views of it.

One JSON object per line and step (a public contract; every quantity is that of the step alone, none is cumulative):

| field | meaning |
|---|---|
| `step` | optimizer steps done, the first is 1 |
| `loss` | mean over the `tokens` of the step's global batch |
| `grad_norm` | global gradient norm before clipping |
| `lr` | learning rate of the step |
| `tokens` | tokens of the global batch that count in the loss: weights for averaging `loss` over steps |
| `samples` | samples that ended up in the global batch (several share a row when rows are packed) |
| `step_seconds` | wall time of the step, waiting for data included; evaluation and saving excluded |
| `data_seconds` | the part of it that waited for data, on rank 0 |
| `tokens_per_second` | `tokens` / `step_seconds`, over all devices |
| `samples_per_second` | `samples` / `step_seconds`, over all devices |
| `tflops_per_device` | model FLOPs of the global batch, see below, 1e12 a second; null where they are unknown |
| `mfu` | model FLOP utilisation: that as a share of the device's peak; null where the peak is unknown |
| `hfu` | hardware FLOP utilisation: as `mfu`, with what `parallel.recompute` computes a second time counted too |
| `memory_bytes` | memory in use on the fullest rank: the allocator's peak of the step, on a CPU the resident size |

Model FLOPs are those of the formula in `ModelShape.train_flops`, forward and backward, for the tokens that the batch
holds: padding is no work, and attention counts the causal half within each sample, however samples are packed. The
peak is that of dense matrix products in the run's activation dtype, from the maker's data sheet. `hfu` adds the
forward passes that the plan repeats, not what a kernel repeats inside itself (flash attention's backward, a fused
loss). Without recomputation the two are equal. Source: Chowdhery et al., 2022 (arXiv 2204.02311, appendix B).

Models that do not read text have no tokens; then `tokens` are what their loss counts, such as the elements of action
chunks.

Further numbers a task reports (`aux_loss`, `lm_loss`) and `eval_loss`, on steps that end with an evaluation, follow
under their own names. Floats are written so that reading gives the same float; NaN and infinity, which JSON lacks,
are null.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from loong_core.errors import RunError, Unsupported
from loong_core.log import logger
from loong_core.startup import FIRST_STEP

if TYPE_CHECKING:
    from loong_core.startup import Startup
    from loong_core.train.batches import Batches
    from loong_core.train.run import Run

FIELDS = (
    "step",
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "samples",
    "step_seconds",
    "data_seconds",
    "tokens_per_second",
    "samples_per_second",
    "tflops_per_device",
    "mfu",
    "hfu",
    "memory_bytes",
)
SINKS = ("console", "jsonl", "tensorboard")
Metrics = dict[str, Any]


class Sink(Protocol):
    """Takes the row of every step."""

    def write(self, row: Metrics) -> None: ...

    def close(self) -> None: ...


def row(
    measured: Mapping[str, Any],
    *,
    step: int,
    samples: int,
    flops: float | None,
    recomputed: float,
    world: int,
    peak_flops: float,
    memory_bytes: int,
) -> Metrics:
    """The row of a step, fields in their order.

    Args:
        measured: `loss`, `counted` (tokens), `grad_norm`, `lr`, `step_seconds`, `data_seconds`, and extra numbers.
        step: optimizer steps done.
        samples: samples in the global batch.
        flops: model FLOPs of the global batch, None = unknown.
        recomputed: FLOPs of it that are computed a second time.
        world: number of devices.
        peak_flops: of one device, 0 = unknown.
        memory_bytes: of the fullest rank.
    """
    seconds = measured["step_seconds"]
    tokens = round(measured["counted"])
    per_device, again = (work / seconds / world if seconds > 0 else 0.0 for work in (flops or 0.0, recomputed))
    share = 1.0 / peak_flops if peak_flops and flops is not None else None
    result: Metrics = {
        "step": step,
        "loss": measured["loss"],
        "grad_norm": measured["grad_norm"],
        "lr": measured["lr"],
        "tokens": tokens,
        "samples": samples,
        "step_seconds": seconds,
        "data_seconds": measured["data_seconds"],
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "samples_per_second": samples / seconds if seconds > 0 else 0.0,
        "tflops_per_device": None if flops is None else per_device / 1e12,
        "mfu": None if share is None else per_device * share,
        "hfu": None if share is None else (per_device + again) * share,
        "memory_bytes": memory_bytes,
    }
    result.update({name: value for name, value in measured.items() if name not in result and name != "counted"})
    return result


def encode(metrics: Mapping[str, Any]) -> str:
    """One line of `metrics.jsonl`, without its end."""
    return json.dumps({name: _finite(value) for name, value in metrics.items()}, allow_nan=False)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> list[Metrics]:
    """The complete rows of a `metrics.jsonl`; what a kill left of a last line is passed over. Absent file: no rows."""
    if not path.exists():
        return []
    rows = []
    with path.open("rb") as lines:
        for line in lines:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and isinstance(found.get("step"), int):
                rows.append(found)
    return rows


class JsonLines:
    """Appends rows; each is handed to the operating system at once, so a killed run keeps every finished step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, row: Metrics) -> None:
        """Append one row. Raises RunError when the file cannot take it (a full disk)."""
        line = encode(row).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise RunError(
                f"{self._path} cannot be written: {error.strerror}. Free space there (or remove jsonl from log.to) "
                "and run the same command again to continue from the newest checkpoint."
            ) from error

    def close(self) -> None:
        """Close the file; a row that was written survives a crash of the machine from here on."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
            self._file.close()


def open_metrics(path: Path, step: int) -> JsonLines:
    """Open `path` to continue after `step`: rows of later steps, which a resumed run does again, are dropped.

    The remaining rows replace the file in one rename, byte for byte as they were; a kill leaves the old or the new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[bytes] = []
    old = path.read_bytes() if path.exists() else b""
    for line in old.splitlines(keepends=True):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and found.get("step", step + 1) <= step:
            kept.append(line.rstrip(b"\n") + b"\n")
    if b"".join(kept) != old:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return JsonLines(path)


class TensorBoard:
    """Every number of a row as a scalar of the step; a resumed run hides the steps it does again."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, row: Metrics) -> None:
        """Write one step."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


def sink_problems(names: Sequence[str]) -> list[str]:
    """What is wrong with `log.to`: names that do not exist, and sinks whose library is not installed."""
    problems = []
    for name in names:
        if name not in SINKS:
            from difflib import get_close_matches

            near = get_close_matches(name, SINKS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            problems.append(f"log.to: no sink named {name!r}; {hint}allowed here {', '.join(SINKS)}")
        elif name == "tensorboard" and find_spec("tensorboard") is None:
            problems.append(
                "log.to: tensorboard is not installed; install the package `tensorboard`, or remove it from log.to"
            )
    return problems


class Reporter:
    """Measures memory on every rank and writes the rows of rank 0 to the sinks of `log.to`.

    With `startup` the first step it is told of ends the start-up: how long that took is said once, on the console and
    in the log. `idle_bytes` tells of memory that the allocator does not (`Engine.idle_bytes`).
    """

    def __init__(self, run: Run, startup: Startup | None = None, idle_bytes: Callable[[], int] = lambda: 0) -> None:
        from loong_core.train.memory_use import used

        self._sinks: list[Sink] = []
        self._startup, self._idle_bytes = startup, idle_bytes
        used(run.device)  # What setting up needed at its peak is not what the first step uses.
        if problems := sink_problems(run.recipe.log.to):
            raise Unsupported(*problems)
        if run.is_main:
            self._sinks = [self._open(name, run) for name in dict.fromkeys(run.recipe.log.to)]

    @staticmethod
    def _open(name: str, run: Run) -> Sink:
        if name == "jsonl":
            return open_metrics(run.folder / "metrics.jsonl", run.step)
        if name == "tensorboard":
            return TensorBoard(run.folder / "tensorboard", run.step)
        from loong_core.train.watch import Watch

        log, counts = run.recipe.log, run.task.counts
        return Watch(run.recipe.run.name, run.step, run.recipe.run.steps, log.every, counts=counts)

    def step(self, run: Run, metrics: Mapping[str, Any], data: Batches, stop: bool = False) -> bool:
        """Report the step that `run.step` now counts. Collective: every rank calls it.

        Returns whether the run ends here: with `stop` on any rank, or a problem of its data.
        """
        from loong_core.train.memory_use import fullest_rank

        startup, self._startup = self._startup, None
        if startup is not None:
            startup.mark(FIRST_STEP)
        memory, stop = fullest_rank(run.device, stop or data.problem() is not None, self._idle_bytes())
        if not self._sinks:
            return stop
        done = row(
            metrics,
            step=run.step,
            samples=data.samples(run.step - 1),
            flops=data.flops(run.step - 1),
            recomputed=data.recomputed(run.step - 1),
            world=run.world,
            peak_flops=run.cluster.peak_flops,
            memory_bytes=memory,
        )
        for sink in self._sinks:
            sink.write(done)
        if startup is not None:
            self._say(startup.line())
        return stop

    def _say(self, text: str) -> None:
        from loong_core.train.watch import Watch

        logger.info(text)
        for sink in self._sinks:
            if isinstance(sink, Watch):
                sink.say(text)

    def close(self) -> None:
        """Close every sink; safe to call again."""
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()
