"""What the solvers promise: budgets hold, results are deterministic, monotone and explained."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.instances import load_instance
from helpers.problems import chain

from fxmem.errors import FxmemError, InfeasibleBudgetError
from fxmem.problem import Operator, Problem, Storage
from fxmem.schedule import plain_schedule, simulate
from fxmem.solvers import SOLVERS, annealing, auto, bound, driver, frontier, highs, least_peak, milp, register_solver, solve
from fxmem.solvers.annealing import Run, anneal
from fxmem.solvers.base import Answer, Task
from fxmem.solvers.minimum import smallest_schedule
from fxmem.solvers.pool import Pool
from fxmem.solvers.stages import compile_problem


def _start(script: str, **environment: str) -> subprocess.Popen:
    """A Python process of its own session that runs the script with the tests' imports."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), **environment)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True, **pipes)


def peak(problem, fraction):
    plain = simulate(problem, plain_schedule(problem)).peak_bytes
    return problem.fixed_bytes + int(fraction * (plain - problem.fixed_bytes))


@pytest.mark.parametrize(("budget_bytes", "extra_s"), [(80, 0.0), (70, 1.0), (60, 2.0), (50, 6.0)])
def test_known_optima_on_a_chain(budget_bytes, extra_s):
    problem = chain(5)
    solution = solve(problem, budget_bytes)
    assert solution.timeline.peak_bytes <= budget_bytes
    assert solution.timeline.time_s - problem.plain_time_s == pytest.approx(extra_s)
    assert solution.status == "optimal"


def test_plain_schedule_where_it_fits():
    problem = chain(4)
    solution = solve(problem, 70)
    assert solution.schedule == plain_schedule(problem)
    assert (solution.status, solution.lower_bound_overhead) == ("optimal", 0.0)


def test_an_infeasible_budget_says_what_would_do_and_what_takes_the_room():
    problem = chain(4)
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(problem, 30)
    assert caught.value.budget_bytes == 30
    assert caught.value.min_budget_bytes == least_peak(problem).timeline.peak_bytes == 50
    assert "y" in str(caught.value) and "'b" in str(caught.value) and "50 bytes" in str(caught.value)


def test_an_unknown_solver_is_told_the_valid_ones():
    with pytest.raises(FxmemError, match="'gurobi'; the solvers are: auto, checkmate_lp, .*, search, torch_budget"):
        solve(chain(3), 50, solver="gurobi")


def test_a_registered_solver_is_used():
    register_solver("plain")(lambda task: Answer(plain_schedule(task.problem)))
    try:
        with pytest.raises(InfeasibleBudgetError):
            solve(chain(3), 20, solver="plain")
        assert solve(chain(3), 60, solver="plain").solver == "plain"
    finally:
        del SOLVERS["plain"]


@pytest.mark.parametrize(
    ("name", "message"), [("auto", "there is a solver 'auto' already"), ("", "'' cannot be asked for"), (3, "give text")]
)
def test_a_solver_by_a_name_that_it_cannot_have(name, message):
    with pytest.raises(FxmemError, match=message):
        register_solver(name)(lambda task: Answer(None))


def test_unet_stays_near_the_best_known():
    problem = load_instance("unet_8")
    solution = solve(problem, peak(problem, 0.5))
    assert solution.timeline.peak_bytes <= peak(problem, 0.5)
    assert 0.05 <= solution.lower_bound_overhead <= solution.timeline.overhead <= 0.066
    assert "of the bound" in solution.status


def test_the_same_input_gives_the_same_schedule_in_two_processes():
    """Two processes have two orders of hashing, and start their clocks at different times."""
    script = (
        "from helpers.instances import load_instance; from fxmem.solvers import solve; import hashlib;"
        "problem = load_instance('vgg16_32');"
        "solution = solve(problem, 2450000000);"
        "print(hashlib.sha256(repr(solution.schedule).encode()).hexdigest(), solution.status)"
    )
    first, second = (process.communicate()[0] for process in [_start(script, PYTHONHASHSEED=seed) for seed in ("1", "2")])
    assert first == second and "bound" in first


def test_a_run_finds_the_same_in_the_second_process(monkeypatch):
    problem = load_instance("vgg16_32")
    compiled = compile_problem(problem)
    everything = ((1 << len(compiled.sizes)) - 1,) * len(compiled.stages)
    # Packing asks HiGHS, which introduces itself on standard output.
    runs = [Run(problem, peak(problem, 0.65), everything, 600, seed, packed=True) for seed in range(3)]
    alone = [anneal(run) for run in runs]
    monkeypatch.setattr("fxmem.solvers.pool.WORTHWHILE_S", 0.0)
    monkeypatch.setattr("fxmem.solvers.pool._cores", lambda: 2)
    with Pool(len(compiled.stages)) as pool:
        together = pool.run_all(runs, math.inf)
        assert pool.process is not None
    assert together == alone


def test_runs_are_made_here_when_the_second_process_dies(monkeypatch):
    problem = chain(5)
    runs = [Run(problem, 70, (31,) * 6, 200, seed) for seed in range(2)]
    monkeypatch.setattr("fxmem.solvers.pool.WORTHWHILE_S", 0.0)
    monkeypatch.setattr("fxmem.solvers.pool._cores", lambda: 2)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with Pool(6) as pool:
        assert pool.run_all(runs, math.inf) == [anneal(run) for run in runs]


def test_a_run_that_a_limit_cut_short_is_not_interrupted(monkeypatch):
    """The second process has until the deadline then, and the runs behind it are made."""
    runs, waits = [Run(chain(5), 70, (31,) * 6, 200, seed, packed=True) for seed in range(4)], []

    class Waiting(threading.Thread):
        def join(self, timeout=None):
            waits.append(timeout)
            super().join(timeout)

    monkeypatch.setattr("fxmem.solvers.pool.threading", SimpleNamespace(Thread=Waiting))
    monkeypatch.setattr("fxmem.solvers.pool.WORTHWHILE_S", 0.0)
    monkeypatch.setattr("fxmem.solvers.pool._cores", lambda: 2)
    monkeypatch.setattr("fxmem.solvers.annealing.pack", lambda *_: True)
    with Pool(6) as pool:
        found = pool.run_all(runs, time.monotonic() + 100)
    assert waits[0] > 100 and all(incumbent.desired for incumbent in found)


def test_least_peak_reaches_the_floor_of_vgg():
    problem = load_instance("vgg16_32")
    solution = least_peak(problem)
    assert solution.timeline.peak_bytes == 2359246404
    assert solution.timeline.overhead < 0.045


def with_a_dear_storage(seconds: float) -> Problem:
    """A chain of a hundred bytes each; its last operator reads four bytes that take long to make again, too."""
    step, small = chain(6, size_bytes=100), Storage("small", 4)
    number, operators, end = len(step.storages), step.operators, step.num_forward
    dear, last = Operator("dear", (1,), (number,), seconds), operators[-1]
    forward = (operators[0], dear, *operators[1:end])
    backward = (*operators[end:-1], replace(last, inputs=(*last.inputs, number)))
    return Problem((*step.storages, small), (*forward, *backward), end + 1, len(operators) + 1, step.outputs)


@pytest.mark.parametrize(("seconds", "peak_bytes", "extra_s"), [(1.0, 500, 11.0), (1000.0, 504, 10.0)])
def test_the_last_bytes_are_not_bought_at_any_price(seconds, peak_bytes, extra_s):
    problem = with_a_dear_storage(seconds)
    timeline = least_peak(problem, time_limit_s=5.0).timeline
    assert (timeline.peak_bytes, timeline.time_s - problem.plain_time_s) == (peak_bytes, pytest.approx(extra_s))
    assert simulate(problem, smallest_schedule(Task(problem, 0, (), 0.0, None, 5.0)).schedule).peak_bytes == 500


def test_least_peak_within_a_given_extra_time():
    problem = chain(9)
    solution = least_peak(problem, max_overhead=0.16)
    assert 0 < solution.timeline.overhead <= 0.16  # three of nineteen operators
    assert least_peak(problem).timeline.peak_bytes < solution.timeline.peak_bytes < peak(problem, 1.0)


def test_least_peak_within_a_given_extra_time_is_never_above_a_start():
    problem = load_instance("unet_8")
    start = solve(problem, peak(problem, 0.5), time_limit_s=1.0)
    found = least_peak(problem, max_overhead=start.timeline.overhead, time_limit_s=0.0, starts=(start.schedule,))
    assert found.timeline.peak_bytes <= start.timeline.peak_bytes < peak(problem, 1.0)
    assert found.timeline.overhead <= start.timeline.overhead


def test_the_frontier_is_monotone_from_plain_to_least():
    problem = chain(6)
    curve = frontier(problem, 5)
    peaks = [s.timeline.peak_bytes for s in curve]
    overheads = [s.timeline.overhead for s in curve]
    assert peaks == sorted(peaks, reverse=True)
    assert overheads == sorted(overheads)
    assert overheads[0] == 0.0
    assert peaks[-1] == least_peak(problem).timeline.peak_bytes


@pytest.mark.parametrize("time_limit_s", [0.0, 0.3])
def test_a_short_time_limit_still_gives_a_schedule(time_limit_s):
    problem = load_instance("unet_8")
    solution = solve(problem, peak(problem, 0.5), time_limit_s=time_limit_s)
    assert solution.timeline.peak_bytes <= peak(problem, 0.5)
    assert "stopped by the time limit" in solution.status


def test_an_interrupt_gives_the_best_so_far(monkeypatch):
    problem = chain(6)
    calls = iter(range(10**6))

    class Interrupting(annealing.Moves):
        def draw(self, state):
            if next(calls) == 500:
                raise KeyboardInterrupt
            return super().draw(state)

    monkeypatch.setattr(annealing, "Moves", Interrupting)
    best = anneal(Run(problem, 90, (63,) * 7, 10_000, 0))
    assert best.stopped and best.desired is not None


@pytest.mark.parametrize("after_s", [0.5, 3.0])
def test_an_interrupted_process_ends_with_the_incumbent_or_cleanly(after_s):
    script = (
        "from helpers.instances import load_instance; from fxmem.solvers import solve; problem = load_instance('unet_8');"
        "print('begin', flush=True);"
        "solution = solve(problem, 643043952);"
        "print(solution.timeline.peak_bytes)"
    )
    process = _start(script)
    assert process.stdout.readline() == "begin\n"
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the second process too
    output, errors = process.communicate(timeout=100)
    if process.returncode == 0:
        assert int(output) <= 643043952
    else:
        assert errors.rstrip().endswith("KeyboardInterrupt") and "During handling" not in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of the group is left


def test_who_asks_for_the_peak_that_an_error_named_gets_it(monkeypatch):
    problem = chain(11)  # too large for the exact program
    lucky = least_peak(problem).schedule
    plain = plain_schedule(problem)
    monkeypatch.setattr(driver, "smallest_schedule", lambda *_: Answer(lucky))
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(problem, simulate(problem, lucky).peak_bytes - 1)
    monkeypatch.setattr(driver, "smallest_schedule", lambda *_: Answer(plain))
    monkeypatch.setitem(SOLVERS, "auto", lambda task: Answer(None))
    assert solve(problem, caught.value.min_budget_bytes).timeline.peak_bytes == caught.value.min_budget_bytes


@pytest.mark.parametrize("above", [1.01, 1.05])
def test_a_time_limit_is_no_reason_to_refuse_a_budget(above):
    problem = load_instance("unet_8")
    budget_bytes = int(least_peak(problem, time_limit_s=4.0).timeline.peak_bytes * above)
    assert solve(problem, budget_bytes, time_limit_s=0.2).timeline.peak_bytes <= budget_bytes


def test_an_interrupted_exact_program_leaves_the_best_of_the_others(monkeypatch):
    def interrupt(task):
        raise KeyboardInterrupt

    monkeypatch.setattr(auto, "milp", interrupt)
    solution = solve(chain(7), 60)
    assert solution.timeline.peak_bytes <= 60 and "milp: interrupted" in solution.log
    assert solution.interrupted and solution.status.endswith("(interrupted)")
    asked = []
    monkeypatch.setattr(auto, "milp", lambda task: asked.append(task) or interrupt(task))
    assert least_peak(chain(7), max_overhead=0.2).interrupted and len(asked) == 1  # and no other budget is tried


def test_nothing_is_printed():
    script = (
        "from helpers.problems import chain; from fxmem.solvers import solve; problem = chain(6);"
        "print(solve(problem, 90).status, solve(problem, 90, solver='milp').status)"
    )
    output, _ = _start(script).communicate(timeout=100)
    assert output == "optimal optimal\n"


@pytest.mark.parametrize("broken", ["bound", "milp"])
def test_a_failing_solver_leaves_the_search(monkeypatch, broken):
    def fail(*_, **__):
        raise RuntimeError("no licence")

    if broken == "bound":
        monkeypatch.setattr(highs, "_run", fail)
    else:
        monkeypatch.setattr("cvxpy.Problem.solve", fail)
        monkeypatch.setattr(auto, "lower_bound", lambda *_: 0.0)
        monkeypatch.setattr(auto, "lift", lambda *_: 0.0)
    solution = solve(chain(5), 70)
    assert solution.timeline.peak_bytes <= 70
    assert any("no licence" in line for line in solution.log)


def test_a_variant_is_taken_where_it_is_cheaper():
    """Dropout: y and its mask from x. The mask is kept, so y comes back from x and mask without drawing anew."""
    storages = (Storage("x", 4, "input"), Storage("y", 100), Storage("mask", 1), Storage("z", 100), Storage("g", 1, "gradient"))
    operators = (
        Operator("dropout", (0,), (1, 2), 5.0, recomputable=False),
        Operator("square", (1,), (3,), 1.0),
        Operator("square_backward", (3,), (4,), 1.0),
        Operator("dropout_backward", (4, 1, 2), (5,), 1.0),
        Operator("apply_mask", (0, 2), (1,), 2.0),
    )
    problem = Problem((*storages, Storage("gx", 4, "gradient")), operators, 2, 4, frozenset({5}))
    solution = solve(problem, 206)
    assert solution.schedule.steps == (0, 1, 2, 4, 3) or solution.timeline.overhead == 0.0
    tight = replace(problem, operators=(*operators[:2], replace(operators[2], workspace_bytes=90), *operators[3:]))
    solution = solve(tight, 206)
    assert solution.schedule.steps == (0, 1, 2, 4, 3)
    assert solution.timeline.overhead == pytest.approx(2 / 8)


def test_memory_is_paid_for_by_a_slower_alternative_where_that_costs_least():
    """Each backward operator takes as much as its gradient to run fast; the least that helps is to do without in the middle."""
    plain = chain(6, size_bytes=10)
    fast = [replace(o, workspace_bytes=10 if p >= plain.num_forward else 0) for p, o in enumerate(plain.operators)]
    slow = [replace(fast[p], name=f"slow {p}", time_s=1.1, workspace_bytes=0, replaces=p) for p in plain.backward]
    problem = replace(plain, operators=(*fast, *slow))
    peak_bytes = simulate(problem, plain_schedule(problem)).peak_bytes
    for solver in ("search", "milp", "auto"):
        found = solve(problem, peak_bytes - 10, solver=solver)
        assert found.timeline.time_s - problem.plain_time_s == pytest.approx(0.1), solver
        assert sum("slow" in problem.operators[p].name for p in found.schedule.steps) == 1


def test_a_limit_is_no_interrupt(monkeypatch):
    """Though the time limit is far: milp counts nodes, for one."""
    problem = chain(5)
    plain = plain_schedule(problem)
    monkeypatch.setitem(SOLVERS, "milp", lambda task: Answer(plain, stopped=True))
    monkeypatch.setattr(driver, "plain_fits", lambda task: None)
    solution = solve(problem, simulate(problem, plain).peak_bytes, solver="milp")
    assert not solution.interrupted and "interrupted" not in solution.status


def test_a_frontier_of_one_point():
    assert [s.timeline.overhead for s in frontier(chain(5), 1)] == [0.0]


def test_nothing_to_recompute_but_a_slower_way_that_takes_less():
    """The forward's result is an output, so no storage is a matter of choice; the backward's workspace is."""
    storages = (Storage("x", 5, "input"), Storage("y", 5), Storage("dx", 5, "gradient"))
    backward = Operator("b", (0, 1), (2,), 1.0, 10)
    operators = (Operator("f", (0,), (1,), 1.0), backward, replace(backward, time_s=1.5, workspace_bytes=0, replaces=1))
    problem = Problem(storages, operators, 1, 2, frozenset({1, 2}))
    for solver in ("search", "auto", "checkmate_lp"):
        found = solve(problem, 20, solver=solver)
        assert (found.timeline.peak_bytes, found.timeline.time_s) == (15, 2.5)
    assert least_peak(problem).timeline.peak_bytes == 15
    assert least_peak(problem, max_overhead=0.1).timeline.peak_bytes == 25


def test_every_window_count_bounds_from_below():
    problem = load_instance("vgg16_32")
    compiled = compile_problem(problem)
    budget_bytes = peak(problem, 0.65)
    found = solve(problem, budget_bytes).timeline.time_s - problem.plain_time_s
    for windows in (1, 2, 5, 20):
        outcome = bound.Relaxation(compiled, budget_bytes, bound.even_edges(compiled, windows)).solve(math.inf)
        assert outcome.status == "optimal"
        assert 0 < outcome.bound <= found


def test_the_exact_program_tells_its_size():
    problem = chain(4)
    assert milp.binaries(problem, compile_problem(problem)) == 5 * (4 + 4)
