"""The least peak that a schedule in program order can be brought to, and the cheapest schedule at that peak.

No schedule goes below what one operator takes with what lives beside it in every schedule. Often packing gets there at once,
and at little cost; otherwise the search with bytes weighed above all finds what can be reached from there up.
"""

from __future__ import annotations

import time
from dataclasses import replace

from ..schedule import Schedule, simulate
from .base import Answer, Task
from .pool import Pool
from .search import advice_packed, better, cheaper, first_states, squeeze
from .stages import Compiled, compile_problem
from .state import State, desires, least_possible_bytes

NEARLY = 1e-3  # of a peak: the last thousandths are a few small storages that take whole layers to make again
PACKING_SHARE = 3  # of the time: where it does not get there, the walk from the starting states goes lower than on from its own
LEAST_EFFORT_S = 10.0  # spent on it where the time limit has passed already: an error that names a peak should name a good one


def smallest_schedule(task: Task, effort_s: float | None = None) -> Answer:
    """The schedule with the least peak that the search meets, whatever it costs; or one that is NEARLY as low as any can be, or
    within the task's budget.

    effort_s: seconds to search at least, even behind the task's deadline; LEAST_EFFORT_S if not given.
    """
    effort_s = LEAST_EFFORT_S if effort_s is None else effort_s
    compiled = compile_problem(task.problem)
    floor_bytes = least_possible_bytes(compiled)
    enough_bytes = max(task.budget_bytes, int(floor_bytes * (1 + NEARLY)))
    task = replace(task, budget_bytes=floor_bytes)
    best = first_states(task, compiled, floor_bytes)
    if best.smallest_bytes > enough_bytes:
        with Pool(len(compiled.stages)) as pool:
            deadline = max(task.deadline, time.monotonic() + effort_s)
            soon = time.monotonic() + (deadline - time.monotonic()) / PACKING_SHARE
            packed = advice_packed(replace(task, budget_bytes=enough_bytes, deadline=soon), compiled, pool)
            if packed.smallest_bytes > enough_bytes and not packed.interrupted:
                best = squeeze(task, compiled, floor_bytes, best, pool, deadline)
            best = better([best, packed])
    wishes = best.desired or best.smallest  # the cheapest of those that are low enough, where any is
    schedules = [State(compiled, floor_bytes, list(wishes)).schedule(), *task.starts]
    schedule = min(schedules, key=lambda schedule: simulate(task.problem, schedule).peak_bytes)
    return Answer(schedule, interrupted=best.interrupted)


def easily_reached_bytes(compiled: Compiled, floor_bytes: int) -> int:
    """The least peak of what the search for floor_bytes begins with, which takes no time to speak of."""
    return first_states(Task(compiled.problem, floor_bytes), compiled, floor_bytes).smallest_bytes


def annealed(task: Task, schedule: Schedule) -> Answer:
    """A schedule within the task's budget, at less extra time: what the search for the least peak ends with runs much several
    times for nothing, which packing, one move at a time, takes long to see."""
    compiled = compile_problem(task.problem)
    state = State(compiled, task.budget_bytes, desires(compiled, schedule))
    with Pool(len(compiled.stages)) as pool:
        best = cheaper(task, compiled, state, pool)
    found = State(compiled, task.budget_bytes, list(best.desired)).schedule() if best.desired else schedule
    return Answer(found, interrupted=best.interrupted)
