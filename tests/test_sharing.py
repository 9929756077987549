"""Lives of buffers, and the sharing allocators, on graphs small enough to count by hand."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import networkx as nx
import pytest
from helpers.instances import load_instance
from helpers.problems import chain, random_problem

from fxmem.errors import ProblemError
from fxmem.memory import Interval, buffers_of, intervals_of, max_live, plan_offsets, share, sharing_curve
from fxmem.memory.sharing import colour_paths, dataflow
from fxmem.problem import Operator, Problem, Storage
from fxmem.schedule import Schedule, plain_schedule, simulate


def forward(*operators, outputs=(), size_bytes=4):
    """A forward alone: each operator as (name, inputs, in place?), named like what it makes; x is there before."""
    number = {"x": 0} | {name: k + 1 for k, (name, *_) in enumerate(operators)}
    storages = (Storage("x", size_bytes, "input"), *(Storage(name, size_bytes) for name, *_ in operators))
    made = []
    for name, inputs, *inplace in operators:
        ins = tuple(number[i] for i in inputs)
        made.append(Operator(name, ins, (number[name],), inplace=tuple((i, number[name]) for i in ins) if any(inplace) else ()))
    return Problem(storages, tuple(made), len(made), len(made), frozenset(number[o] for o in outputs))


def branches(count, length=3):
    """As in an Inception block: chains side by side from one operator, joined by another."""
    operators = [("stem", "x")]
    for b in range(count):
        for k in range(length):
            operators.append((f"{'abcdefgh'[b]}{k}", [f"{'abcdefgh'[b]}{k - 1}" if k else "stem"]))
    operators.append(("join", [f"{'abcdefgh'[b]}{length - 1}" for b in range(count)]))
    return forward(*operators, outputs=("join",))


def plain(problem):
    return problem, plain_schedule(problem)


def test_lives_of_a_chain():
    assert intervals_of(*plain(chain(3))) == (
        Interval("y0", 0, 7, 10),
        Interval("y1", 1, 6, 10),
        Interval("y2", 2, 5, 10),
        Interval("g3", 3, 5, 10),
        Interval("g2", 4, 6, 10),
        Interval("g1", 5, 7, 10),
    )  # g0, the gradient of the input, is an output


def test_what_is_made_again_is_another_buffer():
    intervals = intervals_of(chain(3), Schedule((0, 1, 2, 3, 0, 1, 4, 5, 6)), alignment=2)
    assert intervals[0] == Interval("y0", 0, 2, 10, 2)
    assert {i.id: (i.begin, i.end) for i in intervals}["y0#2"] == (4, 9)


def test_in_place_goes_on_in_the_same_buffer():
    problem = forward(("a", "x"), ("b", "a", True), ("c", "b", True), ("d", "ac"))
    first, second, third = buffers_of(*plain(problem))
    # a is read again by d, so b is beside it; c is in b's place
    assert (first.storages, first.users, second.storages, second.makers, second.users) == (
        (1,),
        (0, 1, 3),
        (2, 3),
        (1, 2),
        (1, 2, 3),
    )
    assert len(buffers_of(*plain(problem), inplace=False)) == 4 and third.storages == (4,)


def test_what_ends_in_an_output_is_outside():
    problem = forward(("a", "x"), ("b", "a", True), ("c", "b"), outputs="b")
    assert [(b.storages, b.outside) for b in buffers_of(*plain(problem))] == [((1, 2), True), ((3,), False)]
    assert intervals_of(*plain(problem)) == (Interval("c", 2, 3, 4),)


def test_an_output_made_again_is_inside_for_a_moment():
    storages = (Storage("x", 2, "input"), Storage("y", 5), Storage("z", 3), Storage("g", 1, "gradient"))
    operators = (Operator("f", (0,), (1, 2)), Operator("h", (2,), ()), Operator("b", (2,), (3,)))
    problem = Problem(storages, operators, 2, 3, frozenset({1, 3}))
    assert intervals_of(problem, Schedule((0, 1, 0, 2))) == (
        Interval("z", 0, 2, 3), Interval("y#2", 2, 3, 5), Interval("z#2", 2, 4, 3)
    )  # fmt: skip


def test_equal_names_get_ids_of_their_own():
    problem = forward(("a", "x"), ("b", "a"), ("c", "ab"))
    storages = tuple(Storage("same", 4) for _ in problem.storages)
    intervals = intervals_of(*plain(Problem(storages, problem.operators, 3, 3)))
    assert [i.id for i in intervals] == ["same@0.0", "same@1.1", "same@2.2"]
    assert plan_offsets(intervals).arena_bytes == 12


@pytest.mark.parametrize("seed", range(40))
def test_bytes_alive_are_the_simulators(seed):
    """Where in-place pairs are of one size; else the larger of the two is held throughout."""
    problem = random_problem(Random(seed))
    sizes = [storage.size_bytes for storage in problem.storages]
    one_size = tuple(replace(o, inplace=tuple((a, b) for a, b in o.inplace if sizes[a] == sizes[b])) for o in problem.operators)
    problem = replace(problem, operators=one_size)
    again = [p for p in problem.forward if problem.operators[p].recomputable]
    steps = (*problem.forward, *again, *problem.backward)
    fixed = {s for s, makers in enumerate(problem.producers) if not makers}
    made = {s for p in again for s in problem.operators[p].outputs}
    needed = {s for p in again for s in problem.operators[p].inputs} - fixed - made
    schedule = Schedule(steps) if not needed else plain_schedule(problem)
    timeline = simulate(problem, schedule)
    alive = [problem.fixed_bytes + problem.operators[p].workspace_bytes for p in schedule.steps]
    for buffer in buffers_of(problem, schedule):
        for step in range(buffer.users[0], len(alive) if buffer.outside else buffer.users[-1] + 1):
            alive[step] += buffer.size_bytes
    assert tuple(alive) == timeline.during_bytes


@pytest.mark.parametrize(("name", "arena"), [("vgg16_32", 2337800192), ("resnet50_32", 2755476992), ("unet_8", 1503681536)])
def test_joint_graphs_reach_the_lower_bound(name, arena):
    intervals = intervals_of(*plain(load_instance(name)))
    assert plan_offsets(intervals).arena_bytes == max_live(intervals).size_bytes == arena


def test_sharing_a_chain():
    """Two buffers in turns, one if each operator runs in place; what nobody shares is a buffer each."""
    operators = [("a", "x"), ("b", "a", True), ("c", "b", True), ("d", "c", True)]
    problem = plain(forward(*operators))
    assert share(*problem).tags == (("a",),)
    assert share(*problem, inplace=False).tags == (("a", "c"), ("b", "d"))
    assert share(*problem, inplace=False, free_tags=False).size_bytes == 16
    assert share(*problem, free_tags=False).size_bytes == 4
    assert share(*problem).added_dependencies == share(*problem, inplace=False).added_dependencies == ()


def test_a_tag_grows_with_its_largest_buffer():
    storages = tuple(Storage(f"s{k}", size) for k, size in enumerate((3, 5, 9, 1)))
    operators = tuple(Operator(f"f{k}", (k - 1,) if k else (), (k,)) for k in range(4))
    sharing = share(*plain(Problem(storages, operators, 4, 4)))
    assert (sharing.tags, sharing.tag_bytes, sharing.size_bytes) == ((("s0", "s2"), ("s1", "s3")), (9, 5), 14)


def test_branches_trade_bytes_for_parallelism():
    """Two chains side by side: shared freely, the second waits for the first. A colour each, b1 alone waits, for
    a0, as the two have read stem, in whose bytes it lies."""
    problem = plain(branches(2))
    free, parallel = sharing_curve(*problem)
    # stem's bytes are free when b0 has read them, a0's when a1 has
    assert free.tags == (("stem", "b1"), ("a0", "a2"), ("a1", "b0", "b2"))
    assert (free.colours, free.size_bytes, free.added_dependencies, free.lost_pairs) == (1, 12, ((3, 4),), 9)
    assert (parallel.colours, parallel.size_bytes, parallel.added_dependencies, parallel.lost_pairs) == (2, 16, ((1, 5),), 2)


def test_in_place_too_makes_others_wait():
    problem = plain(forward(("a", "x"), ("b", "a"), ("c", "a", True), ("d", "bc")))
    assert share(*problem).added_dependencies == ((1, 2),)
    assert share(*problem, inplace=False).added_dependencies == ()


def test_colours_are_the_longest_paths():
    graph = dataflow(*plain(forward(("a", "x"), ("b", "a"), ("c", "b"), ("d", "a"), ("e", "cd"), ("f", "a"))))
    assert colour_paths(graph, 9) == [0, 0, 0, 1, 0, 2]
    assert colour_paths(graph, 2) == [0, 0, 0, 1, 0, 1]
    assert colour_paths(graph, 1) == [0] * 6


@pytest.mark.parametrize("seed", range(40))
def test_sharing_is_what_it_says(seed):
    """Tags hold one buffer at a time, whoever takes one is ordered behind all users before, and the count of pairs is that of
    the transitive closures."""
    problem, schedule = plain(random_problem(Random(seed)))
    buffers = {b.name: b for b in buffers_of(problem, schedule)}
    graph = dataflow(problem, schedule)
    least = max_live(intervals_of(problem, schedule)).size_bytes
    for sharing in sharing_curve(problem, schedule):
        assert least <= sharing.size_bytes == sum(sharing.tag_bytes)
        assert sharing.size_bytes <= share(problem, schedule, free_tags=False).size_bytes
        ordered = nx.DiGraph(graph)
        for before, after in sharing.added_dependencies:
            assert not nx.has_path(ordered, before, after)
            ordered.add_edge(before, after)
        for tag, size_bytes in zip(sharing.tags, sharing.tag_bytes, strict=True):
            assert size_bytes == max(buffers[name].size_bytes for name in tag)
            for before, after in pairwise(buffers[name] for name in tag):
                assert before.users[-1] < after.users[0]
                assert all(nx.has_path(ordered, user, after.users[0]) for user in before.users)
        closures = [nx.transitive_closure(g).number_of_edges() for g in (graph, ordered)]
        assert sharing.lost_pairs == closures[1] - closures[0]


@pytest.mark.parametrize("colours", [0, -1, 1.5, True])
def test_what_is_no_number_of_colours_is_refused(colours):
    with pytest.raises(ProblemError, match="colours="):
        share(*plain(chain(2)), colours=colours)
