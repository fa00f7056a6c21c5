"""What one rank does: `python -m loong_core.train.worker <resolved recipe.yaml>`, started by the launcher or torchrun.

The exit code is that of the command line: 0, 1 (the run failed), 2 (the input is wrong). It is also left in
`logs/exit-<rank>.json` of the run folder, because torchrun reports 1 for every failure.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import NoReturn

    from loong_core.data.prepare import PreparedData
    from loong_core.startup import Startup
    from loong_core.train.batches import Batches
    from loong_core.train.engine import Engine
    from loong_core.train.run import Run


def main(recipe_path: Path, startup: Startup | None = None) -> int:
    """Train the resolved recipe at `recipe_path`, which lies in its run folder. `startup`: what was measured so far;
    by default what the launcher left in the environment."""
    from loong_core import log
    from loong_core import startup as startups

    if startup is None:
        startup = startups.Startup.read(os.environ.pop(startups.VARIABLE, None))
        startup.mark("launch")
    folder = recipe_path.resolve().parent
    rank = int(os.environ.get("RANK", "0"))
    log.start(folder, rank)
    code, message = 1, ""
    try:
        _train(recipe_path, folder, startup)
        code = 0
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        message = f"{type(error).__name__}: {error}"
        log.failure(error)
        if isinstance(error, KeyboardInterrupt):
            print("error: interrupted", file=sys.stderr)
        elif os.environ.get("LOONG_DEBUG") or not hasattr(error, "exit_code"):
            traceback.print_exc()
        elif not getattr(error, "told", False):
            print(f"error: {error}", file=sys.stderr)
    finally:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        outcome = {"rank": rank, "exit_code": code, "message": message}
        (folder / "logs" / f"exit-{rank:04d}.json").write_text(json.dumps(outcome))
    return code


def _train(recipe_path: Path, folder: Path, startup: Startup) -> None:
    """Build the run, bring in weights or a checkpoint, train, export, report."""
    from loong_core import plugins, validate
    from loong_core.recipe_load import load
    from loong_core.registry import Registry, resolve

    registry = Registry(plugins.load())
    prepared = validate.prepare(load(str(recipe_path), [], registry), registry, worker=True)
    startup.mark("checks")

    from loong_core.train import run as runs

    startup.mark("imports")
    run = runs.create(prepared, registry, folder)
    startup.mark("device")
    error: BaseException | None = None
    try:
        streamed = registry.get("data_sources", run.recipe.data.source).stream is not None
        data = None if streamed else _prepare(run)
        startup.mark("data")
        build = resolve(run.registry.get("parallel_planners", run.plan.planner).build)
        startup.mark("imports")
        engine = build(run)
        startup.mark("model")
        _run(run, engine, data, startup)
        engine.close()
    except BaseException as caught:
        error = caught
        raise
    finally:
        registry.events.run_end(run, error)
        _leave(error)


def _prepare(run: Run) -> PreparedData:
    from loong_core.data.prepare import prepare

    return prepare(run.recipe, run.folder)


def _stream(run: Run, data: PreparedData | None) -> Batches:
    """The batches of this rank's replica: cut from rows of text, or made by the source itself."""
    from loong_core.data.stream import Stream
    from loong_core.registry import resolve

    if data is not None:
        return Stream(run.recipe, data, run.plan, _replica(run), run.shape)
    source = run.registry.get("data_sources", run.recipe.data.source)
    made: Batches = resolve(source.stream, f"data source {source.name}")(run, _replica(run))
    return made


def _run(run: Run, engine: Engine, data: PreparedData | None, startup: Startup) -> None:
    from loong_core.train import report
    from loong_core.train.checkpoints import Checkpoints
    from loong_core.train.loop import train
    from loong_core.train.metrics import Reporter
    from loong_core.train.start import freeze, start_weights

    checkpoints = Checkpoints(run)
    # First, because processes that make batches have their own start-up to do while weights are read.
    stream = _stream(run, data)
    startup.mark("data")
    try:
        found = checkpoints.newest()
        if found is None:
            start_weights(run, engine)
        startup.mark("weights")
        freeze(run, engine)
        run.registry.events.model_built(engine.modules, run)
        engine.optimizer(run.recipe.optim)
        startup.mark("optimizer")
        if found is not None:
            checkpoints.load(run, engine, stream, found)
            startup.mark("checkpoint")
            if run.is_main:
                sys.stdout.write(_continued(run, found))
        reporter = Reporter(run, startup, engine.idle_bytes)
        run.registry.events.run_start(run)
        try:
            train(run, engine, stream, checkpoints, reporter)
            checkpoints.finish(run, engine, stream)
        finally:
            reporter.close()
    finally:
        stream.close()
    if run.recipe.checkpoint.export is not None:
        checkpoints.export(run, engine)
    if run.is_main:
        report.write(run.folder)


def _continued(run: Run, found: Path) -> str:
    """What a user is told who starts a run that has a checkpoint."""
    steps = run.recipe.run.steps
    if run.step >= steps:
        return f"all {steps} steps are done, by {found}; a higher run.steps goes on from there\n"
    return f"continues after step {run.step} of {steps}, from {found}\n"


def _replica(run: Run) -> int:
    """This rank's data-parallel index: megatron orders ranks tp, cp, (ep inside dp), dp, pp from fastest to slowest."""
    return run.rank // (run.plan.tp * run.plan.cp) % run.plan.dp


def _leave(error: BaseException | None) -> None:
    """Leave the process group; after a failure without waiting for ranks that may be stuck in a collective."""
    import torch.distributed as dist

    if error is None and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """Leave the process. Where a GPU's step was profiled, without what native libraries do at the exit: everything is
    on disk, and after a profile some of them freed memory twice there, which made a failure of a finished run."""
    from loong_core.train import profile

    if not profile.on_a_device:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main(Path(sys.argv[1])))
