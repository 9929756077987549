"""The default: the methods of others, search, a lower bound, and where these do not meet on a small graph, the exact program.

The methods of others take little time, are starts for the search, and are judged beside it: the answer is never worse than
theirs. Where there are operator implementations to choose from, the step without them is searched first, in short, and is one
of the starts. The exact program begins from what the search found, as an upper limit on its cost. Whatever
fails, the best schedule of the others is the answer, and the log tells.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from ..problem import without_implementations
from ..schedule import Schedule, simulate
from ..units import format_percent
from .base import SOLVERS, Answer, Task, judge, register_solver
from .bound import lower_bound
from .checkmate import is_quick
from .lift import lift
from .milp import binaries, milp
from .search import search
from .stages import Compiled, compile_problem
from .state import least_possible_bytes

MOST_BINARIES = 600  # up to which the exact program ends in seconds
CLOSE = 1e-4  # of a step: not worth closing
FAR = 1.15  # times the bound: worth lifting
PEERS = ("chen_greedy", "chen_sqrt", "per_block", "recursive", "rotor", "checkmate_lp")


@register_solver("auto")
def auto(task: Task) -> Answer:
    """Ask the peers, search, bound, and prove where that is cheap."""
    compiled = compile_problem(task.problem)
    log: list[str] = []
    task = replace(task, starts=(*task.starts, *_peers(task, compiled, log)))
    bound_s = lower_bound(compiled, task.budget_bytes, task.deadline, log)
    known = math.isfinite(bound_s)  # at the least peak itself, the linear solver's tolerance may say that nothing fits
    plainly, interrupted = _plainly(task, log)
    task = replace(task, starts=(*task.starts, *plainly), bound_s=bound_s if known else 0.0)
    if interrupted:
        found = judge(task, task.starts)
        return Answer(found and found[0], stopped=True, log=tuple(log))
    answer = search(task)
    log += answer.log
    if not known:
        return replace(answer, log=tuple(log))
    unit_s = task.problem.plain_time_s or 1.0
    found = judge(task, [answer.schedule, *task.starts])
    overhead = found[1].overhead if found else math.inf
    if overhead * unit_s > FAR * bound_s and not answer.stopped:
        bound_s = lift(compiled, task.budget_bytes, bound_s, overhead * unit_s, task.limit_s, task.deadline, log)
    bound = bound_s / unit_s
    if task.progress:
        task.progress(
            f"extra time {format_percent(overhead, 2)}, no schedule below {format_percent(bound, 2)}, "
            f"gap {format_percent(overhead - bound, 2)}"
        )
    proven = False
    if overhead - bound > CLOSE and not answer.stopped and binaries(task.problem, compiled) <= MOST_BINARIES:
        exact = milp(replace(task, starts=(found[0],) if found else ()))
        log += exact.log
        proven = exact.proven
        bound = max(bound, exact.lower_bound_overhead)
        found = judge(task, [found and found[0], exact.schedule])
    return replace(answer, schedule=found and found[0], lower_bound_overhead=bound, proven=proven, log=tuple(log))


def _plainly(task: Task, log: list[str]) -> tuple[list[Schedule], bool]:
    """What the search finds without any implementations, in half of the time that is left at most; and whether somebody
    interrupted it."""
    problem, kept = without_implementations(task.problem)
    if len(kept) == len(task.problem.operators):
        return [], False
    if task.budget_bytes < least_possible_bytes(problem, compile_problem(problem)):
        return [], False
    now = time.monotonic()
    alone = replace(task, problem=problem, starts=(), deadline=now + (task.deadline - now) / 2)
    answer = search(alone, thorough=False)
    log += (f"without implementations: {line}" for line in answer.log)
    found = [] if answer.schedule is None else [Schedule(tuple(kept[p] for p in answer.schedule.steps))]
    return found, answer.stopped and not alone.out_of_time


def _peers(task: Task, compiled: Compiled, log: list[str]) -> list[Schedule]:
    """The schedules of the peers that fit, where there is time for them."""
    found = []
    for name in PEERS:
        if task.out_of_time or (name == "checkmate_lp" and not is_quick(compiled)):
            break
        schedule = SOLVERS[name](task).schedule
        if schedule is not None:
            log.append(f"{name}: extra time {format_percent(simulate(task.problem, schedule).overhead, 3)}")
            found.append(schedule)
    return found
