"""The backward's operators in an order that needs less memory, before anything is decided on keeping and recomputing.

The forward stays as the model has it, so that the code reads like the model: most of what it makes is kept anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from torch import fx

from ..graph_meta import require, storages_read
from ..lowering import Lowered, draws_random_numbers, lower
from ..order import Order, candidates, reordered, trace_order
from ..schedule import plain_schedule, simulate
from ..solvers.stages import compile_problem
from ..solvers.state import least_possible_bytes
from .base import Pass

EQUAL_FLOORS = 0.01  # of a peak: floors this near are as good as equal


class Reorder(Pass):
    """Moves the operators of the backward, each with what is taken out of its tuple; views come right before who needs them.

    order: indices of the lowered graph's operators; where None, `better_order` finds it, and nothing moves where there is
    none. Regions have to be marked anew afterwards. Needs ShapeProp and Costs. Raises ProblemError for what is no order.
    """

    def __init__(self, order: Sequence[int] | None = None):
        super().__init__()
        self.order = order

    def apply(self, graph_module: fx.GraphModule) -> bool:
        require(graph_module, "fxmem_storages", "ShapeProp")
        lowered = lower(graph_module)
        order = better_order(lowered) if self.order is None else tuple(self.order)
        if order is None or order == trace_order(lowered.problem):
            return False
        reordered(lowered.problem, order)  # which refuses what is no order
        _move(graph_module.graph, [lowered.nodes[p] for p in order])
        return True


def better_order(lowered: Lowered) -> Order | None:
    """The best of `fxmem.order.candidates` beside the trace's, which is planned as well: where some can be brought to a smaller
    peak than the trace's, one of those; by the simulator, of the least plain peak, and of those the one with the least bytes
    alive on the average. None where that is the trace's.

    Sizes alone decide, not what a cost model says, so that a plan finds its order again.
    """
    operators = tuple(replace(o, workspace_bytes=0) for o in lowered.problem.operators)
    problem = replace(lowered.problem, operators=operators)
    found = candidates(problem, order_constraints(lowered))
    problems = {name: reordered(problem, order) for name, order in found.items()}
    floors = {name: least_possible_bytes(compile_problem(p)) for name, p in problems.items()}
    lowest_bytes = min(floors.values()) * (1 + EQUAL_FLOORS)
    worthwhile = found if floors["trace"] <= lowest_bytes else [name for name in found if floors[name] <= lowest_bytes]

    def need(name: str) -> tuple[int, int]:
        timeline = simulate(problems[name], plain_schedule(problems[name]))
        return timeline.peak_bytes, sum(timeline.during_bytes)

    best = min(worthwhile, key=need)  # the trace's is the first
    return None if best == "trace" else found[best]


def order_constraints(lowered: Lowered) -> tuple[tuple[int, int], ...]:
    """Pairs of operators that stay in order, whatever they read: the whole forward, what draws from a generator, what has
    effects, and a buffer's readers around what writes it."""
    problem = lowered.problem
    nodes = {p: n for p, n in enumerate(lowered.nodes[: problem.num_program]) if n.op == "call_function"}
    effects = [p for p, n in nodes.items() if "fxmem_writes" in n.meta or not n.meta["fxmem_storages"]]
    draws = [p for p, n in nodes.items() if draws_random_numbers(n)]
    return (*pairwise(problem.forward), *pairwise(draws), *pairwise(effects), *_around_writes(nodes))


def _around_writes(nodes: dict[int, fx.Node]) -> Iterator[tuple[int, int]]:
    shown = {p: set(storages_read(node)) for p, node in nodes.items()}
    for write, node in nodes.items():
        if "fxmem_writes" in node.meta:
            written = node.args[0].meta["fxmem_storages"]
            readers = (p for p, storages in shown.items() if p != write and not storages.isdisjoint(written))
            yield from ((min(p, write), max(p, write)) for p in readers)


def _move(graph: fx.Graph, operators: Sequence[fx.Node]) -> None:
    """Put the operators into that order; what none of them needs stays behind them, in its own."""
    output = graph.output_node()
    placed = {n for n in graph.nodes if n.op == "placeholder"}
    wanted = [n for made in operators for n in (made, *(u for u in made.users if u.target is operator.getitem))]
    wanted += [n for n in graph.nodes if n not in placed]
    for node in wanted:
        pending = [] if node is output else [node]
        while pending:  # chains of views may be long, so no recursion
            missing = [n for n in pending[-1].all_input_nodes if n not in placed]
            pending += missing
            if not missing and (top := pending.pop()) not in placed:
                placed.add(top)
                output.prepend(top)
