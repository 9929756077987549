"""The methods of others, as solvers: what they promise on chains, and that the default is never worse than any of them."""

import math
from dataclasses import replace
from random import Random

import pytest
import torch
from helpers.instances import load_instance
from helpers.models import ConvNet
from helpers.problems import chain, random_problem

import fxmem
from fxmem.errors import FxmemError, InfeasibleBudgetError
from fxmem.problem import Problem
from fxmem.schedule import plain_schedule, simulate
from fxmem.solvers import SOLVERS, least_peak, solve
from fxmem.solvers.auto import PEERS
from fxmem.solvers.base import Task
from fxmem.solvers.segments import crossing_bytes, narrow_cuts, nested
from fxmem.solvers.stages import compile_problem


def timeline(name: str, problem: Problem, budget_bytes: int):
    schedule = SOLVERS[name](Task(problem, budget_bytes)).schedule
    return schedule and simulate(problem, schedule)


def budget_of(problem: Problem, fraction: float) -> int:
    plain = simulate(problem, plain_schedule(problem)).peak_bytes
    return problem.fixed_bytes + int(fraction * (plain - problem.fixed_bytes))


@pytest.mark.parametrize("name", PEERS)
def test_what_fits_fits_and_the_rest_is_none(name):
    problem = chain(12)
    for budget_bytes in range(30, 170, 10):
        found = timeline(name, problem, budget_bytes)
        assert found is None or found.peak_bytes <= budget_bytes
    assert found is not None


def test_one_level_of_segments_runs_the_forward_at_most_twice():
    problem = chain(16)
    found = timeline("chen_sqrt", problem, 120)
    forward_s = sum(problem.operators[i].time_s for i in problem.forward)
    assert 0 < found.time_s - problem.plain_time_s <= forward_s


def test_segments_in_segments_go_lower_than_one_level():
    problem = chain(64)
    reached = {
        name: min(b for b in range(50, 700, 10) if timeline(name, problem, b) is not None)
        for name in ("chen_sqrt", "recursive")
    }
    assert reached["recursive"] < reached["chen_sqrt"] < 2.5 * 10 * math.sqrt(64) + 50


def test_the_recursion_over_a_chain_is_no_worse_than_segments_of_one_length():
    problem = chain(24)
    for budget_bytes in range(120, 280, 20):
        one_level, recursion = (timeline(name, problem, budget_bytes) for name in ("chen_sqrt", "rotor"))
        assert recursion is not None
        assert one_level is None or recursion.time_s <= one_level.time_s


def test_blocks_are_what_the_module_paths_say():
    problem = chain(9)
    paths = ["stem", *(f"layers.{k // 2}.{name}" for k, name in enumerate(("conv", "relu") * 3)), "head", "loss"]
    operators = tuple(replace(o, module=paths[i]) if i < problem.num_forward else o for i, o in enumerate(problem.operators))
    problem = replace(problem, operators=operators)
    schedule = SOLVERS["per_block"](Task(problem, 110)).schedule
    again = sorted(schedule.steps)
    repeated = [i for i in problem.forward if again.count(i) == 2]
    assert repeated == [1, 3, 5]  # the first of each block: its second is the next block's input, which is kept


def test_narrow_cuts_lie_between_the_blocks_of_a_skip():
    compiled = compile_problem(load_instance("unet_8"))
    crossing, cuts = crossing_bytes(compiled), narrow_cuts(compiled)
    assert cuts == sorted(cuts) and all(0 < k < len(compiled.sizes) for k in cuts)
    assert all(crossing[k] <= crossing[k - 1] or k == 1 for k in cuts)
    assert len(narrow_cuts(compiled, 10)) == 9


def test_nested_segments_cover_everything_once():
    def leaves(segment):
        return [leaf for part in segment.parts for leaf in leaves(part)] if segment.parts else [segment]

    compiled = compile_problem(chain(37))
    for arity in (2, 3, 5):
        found = leaves(nested(compiled, arity, 3))
        assert [s.start for s in found] == [0, *(s.stop for s in found[:-1])] and found[-1].stop == 37


@pytest.mark.parametrize("seed", range(25))
def test_the_default_is_never_worse(seed):
    problem = random_problem(Random(seed), 7)
    plain = simulate(problem, plain_schedule(problem)).peak_bytes
    low = least_peak(problem, time_limit_s=5).timeline.peak_bytes
    for budget_bytes in {low, (low + plain) // 2, plain - 1}:
        try:
            default_s = solve(problem, budget_bytes, time_limit_s=20).timeline.time_s
        except InfeasibleBudgetError:
            default_s = math.inf
        for name in PEERS:
            found = timeline(name, problem, budget_bytes)
            assert found is None or default_s <= found.time_s + 1e-9, name


@pytest.mark.parametrize(("name", "most_percent"), [("chen_greedy", 18.0), ("rotor", 22.0), ("checkmate_lp", 8.5)])
def test_peers_on_a_unet(name, most_percent):
    problem = load_instance("unet_8")
    found = timeline(name, problem, budget_of(problem, 0.5))
    assert 100 * found.overhead <= most_percent


def test_without_any_time_there_is_a_plan():
    problem = load_instance("unet_8")
    solution = solve(problem, budget_of(problem, 0.4), time_limit_s=0.0)
    assert solution.timeline.peak_bytes <= budget_of(problem, 0.4)
    assert "time limit" in solution.status


def test_what_stands_in_for_a_solver_that_finds_nothing():
    problem = chain(12)
    solution = solve(problem, 60, solver="chen_sqrt")
    assert solution.timeline.peak_bytes <= 60
    assert "chen_sqrt found nothing that fits" in solution.status and solution.solver == "auto"


def test_the_partitioners_decisions_are_read_from_a_module():
    args = (torch.randn(4, 3, 32, 32),)
    plan = fxmem.plan(ConvNet(), args, budget=0.8, solver="torch_budget")
    best = fxmem.plan(ConvNet(), args, budget=0.8)
    assert plan.solution.solver == "torch_budget" and plan.predicted_peak_bytes <= plan.budget_bytes
    assert 0 < best.predicted_overhead <= plan.predicted_overhead < 1
    with pytest.raises(FxmemError, match="fxmem.plan"):
        solve(chain(5), 70, solver="torch_budget")
