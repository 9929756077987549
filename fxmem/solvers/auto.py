"""The default: the methods of others, a lower bound, on a small graph the exact program, else search.

The methods of others take little time, are starts for the rest, and are judged beside it: the answer is never worse than
theirs. What comes next depends on what is open: nothing, where they meet the bound; the exact program, where that ends in
seconds, with the best of them as an upper limit on its cost; else the search. Where there are operator implementations to
choose from, and packing leaves room for that, the step without them is searched too, in short, and is another start. Whatever
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
from .search import FAR, search
from .stages import Compiled, compile_problem
from .state import least_possible_bytes

MOST_BINARIES = 600  # up to which the exact program ends in seconds
PEERS = ("chen_greedy", "chen_sqrt", "per_block", "recursive", "rotor", "checkmate_lp")


@register_solver("auto")
def auto(task: Task) -> Answer:
    """Ask the peers, bound, prove where that is cheap, else search."""
    compiled = compile_problem(task.problem)
    log: list[str] = []
    if task.with_peers:
        task = replace(task, starts=(*task.starts, *_peers(task, compiled, log)))
    bound_s = lower_bound(compiled, task.budget_bytes, task.deadline, log)
    known = math.isfinite(bound_s)  # at the least peak itself, the linear solver's tolerance may say that nothing fits
    task = replace(task, bound_s=bound_s if known else 0.0)
    unit_s = task.problem.plain_time_s or 1.0
    found = judge(task, task.starts)
    if found and task.is_settled(found[1].overhead * unit_s):
        return Answer(found[0], task.bound_s / unit_s, log=tuple(log))
    if binaries(task.problem, compiled) <= MOST_BINARIES:
        exact = _exact(task, found and found[0])
        if exact is None:
            return Answer(
                found and found[0], task.bound_s / unit_s, stopped=True, interrupted=True, log=(*log, "milp: interrupted")
            )
        log += exact.log
        if exact.proven:
            return replace(exact, log=tuple(log))
        bound_s = max(bound_s, exact.lower_bound_overhead * unit_s)
        starts = (*task.starts, *filter(None, [exact.schedule]))
        task = replace(task, bound_s=bound_s if known else 0.0, starts=starts)
    plainly = _Plainly(task)
    answer = search(task, more_starts=plainly)
    log += (*plainly.log, *answer.log)
    found = judge(task, [answer.schedule, *plainly.found, *task.starts])
    if found is None or not known:
        return replace(answer, schedule=found and found[0], log=tuple(log))
    overhead = found[1].overhead
    if overhead * unit_s > (1 + FAR) * bound_s and not answer.stopped:
        bound_s = lift(compiled, task.budget_bytes, bound_s, overhead * unit_s, task.limit_s, task.deadline, log)
    bound = bound_s / unit_s
    if task.progress:
        task.progress(
            f"extra time {format_percent(overhead, 2)}, no schedule below {format_percent(bound, 2)}, "
            f"gap {format_percent(overhead - bound, 2)}"
        )
    return replace(answer, schedule=found[0], lower_bound_overhead=bound, log=tuple(log))


def _exact(task: Task, best: Schedule | None) -> Answer | None:
    """What the exact program finds below the best schedule known, in half of the time that is left at most; None where somebody
    interrupts it."""
    now = time.monotonic()
    try:
        return milp(replace(task, starts=(best,) if best else (), deadline=now + (task.deadline - now) / 2))
    except KeyboardInterrupt:
        return None


class _Plainly:
    """What the search finds without any implementations, in half of the time that is left at most, where that may be less than
    what is known; and whether somebody interrupted it."""

    def __init__(self, task: Task):
        self.task, self.found, self.log, self.asked = task, [], [], False

    def __call__(self, enough_s: float) -> tuple[list[Schedule], bool]:
        problem, kept = without_implementations(self.task.problem)
        if self.asked or len(kept) == len(self.task.problem.operators):
            return self.found, False
        self.asked = True
        compiled, budget_bytes, now = compile_problem(problem), self.task.budget_bytes, time.monotonic()
        if budget_bytes < least_possible_bytes(compiled):
            return [], False
        deadline, log = now + (self.task.deadline - now) / 2, []
        bound_s = lower_bound(compiled, budget_bytes, deadline, log)
        bound_s = bound_s if math.isfinite(bound_s) else 0.0  # see `auto`
        if bound_s and bound_s >= enough_s:
            return [], False
        alone = replace(self.task, problem=problem, starts=(), deadline=deadline, bound_s=bound_s)
        answer = search(alone, thorough=False)
        self.log += (f"without implementations: {line}" for line in (*log, *answer.log))
        self.found += [] if answer.schedule is None else [Schedule(tuple(kept[p] for p in answer.schedule.steps))]
        return self.found, answer.interrupted


def _peers(task: Task, compiled: Compiled, log: list[str]) -> list[Schedule]:
    """The schedules of the peers that fit, as far as a third of the time goes."""
    found, until = [], time.monotonic() + (task.deadline - time.monotonic()) / 3
    for name in PEERS:
        if time.monotonic() > until or (name == "checkmate_lp" and not is_quick(compiled)):
            break
        schedule = SOLVERS[name](replace(task, deadline=until)).schedule
        if schedule is not None:
            log.append(f"{name}: extra time {format_percent(simulate(task.problem, schedule).overhead, 3)}")
            found.append(schedule)
    return found
