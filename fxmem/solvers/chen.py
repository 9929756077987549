"""Training deep nets with sublinear memory cost (Chen, Xu, Zhang, Guestrin 2016), on graphs rather than chains.

`chen_sqrt`: segments of equally many storages, of the length that serves the budget best. `chen_greedy`: their algorithm 3,
which fills each segment up to so many bytes and ends it where the graph is narrow. `recursive`: segments cut again and
again, memory of log N at times N log N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .base import Answer, Task, cheapest, register_solver
from .segments import Segment, narrow_cuts, nested, wishes_of
from .stages import Compiled, compile_problem

LENGTHS = 24  # segment lengths tried, at equal ratios
ARITIES = (2, 4, 8)


@register_solver("chen_sqrt")
def chen_sqrt(task: Task) -> Answer:
    """One level of segments with equally many storages."""
    compiled = compile_problem(task.problem)
    return cheapest(task, compiled, uniform_states(compiled))


@register_solver("chen_greedy")
def chen_greedy(task: Task) -> Answer:
    """One level of segments with equal bytes, that end at narrow cuts."""
    compiled = compile_problem(task.problem)
    return cheapest(task, compiled, _greedy_states(compiled))


@register_solver("recursive")
def recursive(task: Task) -> Answer:
    """Segments in segments, of several arities and depths from two levels on."""
    compiled = compile_problem(task.problem)
    return cheapest(task, compiled, nested_states(compiled))


def uniform_states(compiled: Compiled) -> Iterator[tuple[int, ...]]:
    """Segments with equally many storages, from one for each storage to one for all; as wishes for each stage."""
    count = len(compiled.sizes)
    for length in _lengths(count):
        edges = [*range(0, count, length), count]
        yield _one_level(compiled, edges)


def _greedy_states(compiled: Compiled) -> Iterator[tuple[int, ...]]:
    count, cuts = len(compiled.sizes), narrow_cuts(compiled)
    total_bytes = sum(compiled.sizes)
    for parts in _lengths(count):
        edges, filled, start = [0], 0, 0
        for end in cuts:
            filled += sum(compiled.sizes[start:end])
            start = end
            if filled >= total_bytes / parts:
                edges.append(end)
                filled = 0
        edges.append(count)
        yield _one_level(compiled, edges)


def nested_states(compiled: Compiled) -> Iterator[tuple[int, ...]]:
    """Segments in segments of several arities and depths; as wishes for each stage."""
    for arity in ARITIES:
        for depth in range(2, 2 + int(math.log(max(2, len(compiled.sizes)), arity))):
            yield wishes_of(compiled, nested(compiled, arity, depth))


def _one_level(compiled: Compiled, edges: Sequence[int]) -> tuple[int, ...]:
    parts = tuple(Segment(a, b) for a, b in zip(edges, edges[1:], strict=False))
    return wishes_of(compiled, Segment(0, len(compiled.sizes), parts))


def _lengths(count: int) -> list[int]:
    return sorted({round(max(1, count) ** (i / LENGTHS)) for i in range(LENGTHS + 1)})
