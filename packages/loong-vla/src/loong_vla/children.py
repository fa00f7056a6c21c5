"""Processes that make batches for a training process, whose own thread then has the interpreter to itself: it launches
the device's work, and every thread that decodes beside it in the same process makes it wait.

See `loong_vla.child` for what they do, and `loong_vla.shared` for how batches come here.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loong_core import errors
from loong_core.errors import LoongError, RecipeError, RunError
from loong_vla.flops import Seen
from loong_vla.making import Made, Skipped
from loong_vla.shared import Mapped, Slot

if TYPE_CHECKING:
    from loong_vla.options import RobotOptions

logger = logging.getLogger(__name__)

MOST, THREADS = 4, 4
"""Processes of a rank, and threads of each, that `auto` takes at most: more threads wait for their process's
interpreter, and 16 cores decode more than a device trains on."""
PATIENCE = 5.0
"""Seconds that an ended process is waited for."""
VARIABLES = (
    "CUDA_VISIBLE_DEVICES=",
    "MKL_NUM_THREADS=1",
    "OMP_NUM_THREADS=1",
    "PYTHONSAFEPATH=1",
    "TOKENIZERS_PARALLELISM=false",
)
"""A process of its own touches no device, and has the threads that it decodes in."""


class Division(NamedTuple):
    """How many processes make batches (0: threads of the training process), and how many threads decode in each."""

    processes: int
    threads: int


def division(settings: RobotOptions, device: str, ranks: int, cores: int | None = None) -> Division:
    """What the recipe asks for, or what suits a rank's share of the machine's cores.

    Raises:
        RecipeError: this system has no memory that processes share.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, (cores or available) // ranks)
    able, asked = hasattr(os, "memfd_create"), settings.processes
    suited = 0 if device == "cpu" or not able else max(1, min(MOST, share // 4))
    count = suited if asked == "auto" else asked
    if not count:
        return Division(0, settings.threads or min(16, share))
    if not able:
        raise RecipeError("data.options.processes: only Linux has what this needs. Set it to 0 or auto.")
    # One core is the training process's own thread's, one that of autograd's.
    return Division(count, settings.threads or max(1, min(THREADS, (share - 2) // count)))


class Child:
    """One process. Its answers are read in a thread, which waits for them without the interpreter."""

    def __init__(self, log: Path, device: str | None) -> None:
        self.log, self.ready = log, False
        self.failure: LoongError | None = None
        self._file = os.memfd_create("loong-batches", os.MFD_CLOEXEC)
        self._memory = Mapped(self._file, device)
        self._pending: dict[int, Future[Made]] = {}
        self._free: deque[int] = deque()
        self._lock, self._closed = threading.Lock(), False
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                ["env", *VARIABLES, sys.executable, "-m", "loong_vla.child", str(self._file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                pass_fds=[self._file],
                encoding="utf-8",
            )
        self._reader = threading.Thread(target=self._read, name="batches", daemon=True)
        self._reader.start()

    @property
    def waiting(self) -> int:
        """How many steps it has to make."""
        return len(self._pending)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message. Where nobody is left to read it, `_read` says why."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:
            logger.debug("process %d reads no more", self.process.pid)

    def ask(self, step: int) -> Future[Made]:
        """What a step trains on, as soon as it is made."""
        future: Future[Made] = Future()
        with self._lock:
            if self.failure is not None:
                raise self.failure
            self._pending[step] = future
        free = [self._free.popleft() for _ in range(len(self._free))]
        self.tell({"step": step, "free": free})
        return future

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                self._take(json.loads(line))
        except Exception as error:  # whatever it is, nobody may go on to wait for the steps that were asked for
            logger.exception("a batch could not be taken over")
            self._fail(RunError(f"A batch could not be taken over from the process that made it: {error}"))
            return
        code = self.process.wait()
        if not self._closed:
            self._fail(RunError(self._obituary(code)))

    def _take(self, message: dict[str, Any]) -> None:
        if "log" in message:
            level, name, text = message["log"]
            logging.getLogger(name).log(level, "%s", text)
        elif "ready" in message:
            self.ready = True
        elif "error" in message:
            error = self._error(message["error"], message["problems"])
            if message.get("step") is None:
                self._fail(error)
            elif (future := self._pending.pop(message["step"])).set_running_or_notify_cancel():
                future.set_exception(error)
        else:
            batches = self._memory.read(Slot(*message["slot"]), message["batches"], self._free.append)
            skipped = [Skipped(*item) for item in message["skipped"]]
            future = self._pending.pop(message["step"])
            if future.set_running_or_notify_cancel():
                future.set_result(Made(batches, skipped, Seen(*message["seen"])))

    def _error(self, name: str, problems: list[str]) -> LoongError:
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, errors.UserError):
            return kind(problems)
        return RunError(f"{' '.join(problems)} This happened in a process that makes batches; see {self.log}.")

    def _fail(self, error: LoongError) -> None:
        with self._lock:
            self.failure = self.failure or error
            pending, self._pending = self._pending, {}
        for future in pending.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(self.failure)

    def _obituary(self, code: int) -> str:
        if code >= 0:
            how = f"ended with exit code {code}"
        else:
            hint = "; the machine may be out of memory" if code == -signal.SIGKILL else ""
            how = f"was ended by {signal.Signals(-code).name}{hint}"
        remedy = "Fewer processes take less memory: data.options.processes; 0 makes batches in the training process."
        return f"Process {self.process.pid}, which makes batches, {how}. See {self.log}. {remedy}"

    def close(self) -> None:
        """End the process, which holds nothing that could be lost."""
        self._closed = True
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except OSError:  # what was not written yet has no reader
                logger.debug("process %d read not all", self.process.pid)
        self._memory.close()
        os.close(self._file)
        if self.log.is_file() and not self.log.stat().st_size:
            self.log.unlink(missing_ok=True)


class Children:
    """The processes of a rank. They start at once, and learn by `begin` what they work on."""

    def __init__(self, count: int, logs: Path, name: str, device: str | None = None) -> None:
        self._children: list[Child] = []
        try:
            for number in range(count):
                self._children.append(Child(logs / f"data-{name}-{number}.log", device))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._children)

    @property
    def processes(self) -> list[subprocess.Popen[str]]:
        """The processes themselves."""
        return [child.process for child in self._children]

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Say which data the steps are of (`loong_vla.open_stream.facts_of`)."""
        for child in self._children:
            child.tell(facts)

    @property
    def ready(self) -> bool:
        """Whether they have begun: steps are better made elsewhere until then.

        Raises:
            LoongError: one of them ended.
        """
        for child in self._children:
            if child.failure is not None:
                raise child.failure
        return all(child.ready for child in self._children)

    def ask(self, step: int) -> Future[Made]:
        """Have the process with the least to do make a step."""
        return min(self._children, key=lambda child: child.waiting).ask(step)

    def close(self) -> None:
        """End them."""
        for child in self._children:
            child.process.kill()
        for child in self._children:
            child.close()
