"""Triton's kernels on a CPU, under its interpreter. To be called before anything imports triton."""

from __future__ import annotations

import os
from typing import Any


def interpret() -> None:
    """Ask for the interpreter, and let kernels loop up to an argument: Triton 3.6's makes an index of a scalar's
    one-element array by int(), which NumPy 2.5 refuses."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_tensor: Any = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
