"""What every solver is given and gives back, and the registry of solvers by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..errors import FxmemError, InfeasibleBudgetError
from ..problem import Problem
from ..schedule import Schedule, Timeline, alive_at_peak, plain_schedule, simulate
from ..units import format_bytes, format_percent
from .stages import Compiled
from .state import State

Progress = Callable[[str], None]
SETTLED = 1e-4  # of a step over the bound: nothing to be had by searching
BY_TIME_LIMIT, BY_INTERRUPT = "stopped by the time limit", "interrupted"


@dataclass(frozen=True)
class Solution:
    """A schedule, what the simulator says of it, and how good it is known to be.

    lower_bound_overhead: no schedule within the budget costs less extra time (a fraction of the plain step's time).
    status: "optimal", "within X % of the bound" (difference in step time) or "feasible", and what cut the solver short.
    log: one line for each thing that was tried. interrupted: whether somebody wants no more of it.
    """

    schedule: Schedule
    timeline: Timeline
    lower_bound_overhead: float
    status: str
    solver: str
    solve_time_s: float
    log: tuple[str, ...] = ()
    interrupted: bool = False


@dataclass(frozen=True)
class Task:
    """What a solver is asked: the cheapest schedule with a peak of at most budget_bytes.

    starts: schedules to begin from; they need not fit. deadline: in time.monotonic() seconds. limit_s: seconds that were
    given for all of it. bound_s: extra time below which nothing is to be found. enough_s: extra time that is small
    enough for who asks. overtime: whether to go on behind the deadline as long as nothing that fits is known. with_peers:
    whether the methods of others are asked first.
    """

    problem: Problem
    budget_bytes: int
    starts: tuple[Schedule, ...] = ()
    deadline: float = float("inf")
    progress: Progress | None = None
    limit_s: float = 60.0
    bound_s: float = 0.0
    enough_s: float = 0.0
    overtime: bool = True
    with_peers: bool = True

    def is_settled(self, time_s: float) -> bool:
        """Whether that extra time is as good as the bound, or good enough."""
        return time_s <= max(self.bound_s + SETTLED * (self.problem.plain_time_s or 1.0), self.enough_s)

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline


@dataclass(frozen=True)
class Answer:
    """What a solver found: the best schedule or None, a valid lower bound on its overhead, and whether it was cut short.

    smallest: where nothing fits, the schedule of the least peak that a search for it met. interrupted: cut short by somebody
    who wants no more of it, rather than by a limit.
    """

    schedule: Schedule | None
    lower_bound_overhead: float = 0.0
    proven: bool = False
    stopped: bool = False
    log: tuple[str, ...] = field(default_factory=tuple)
    smallest: Schedule | None = None
    interrupted: bool = False


Solver = Callable[[Task], Answer]
SOLVERS: dict[str, Solver] = {}


def register_solver(name: str) -> Callable[[Solver], Solver]:
    """Decorator: make a function from `Task` to `Answer` available as `solve(..., solver=name)`.

    Raises FxmemError for a name that another function has, and what is no name.
    """
    if not isinstance(name, str) or not name:
        raise FxmemError(f"solver {name!r} cannot be asked for by name: give text")

    def register(function: Solver) -> Solver:
        if name in SOLVERS and SOLVERS[name].__qualname__ != function.__qualname__:
            raise FxmemError(f"there is a solver {name!r} already; give this one another name")
        SOLVERS[name] = function
        return function

    return register


def find_solver(name: str) -> Solver:
    """The solver of that name; FxmemError with the valid names where there is none."""
    if not isinstance(name, str) or name not in SOLVERS:
        raise FxmemError(f"unknown solver {name!r}; the solvers are: {', '.join(sorted(SOLVERS))}")
    return SOLVERS[name]


def judge(task: Task, candidates: Sequence[Schedule | None]) -> tuple[Schedule, Timeline] | None:
    """The cheapest of the schedules that fit, by the simulator; among equally cheap ones that of the least peak."""
    best = None
    for schedule in candidates:
        if schedule is None:
            continue
        timeline = simulate(task.problem, schedule)
        if timeline.peak_bytes > task.budget_bytes:
            continue
        key = (round(timeline.overhead, 12), timeline.peak_bytes)
        if best is None or key < best[0]:
            best = key, schedule, timeline
    return best and best[1:]


def cheapest(task: Task, compiled: Compiled, candidates: Iterable[Sequence[int]]) -> Answer:
    """The cheapest of some states, as wishes for each stage (see `state`), that fits."""
    best, best_s, state = None, float("inf"), None
    for wishes in candidates:
        if state is None:  # one for all: it remembers what they have in common
            state = State(compiled, task.budget_bytes, list(wishes))
        else:
            state.reset(list(wishes), task.budget_bytes)
        if state.worst_bytes <= task.budget_bytes and state.time_s < best_s:
            schedule = state.schedule()
            if simulate(task.problem, schedule).peak_bytes <= task.budget_bytes:
                best, best_s = schedule, state.time_s
    return Answer(best)


def describe(overhead: float, bound: float, proven: bool, cut_short: str = "") -> str:
    """The status of a plan, from its overhead and what is known about the least. cut_short: by what the search was."""
    gap = (overhead - bound) / (1 + overhead)
    if proven or gap <= 1e-6:
        status = "optimal"
    elif bound > 0:
        status = f"within {format_percent(gap)} of the bound"
    else:
        status = "feasible"
    return with_reason(status, cut_short)


def with_reason(status: str, cut_short: str) -> str:
    """A status, and by what the search was cut short, where that matters."""
    return f"{status} ({cut_short})" if cut_short and status != "optimal" else status


def interrupted(solution: Solution) -> Solution:
    """The same, with a word of it that somebody interrupted the question that it answers."""
    if solution.interrupted:
        return solution
    return replace(solution, interrupted=True, status=with_reason(solution.status, BY_INTERRUPT))


def infeasible(problem: Problem, budget_bytes: int, least: Schedule) -> InfeasibleBudgetError:
    """The error for a budget below the least peak, saying what takes the room there."""
    timeline = simulate(problem, least)
    step = timeline.peak_step
    where = problem.operators[least.steps[step]].name if step >= 0 else "the start of the step"
    largest = sorted(alive_at_peak(problem, least, timeline), key=lambda s: -problem.storages[s].size_bytes)[:5]
    holders = ", ".join(f"{problem.storages[s].name} ({problem.storages[s].size_bytes:,} bytes)" for s in largest)
    kinds = ", ".join(f"{kind} {size:,}" for kind, size in timeline.peak_by_kind.items() if size)
    asked, least_peak = (f"{n:,} bytes ({format_bytes(n)})" for n in (budget_bytes, timeline.peak_bytes))
    message = (
        f"no schedule was found within a budget of {asked}; the least peak that is reached is {least_peak}, at operator "
        f"{where!r}. What takes the room there, in bytes: {kinds}; the largest storages: {holders or 'none'}. "
        f"Ask for at least {timeline.peak_bytes:,} bytes, or for budget='min'"
    )
    return InfeasibleBudgetError(message, budget_bytes, timeline.peak_bytes)


def plain_fits(task: Task) -> Schedule | None:
    """The plain schedule, where it fits."""
    plain = plain_schedule(task.problem)
    return plain if simulate(task.problem, plain).peak_bytes <= task.budget_bytes else None
