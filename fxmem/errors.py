"""The errors that fxmem raises on purpose: one base class, one subclass for each thing a caller can act on."""

from __future__ import annotations


class FxmemError(Exception):
    """Base of every error that fxmem raises on purpose."""


class BudgetError(FxmemError, ValueError):
    """A budget that cannot be read: the message holds what was given and the accepted forms."""


class InfeasibleBudgetError(FxmemError):
    """A budget below the least peak that could be reached.

    Attributes:
        budget_bytes: what was asked for.
        min_budget_bytes: the least peak that was reached: a budget that can be met.
    """

    def __init__(self, message: str, budget_bytes: int, min_budget_bytes: int):
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.min_budget_bytes = min_budget_bytes


class CaptureError(FxmemError):
    """A module that cannot be captured as one joint graph, or only wrongly: names the node, module and line."""


class ProblemError(FxmemError, ValueError):
    """An inconsistent Problem or Schedule: names the operator or storage."""


class OffsetError(FxmemError, ValueError):
    """Intervals, a capacity or a file that no offsets can be planned for: names the interval or the line."""


class CapacityError(FxmemError):
    """A capacity that is proven to be too small.

    Attributes:
        capacity: what was given, in bytes.
        lower_bound_bytes: the least arena that is not ruled out.
    """

    def __init__(self, message: str, capacity: int, lower_bound_bytes: int):
        super().__init__(message)
        self.capacity = capacity
        self.lower_bound_bytes = lower_bound_bytes


class PlacementError(FxmemError):
    """Offsets that break what they promise: two live buffers overlap, one is not aligned, or one lies outside."""


class CostError(FxmemError, ValueError):
    """An unknown device, or a cost that is negative or not a number."""


class ImplementationError(FxmemError, ValueError):
    """An implementation of an operator that is not what it says it is, or that nobody knows."""


class PlanError(FxmemError, ValueError):
    """A saved plan that cannot be read or written, or is for another module, call or version: says what differs."""


class MeasureError(FxmemError, ValueError):
    """A training step that cannot be measured: no output requires grad, tensors on several devices, bad counts."""


class TapeError(FxmemError, RuntimeError):
    """A backward that the planned module cannot run rightly: a second one, a double one, or after an in-place change."""


class ArenaError(FxmemError, RuntimeError):
    """An arena that cannot be allocated (the bytes asked for), or a result that does not fit its slice (the node's name)."""


class MissingExtraError(FxmemError, ImportError):
    """An optional package is not installed: the message names the extra that brings it."""
