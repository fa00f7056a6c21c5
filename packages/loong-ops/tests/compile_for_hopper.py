"""Compiles what loong-ops launches for a Hopper GPU, where none is: `python compile_for_hopper.py FOLDER`.

Triton asks a stand-in for its driver what to compile for; a launch compiles its kernel as the op asks for it, from the
same arguments, and runs nothing, so that the ops compute with what lies in memory. Processes share the cases of
`compiled_cases`: who creates a case's file in FOLDER takes it, and writes there what became of it. Each needs a cache
of Triton's own, empty: of what lies there the compiler says nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pkgutil
import re
import sys
import traceback
from pathlib import Path
from typing import Any

from compiled_cases import CASES
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.knobs import nvidia
from triton.runtime import driver

import loong_ops

SPILLS = re.compile(r"(\d+) bytes spill (?:stores|loads)")


NO_DEVICE = "kernels are compiled here and never run: there is no device to ask"


class Hopper(DriverBase):
    """Knows what it stands for, and nothing that takes a CUDA library."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise RuntimeError(NO_DEVICE)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> Any:
        raise RuntimeError(NO_DEVICE)

    def get_benchmarker(self) -> Any:
        raise RuntimeError(NO_DEVICE)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launches:
    """Takes the place of `JITFunction.run`. Since `begin`: `launched` are the kernels' names, `compiled` what was
    compiled, which a kernel is once for the same types and constants."""

    def __init__(self) -> None:
        self.run = JITFunction.run
        self.seen: set[int] = set()
        self.begin()

    def begin(self) -> None:
        self.launched: set[str] = set()
        self.compiled: list[dict[str, Any]] = []

    def __call__(self, kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        self.launched.add(name(kernel))
        log = io.StringIO()  # of ptxas, which Triton prints
        with contextlib.redirect_stdout(log):
            result = self.run(kernel, *args, grid=grid, warmup=True, **options)
        if id(result) not in self.seen:
            self.seen.add(id(result))  # Triton keeps it, so that no other gets its id
            spilled = max(int(size) for size in SPILLS.findall(log.getvalue()))
            self.compiled.append({"kernel": name(kernel), "shared": result.metadata.shared, "spilled": spilled})
        return result


def name(kernel: JITFunction[Any]) -> str:
    return f"{kernel.fn.__module__.removeprefix('loong_ops.')}.{kernel.fn.__name__}"


def kernels() -> list[str]:
    """Every function of the package that Triton compiles, unless another of them calls it."""
    found: dict[str, JITFunction[Any]] = {}
    for module in pkgutil.walk_packages(loong_ops.__path__, "loong_ops."):
        members = vars(importlib.import_module(module.name)).values()
        found |= {name(member): member for member in members if isinstance(member, JITFunction)}
    called = {
        name(member)
        for kernel in found.values()
        for word in kernel.fn.__code__.co_names
        if isinstance(member := kernel.fn.__globals__.get(word), JITFunction)
    }
    return sorted(set(found) - called)


def main(folder: Path) -> None:
    """Also says on standard output which kernels there are."""
    driver.set_active(Hopper())
    nvidia.dump_ptxas_log = True
    launches = Launches()
    JITFunction.run = lambda kernel, *args, **options: launches(kernel, *args, **options)  # type: ignore[method-assign]
    print(json.dumps(kernels()))
    for case, call in CASES.items():
        try:
            target = (folder / f"{case}.json").open("x")
        except FileExistsError:
            continue
        launches.begin()
        error = None
        try:
            call()
        except Exception:
            error = traceback.format_exc()
        with target:
            json.dump({"error": error, "launched": sorted(launches.launched), "compiled": launches.compiled}, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
