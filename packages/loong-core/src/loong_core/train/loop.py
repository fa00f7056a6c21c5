"""The training loop: batches, gradients, update, report, evaluate, save. It knows no engine, modality or device."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from loong_core.errors import RunError
from loong_core.registry import resolve
from loong_core.train.checkpoints import FOLDER
from loong_core.train.interruption import Interruption
from loong_core.train.profile import profiled
from loong_core.train.schedule import learning_rate

if TYPE_CHECKING:
    from loong_core.train.batches import Batches
    from loong_core.train.checkpoints import Checkpoints
    from loong_core.train.engine import Engine
    from loong_core.train.metrics import Reporter
    from loong_core.train.run import Run


def train(run: Run, engine: Engine, data: Batches, checkpoints: Checkpoints, report: Reporter) -> None:
    """Train from `run.step` to the recipe's last step. `run.step` counts finished optimizer steps."""
    steps = run.recipe.run.steps
    with Interruption(say=run.is_main) as interruption:
        while run.step < steps:
            began = time.perf_counter()
            with profiled(run):
                batches = data.batches(run.step)
                data_seconds = time.perf_counter() - began

                coming = partial(data.coming, run.step + 1) if run.step + 1 < steps else None
                losses = engine.forward_backward(batches, run.step, coming)
                _require_finite(run, "loss", losses["loss"])
                lr = learning_rate(run.recipe.optim, run.step + 1, steps)
                norm = engine.step(lr)
                _require_finite(run, "gradient norm", norm)
            run.step += 1

            metrics: dict[str, Any] = dict(losses, grad_norm=norm, lr=lr, data_seconds=data_seconds)
            metrics["step_seconds"] = time.perf_counter() - began
            if _evaluation_due(run):
                metrics["eval_loss"] = evaluate(run, engine, data)
                if run.task.evaluate is not None:
                    metrics.update(resolve(run.task.evaluate, f"task {run.task.name}")(run, engine, data))
            stop = report.step(run, metrics, data, interruption.received is not None)
            run.registry.events.step_end(run, metrics)
            if checkpoints.due(run.step):
                checkpoints.save(run, engine, data)
            if stop:
                _stop(run, engine, data, checkpoints, interruption)


def _stop(run: Run, engine: Engine, data: Batches, checkpoints: Checkpoints, interruption: Interruption) -> NoReturn:
    """End the run because of its data or of a signal, on every rank, with everything learned so far on disk."""
    checkpoints.finish(run, engine, data)
    reason = data.problem()
    if reason is None and interruption.received is not None:
        reason = f"Interrupted by {interruption.received.name}."
    if reason is None:
        reason = "Another rank was interrupted, or cannot use its data any further; its log says why."
    saved = f"is saved in {run.folder / FOLDER}, and the same command continues from there"
    if run.recipe.checkpoint.every is None:
        saved = "is not saved, because checkpoint.every is null"
    error = RunError(f"{reason} The run stopped after step {run.step}, which {saved}.")
    error.told = not run.is_main and data.problem() is None
    raise error


def evaluate(run: Run, engine: Engine, data: Batches) -> float | None:
    """Mean loss over what counts in the held-out batches; None where nothing does."""
    total = count = 0.0
    for index in range(data.eval_count):
        losses = engine.evaluate(data.eval_batches(index))
        total += losses["loss"] * losses["counted"]
        count += losses["counted"]
    return total / count if count else None


def _evaluation_due(run: Run) -> bool:
    section = run.recipe.data.eval
    if section is None:
        return False
    last = run.step == run.recipe.run.steps
    return last or (section.every is not None and run.step % section.every == 0)


def _require_finite(run: Run, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise RunError(
            f"The {what} of step {run.step + 1} is {value}. Nothing of this step is saved; the newest checkpoint in "
            f"{run.folder / 'checkpoints'} is intact. Lower optim.lr, set optim.clip, or look at this step's rows with "
            f"`loong data inspect`."
        )
