"""Makes batches in a process of its own: `python -m loong_vla.child FILE`, started by `loong_vla.children`.

FILE is the number of an open file, the memory for batches. Messages are lines of JSON. In: first what the data are,
then steps to make and slots that are free again. Out: that it is ready, batches and where they lie, errors, log
records. It ends with its input, so it never outlives the training process, whatever ends that.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loong_vla.open_stream import Opened

Messages = SimpleQueue[dict[str, Any]]


class Answers:
    """Where answers go. What anything prints goes to the log file: only messages may stand on this output."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._lock = threading.Lock()
        os.dup2(2, 1)

    def say(self, **message: Any) -> None:
        """Send a message."""
        text = json.dumps(message) + "\n"
        with self._lock:
            self._file.write(text)
            self._file.flush()


class _Records(logging.Handler):
    """Log records for the log of the run."""

    def __init__(self, answers: Answers) -> None:
        super().__init__(logging.WARNING)
        self._answers = answers

    def emit(self, record: logging.LogRecord) -> None:
        self._answers.say(log=[record.levelno, record.name, record.getMessage()])


def main(file: int) -> None:
    """Answer until the input ends."""
    # What asks the run to end is the training process's to act on: it finishes its step, for which it needs this one.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    answers, messages = Answers(), Messages()
    logging.getLogger().addHandler(_Records(answers))
    logging.captureWarnings(True)
    threading.Thread(target=_listen, args=(messages,), daemon=True).start()
    try:
        # The slow imports, while the training process still reads the description of the data.
        import transformers.models.auto.tokenization_auto  # noqa: F401

        from loong_vla.shared import Pool

        opened = _open(messages.get())
        answers.say(ready=True)
        _serve(messages, answers, opened, Pool(file))
    except Exception as error:
        answers.say(**_described(error))
        sys.exit(1)


def _listen(messages: Messages) -> None:
    for line in sys.stdin:
        messages.put(json.loads(line))
    os._exit(0)


def _open(facts: Mapping[str, Any]) -> Opened:
    """The data as the training process opened them."""
    from loong_core.errors import DataError
    from loong_vla.open_stream import Known, open_data, run_of

    run: Any = run_of(facts)
    opened = open_data(run, facts["replica"], facts["threads"], Known.of(facts["known"]))
    if opened.identity != facts["identity"]:
        raise DataError(f"`{run.recipe.data.path}` changed while it was opened. Start the run again.")
    return opened


def _serve(messages: Messages, answers: Answers, opened: Opened, pool: Any) -> None:
    while True:
        message = messages.get()
        pool.free(message["free"])
        try:
            made = opened.maker.make(opened.train, message["step"])
            slot, entries = pool.write(made.batches)
        except Exception as error:
            answers.say(step=message["step"], **_described(error))
            continue
        answers.say(step=message["step"], slot=slot, batches=entries, skipped=made.skipped, seen=made.seen)


def _described(error: Exception) -> dict[str, Any]:
    """An error by its name and its messages; of one that is none of loong's, all there is to know."""
    from loong_core.errors import LoongError

    if isinstance(error, LoongError):
        return {"error": type(error).__name__, "problems": getattr(error, "problems", [str(error)])}
    traceback.print_exc()
    return {"error": "RunError", "problems": [f"{type(error).__name__}: {error}"]}


if __name__ == "__main__":
    main(int(sys.argv[1]))
