"""Contract suites: subclass one in a test file, set its attributes, and pytest runs what every such plugin owes.

    from loong_core.testing import FamilyContract

    class TestAcme(FamilyContract):
        family = "acme"
        config = {"model_type": "llama", "num_hidden_layers": 2, ...}

The suites need pytest (`pip install "loong-core[testing]"`) and are imported when first asked for, so that
`loong_core.testing.ranks` can be used without them.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loong_core.testing.adamw import AdamWContract
    from loong_core.testing.backend import BackendContract
    from loong_core.testing.contract import Contract
    from loong_core.testing.dropout import DropoutContract
    from loong_core.testing.engine import EngineContract
    from loong_core.testing.family import FamilyContract
    from loong_core.testing.op import OpContract
    from loong_core.testing.parts import PartsContract
    from loong_core.testing.planner import PlannerContract
    from loong_core.testing.plugin import PluginContract
    from loong_core.testing.precision import PrecisionContract
    from loong_core.testing.recipe import RecipeContract
    from loong_core.testing.squares import SquaresContract

__all__ = [
    "AdamWContract",
    "BackendContract",
    "Contract",
    "DropoutContract",
    "EngineContract",
    "FamilyContract",
    "OpContract",
    "PartsContract",
    "PlannerContract",
    "PluginContract",
    "PrecisionContract",
    "RecipeContract",
    "SquaresContract",
]


_MODULES = {name: f"{__name__}.{name.removesuffix('Contract').lower() or 'contract'}" for name in __all__}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    # Installed modules get pytest's explained assertions only if it is told before they are imported.
    pytest.register_assert_rewrite(*(module for module in _MODULES.values() if module not in sys.modules))
    return getattr(importlib.import_module(_MODULES[name]), name)
