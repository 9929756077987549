"""fxmem: train PyTorch models under a memory budget that holds.

Names are imported when they are first used: the planning core (problem, schedule, solvers) works without torch, and processes
that only solve never load it.
"""

from __future__ import annotations

import importlib

from .version import VERSION as __version__  # noqa: F401

_PLACES = {
    "api": ("frontier", "plan", "plans", "transform"),
    "checking": ("ImplementationCheck", "check_implementation"),
    "codegen.planned": ("PlannedModule",),
    "cost": ("CostModel", "OpCost"),
    "errors": (
        "ArenaError", "BudgetError", "CapacityError", "CaptureError", "CostError", "FxmemError", "ImplementationError",
        "InfeasibleBudgetError", "MeasureError", "MissingExtraError", "OffsetError", "PlacementError", "PlanError",
        "ProblemError", "TapeError",
    ),
    "implementations": ("register_implementation",),
    "measuring": ("Measurement", "PairMeasurement", "measure", "measure_pair"),
    "decisions": ("Frontier", "Plan"),
    "saving": ("load_plan",),
}  # fmt: skip
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}

_PACKAGES = ("implementations", "memory", "passes", "solvers")
__all__ = [*sorted(_PLACE_OF), *_PACKAGES]


def __getattr__(name: str):
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _PLACE_OF:
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_PLACE_OF[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
