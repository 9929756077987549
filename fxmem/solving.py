"""From what the user asked for to one call of a solver."""

from __future__ import annotations

from collections.abc import Sequence

from .budget import Budget
from .problem import Problem
from .progress import detail, phase
from .schedule import Schedule, plain_schedule, simulate
from .solvers import Solution, least_peak, solve


def unsolved(problem: Problem) -> Solution:
    """The plain schedule as a Solution: nothing is recomputed, nothing was searched for."""
    plain = plain_schedule(problem)
    return Solution(plain, simulate(problem, plain), 0.0, "optimal", "none", 0.0)


def choose(
    problem: Problem,
    budget: Budget,
    plain_peak_bytes: int,
    solver: str = "auto",
    time_limit_s: float = 60.0,
    starts: Sequence[Schedule] = (),
) -> Solution:
    """The Solution of `problem` for `budget`, of which a fraction is one of `plain_peak_bytes`.

    Raises InfeasibleBudgetError.
    """
    size_bytes = simulate(problem, plain_schedule(problem)).peak_bytes if budget.is_free else budget.resolve(plain_peak_bytes)
    phase("solving")
    if size_bytes is None:
        return least_peak(problem, max_overhead=budget.max_overhead, time_limit_s=time_limit_s, starts=starts, progress=detail)
    return solve(problem, size_bytes, solver=solver, time_limit_s=time_limit_s, starts=starts, progress=detail)
