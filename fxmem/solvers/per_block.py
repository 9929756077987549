"""What torch.utils.checkpoint around each block of a model does: keep the blocks' inputs, run each block again as a whole.

A block is an element of a list of modules, as the operators' module paths tell ("layers.3", "features.0"); what belongs to
none is kept. Where no operator has such a path, blocks are the pieces between narrow cuts of the graph.
"""

from __future__ import annotations

import itertools
import re

from .base import Answer, Task, cheapest, register_solver
from .segments import Segment, narrow_cuts, wishes_of
from .stages import Compiled, compile_problem

IN_A_LIST = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")


@register_solver("per_block")
def per_block(task: Task) -> Answer:
    """Every block a segment."""
    compiled = compile_problem(task.problem)
    return cheapest(task, compiled, [wishes_of(compiled, _blocks(compiled))])


def _blocks(compiled: Compiled) -> Segment:
    problem, count = compiled.problem, len(compiled.sizes)
    names = [_block(problem.operators[problem.producers[s][0]].module) for s in compiled.storages]
    if not any(names):
        edges = [0, *narrow_cuts(compiled), count]
        return Segment(0, count, tuple(Segment(a, b) for a, b in itertools.pairwise(edges)))
    parts, start = [], 0
    for name, run in itertools.groupby(names):
        stop = start + len(list(run))
        part = Segment(start, stop)
        parts.append(part if name else Segment(start, stop, kept=part.bits))
        start = stop
    return Segment(0, count, tuple(parts))


def _block(module: str) -> str:
    found = IN_A_LIST.match(module)
    return found.group() if found else ""
