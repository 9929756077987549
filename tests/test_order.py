"""Orders of operators: what is valid, what each rule does, and the complete search against all orders there are."""

import itertools
from random import Random

import pytest
from helpers.problems import chain, random_problem

from fxmem.errors import ProblemError
from fxmem.order import candidates, early_gradients, largest_decrease_first, least_peak_order, peak_of, reordered, trace_order
from fxmem.problem import Operator, Problem, Storage
from fxmem.schedule import plain_schedule, simulate


def all_orders(problem, waits):
    """The peak of every order that is valid, the forward's last operator staying its last."""
    forward = [(*p, problem.num_forward - 1) for p in itertools.permutations(problem.forward[:-1])]
    for order in (a + b for a, b in itertools.product(forward, itertools.permutations(problem.backward))):
        place = {p: i for i, p in enumerate(order)}
        makers = {s: p for p in order for s in problem.operators[p].outputs}
        data = [(makers[s], p) for p in order for s in problem.operators[p].inputs if s in makers]
        if all(place[a] < place[b] for a, b in (*data, *waits)):
            yield order, peak_of(problem, order)


def random_step(rng):
    """Four operators forward, five backward, with branches; sizes, pairs in place and workspaces of all kinds."""
    storages, operators, outputs = [Storage("x", 2, "input")], [], set()
    for k in range(9):
        inputs = tuple(rng.sample(range(len(storages)), min(len(storages), rng.randint(0, 2))))
        made = tuple(range(len(storages), len(storages) + rng.choice((1, 1, 2))))
        storages += [Storage(f"s{s}", rng.randint(0, 9)) for s in made]
        outputs.update(s for s in made if rng.random() < 0.2)
        pairs = tuple((i, o) for i in inputs for o in made if rng.random() < 0.4)
        operators.append(Operator(f"o{k}", inputs, made, 1.0, rng.choice((0, 0, 0, 5)), inplace=pairs))
    return Problem(tuple(storages), tuple(operators), 4, 9, frozenset(outputs))


def test_the_complete_search_finds_the_least_of_all_orders():
    rng, better = Random(0), 0
    for _ in range(60):
        problem = random_step(rng)
        waits = [tuple(sorted(rng.sample(range(4, 9), 2)))] if rng.random() < 0.3 else []
        peaks = dict(all_orders(problem, waits))
        found = least_peak_order(problem, waits)
        assert peaks[found] == min(peaks.values())
        assert all(order in peaks for order in candidates(problem, waits).values())
        better += peaks[found] < peaks[trace_order(problem)]
    assert better == 27
