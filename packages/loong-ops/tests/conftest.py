"""Kernels run on a CUDA device where there is one, otherwise under Triton's interpreter, which must be asked for first."""

from __future__ import annotations

import os

from loong_core.backends import cuda

if cuda.probe().devices == 0:
    os.environ["TRITON_INTERPRET"] = "1"
