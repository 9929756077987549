"""The sharing allocators that deep learning frameworks began with (Chen et al. 2015, MXNet; 2016, arXiv 1604.06174).

Operators are walked in the order in which they run, with a count of the readers that each buffer still has. An output first
goes on *in place* in an input whose last reader this is. Else it takes a *free tag*: bytes whose buffer has no readers left.
Else it begins a tag of its own. A tag is as large as its largest buffer, and the tags add up to the memory.

Sharing orders operators that could have run in parallel: who takes a tag must wait for all users of what lay there. The
*concurrency-aware* variant gives the operators on the longest path of the graph one colour, those on the longest path through
what is left the next, and so on, and lets a tag be taken only by the colour of the operator that freed it: operators of one
colour run one after the other anyway. Fewer colours save more memory, more colours keep more parallelism; `sharing_curve` is
what lies between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ProblemError
from ..problem import Problem
from ..schedule import Schedule
from .lifetimes import Buffer, buffers_of

if TYPE_CHECKING:
    import networkx as nx  # imported where it is used: offsets need none of it


@dataclass(frozen=True)
class Sharing:
    """What a sharing allocator decided.

    colours: into how many the operators were divided; 1 is the allocator that does not look at parallelism.
    size_bytes: of all tags together; of what goes into an arena, as for `intervals_of`.
    tags[i]: the names of the buffers in tag i, one after the other; tag_bytes[i]: its size.
    added_dependencies: pairs (step, later step) that neither data nor an earlier one of these pairs had put in order.
    lost_pairs: how many pairs of steps could run in parallel before and cannot now.
    """

    colours: int
    size_bytes: int
    tags: tuple[tuple[str, ...], ...]
    tag_bytes: tuple[int, ...]
    added_dependencies: tuple[tuple[int, int], ...]
    lost_pairs: int


def dataflow(problem: Problem, schedule: Schedule) -> nx.DiGraph:
    """The steps of a schedule, and an edge from the step that makes a storage to each that reads it."""
    import networkx as nx

    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(schedule.steps)))
    maker: dict[int, int] = {}
    for step, index in enumerate(schedule.steps):
        graph.add_edges_from((maker[s], step) for s in problem.operators[index].inputs if s in maker)
        maker.update(dict.fromkeys(problem.operators[index].outputs, step))
    return graph


def colour_paths(graph: nx.DiGraph, most: int) -> list[int]:
    """A colour for each step, 0 for the longest path: `most` at most, the last one for all that is left then.

    Paths may go through steps that have a colour already, but are as long as the steps that have none.
    """
    import networkx as nx

    colours: dict[int, int] = {}
    for colour in range(most - 1):
        if len(colours) == len(graph):
            break
        weighted = nx.DiGraph()
        weighted.add_weighted_edges_from((u, v, v not in colours) for u, v in graph.edges)
        weighted.add_weighted_edges_from((-1, v, v not in colours) for v in graph if not graph.in_degree(v))
        for step in nx.dag_longest_path(weighted)[1:]:
            colours.setdefault(step, colour)
    return [colours.get(step, most - 1) for step in range(len(graph))]


def share(problem: Problem, schedule: Schedule, *, colours: int = 1, inplace: bool = True, free_tags: bool = True) -> Sharing:
    """Run the allocator. colours: how many at most; inplace, free_tags: whether it may do either.

    Raises ProblemError where `colours` is no positive integer, or `simulate` would.
    """
    if not isinstance(colours, int) or isinstance(colours, bool) or colours < 1:
        raise ProblemError(f"colours={colours!r}; it must be a positive integer: 1 to share without regard to parallelism")
    graph = dataflow(problem, schedule)
    return _share(graph, buffers_of(problem, schedule, inplace), colour_paths(graph, colours), free_tags)


def sharing_curve(problem: Problem, schedule: Schedule) -> tuple[Sharing, ...]:
    """Bytes against parallelism: `share` with 1, 2, 4, ... colours, until every step is on a path of its own colour."""
    graph, buffers = dataflow(problem, schedule), buffers_of(problem, schedule)
    colours = colour_paths(graph, len(graph) + 1)
    needed = max(colours, default=0) + 1
    doubling = [1 << k for k in range(needed.bit_length()) if 1 << k < needed]
    return tuple(
        _share(graph, buffers, [min(colour, most - 1) for colour in colours], free_tags=True) for most in (*doubling, needed)
    )


def _share(graph: nx.DiGraph, buffers: Sequence[Buffer], colour: Sequence[int], free_tags: bool) -> Sharing:
    tags = _assign([b for b in buffers if not b.outside], colour, free_tags)
    added, lost_pairs = _dependencies(graph, buffers, tags)
    tag_bytes = tuple(max(b.size_bytes for b in tag) for tag in tags)
    names = tuple(tuple(b.name for b in tag) for tag in tags)
    return Sharing(max(colour, default=0) + 1, sum(tag_bytes), names, tag_bytes, added, lost_pairs)


def _assign(buffers: Sequence[Buffer], colour: Sequence[int], free_tags: bool) -> list[list[Buffer]]:
    """The buffers of each tag. Of free tags, the smallest that is large enough, else the largest, which grows."""
    tags: list[list[Buffer]] = []
    sizes: list[int] = []
    for buffer in sorted(buffers, key=lambda b: b.users[0]):
        step = buffer.users[0]
        last = [tag[-1].users[-1] for tag in tags] if free_tags else []
        free = [t for t, user in enumerate(last) if user < step and colour[user] == colour[step]]
        need = buffer.size_bytes
        if free:
            best = min(free, key=lambda t: (sizes[t] < need, abs(sizes[t] - need), t))
            tags[best].append(buffer)
            sizes[best] = max(sizes[best], need)
        else:
            tags.append([buffer])
            sizes.append(need)
    return tags


def _dependencies(
    graph: nx.DiGraph, buffers: Sequence[Buffer], tags: Sequence[Sequence[Buffer]]
) -> tuple[tuple[tuple[int, int], ...], int]:
    """What must come before what because it takes the same bytes, and the pairs of steps that this puts in order."""
    waits: dict[int, set[int]] = {}
    for buffer in buffers:
        for maker in buffer.makers[1:]:
            waits.setdefault(maker, set()).update(u for u in buffer.users if u < maker)
    for tag in tags:
        for before, after in zip(tag, tag[1:], strict=False):
            waits.setdefault(after.users[0], set()).update(before.users)
    by_data: list[int] = []  # the steps before each, as bits
    by_all: list[int] = []
    added = []
    for step in range(len(graph)):
        data = everything = 0
        for u in graph.predecessors(step):
            data |= by_data[u] | 1 << u
            everything |= by_all[u] | 1 << u
        for u in sorted(waits.get(step, ()), reverse=True):
            if not everything >> u & 1:
                added.append((u, step))
                everything |= by_all[u] | 1 << u
        by_data.append(data)
        by_all.append(everything)
    lost = sum(a.bit_count() - d.bit_count() for a, d in zip(by_all, by_data, strict=True))
    return tuple(added), lost
