"""Solvers against exhaustive search on small random joint graphs."""

import math
import os
from collections.abc import Iterator
from random import Random

import pytest
from helpers.brute import frontier, least_time_s
from helpers.problems import random_problem
from hypothesis import given, settings
from hypothesis import strategies as st

from fxmem.errors import InfeasibleBudgetError
from fxmem.problem import Operator, Problem, Storage, without_recompute
from fxmem.schedule import simulate
from fxmem.solvers import Solution, solve
from fxmem.solvers.annealing import Run, anneal
from fxmem.solvers.base import Task
from fxmem.solvers.bound import knapsack, lower_bound
from fxmem.solvers.lift import lift
from fxmem.solvers.milp import milp
from fxmem.solvers.moves import Moves
from fxmem.solvers.stages import compile_problem
from fxmem.solvers.state import State, desires, least_possible_bytes

seeds = st.integers(0, 10**6)
EXAMPLES = int(os.environ.get("FXMEM_EXAMPLES", 0))  # 500, say: as many graphs, larger ones, an hour


def some(most: int) -> settings:
    return settings(max_examples=EXAMPLES or most, deadline=None, derandomize=True)


def small_problem(seed: int) -> Problem:
    return random_problem(Random(seed), most_forward=8 if EXAMPLES else 5)


@some(25)
@given(seeds)
def test_the_exact_program_is_the_best_of_its_class_at_every_budget(seed):
    problem = small_problem(seed)
    for budget_bytes, best_s in frontier(problem, ordered=True).items():
        answer = milp(Task(problem, budget_bytes))
        if math.isinf(best_s):
            assert answer.schedule is None
        else:
            assert answer.proven, answer.log
            timeline = simulate(problem, answer.schedule)
            assert timeline.peak_bytes <= budget_bytes
            assert timeline.time_s - problem.plain_time_s == pytest.approx(best_s, abs=1e-6)


def test_what_presolve_must_not_cut_off():
    """HiGHS's presolve takes 5 s for the least, by rule 9; `fxmem.solvers.highs` turns it off. Making s3 again takes 4 s."""
    sizes = (5, 5, 5, 7, 3, 3, 8, 5, 3, 2, 0, 2, 3, 1, 1, 1)
    kinds = ["parameter"] * 2 + ["activation"] * 7 + ["gradient"] * 7
    operators = (
        Operator("f0", (1,), (2,), 5.0),
        Operator("f1", (2,), (3,)),
        Operator("f2", (3, 2, 1), (4,), 4.0, inplace=((3, 4), (2, 4), (1, 4))),
        Operator("f3", (4, 3), (5, 6), 4.0, inplace=((4, 5), (3, 6), (3, 5))),
        Operator("f4", (1, 6), (7,), 3.0, inplace=((1, 7),)),
        Operator("f5", (7, 6), (8,), 3.0, inplace=((6, 8), (7, 8))),
        Operator("b0", (7,), (9, 10), 1.0, 4, inplace=((7, 10),)),
        Operator("b1", (9, 6, 7), (11,), 0.0, 1),
        Operator("b2", (11, 6, 4), (12,), 3.0, inplace=((11, 12),)),
        Operator("b3", (12, 2, 4), (13,), 3.0),
        Operator("b4", (13, 2), (14,), 2.0, 1, inplace=((2, 14),)),
        Operator("b5", (14, 2, 4), (15,), 0.0, 3, inplace=((14, 15),)),
    )
    storages = tuple(Storage(f"s{k}", size, kind) for k, (size, kind) in enumerate(zip(sizes, kinds, strict=True)))
    problem = Problem(storages, operators, 6, 12, frozenset({8, 10}))
    answer = milp(Task(problem, 39))
    assert simulate(problem, answer.schedule).time_s - problem.plain_time_s == pytest.approx(4.0)
    assert answer.proven


def test_what_is_made_from_a_later_storage_may_be_read_in_the_same_stage():
    """A part of what was joined later comes back in half a second, and what was made of it in one more."""
    sizes = {"x": 1, "part": 10, "made": 10, "whole": 10, "large": 20, "g0": 1, "g1": 1, "g2": 1}
    storages = tuple(Storage(name, size, "input" if name == "x" else "activation") for name, size in sizes.items())
    part, made, whole, large, g0, g1, g2 = range(1, 8)
    operators = (
        Operator("part", (0,), (part,), 5.0),
        Operator("made", (part,), (made,), 1.0),
        Operator("whole", (part,), (whole,), 9.0),
        Operator("large", (whole,), (large,), 9.0),
        Operator("d_large", (large, whole), (g0,), 1.0),
        Operator("d_whole", (whole, g0), (g1,), 1.0),
        Operator("d_made", (made, g1), (g2,), 1.0),
        Operator("part again", (whole,), (part,), 0.5),
    )
    problem = Problem(storages, operators, 4, 7, frozenset({g2}))
    answer = milp(Task(problem, 36))
    assert answer.proven and simulate(problem, answer.schedule).time_s - problem.plain_time_s == pytest.approx(1.5)


def as_good_as_the_class(problem: Problem) -> Iterator[Solution]:
    """What `auto` finds at every budget that something fits, none of it worse than exhaustive search."""
    for budget_bytes, best_s in frontier(problem, ordered=True).items():
        if math.isinf(best_s):
            break
        solution = solve(problem, budget_bytes)
        assert solution.timeline.peak_bytes <= budget_bytes
        assert solution.timeline.time_s - problem.plain_time_s <= best_s + 1e-6
        yield solution


@some(8)
@given(seeds)
def test_auto_is_as_good_as_the_class(seed):
    assert all(solution.status for solution in as_good_as_the_class(small_problem(seed)))


@some(10)
@given(seeds)
def test_without_recompute_as_good_as_the_class_and_nothing_runs_twice(seed):
    problem = without_recompute(small_problem(seed))
    for solution in as_good_as_the_class(problem):
        assert all(solution.schedule.steps.count(p) == 1 for p in problem.forward)


@some(25)
@given(seeds)
def test_bounds_hold_for_any_schedule(seed):
    problem = small_problem(seed)
    compiled = compile_problem(problem)
    for budget_bytes, best_s in frontier(problem, ordered=False).items():
        assert knapsack(compiled, budget_bytes) <= best_s + 1e-6
        bound_s = lower_bound(compiled, budget_bytes, math.inf, [])
        assert bound_s <= best_s + 1e-6
        lifted_s = bound_s if math.isinf(bound_s) else lift(compiled, budget_bytes, bound_s, math.inf, 120, math.inf, [])
        assert bound_s <= lifted_s and (math.isinf(bound_s) or lifted_s <= best_s + 1e-6)
        assert math.isinf(best_s) or least_possible_bytes(compiled) <= budget_bytes


@some(10)
@given(seeds)
def test_no_schedule_exists_where_one_is_refused_below_the_floor(seed):
    problem = small_problem(seed)
    floor_bytes = least_possible_bytes(compile_problem(problem))
    assert math.isinf(least_time_s(problem, floor_bytes - 1, ordered=False))
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(problem, floor_bytes - 1)
    assert caught.value.min_budget_bytes >= floor_bytes


@settings(max_examples=120, deadline=None, derandomize=True)
@given(seeds)
def test_the_incremental_evaluation_is_the_simulator(seed):
    rng = Random(seed)
    problem = random_problem(rng, most_forward=9)
    problem = without_recompute(problem) if rng.random() < 0.3 else problem
    compiled = compile_problem(problem)
    state = State(compiled, problem.fixed_bytes + 10)
    fresh = State(compiled, state.budget_bytes)
    moves = Moves(compiled, rng)
    for _ in range(12):
        state.change(moves.draw(state))
        state.change(moves.draw(state))
        state.keep() if rng.random() < 0.5 else state.undo()
        timeline = simulate(problem, state.schedule())
        assert state.worst_bytes == timeline.peak_bytes
        assert state.time_s == pytest.approx(timeline.time_s - problem.plain_time_s)
        fresh.reset(list(state.desired), state.budget_bytes)
        assert (fresh.recomputes, fresh.live, fresh.peak_bytes) == (state.recomputes, state.live, state.peak_bytes)
        assert fresh.excess_bytes == state.excess_bytes


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seeds)
def test_a_schedule_becomes_a_state_and_back(seed):
    problem = random_problem(Random(seed), most_forward=9)
    compiled = compile_problem(problem)
    run = Run(problem, problem.fixed_bytes + 10, ((1 << len(compiled.sizes)) - 1,) * len(compiled.stages), 200, seed)
    state = State(compiled, run.budget_bytes, list(anneal(run).smallest))
    again = State(compiled, run.budget_bytes, desires(compiled, state.schedule()))
    if not problem.variants and not problem.encoders:  # which of several ways is cheapest depends on what lies there unused
        assert (again.worst_bytes, again.time_s) == (state.worst_bytes, pytest.approx(state.time_s))
