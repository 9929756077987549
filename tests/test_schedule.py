"""The simulator on schedules small enough to count by hand."""

from dataclasses import replace

import pytest
from helpers.problems import chain

from fxmem.errors import ProblemError
from fxmem.problem import Operator, Problem, Storage, without_recompute
from fxmem.schedule import Schedule, plain_schedule, simulate


def test_plain_chain_counts_what_lives():
    timeline = simulate(chain(3), plain_schedule(chain(3)))
    # x is fixed; y0 y1 y2 pile up; the backward adds a gradient and drops an activation at each step
    assert timeline.during_bytes == (20, 30, 40, 50, 60, 50, 40)
    assert timeline.after_bytes == (20, 30, 40, 50, 40, 30, 20)
    assert (timeline.peak_bytes, timeline.peak_step, timeline.overhead) == (60, 4, 0.0)
    assert timeline.frees == ((), (), (), (), (3, 7), (2, 6), (1, 5))


def test_recompute_costs_time_and_frees_memory():
    problem = chain(3)
    timeline = simulate(problem, Schedule((0, 1, 2, 3, 0, 1, 4, 5, 6)))
    # y0 lives until f1, y1 until f2, and both are made again before b2
    assert timeline.during_bytes == (20, 30, 30, 30, 40, 50, 60, 50, 40)
    assert timeline.time_s == 9.0
    assert timeline.overhead == pytest.approx(2 / 7)


def test_extra_bytes_are_there_all_the_time():
    problem = replace(chain(2), extra_bytes=7)
    timeline = simulate(problem, Schedule((0, 1, 2, 0, 3, 4)))
    assert timeline.time_s == 6.0
    assert timeline.after_bytes[-1] == 10 + 7 + 10


@pytest.mark.parametrize(
    ("pairs", "expected", "peak_bytes"),
    [((), None, 21), (((0, 2),), None, 21), (((1, 2),), (1, 2), 17), (((0, 2), (1, 2)), (1, 2), 17)],
)
def test_inplace_takes_the_first_pair_whose_input_dies(pairs, expected, peak_bytes):
    storages = (Storage("x", 10, "input"), Storage("y", 4), Storage("z", 7))
    operators = (Operator("make", (0,), (1,)), Operator("use", (0, 1), (2,), inplace=pairs))
    timeline = simulate(Problem(storages, operators, 2, 2, frozenset({2})), Schedule((0, 1)))
    assert timeline.inplace[1] == expected
    assert timeline.peak_bytes == peak_bytes


def test_a_kept_output_made_again_counts_twice_for_a_moment():
    problem = replace(chain(2), outputs=frozenset({1, 3}))
    timeline = simulate(problem, Schedule((0, 1, 2, 0, 3, 4)))
    assert timeline.during_bytes[3] == simulate(problem, plain_schedule(problem)).after_bytes[2] + 10


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((0, 1, 2, 3), "never runs"),
        ((1, 0, 2, 3, 4), "before the forward reached it"),
        ((0, 0, 1, 2, 3, 4), "before the forward is over"),
        ((0, 1, 2, 3, 3, 4), "twice or out of order"),
        ((0, 1, 2, 3, 4, 9), "but there are 5 operators"),
    ],
)
def test_what_is_no_schedule_is_refused(steps, message):
    with pytest.raises(ProblemError, match=message):
        simulate(chain(2), Schedule(steps))


def test_an_operator_that_must_run_once_is_not_repeated():
    problem = chain(2)
    once = replace(problem.operators[0], recomputable=False)
    problem = replace(problem, operators=(once, *problem.operators[1:]))
    with pytest.raises(ProblemError, match="'f0' again, which is not recomputable"):
        simulate(problem, Schedule((0, 1, 2, 0, 3, 4)))


@pytest.mark.parametrize(
    ("again_s", "slower_s", "size_bytes", "useful"),
    [
        (1.0, 2.0, 8, False),  # to make again what it reads takes less than it takes more
        (3.0, 2.0, 8, True),
        (1.0, 0.0, 8, True),
        (1.0, 2.0, 4, True),  # the operator reads more than that
    ],
)
def test_an_alternative_that_reads_what_is_soon_made_again(again_s, slower_s, size_bytes, useful):
    storages = tuple(Storage(name, size) for name, size in (("w", 2), ("x", 8), ("y", size_bytes), ("z", 4), ("g", 4)))
    operators = (
        Operator("x", (0,), (1,), 1.0),
        Operator("y", (1, 0), (2,), again_s),
        Operator("return", (2,), ()),
        Operator("z_backward", (2,), (3,), 1.0),
        Operator("y_backward", (3, 1), (4,), 1.0),
        Operator("y_backward_from_y", (3, 2), (4,), 1.0 + slower_s, replaces=4),
    )
    problem = Problem(storages, operators, num_forward=3, num_program=5, outputs=frozenset({4}))
    assert problem.useful_alternatives == ({4: (5,)} if useful else {})
    assert without_recompute(problem).useful_alternatives == problem.alternatives == {4: (5,)}


@pytest.mark.parametrize(("workspace_bytes", "inplace", "useful"), [(9, (), False), (8, (), True), (9, ((3, 4),), True)])
def test_an_alternative_that_reads_all_that_the_operator_reads(workspace_bytes, inplace, useful):
    storages = tuple(Storage(name, 4) for name in "wxyzg")
    operators = (
        Operator("x", (0,), (1,), 1.0),
        Operator("return", (1,), ()),
        Operator("z_backward", (1,), (3,), 1.0),
        Operator("y_backward", (3, 1), (4,), 1.0, 9),
        Operator("in slices", (3, 1), (4,), 1.5, workspace_bytes, inplace, replaces=3),
    )
    problem = Problem(storages, operators, num_forward=2, num_program=4, outputs=frozenset({4}))
    assert problem.useful_alternatives == ({3: (4,)} if useful else {})
