"""Signals that ask a run to end, as Ctrl-C and cluster schedulers send them: the step is finished first, and saved."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """While it is entered, these signals do not end the process but are noted. Who has no patience ends the launcher's
    workers with a second one (`loong_core.launch`)."""

    def __init__(self, say: bool) -> None:
        """`say`: tell the user that the signal has come."""
        self._say = say
        self._before: dict[signal.Signals, Any] = {}
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None and self._say:
            sys.stderr.write(f"{signal.Signals(number).name}: the run ends after this step.\n")
        self.received = signal.Signals(number)
