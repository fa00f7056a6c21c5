"""Make `torch.cuda` mean the CPU, reversibly: megatron-core's device abstraction is `torch.cuda` itself.

Device only, no operators: streams, events and random state land on the CPU, a device argument that names CUDA is read
as `cpu` (by a `TorchFunctionMode`, the mechanism of `torch.set_default_device`; no tensor function is replaced), and
collectives that gloo lacks are spelled with ones it has. Importing this module changes nothing; `activate()` does.

Process-wide while active: the CUDA generator *is* the CPU generator, `Tensor.type()` answers `torch.cuda.*`, and
`torch.compile` is the identity. `torch.cuda.is_available()` keeps telling the truth.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # maps torch.cuda names to rules when it is imported: it has to see the real ones
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from loong_core.backends import gloo
from loong_core.errors import Unsupported

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------ streams, events, random state
class Stream:
    """A stream of the CPU: work is in order already, so every wait is over when it begins."""

    device, device_index, device_type, cuda_stream, stream_id = CPU, 0, 0, 0, 0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


class Event:
    """A moment in time: recorded work is finished work."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`."""
        return (end.seconds - self.seconds) * 1e3


class _Generators:
    """`torch.cuda.default_generators`: one device, whatever the index."""

    def __getitem__(self, _: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


_STREAM = Stream()


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _no_context(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _random_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_random_state(state: torch.Tensor, device: Any = None) -> None:
    torch.default_generator.set_state(state)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _now(function: Callable[[], Any], **_: Any) -> None:
    function()


TORCH_CUDA: dict[str, Any] = {
    # As the real one answers; `CudaMeansCpu` reads `device=0` as the CPU.
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "device": _no_context,
    "set_device": _nothing,
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "Stream": Stream,
    "Event": Event,
    "stream": _no_context,
    "set_stream": _nothing,
    "current_stream": lambda *_: _STREAM,
    "default_stream": lambda *_: _STREAM,
    "is_current_stream_capturing": lambda: False,
    "get_device_capability": lambda *_: (0, 0),
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "memory_reserved": lambda *_: 0,
    "max_memory_reserved": lambda *_: 0,
    "memory_stats": lambda *_: {},
    "reset_peak_memory_stats": _nothing,
    "get_rng_state": _random_state,
    "set_rng_state": _set_random_state,
    "random.get_rng_state": _random_state,
    "random.set_rng_state": _set_random_state,
    "manual_seed": _seed,
    "manual_seed_all": _seed,
    "initial_seed": torch.default_generator.initial_seed,
    "default_generators": _Generators(),
    "_lazy_init": _nothing,
    "_lazy_call": _now,
    "nvtx.range_push": _nothing,
    "nvtx.range_pop": _nothing,
    "nvtx.range": _no_context,
}


# ---------------------------------------------------------------------------------------------- device arguments
def _cpu(device: Any) -> Any:
    """`device` with CUDA read as CPU; an index alone means the accelerator too."""
    if isinstance(device, bool) or device is None:
        return device
    if isinstance(device, int):
        return CPU
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str) and device.split(":")[0] == "cuda":
        return CPU
    return device


class CudaMeansCpu(TorchFunctionMode):
    """Reads CUDA in the device arguments of every torch function as the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron-core's optimizers compare this string with 'torch.cuda.FloatTensor'
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to:
            args = (args[0], *map(_cpu, args[1:]))
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # page-locking needs an accelerator
        return func(*args, **kwargs)


def _compile(function: Any = None, **_: Any) -> Any:
    """`torch.compile`, which megatron-core uses as its fuser, without compiling."""
    return function if function is not None else lambda decorated: decorated


# --------------------------------------------------------------------------------------------------------- switch
_active: contextlib.ExitStack | None = None
_activated_before = False


def active() -> bool:
    """Whether `torch.cuda` means the CPU in this process."""
    return _active is not None


def activate(force: bool = False) -> None:
    """Make `torch.cuda` mean the CPU in this process until `deactivate()`; a second call does nothing.

    Call it before megatron.core is imported, which binds names of `torch.cuda` then (what it bound stays good for a
    later activation). A process that forks while it is active is active in its children too.

    Raises `Unsupported` where a GPU is visible, unless forced, because from then on nothing could use it; and where
    megatron.core has been imported already.
    """
    global _active, _activated_before
    if _active is not None:
        return
    if torch.cuda.is_available() and not force:
        raise Unsupported(
            "backend cpu: a GPU is visible to this process, and the cpu backend would hide it from everything in it. "
            "Set CUDA_VISIBLE_DEVICES='' to hide the GPU, or choose `backend: cuda`."
        )
    if "megatron.core" in sys.modules and not _activated_before:
        raise Unsupported(
            "backend cpu: megatron.core was imported before the cpu device was activated, so parts of it still call "
            "CUDA. Call loong_core.backends.cpu_device.activate() first (a backend's setup() does it), and import "
            "modules that need megatron.core inside functions."
        )
    mode = CudaMeansCpu()
    run_backward = torch.autograd._engine_run_backward

    def run_backward_in_mode(*args: Any, **kwargs: Any) -> Any:
        # Tensor.backward is a torch function itself, so the mode is off while it runs
        with mode:
            return run_backward(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name, value in TORCH_CUDA.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", value, create=True))
        for name, wrap in gloo.WRAPPERS.items():
            stack.enter_context(mock.patch.object(dist, name, wrap(getattr(dist, name))))
        stack.enter_context(mock.patch("torch.compile", _compile))
        stack.enter_context(mock.patch("torch.autograd._engine_run_backward", run_backward_in_mode))
        stack.enter_context(mode)
        _active, _activated_before = stack.pop_all(), True


def deactivate() -> None:
    """Restore every name that `activate` replaced. Modules built in between must not be used any more."""
    global _active
    if _active is not None:
        stack, _active = _active, None
        stack.close()
