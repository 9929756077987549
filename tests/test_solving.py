"""Which of several ways to write a step, and which of its orders, is solved and taken."""

from dataclasses import replace
from random import Random

import pytest
from helpers.problems import chain, random_problem, two_gradients

from fxmem import solving
from fxmem.budget import Budget
from fxmem.errors import InfeasibleBudgetError
from fxmem.order import early_gradients, largest_decrease_first, reordered
from fxmem.problem import Operator, Problem, Storage
from fxmem.schedule import plain_schedule, simulate
from fxmem.solvers.stages import compile_problem
from fxmem.solvers.state import least_possible_bytes
from fxmem.solving import _worth_solving, choose_frontier, choose_program, unsolved


def step_of(seconds: float, size_bytes: int) -> Problem:
    """a, then b, and their gradients, with a kept."""
    storages = (Storage("a", size_bytes), Storage("b", 10), Storage("db", 10, "gradient"), Storage("da", 1, "gradient"))
    operators = (
        Operator("a", (), (0,), seconds, recomputable=False),
        Operator("b", (0,), (1,), 1.0),
        Operator("return", (1,), (), recomputable=False),
        Operator("db", (1,), (2,), 1.0, workspace_bytes=20),
        Operator("da", (0, 2), (3,), 1.0),
    )
    return Problem(storages, operators, 3, 5, frozenset({3}))


PROGRAMS = step_of(1.0, 100), step_of(2.0, 50)  # the second takes a quarter more time


@pytest.mark.parametrize(
    ("budget", "number", "overhead"),
    [
        (Budget(), 0, 0.0),
        (Budget(size_bytes=200), 0, 0.0),
        (Budget(size_bytes=120), 1, 0.25),
        (Budget(least=True), 1, 0.25),
        (Budget(max_overhead=0.3), 1, 0.25),
        (Budget(max_overhead=0.2), 0, 0.0),
    ],
)
def test_the_better_program_is_taken(budget, number, overhead):
    chosen, solution = choose_program(PROGRAMS, budget, 140, time_limit_s=2.0)
    assert (chosen, solution.timeline.overhead) == (number, pytest.approx(overhead))


def test_an_interrupt_of_one_program_is_told_where_the_other_is_taken(monkeypatch):
    programs, choose = (PROGRAMS[0], step_of(2.0, 100)), solving.choose
    monkeypatch.setattr(solving, "choose", lambda p, *args: replace(choose(p, *args), interrupted=p is programs[1]))
    chosen, solution = choose_program(programs, Budget(least=True), 140, time_limit_s=2.0)
    assert chosen == 0 and solution.interrupted


def test_no_program_fits():
    with pytest.raises(InfeasibleBudgetError) as caught:
        choose_program(PROGRAMS, Budget(size_bytes=40), 140)
    assert caught.value.min_budget_bytes == 90


def test_a_frontier_of_both_programs():
    found = choose_frontier(PROGRAMS, 4, 10.0)
    assert [(number, s.timeline.peak_bytes) for number, s in found] == [(0, 140), (1, 90)]


@pytest.mark.parametrize(("budget_bytes", "worth_solving"), [(None, [1]), (30, [1]), (36, [0])])
def test_an_order_that_is_better_in_all_that_is_known_is_solved_alone(budget_bytes, worth_solving):
    """But the trace's is taken where all of it fits."""
    problem = two_gradients(5)  # 36 bytes, or 26
    assert _worth_solving([problem, reordered(problem, early_gradients(problem))], budget_bytes) == worth_solving


def test_an_order_in_which_all_fits_is_solved_alone():
    """Even where another one could be brought to less."""
    rng, count = Random(0), 0
    for _ in range(1000):
        problem = random_problem(rng)
        other = reordered(problem, largest_decrease_first(problem))
        plain_bytes, fits_bytes = (simulate(p, plain_schedule(p)).peak_bytes for p in (problem, other))
        if least_possible_bytes(compile_problem(problem)) < fits_bytes < plain_bytes:
            assert _worth_solving([problem, other], fits_bytes) == [1]
            assert _worth_solving([other, problem], fits_bytes) == [0]
            count += 1
    assert count


def test_another_order_takes_no_more_time():
    """Sums of floats depend on their order: a step in another one would be a little slower, and no plan of it free."""
    problem = two_gradients(5)
    rng, order = Random(1), early_gradients(problem)
    for _ in range(100):
        timed = replace(problem, operators=tuple(replace(o, time_s=rng.random()) for o in problem.operators))
        programs = timed, reordered(timed, order)
        assert choose_program(programs, Budget(max_overhead=0.0), 36, time_limit_s=1.0)[0] == 1


def answers(monkeypatch, *found) -> None:
    """What `choose` gives for one program after the other: a peak in bytes with extra time, or an error."""
    left = iter(found)

    def choose(problem, *_):
        answer = next(left)
        if isinstance(answer, BaseException):
            raise answer
        solution = unsolved(problem)
        timeline = replace(solution.timeline, peak_bytes=answer[0], overhead=answer[1])
        return replace(solution, timeline=timeline)

    monkeypatch.setattr(solving, "choose", choose)


@pytest.mark.parametrize(
    ("found", "number"),
    [
        (((1000, 2.0), (1001, 1.0)), 1),
        (((1000, 2.0), (1015, 0.5)), 1),
        (((1000, 2.0), (1015, 1.5)), 0),
        (((1000, 2.0), (1030, 0.1)), 0),
    ],
)
def test_the_least_peak_of_several_programs_is_not_bought_at_any_price(monkeypatch, found, number):
    """As of one: a thousandth above the least at any gain, two hundredths where that halves the extra time."""
    answers(monkeypatch, *found)
    assert choose_program((step_of(1.0, 100), step_of(0.5, 100)), Budget(least=True), 1030)[0] == number


def test_the_program_that_promises_most_comes_first(monkeypatch):
    """And the other one, no plan of which can be as good as what that became, is not solved at all."""
    dear, slim = chain(8), chain(8, size_bytes=8, time_s=0.9)
    peak_bytes = unsolved(slim).timeline.peak_bytes
    for programs, number in (((dear, slim), 1), ((slim, dear), 0)):
        answers(monkeypatch, (peak_bytes, 0.0))
        assert choose_program(programs, Budget(size_bytes=peak_bytes), 1000)[0] == number
    answers(monkeypatch, (peak_bytes, 0.9), (peak_bytes, 0.5))
    assert choose_program((dear, slim), Budget(size_bytes=peak_bytes), 1000)[0] == 0


def test_an_interrupt_before_another_program_has_a_plan(monkeypatch):
    answers(monkeypatch, (100, 0.3), KeyboardInterrupt())
    chosen, solution = choose_program(PROGRAMS, Budget(size_bytes=120), 140)
    assert chosen == 0 and solution.interrupted and solution.status == "optimal"
    answers(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        choose_program(PROGRAMS, Budget(size_bytes=120), 140)


def test_no_program_is_solved_that_is_slower_than_what_is_known(monkeypatch):
    """Of whichever program that is."""
    problem = two_gradients(5)
    timed = replace(problem, operators=tuple(replace(o, time_s=1.0) for o in problem.operators))
    slower = replace(timed, operators=(*timed.operators[:-1], replace(timed.operators[-1], time_s=3.0)))
    programs = timed, reordered(timed, early_gradients(timed)), slower
    answers(monkeypatch, (25, 0.1), AssertionError("it takes a third more time"))
    assert choose_program(programs, Budget(size_bytes=25), 36)[0] == 1


@pytest.mark.parametrize(("max_overhead", "shares_s"), [(0.2, [8.0]), (0.3, [4.0, 8.0])])
def test_a_program_that_is_too_slow_has_no_share_of_the_time(monkeypatch, max_overhead, shares_s):
    """The second one takes a quarter more time than the first."""
    given = []

    def choose(problem, budget, plain_peak_bytes, solver, time_limit_s, starts):
        given.append(time_limit_s)
        return unsolved(problem)

    monkeypatch.setattr(solving, "choose", choose)
    choose_program(PROGRAMS, Budget(max_overhead=max_overhead), 140, time_limit_s=8.0)
    assert given == pytest.approx(shares_s, abs=0.5)
