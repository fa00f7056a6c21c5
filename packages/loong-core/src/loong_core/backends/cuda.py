"""The CUDA backend. The probe asks the driver itself (`libcuda`), so the parent process needs no tensor library."""

from __future__ import annotations

import ctypes
import importlib.util
import os

from loong_core.errors import Unsupported
from loong_core.types import Backend, Probe

ENVIRONMENT = {
    # Device N is the same device in every tool that lists them.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    # Transformer Engine multiplies fp32 in TF32; `precision: fp32` means 32 bits.
    "NVIDIA_TF32_OVERRIDE": "0",
    # Growing segments instead of fixed blocks: packed rows of varying layout would fragment the allocator's cache.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # Otherwise the profiler takes its library down as it stops; profiled runs with CUDA graphs crashed when they ended.
    "TEARDOWN_CUPTI": "0",
}

PEAK_FLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B300", {"bfloat16": 2.25e15, "float16": 2.25e15, "float32": 75e12, "float8": 4.5e15}),
    ("B200", {"bfloat16": 2.25e15, "float16": 2.25e15, "float32": 75e12, "float8": 4.5e15}),
    ("GH200", {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float8": 1979e12}),
    ("H200", {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float8": 1979e12}),
    ("H100 PCIe", {"bfloat16": 756e12, "float16": 756e12, "float32": 51e12, "float8": 1513e12}),
    ("H100 NVL", {"bfloat16": 835e12, "float16": 835e12, "float32": 60e12, "float8": 1671e12}),
    ("H100", {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float8": 1979e12}),
    ("H800", {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "float8": 1979e12}),
    ("H20", {"bfloat16": 148e12, "float16": 148e12, "float32": 44e12, "float8": 296e12}),
    ("A100", {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12}),
    ("A800", {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12}),
    ("L40S", {"bfloat16": 362e12, "float16": 362e12, "float32": 91.6e12, "float8": 733e12}),
    ("L40", {"bfloat16": 181e12, "float16": 181e12, "float32": 90.5e12, "float8": 362e12}),
    ("L4", {"bfloat16": 121e12, "float16": 121e12, "float32": 30.3e12, "float8": 242e12}),
)
"""Dense peaks (no sparsity) from NVIDIA's data sheets, FLOP/s per device; the first name found in the device's wins."""


_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


class _Driver:
    """The few entry points of the driver that a probe needs. Every failure is an OSError in words."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise OSError("no NVIDIA driver: libcuda.so.1 is not on this machine") from error
        self.call("cuInit", ctypes.c_uint(0))

    def call(self, name: str, *arguments: object) -> None:
        """Call `name`; raises OSError with the driver's own words for a code that is not zero."""
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            known = self._library.cuGetErrorString(code, ctypes.byref(text)) == 0 and text.value
            words = text.value.decode(errors="replace") if known and text.value else "unknown error"
            raise OSError(f"the driver's {name} failed with code {code}: {words}")

    def count(self) -> int:
        """Number of devices this process may use."""
        number = ctypes.c_int(0)
        self.call("cuDeviceGetCount", ctypes.byref(number))
        return number.value

    def describe(self, index: int) -> tuple[str, int]:
        """Name and bytes of memory of one device."""
        device, memory, name = ctypes.c_int(0), ctypes.c_size_t(0), ctypes.create_string_buffer(128)
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        self.call("cuDeviceGetName", name, ctypes.c_int(len(name)), device)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        return name.value.decode(errors="replace"), memory.value

    def capability(self, index: int) -> tuple[int, int]:
        """Compute capability of one device, major and minor."""
        device, found = ctypes.c_int(0), []
        self.call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        for attribute in _CAPABILITY:
            value = ctypes.c_int(0)
            self.call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
            found.append(value.value)
        return found[0], found[1]


def probe() -> Probe:
    """The visible CUDA devices: their number, and name and memory (bytes) of the smallest. Never raises.

    The driver itself honours CUDA_VISIBLE_DEVICES. The driver is initialised in this process; a child that is forked
    afterwards could not use it, so workers are started as new programs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles", "none", "void"):
        return Probe(devices=0, reason=f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU")
    try:
        driver = _Driver()
        number = driver.count()
        if number == 0:
            hint = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
            return Probe(devices=0, reason=f"the driver shows no GPU to this process{hint}")
        found = [driver.describe(index) for index in range(number)]
    except (OSError, AttributeError) as error:
        return Probe(devices=0, reason=str(error))
    name, memory = min(found, key=lambda item: item[1])
    return Probe(devices=number, memory=memory, device_name=name)


def one_queue() -> bool:
    """Whether all streams of this process share one hardware queue, so that what waits in one holds up the others."""
    return os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"


def compute_capability() -> tuple[int, int] | None:
    """The lowest compute capability of the visible devices, as (9, 0); None where none tells. Never raises."""
    if probe().devices == 0:
        return None
    try:
        driver = _Driver()
        return min(driver.capability(index) for index in range(driver.count()))
    except (OSError, AttributeError):
        return None


def setup(local_rank: int) -> str:
    """Bind this process to GPU `local_rank` (modulo the visible ones); returns `"cuda:N"`.

    Raises `Unsupported` where torch sees no GPU although the backend was chosen.
    """
    import torch

    if not torch.cuda.is_available():
        raise Unsupported(
            f"backend cuda: torch {torch.__version__} (built for CUDA {torch.version.cuda}) sees no GPU. "
            f"The driver says: {probe().reason or 'GPUs are there'}. "
            "Install a torch built for this driver, or choose `backend: cpu`."
        )
    device = local_rank
    if local_rank >= (count := torch.cuda.device_count()):
        if count > 1:
            raise Unsupported(
                f"backend cuda: local rank {local_rank} has no GPU of its own, {count} are visible. "
                f"Use launch.devices <= {count}."
            )
        device = 0  # a launcher that shows every worker its own GPU alone
    torch.cuda.set_device(device)
    return f"cuda:{device}"


def peak_flops(device_name: str, dtype: str) -> float:
    """Dense peak of one device in FLOP/s for a torch dtype name; 0 where the device or the format is not known."""
    for name, peaks in PEAK_FLOPS:
        if name.lower() in device_name.lower():
            return peaks.get(dtype, 0.0)
    return 0.0


def _capabilities() -> frozenset[str]:
    """What every GPU of the table can do, and what is installed here (looked for, not imported)."""
    found = {"bf16", "fp16", "cuda_streams"}
    if importlib.util.find_spec("transformer_engine") is not None:
        found.add("transformer_engine")
    return frozenset(found)


BACKEND = Backend(
    name="cuda",
    device_type="cuda",
    collective="nccl",
    probe="loong_core.backends.cuda:probe",
    setup="loong_core.backends.cuda:setup",
    layer_provider="loong_core.parallel.te_layers:TELayerProvider",
    peak_flops="loong_core.backends.cuda:peak_flops",
    env=ENVIRONMENT,
    capabilities=_capabilities(),
    priority=100,
    summary="NVIDIA GPUs over NCCL, layers by Transformer Engine.",
)
