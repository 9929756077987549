"""The cheapest schedule under one budget: by the plain schedule, by a solver, by whoever stands in for it, or a refusal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from ..errors import InfeasibleBudgetError
from ..problem import Problem
from ..schedule import Schedule, simulate
from .base import (
    BY_INTERRUPT,
    BY_TIME_LIMIT,
    Answer,
    Progress,
    Solution,
    Task,
    describe,
    find_solver,
    infeasible,
    judge,
    plain_fits,
)
from .minimum import smallest_schedule
from .stages import compile_problem
from .state import least_possible_bytes

MOST_NAMED = 8
_named: dict[Problem, Schedule] = {}  # behind the least peaks that errors have named: who asks for one of them shall have it


def solve(
    problem: Problem,
    budget_bytes: int,
    *,
    solver: str = "auto",
    time_limit_s: float = 60.0,
    starts: Sequence[Schedule] = (),
    progress: Progress | None = None,
) -> Solution:
    """The schedule with the least extra time that is found among those whose peak is at most budget_bytes.

    budget_bytes: peak by `simulate`, fixed bytes included. solver: a name in `SOLVERS`. time_limit_s: seconds after which the
    search stops with what it has (never without a schedule, where one is known to exist). starts: schedules to begin from.
    progress: called with a line of text now and then.

    A solver that finds nothing is stood in for by "auto"; the status says so.

    Raises InfeasibleBudgetError where no schedule that fits is found, with the least peak that is reached; FxmemError for
    an unknown solver; KeyboardInterrupt where somebody interrupts it before it has a schedule that fits: later, it is the
    answer, and says so.
    """
    deadline = time.monotonic() + time_limit_s
    return solve_task(Task(problem, budget_bytes, tuple(starts), deadline, progress, time_limit_s), solver)


def solve_task(task: Task, solver: str = "auto") -> Solution:
    """`solve` for a task."""
    begin, problem, budget_bytes = time.monotonic(), task.problem, task.budget_bytes
    function = find_solver(solver)
    if (plain := plain_fits(task)) is not None:
        return _solution(task, Answer(plain, proven=True, log=("the plain schedule fits",)), solver, begin)
    named = _named.get(problem) if solver == "auto" else None
    if named:
        task = replace(task, starts=(*task.starts, named))
    if budget_bytes < least_possible_bytes(compile_problem(problem)):
        raise _refusal(task, smallest_schedule(task))
    answer = function(task)
    found = judge(task, [answer.schedule, *task.starts])
    if found is None and answer.interrupted:
        raise KeyboardInterrupt  # there is nothing to give
    if found is None and solver != "auto":
        instead = solve_task(task)
        note = f"{solver} found nothing that fits"
        return replace(instead, status=f"{instead.status} ({note})", log=(*answer.log, note, *instead.log))
    if found is None:
        met = (answer.smallest,) if answer.smallest else ()
        searched = met or not task.overtime
        least = smallest_schedule(replace(task, starts=(*task.starts, *met)), 0.0 if searched else None)
        found = judge(task, [least.schedule])
        if found is None:
            raise _refusal(task, least)
        answer = replace(answer, interrupted=least.interrupted)
    return _solution(task, replace(answer, schedule=found[0]), solver, begin)


def _refusal(task: Task, least: Answer) -> InfeasibleBudgetError | KeyboardInterrupt:
    """The error for a task's budget; what it names is remembered. An interrupt, where one ended the search for that."""
    if least.interrupted:
        return KeyboardInterrupt()
    _named.pop(task.problem, None)
    _named[task.problem] = least.schedule
    while len(_named) > MOST_NAMED:
        del _named[next(iter(_named))]
    return infeasible(task.problem, task.budget_bytes, least.schedule)


def solve_alone(
    problem: Problem, budget_bytes: int, solver: str, starts: Sequence[Schedule] = (), time_limit_s: float = 60.0
) -> Solution | None:
    """What `solver` finds within `budget_bytes` with nobody standing in for it; None where that is nothing.

    Raises FxmemError for an unknown solver.
    """
    begin = time.monotonic()
    task = Task(problem, budget_bytes, tuple(starts), begin + time_limit_s, None, time_limit_s)
    answer = find_solver(solver)(task)
    found = judge(task, [answer.schedule])
    return found and _solution(task, replace(answer, schedule=found[0]), solver, begin)


def _solution(task: Task, answer: Answer, solver: str, begin: float) -> Solution:
    timeline = simulate(task.problem, answer.schedule)
    bound = min(answer.lower_bound_overhead, timeline.overhead)
    cut_short = BY_INTERRUPT if answer.interrupted else BY_TIME_LIMIT if answer.stopped else ""
    status = describe(timeline.overhead, bound, answer.proven or timeline.overhead <= 0, cut_short)
    return Solution(answer.schedule, timeline, bound, status, solver, time.monotonic() - begin, answer.log, answer.interrupted)
