"""The default: search, a lower bound, and where the two do not meet on a small graph, the exact program.

The exact program begins from what the search found, as an upper limit on its cost. Whatever fails, the best schedule of the
others is the answer, and the log tells.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .base import Answer, Task, judge, register_solver
from .bound import lower_bound
from .milp import binaries, milp
from .search import search
from .stages import compile_problem

MOST_BINARIES = 1_500  # up to which the exact program ends in seconds
CLOSE = 1e-4  # of a step: not worth closing


@register_solver("auto")
def auto(task: Task) -> Answer:
    """Search, bound, and prove where that is cheap."""
    compiled = compile_problem(task.problem)
    answer = search(task)
    log = list(answer.log)
    unit_s = task.problem.plain_time_s or 1.0
    bound = lower_bound(compiled, task.budget_bytes, task.deadline, log) / unit_s
    if not math.isfinite(bound):
        return replace(answer, log=tuple(log))
    found = judge(task, [answer.schedule, *task.starts])
    overhead = found[1].overhead if found else math.inf
    proven = False
    if overhead - bound > CLOSE and not answer.stopped and binaries(task.problem, compiled) <= MOST_BINARIES:
        starts = (*task.starts, *([answer.schedule] if answer.schedule else []))
        exact = milp(replace(task, starts=starts))
        log += exact.log
        proven = exact.proven
        bound = max(bound, exact.lower_bound_overhead)
        found = judge(task, [found and found[0], exact.schedule])
    return Answer(found and found[0], bound, proven, answer.stopped, tuple(log))
