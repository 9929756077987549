"""From what the user asked for to one call of a solver."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .budget import Budget
from .errors import BudgetError, InfeasibleBudgetError
from .problem import Problem
from .progress import detail, phase
from .schedule import Schedule, plain_schedule, simulate
from .solvers import Solution, find_solver, frontier, least_peak, solve
from .solvers.base import interrupted
from .solvers.bound import Relaxation
from .solvers.budgets import least_of
from .solvers.minimum import NEARLY, easily_reached_bytes
from .solvers.stages import compile_problem
from .solvers.state import least_possible_bytes

WORTH_AN_ORDER = 0.005  # of the least peak, or of the extra time: below that, solving twice finds noise
NOTHING_BETTER = (0.0, 0.0)  # what an order promises in which all of the step fits


def unsolved(problem: Problem) -> Solution:
    """The plain schedule as a Solution: nothing is recomputed, nothing was searched for."""
    plain = plain_schedule(problem)
    return Solution(plain, simulate(problem, plain), 0.0, "optimal", "none", 0.0)


def check_solver(solver: str, *budgets: Budget) -> None:
    """Raise FxmemError for a solver that nobody knows, and BudgetError for one that does not serve such budgets."""
    find_solver(solver)
    if solver != "auto" and any(budget.least or budget.max_overhead is not None for budget in budgets):
        raise BudgetError(
            f"solver={solver!r} was given: it looks for the least extra time within a budget in bytes or a fraction; for "
            "budget='min' and for max_overhead leave solver='auto'"
        )


def choose(
    problem: Problem,
    budget: Budget,
    plain_peak_bytes: int,
    solver: str = "auto",
    time_limit_s: float = 60.0,
    starts: Sequence[Schedule] = (),
) -> Solution:
    """The Solution of `problem` for `budget`, of which a fraction is one of `plain_peak_bytes`.

    Raises InfeasibleBudgetError, and BudgetError where the solver does not serve such a budget.
    """
    check_solver(solver, budget)
    size_bytes = simulate(problem, plain_schedule(problem)).peak_bytes if budget.is_free else budget.resolve(plain_peak_bytes)
    phase("solving")
    if size_bytes is None:
        return least_peak(problem, max_overhead=budget.max_overhead, time_limit_s=time_limit_s, starts=starts, progress=detail)
    return solve(problem, size_bytes, solver=solver, time_limit_s=time_limit_s, starts=starts, progress=detail)


def choose_program(
    problems: Sequence[Problem],
    budget: Budget,
    plain_peak_bytes: int,
    solver: str = "auto",
    time_limit_s: float = 60.0,
    starts: Mapping[int, Sequence[Schedule]] | None = None,
) -> tuple[int, Solution]:
    """The best of several ways to write one step: which of `problems`, the plain one first, and the Solution of it.

    Each is solved, so that the answer is never worse than that of the plain one alone; but where nothing is to be recomputed,
    the plain one is taken at once, and of several orders of the same operators only those are solved whose least peaks or
    relaxations promise something beside the others'. The way of writing that promises most comes first, the lowest least peak
    or the least extra time, and others only where they can be as good as what it became. They share the time: what one leaves
    is the next ones'. Extra times are over the plain one's step. starts: schedules to begin from, by problem.

    Raises InfeasibleBudgetError where none of them fits.
    """
    found, errors, deadline, stopped = {}, [], time.monotonic() + time_limit_s, False
    slower = [_slower(problem, problems[0]) for problem in problems]
    in_turn, promises = _in_turn(problems, slower, budget, plain_peak_bytes, deadline)
    for already, number in enumerate(in_turn):
        if any(_is_settled(budget, s, promises[number]) for s in found.values()):
            continue
        left = len(in_turn) - already
        share_s = max((deadline - time.monotonic()) / left, time_limit_s / len(in_turn) / 2)  # even behind a slow one
        own, known = _over_own(budget, slower[number]), (starts or {}).get(number, ())
        try:
            solution = choose(problems[number], own, plain_peak_bytes, solver, share_s, known)
        except InfeasibleBudgetError as error:
            errors.append(error)
            continue
        except KeyboardInterrupt:  # before it had anything that fits
            if not found:
                raise
            stopped = True
        else:
            found[number], stopped = _over_plain(solution, slower[number]), solution.interrupted
        if stopped:
            found = {n: interrupted(s) for n, s in found.items()}
            break
    if not found:
        raise min(errors, key=lambda error: error.min_budget_bytes)
    if budget.least:
        least = least_of(found.values())
        return next((n, s) for n, s in found.items() if s is least)
    return min(found.items(), key=lambda item: _worth(item[1], least=budget.max_overhead is not None))


def _in_turn(
    problems: Sequence[Problem], slower: Sequence[float], budget: Budget, plain_peak_bytes: int, deadline: float
) -> tuple[list[int], dict[int, float]]:
    """The programs to solve, one after the other, and what each promises at best: its least possible peak in bytes, where that
    is looked for, else its least extra time over the plain one's step. One that takes more time than it may by itself is none
    of them, so that it has no share of the time either. Orders of the same operators come as they are, side by side."""
    if budget.is_free:
        return [0], {0: 0.0}
    size_bytes = budget.resolve(plain_peak_bytes)
    found = _worth_solving(problems, size_bytes, deadline, budget.least)
    if budget.max_overhead is not None:
        found = [n for n in found if slower[n] <= budget.max_overhead]
    if budget.least:
        floors = {n: least_possible_bytes(compile_problem(problems[n])) for n in found}
        return sorted(found, key=floors.__getitem__), floors
    operators = {n: _operators(problems[n]) for n in found}
    if size_bytes is None or all(operators[n] == operators[found[0]] for n in found):
        return found, {n: slower[n] for n in found}
    bounds = {n: _least_extra(problems[n], size_bytes, slower[n], deadline) for n in found}
    least = {n: min(bounds[m] for m in found if operators[m] == operators[n]) for n in found}
    return sorted(found, key=least.__getitem__), bounds


def _least_extra(problem: Problem, budget_bytes: int, slower: float, deadline: float) -> float:
    """The extra time over the plain one's step that no schedule of a program within a budget is below, as far as is known."""
    _, bound_s = _promised(problem, budget_bytes, deadline, least=False)
    own = bound_s / (problem.plain_time_s or 1.0) if bound_s is not None and math.isfinite(bound_s) else 0.0
    return (1 + own) * (1 + slower) - 1


def choose_frontier(problems: Sequence[Problem], points: int, time_limit_s: float) -> list[tuple[int, Solution]]:
    """Up to `points` plans of several ways to write one step, the plain one first, from the largest peak to the least."""
    found = []
    worth_solving = _worth_solving(problems, None)
    for number in worth_solving:
        slower = _slower(problems[number], problems[0])
        solutions = frontier(problems[number], points, time_limit_s=time_limit_s / len(worth_solving), progress=detail)
        found += [(number, _over_plain(solution, slower)) for solution in solutions]
        if any(solution.interrupted for solution in solutions):
            break
    kept: list[tuple[int, Solution]] = []
    for number, solution in sorted(found, key=lambda item: _worth(item[1], least=True)):
        if not kept or solution.timeline.overhead < kept[-1][1].timeline.overhead:
            kept.append((number, solution))
    last = len(kept) - 1
    chosen = {round(k * last / max(1, points - 1)) for k in range(points)} if len(kept) > points else set(range(len(kept)))
    return [kept[k] for k in sorted(chosen, reverse=True)]


def _slower(problem: Problem, plain: Problem) -> float:
    """How much more time a program's step takes than the plain one's, at least nothing."""
    return max(0.0, problem.plain_time_s / (plain.plain_time_s or 1.0) - 1)


def _is_settled(budget: Budget, known: Solution, promised: float) -> bool:
    """Whether no plan of a program can be better than what is known."""
    if budget.least:
        return promised > known.timeline.peak_bytes * (1 + NEARLY)
    return budget.max_overhead is None and known.timeline.overhead <= promised


def _worth_solving(
    problems: Sequence[Problem], budget_bytes: int | None, deadline: float = math.inf, least: bool = False
) -> list[int]:
    """All, but for orders of the same operators that promise nothing beside another one."""
    found: list[int] = []
    operators = [_operators(problem) for problem in problems]
    promised = functools.cache(lambda number: _promised(problems[number], budget_bytes, deadline, least))
    for number in range(len(problems)):
        same = [n for n in found if operators[n] == operators[number]]
        if all(_is_better(promised(number), promised(n)) for n in same):
            found = [n for n in found if n not in same or _is_better(promised(n), promised(number)) is not False]
            found.append(number)
    return found


def _operators(problem: Problem) -> Counter:
    """What runs, in whatever order."""
    return Counter((o.name, o.inputs, o.outputs, o.time_s) for o in problem.operators)


def _promised(problem: Problem, budget_bytes: int | None, deadline: float, least: bool) -> tuple[float, float | None]:
    """The least possible peak of an order, and, by the linear relaxation, the least extra time within a budget (None where that
    takes long); without one, the plain peak, or the one that is easily reached where the least is looked for. NOTHING_BETTER
    where everything fits."""
    compiled = compile_problem(problem)
    floor_bytes = least_possible_bytes(compiled)
    if least:
        return floor_bytes, easily_reached_bytes(compiled, floor_bytes)
    plain_bytes = simulate(problem, plain_schedule(problem)).peak_bytes
    if budget_bytes is None:
        return floor_bytes, plain_bytes
    if plain_bytes <= budget_bytes:
        return NOTHING_BETTER
    relaxation = Relaxation(compiled, budget_bytes)
    bound_s = None if relaxation.takes_long else relaxation.solve(deadline).bound
    return floor_bytes, None if bound_s == -math.inf else bound_s


def _is_better(promised: tuple, of_other: tuple) -> bool | None:
    """Whether one order of a step may be enough better than another one to be worth solving for; None where nobody knows."""
    if of_other == NOTHING_BETTER:
        return False
    pairs = [pair for pair in zip(promised, of_other, strict=True) if None not in pair]
    if any(low < high * (1 - WORTH_AN_ORDER) for low, high in pairs):
        return True
    return False if len(pairs) == len(promised) else None


def _over_own(budget: Budget, slower: float) -> Budget:
    """With the extra time that it allows over the plain one's step told over that of a program that is so much slower."""
    if budget.max_overhead is None:
        return budget
    return replace(budget, max_overhead=max(0.0, (1 + budget.max_overhead) / (1 + slower) - 1))


def _over_plain(solution: Solution, slower: float) -> Solution:
    """With its extra times over the step of another program, which takes 1 / (1 + slower) of its own one's time."""
    if not slower:
        return solution
    extra, bound = ((1 + o) * (1 + slower) - 1 for o in (solution.timeline.overhead, solution.lower_bound_overhead))
    return replace(solution, timeline=replace(solution.timeline, overhead=extra), lower_bound_overhead=bound)


def _worth(solution: Solution, least: bool) -> tuple[float, float]:
    pair = solution.timeline.overhead, solution.timeline.peak_bytes
    return pair[::-1] if least else pair
