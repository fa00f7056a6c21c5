"""Kernels run on a CUDA device where there is one, otherwise under Triton's interpreter, to be asked for before."""

from __future__ import annotations

import pytest

from loong_core.backends import cuda
from loong_core.testing.interpreter import interpret

HAS_GPU = cuda.probe().devices > 0

if not HAS_GPU:
    interpret()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped without one, whatever their class."""
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu") and "loong-ops" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def torch_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """QuACK's functions with torch inside."""
    import quack_stand_ins

    quack_stand_ins.install(monkeypatch)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """QuACK's products however small."""
    import quack_stand_ins

    quack_stand_ins.any_size(monkeypatch)
