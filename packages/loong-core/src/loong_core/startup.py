"""Where the time before training goes: from the command to the end of the first step, part by part.

The parts belong to two processes: the command, which checks and prepares data, hands its own on to the worker as text.
"""

from __future__ import annotations

import json
import time

VARIABLE = "LOONG_STARTUP"
"""The environment variable in which a launcher hands on what it measured."""

FIRST_STEP = "first step"


class Startup:
    """A stopwatch whose time belongs, in full, to the parts that `mark` ends."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        """Seconds, in the order in which the parts first ended."""
        self._last = time.time()

    def mark(self, part: str) -> None:
        """All time since the last mark was spent on `part`; a part may be in several pieces."""
        now = time.time()
        # The wall clock is the one that processes share; it may be set back.
        self.parts[part] = self.parts.get(part, 0.0) + max(0.0, now - self._last)
        self._last = now

    def line(self) -> str:
        """`start-up 41.2 s: checks 0.7, imports 9.1, ...`: the whole, and every part that took 0.1 s or more."""
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items() if seconds >= 0.1)
        return f"start-up {sum(self.parts.values()):.1f} s" + (f": {parts}" if parts else "")

    def dump(self) -> str:
        """For `read` in another process of this machine."""
        return json.dumps({"parts": self.parts, "last": self._last})

    @staticmethod
    def read(text: str | None) -> Startup:
        """What `dump` gave; a stopwatch that starts now where that is absent or unreadable."""
        result = Startup()
        try:
            found = json.loads(text or "")
            parts = {str(part): float(seconds) for part, seconds in found["parts"].items()}
            last = float(found["last"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return result
        result.parts, result._last = parts, last
        return result
