"""From a question to its plan: one that is given, one from the cache, or one that is solved for now."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .budget import Budget, check_time_limit
from .cost import CostModel
from .decisions import Plan
from .errors import BudgetError, InfeasibleBudgetError, PlanError
from .guards import ValueGuard, broken_guards, is_offered
from .prepared import Prepared, prepare
from .saving import cache_path, check_fits, load_plan
from .solvers.base import BY_INTERRUPT, BY_TIME_LIMIT, describe
from .solving import check_solver, choose_program, unsolved

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What a user asks for one module and call. graph_options: those of `prepare` that decide which operators there are.
    withheld: keys of guards that no plan is to go by, even if they hold now."""

    budget: Budget
    cost: str | CostModel
    solver: str
    time_limit_s: float
    graph_options: dict[str, Any]
    withheld: frozenset[tuple[str, ...]] = frozenset()


def decide(
    module: nn.Module, args: tuple, kwargs: dict, question: Question, given: Plan | None, cache_dir: str | os.PathLike | None
) -> tuple[Prepared, Plan]:
    """The plan for a question: the given one, one from the cache, or one that is solved for now; and the program it is of."""
    check_solver(question.solver, *(() if given else (question.budget,)))
    check_time_limit(question.time_limit_s)
    if not (cache_dir is None or isinstance(cache_dir, str | os.PathLike)):
        raise PlanError(f"cache_dir={cache_dir!r} was given; it is the path of a folder")

    def holds(guard: ValueGuard) -> bool:
        if given:  # what operators there are is up to the plan; if it holds is another question
            return guard.key not in given.origin.withheld
        return guard.key not in question.withheld and is_offered(module, guard)

    prepare_for = functools.partial(prepare, module, args, kwargs, **question.graph_options, holds=holds)
    if given is None and cache_dir is None:
        prepared = prepare_for(question.cost)
        return solve_for(prepared, question.budget, question.solver, question.time_limit_s)
    prepared = prepare_for("roofline")  # which costs nothing to ask
    if given is not None:
        return _program_of(given, prepared), given
    cost = getattr(question.cost, "name", question.cost)
    threads = torch.get_num_threads()  # of which workspaces depend
    asked = question.budget, cost, threads, question.solver, question.time_limit_s
    path = cache_path(cache_dir, _unsolved(prepared), asked)
    if path.exists():
        try:
            found = load_plan(path)
            return _program_of(found, prepared), found
        except PlanError as error:
            log.warning("%s; planning anew", error)
    program, found = solve_for(prepared.under(question.cost), question.budget, question.solver, question.time_limit_s)
    if not found.solution.interrupted:  # who asks again shall have all of the time
        found.save(path)
    return program, found


def _unsolved(prepared: Prepared) -> Plan:
    return prepared.plan(unsolved(prepared.lowered.problem), None)


def _program_of(found: Plan, prepared: Prepared) -> Prepared:
    """The one among the ways to write the step that a plan is of. Raises PlanError."""
    for program in prepared.programs[1:]:
        with contextlib.suppress(PlanError):
            check_fits(found, _unsolved(program))
            return program
    check_fits(found, _unsolved(prepared))
    return prepared


def given_plan(plan_: Plan | str | os.PathLike, budget: Any, max_overhead: Any) -> Plan:
    """The Plan that a user hands over, or the file of. Raises BudgetError where there is a budget beside it, and PlanError."""
    if budget is not None or max_overhead is not None:
        raise BudgetError(
            "both a plan and a budget were given: leave out the budget to follow the plan, or the plan to solve anew"
        )
    if not isinstance(plan_, (Plan, str, os.PathLike)):
        raise PlanError(f"plan={plan_!r} was given; it is a Plan, or the path of one that Plan.save wrote")
    return plan_ if isinstance(plan_, Plan) else load_plan(plan_)


def check_holds(guards: Collection[ValueGuard], module: nn.Module) -> None:
    """Raise PlanError where a given plan goes by guards that do not hold of a module's values."""
    wrong = broken_guards(guards, module)
    if wrong:
        raise PlanError(
            f"the plan does not fit: its {wrong[0].implementation!r} is not accurate for the values of {wrong[0]}. "
            "Plan anew with a budget"
        )


def solve_for(
    prepared: Prepared, budget: Budget, solver: str, time_limit_s: float, known: Sequence[Plan] = ()
) -> tuple[Prepared, Plan]:
    """Solve a prepared step for its best plan; the program that it is of, and the plan.

    known: earlier plans of the same step, to begin from; none that is within the budget takes less time than the answer.
    Raises InfeasibleBudgetError.
    """
    plain_peak_bytes = prepared.baseline.peak_bytes
    problems, starts = [p.lowered.problem for p in prepared.programs], {}
    for number, program in enumerate(prepared.programs):
        own = [p.solution.schedule for p in known if p.problem is problems[number]]
        starts[number] = (*own, *(program.partitioner_schedules() if solver == "torch_budget" else ()))
    try:
        number, solution = choose_program(problems, budget, plain_peak_bytes, solver, time_limit_s, starts)
    except InfeasibleBudgetError as error:
        if prepared.origin.recompute:
            raise
        message = f"{error}. Nothing may run twice (recompute=False); recompute=True may reach less"
        raise InfeasibleBudgetError(message, error.budget_bytes, error.min_budget_bytes) from None
    budget_bytes = None if budget.is_free else budget.resolve(plain_peak_bytes) or solution.timeline.peak_bytes
    found = prepared.programs[number].plan(solution, budget_bytes, budget)
    if budget_bytes is not None and budget.max_overhead is None:
        best = min((found, *(p for p in known if p.predicted_peak_bytes <= budget_bytes)), key=lambda p: p.predicted_overhead)
        if best is not found:
            number = next(n for n, problem in enumerate(problems) if problem is best.problem)
            found = _in_place_of(found, best)
    return prepared.programs[number], found


def none_better(plans_: Sequence[Plan], others: Sequence[Plan]) -> tuple[Plan, ...]:
    """Each of some plans, or the one among all that takes the least time within its peak; none twice."""
    best: dict[int, Plan] = {}
    for plan_ in plans_:
        within = [p for p in (plan_, *plans_, *others) if p.predicted_peak_bytes <= plan_.predicted_peak_bytes]
        chosen = min(within, key=lambda p: (p.predicted_overhead, p.predicted_peak_bytes))
        best.setdefault(id(chosen), plan_ if chosen is plan_ else _in_place_of(plan_, chosen))
    return tuple(best.values())


def _in_place_of(plan_: Plan, better: Plan) -> Plan:
    """A better plan within the peak of another one, with what is known of all schedules within that peak."""
    bound = plan_.lower_bound_overhead if plan_.problem is better.problem else 0.0
    interrupted = plan_.solution.interrupted
    cut_short = BY_INTERRUPT if interrupted else BY_TIME_LIMIT
    status = describe(better.predicted_overhead, bound, proven=False, cut_short=cut_short)
    solution = replace(better.solution, lower_bound_overhead=bound, status=status, interrupted=interrupted)
    return replace(better, solution=solution, budget_bytes=plan_.budget_bytes, asked=plan_.asked)
