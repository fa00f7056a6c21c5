"""Kernels run on a CUDA device where there is one, otherwise under Triton's interpreter, to be asked for before."""

from __future__ import annotations

import os
from typing import Any

from loong_core.backends import cuda


def let_loops_end_at_an_argument() -> None:
    """Triton 3.6's interpreter makes an index of a scalar's one-element array by int(), which NumPy 2.5 refuses."""
    from triton.runtime import interpreter

    patch_tensor: Any = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if cuda.probe().devices == 0:
    os.environ["TRITON_INTERPRET"] = "1"
    let_loops_end_at_an_argument()
