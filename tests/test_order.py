"""Orders of operators: what is valid, what each rule does, and the complete search against all orders there are."""

import itertools
from dataclasses import replace
from random import Random

import pytest
import torch
from helpers.problems import chain, two_gradients
from torch import nn

import fxmem
from fxmem.errors import ProblemError
from fxmem.lowering import Lowered, lower
from fxmem.measuring import backward_roots
from fxmem.order import (
    candidates,
    early_gradients,
    largest_decrease_first,
    late_gradients,
    least_peak_order,
    peak_of,
    reordered,
    trace_order,
)
from fxmem.passes import MarkRegions, Reorder, reorder
from fxmem.passes.reorder import better_order, order_constraints
from fxmem.prepared import prepare
from fxmem.problem import Operator, Problem, Storage


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
    """Three operators forward, five backward, with branches; sizes, pairs in place and workspaces of all kinds."""
    storages, operators, outputs = [Storage("x", 2, "input")], [], set()
    for k in range(8):
        inputs = tuple(rng.sample(range(len(storages)), min(len(storages), rng.randint(0, 2))))
        made = tuple(range(len(storages), len(storages) + rng.choice((1, 1, 2))))
        storages += [Storage(f"s{s}", rng.randint(0, 9)) for s in made]
        outputs.update(s for s in made if rng.random() < 0.2)
        pairs = tuple((i, o) for i in inputs for o in made if rng.random() < 0.4)
        operators.append(Operator(f"o{k}", inputs, made, 1.0, rng.choice((0, 0, 0, 5)), inplace=pairs))
    return Problem(tuple(storages), tuple(operators), 3, 8, frozenset(outputs))


def test_the_complete_search_finds_the_least_of_all_orders():
    rng, better = Random(0), 0
    for _ in range(80):
        problem = random_step(rng)
        waits = [tuple(sorted(rng.sample(range(3, 8), 2)))] if rng.random() < 0.3 else []
        peaks = dict(all_orders(problem, waits))
        found = least_peak_order(problem, waits)
        assert peaks[found] == min(peaks.values())
        assert all(order in peaks for order in candidates(problem, waits).values())
        better += peaks[found] < peaks[trace_order(problem)]
    assert better == 41


@pytest.mark.parametrize(
    ("weight_bytes", "decrease", "early"),
    [
        (5, (0, 1, 2, 4, 3, 5), (0, 1, 2, 4, 3, 5)),  # x dies in what makes dw: sooner is better
        (25, (0, 1, 2, 3, 5, 4), (0, 1, 2, 4, 3, 5)),  # dw is larger than x: later
    ],
)
def test_what_the_rules_do(weight_bytes, decrease, early):
    problem = two_gradients(weight_bytes)
    assert (largest_decrease_first(problem), early_gradients(problem)) == (decrease, early)
    assert late_gradients(problem) == decrease
    assert largest_decrease_first(problem, [(4, 3)])[2:] == (2, 4, 3, 5)


def test_late_gradients_wait_for_the_end_where_they_outweigh_what_is_read():
    """A gradient larger than the activations that it is made from comes after all else; one that is smaller, at once."""
    problem = chain(6)
    weights = {6: 100, 9: 3}  # by backward operator: bytes of a gradient that is made beside what it makes
    storages, operators = list(problem.storages), []
    for p, o in enumerate(problem.operators):
        operators.append(o)
        if p in weights:
            storages.append(Storage(f"dw{p}", weights[p], "gradient"))
            operators.append(Operator(f"dw{p}", o.inputs, (len(storages) - 1,), 1.0))
    made = frozenset(range(len(problem.storages), len(storages)))
    step = replace(
        problem,
        storages=tuple(storages),
        operators=tuple(operators),
        num_program=len(operators),
        outputs=problem.outputs | made,
    )
    names = [step.operators[p].name for p in late_gradients(step)]
    assert names.index("dw9") < names.index(problem.operators[10].name)
    assert names[-1] == "dw6" and peak_of(step, late_gradients(step)) < peak_of(step, early_gradients(step))


def test_peaks_by_order():
    problem = two_gradients(5)
    assert [peak_of(problem, order) for order in candidates(problem).values()] == [36, 26]
    assert list(candidates(chain(6))) == ["trace"]
    assert least_peak_order(chain(6), most_states=3) is None


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3, 4), (1, 0, 2, 3, 4, 5), (0, 2, 1, 3, 4, 5), (0, 1, 2, 5, 3, 4), (0, 1, 2, 2, 4, 5)]
)
def test_what_is_no_order_is_refused(order):
    with pytest.raises(ProblemError, match="order"):
        reordered(two_gradients(5), order)


def test_alternatives_follow_what_they_replace():
    problem = two_gradients(5)
    other = Operator("dw by other means", problem.operators[4].inputs, problem.operators[4].outputs, 2.0, replaces=4)
    moved = reordered(replace(problem, operators=(*problem.operators, other)), (0, 1, 2, 4, 3, 5))
    assert moved.alternatives == {3: (6,)} and moved.operators[3].name == "dw"


class Layer(nn.Module):
    """A wide and a narrow linear layer around a residual stream, with dropout."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.dropout(self.narrow(nn.functional.gelu(self.wide(self.norm(x)))))


@pytest.fixture(scope="module")
def layers():
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(4))), torch.randn(256, 32)


def test_the_pass_moves_what_the_lowering_is_told(layers):
    module, x = layers
    prepared = prepare(module, (x,), {}, "roofline")
    plain, other = prepared.programs
    assert plain.order is None and other.order == better_order(plain.lowered)
    assert other.order[: plain.lowered.problem.num_forward] == tuple(plain.lowered.problem.forward)
    joint = plain.captured.joint
    assert Reorder(other.order)(joint).modified
    assert lower(joint).problem == other.lowered.problem
    assert Reorder()(joint).modified is False  # it is the best one now
    MarkRegions()(joint)
    backward = [n.meta["fxmem_region"] for n in lower(joint).nodes[other.lowered.problem.num_forward :]]
    program = backward[: other.lowered.problem.num_program - other.lowered.problem.num_forward]
    assert program == sorted(program, reverse=True)


def test_an_order_that_can_be_brought_to_a_smaller_peak_comes_before_one_of_a_smaller_plain_peak(monkeypatch):
    """The complete search saves a byte where everything kept lies; largest decrease first makes the large gradient last, after
    what `h` takes, which no recompute can undo."""
    sizes = {"x": 5, "y1": 70, "y2": 70, "y3": 70, "z1": 10, "z2": 2, "A1": 8, "A2": 1, "D1": 0, "D2": 0, "D3": 0}
    sizes |= {"O": 100, "T": 60, "o": 1}
    number = {name: k for k, name in enumerate(sizes)}
    storages = tuple(Storage(name, size) for name, size in sizes.items())

    def operator(name: str, inputs: str, output: str) -> Operator:
        return Operator(name, tuple(number[i] for i in inputs.split()), (number[output],), 1.0)

    forward = [operator(f"f{made}", "", made) for made in ("x", "y1", "y2", "y3", "z1", "z2")]
    backward = [operator("a1", "z1", "A1"), operator("a2", "z2", "A2")]
    backward += [operator(f"d{i}", f"y{i} A1 A2", f"D{i}") for i in (1, 2, 3)]
    backward += [operator("w", "x A1", "O"), operator("h", "A1 A2", "T"), operator("t", "T", "o")]
    results = frozenset(number[name] for name in ("A1", "A2", "D1", "D2", "D3", "O", "o"))
    problem = Problem(storages, (*forward, *backward), len(forward), len(forward) + len(backward), results)
    monkeypatch.setattr(reorder, "order_constraints", lambda lowered: itertools.pairwise(problem.forward))
    found = candidates(problem, tuple(itertools.pairwise(problem.forward)))
    best = better_order(Lowered(problem, ()))
    assert best == found["largest decrease first"]
    assert peak_of(problem, best) > peak_of(problem, found["complete search"])


def test_what_stays_in_order():
    """Draws, writes of buffers, and who reads what is written."""
    module = nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(0.2))
    lowered = prepare(module, (torch.randn(4, 8, requires_grad=True),), {}, "roofline").lowered
    pairs = {(lowered.nodes[a].name, lowered.nodes[b].name) for a, b in order_constraints(lowered)}
    assert {("_0_dropout", "_3_dropout"), ("copy__default", "copy__default_1"), ("_1_batch_norm", "copy__default_1")} <= pairs


@pytest.mark.parametrize("budget", [None, 0.6])
def test_a_step_in_another_order_is_bitwise_the_plain_one(layers, budget):
    module, x = layers
    planned = fxmem.transform(module, (x,), budget=budget, cost="roofline", time_limit_s=2.0)

    def step(called):
        torch.manual_seed(1)
        output = called(x)
        torch.autograd.backward(backward_roots(output), [torch.ones_like(output)])
        gradients = [p.grad for p in called.parameters()]
        called.zero_grad(set_to_none=True)
        return [output, *gradients]

    assert all(torch.equal(a, b) for a, b in zip(step(module), step(planned), strict=True))
    moved = [o.name for o in planned.plan.problem.operators] != [
        o.name for o in prepare(module, (x,), {}, "roofline").lowered.problem.operators
    ]
    assert moved == (budget == 0.6)
