"""fxmem: train PyTorch models under a memory budget that holds."""

from . import passes
from .api import frontier, plan, transform
from .codegen.planned import PlannedModule
from .cost import CostModel, OpCost
from .errors import (
    BudgetError,
    CaptureError,
    CostError,
    FxmemError,
    InfeasibleBudgetError,
    MeasureError,
    MissingExtraError,
    ProblemError,
    TapeError,
)
from .measure import Measurement, PairMeasurement, measure, measure_pair
from .plan import Frontier, Plan

__all__ = [
    "BudgetError", "CaptureError", "CostError", "CostModel", "Frontier", "FxmemError", "InfeasibleBudgetError", "MeasureError",
    "Measurement", "MissingExtraError", "OpCost", "PairMeasurement", "Plan", "PlannedModule", "ProblemError", "TapeError", "frontier",
    "measure", "measure_pair", "passes", "plan", "transform",
]  # fmt: skip
