"""From a question to its plan: one that is given, one from the cache, or one that is solved for now."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .budget import Budget
from .cost import CostModel
from .decisions import Plan
from .errors import BudgetError, PlanError
from .prepared import Prepared, prepare
from .saving import cache_path, check_fits, load_plan
from .schedule import Schedule
from .solving import choose, unsolved

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """What a user asks for one module and call. graph_options: those of `prepare` that decide which operators there are."""

    budget: Budget
    cost: str | CostModel
    solver: str
    time_limit_s: float
    graph_options: dict[str, Any]


def decide(
    module: nn.Module, args: tuple, kwargs: dict, question: Question, given: Plan | None, cache_dir: str | os.PathLike | None
) -> tuple[Prepared, Plan]:
    """The plan for a question: the given one, one from the cache, or one that is solved for now."""
    if given is None and cache_dir is None:
        prepared = prepare(module, args, kwargs, question.cost, **question.graph_options)
        return prepared, solve_for(prepared, question.budget, question.solver, question.time_limit_s)
    prepared = prepare(module, args, kwargs, "roofline", **question.graph_options)  # which costs nothing to ask
    here = prepared.plan(unsolved(prepared.lowered.problem), None)
    if given is not None:
        check_fits(given, here)
        return prepared, given
    asked = (
        question.budget,
        getattr(question.cost, "name", question.cost),
        torch.get_num_threads(),
        question.solver,
        question.time_limit_s,
    )
    path = cache_path(cache_dir, here, asked)
    if path.exists():
        try:
            found = load_plan(path)
            check_fits(found, here)
            return prepared, found
        except PlanError as error:
            log.warning("%s; planning anew", error)
    prepared = prepared.under(question.cost)
    found = solve_for(prepared, question.budget, question.solver, question.time_limit_s)
    found.save(path)
    return prepared, found


def given_plan(plan_: Plan | str | os.PathLike, budget: Any, max_overhead: Any) -> Plan:
    """The Plan that a user hands over, or the file of. Raises BudgetError where there is a budget beside it, and PlanError."""
    if budget is not None or max_overhead is not None:
        raise BudgetError(
            "both a plan and a budget were given: leave out the budget to follow the plan, or the plan to solve anew"
        )
    return plan_ if isinstance(plan_, Plan) else load_plan(plan_)


def solve_for(prepared: Prepared, budget: Budget, solver: str, time_limit_s: float, starts: Sequence[Schedule] = ()) -> Plan:
    """Solve a prepared problem, from `starts` on. Raises InfeasibleBudgetError."""
    plain_peak_bytes = prepared.baseline.peak_bytes
    starts = (*starts, *prepared.partitioner_schedules()) if solver == "torch_budget" else starts
    solution = choose(prepared.lowered.problem, budget, plain_peak_bytes, solver, time_limit_s, starts)
    budget_bytes = None if budget.is_free else budget.resolve(plain_peak_bytes) or solution.timeline.peak_bytes
    return prepared.plan(solution, budget_bytes, budget)
