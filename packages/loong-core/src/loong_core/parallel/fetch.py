"""Numbers on their way from the device to the host, which waits for them alone and not for what was launched since."""

from __future__ import annotations

import torch
from torch import Tensor


class Fetched:
    """The values of `tensor` as they are at this point of the current stream."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor.clone()

    def get(self) -> Tensor:
        """The values, on the CPU. The host waits here."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
