"""Everything a plugin author imports. No tensor library is imported here, not even indirectly."""

from __future__ import annotations

from loong_core.hookspecs import hookimpl
from loong_core.types import (
    Backend,
    CheckpointFormat,
    Cluster,
    DataSource,
    Divisor,
    ModelFamily,
    ModelShape,
    OpImpl,
    OpRequest,
    ParallelPlan,
    ParallelPlanner,
    ParameterSpec,
    PrecisionPolicy,
    Probe,
    RecipeFolder,
    Ref,
    Row,
    Task,
    Weight,
)

__all__ = [
    "Backend",
    "CheckpointFormat",
    "Cluster",
    "DataSource",
    "Divisor",
    "ModelFamily",
    "ModelShape",
    "OpImpl",
    "OpRequest",
    "ParallelPlan",
    "ParallelPlanner",
    "ParameterSpec",
    "PrecisionPolicy",
    "Probe",
    "RecipeFolder",
    "Ref",
    "Row",
    "Task",
    "Weight",
    "hookimpl",
]
