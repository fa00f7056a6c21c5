"""Shows, in a worker, what the backend claims of itself; `BackendContract` calls it."""

from __future__ import annotations

from typing import Any

import torch

from loong_example_backend.device import ROWS
from loong_example_backend.layers import BlockNorm


def show_row_blocks(run: Any) -> str | None:
    """The capability `row_blocks`: work in blocks of rows gives the numbers of work in one go."""
    base = type("Centre", (torch.nn.Module,), {"forward": lambda self, x: x - x.mean(-1, keepdim=True)})
    rows = torch.randn(3 * ROWS + 1, 4, device=run.device)
    blocked = type("Blocked", (BlockNorm, base), {})()(rows)
    return None if torch.equal(blocked, base()(rows)) else "blocks change the numbers"
