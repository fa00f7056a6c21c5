"""Cases of the op."""

from __future__ import annotations

from loong_core.testing.cases.case import OpCase

CASES: tuple[OpCase, ...] = ()
