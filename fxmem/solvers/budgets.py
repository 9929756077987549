"""Questions that take several budgets to answer: the least peak, at any extra time or at a given one, and the whole trade."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ..errors import InfeasibleBudgetError
from ..problem import Problem
from ..schedule import Schedule, Timeline, plain_schedule, simulate
from .base import BY_INTERRUPT, BY_TIME_LIMIT, Progress, Solution, Task, interrupted, with_reason
from .bound import Relaxation
from .driver import solve, solve_task
from .minimum import NEARLY, annealed, smallest_schedule
from .stages import compile_problem
from .state import least_possible_bytes

SLIGHTLY = 0.02  # of a peak: so much more is taken where the least one costs more than TOO_MUCH times the extra time
TOO_MUCH = 2.0
DEAR = 0.5  # extra time of the least peak as it is met: what costs less is worth no second search slightly above it
LEAST_SHARE = 1 / 3  # of the time limit: for the least peak itself
PROBES = 8  # budgets that are tried
PROBE_SHARE = 3  # of the time that is left, each may take the third part, the last ones more


def least_peak(
    problem: Problem,
    *,
    max_overhead: float | None = None,
    time_limit_s: float = 60.0,
    starts: Sequence[Schedule] = (),
    progress: Progress | None = None,
) -> Solution:
    """The schedule with the least peak that is found, at the least extra time that is found for nearly that peak.

    The last thousandths of a peak are a few small storages that take whole layers to make again; so the answer may lie up to
    NEARLY above the least peak that was met, and, where that is DEAR, up to SLIGHTLY above it if that at least halves the extra
    time: what the search for the least peak ends with may run everything many times over.

    max_overhead: among those that cost at most this extra time only (0.1: ten percent of the plain step).
    """
    begin = time.monotonic()
    task = Task(problem, 0, tuple(starts), begin + time_limit_s, progress, time_limit_s)
    if max_overhead is not None:
        best = _least_within(task, max_overhead)
        return replace(best, solve_time_s=time.monotonic() - begin)
    least = smallest_schedule(replace(task, deadline=begin + time_limit_s * LEAST_SHARE))
    smallest = least.schedule
    reached, now = simulate(problem, smallest), time.monotonic()
    if least.interrupted:
        return _unproven(smallest, reached, now - begin)
    until = max(task.deadline, now + time_limit_s / 2)  # the peak alone may be found at any cost
    found, low_bytes, dear = [], int(reached.peak_bytes * (1 + NEARLY)), reached.overhead > DEAR
    if dear:
        high_bytes = int(reached.peak_bytes * (1 + SLIGHTLY))
        near = _within(replace(task, deadline=now + (until - now) / 2), high_bytes, smallest, dear)
        starts, found = (near.schedule, *starts), [near]
        if near.interrupted or near.status == "optimal" and near.timeline.peak_bytes <= low_bytes:
            return replace(near, solve_time_s=time.monotonic() - begin)
    found.append(_within(replace(task, starts=tuple(starts), deadline=until), low_bytes, smallest, dear))
    best = interrupted(least_of(found)) if found[-1].interrupted else least_of(found)
    return replace(best, solve_time_s=time.monotonic() - begin)


def least_of(solutions: Iterable[Solution]) -> Solution:
    """Of several answers, the one to "min": the one with the least extra time of those NEARLY as low as the lowest, or of those
    SLIGHTLY above it, if that at least halves it."""
    solutions = list(solutions)
    low_bytes = min(s.timeline.peak_bytes for s in solutions)

    def cheapest_within(part: float) -> Solution:
        low_enough = (s for s in solutions if s.timeline.peak_bytes <= int(low_bytes * (1 + part)))
        return min(low_enough, key=lambda s: (s.timeline.overhead, s.timeline.peak_bytes))

    best, other = cheapest_within(NEARLY), cheapest_within(SLIGHTLY)
    return other if other.timeline.overhead * TOO_MUCH <= best.timeline.overhead else best


def _unproven(schedule: Schedule, timeline: Timeline, time_s: float) -> Solution:
    """What was known when somebody interrupted the search."""
    return interrupted(Solution(schedule, timeline, 0.0, "feasible", "auto", time_s))


def _within(task: Task, budget_bytes: int, smallest: Schedule, dear: bool) -> Solution:
    """What is found within a budget near the least peak, from what reaches that at any price, annealed where it is dear."""
    task = replace(task, budget_bytes=budget_bytes, starts=(smallest, *task.starts))
    if not dear:
        return solve_task(task)
    begin, cheap = time.monotonic(), annealed(task, smallest)
    if cheap.interrupted:
        return _unproven(cheap.schedule, simulate(task.problem, cheap.schedule), time.monotonic() - begin)
    return solve_task(replace(task, starts=(cheap.schedule, *task.starts)))


def frontier(
    problem: Problem,
    points: int,
    *,
    time_limit_s: float = 60.0,
    starts: Sequence[Schedule] = (),
    progress: Progress | None = None,
) -> tuple[Solution, ...]:
    """`points` schedules at most, from no recompute to the least peak, each with a smaller peak and more extra time.

    time_limit_s: for all together. Budgets lie at equal distances; each search begins from its neighbours' schedules, so a
    larger budget never costs more extra time.
    """
    begin = time.monotonic()
    deadline = begin + time_limit_s
    plain = plain_schedule(problem)
    high_bytes = simulate(problem, plain).peak_bytes
    share_s = time_limit_s / points
    found = [solve(problem, high_bytes)]
    if points == 1:
        return tuple(found)
    least = least_peak(problem, time_limit_s=share_s, starts=starts, progress=progress)
    known = [*starts, least.schedule]
    low_bytes = least.timeline.peak_bytes
    for k in range(1, points):  # the least peak once more, from what is known then
        budget_bytes = high_bytes - (high_bytes - low_bytes) * k // (points - 1)
        until = time.monotonic() + max(0.0, deadline - time.monotonic()) / (points - k)
        if (found[-1] if k > 1 else least).interrupted:
            break
        found.append(solve_task(Task(problem, budget_bytes, tuple(known), until, progress, share_s)))
        known.append(found[-1].schedule)
    return _monotone([*found, least])


def _monotone(solutions: list[Solution]) -> tuple[Solution, ...]:
    """From the largest budget to the smallest, without those that another beats in both peak and extra time."""
    kept: list[Solution] = []
    for solution in sorted(solutions, key=lambda s: (s.timeline.peak_bytes, s.timeline.overhead)):
        if not kept or solution.timeline.overhead < kept[-1].timeline.overhead:
            kept.append(solution)
    return tuple(reversed(kept))


def _least_within(task: Task, max_overhead: float) -> Solution:
    """The budget is closed in on; then less extra time is looked for at the peak that was found."""
    problem, task = task.problem, replace(task, overtime=False)
    plain = solve(problem, simulate(problem, plain_schedule(problem)).peak_bytes)
    plain_bytes = plain.timeline.peak_bytes
    impossible_bytes = _ruled_out(problem, max_overhead, plain_bytes, time.monotonic() + task.limit_s / PROBES)
    best = _best_start(task, max_overhead, plain)
    best, impossible_bytes = _close_in(task, max_overhead, impossible_bytes, plain_bytes, best)
    cut_short = BY_INTERRUPT if best.interrupted else BY_TIME_LIMIT if task.out_of_time else ""
    if best.timeline.overhead > 0 and not cut_short:
        left_s, peak_bytes = task.deadline - time.monotonic(), best.timeline.peak_bytes
        best = solve_task(replace(task, budget_bytes=peak_bytes, starts=(best.schedule,), limit_s=left_s, with_peers=False))
        cut_short = BY_INTERRUPT if best.interrupted else ""
    proven = best.timeline.peak_bytes <= impossible_bytes + NEARLY * plain_bytes
    return replace(best, status=with_reason("optimal" if proven else "feasible", cut_short))


def _best_start(task: Task, max_overhead: float, plain: Solution) -> Solution:
    """The one with the least peak, of the plain schedule and of the starts that cost little enough."""
    known = (Solution(s, simulate(task.problem, s), 0.0, "feasible", plain.solver, 0.0) for s in task.starts)
    return min((plain, *(s for s in known if s.timeline.overhead <= max_overhead)), key=lambda s: s.timeline.peak_bytes)


def _close_in(task: Task, max_overhead: float, impossible_bytes: int, plain_bytes: int, best: Solution) -> tuple[Solution, int]:
    """The least peak that is found between a budget that is too small and a solution, each schedule a start for the next; and
    the largest budget that is known to be too small."""
    starts, low_bytes, low_overhead = list(task.starts), impossible_bytes, math.inf
    from_plain = best.timeline.peak_bytes == plain_bytes
    task, missed = replace(task, enough_s=max_overhead * task.problem.plain_time_s), False
    for k in range(PROBES):
        if k and task.out_of_time:
            break
        probe, room_bytes = low_bytes + (plain_bytes - low_bytes) // 16, best.timeline.peak_bytes - low_bytes
        only_low = from_plain and k == 0  # where nothing is known, one that is too small tells most
        if not only_low:
            if room_bytes <= NEARLY * plain_bytes:
                break
            part = 0.5 if missed else _crossing(low_overhead, best.timeline.overhead, max_overhead)
            probe = low_bytes + int(part * room_bytes)
        share_s = max(0.0, task.deadline - time.monotonic()) / min(PROBES - k, PROBE_SHARE)
        within = dict(budget_bytes=probe, starts=tuple(starts), deadline=time.monotonic() + share_s, limit_s=share_s)
        try:
            found = solve_task(replace(task, **within))
        except InfeasibleBudgetError as error:
            low_bytes, low_overhead = max(low_bytes, min(error.min_budget_bytes, best.timeline.peak_bytes) - 1), math.inf
            continue
        except KeyboardInterrupt:
            return replace(best, interrupted=True), impossible_bytes
        starts.append(found.schedule)
        missed = not only_low and found.timeline.overhead > max_overhead
        if found.timeline.overhead <= max_overhead:
            best = min(best, found, key=lambda s: s.timeline.peak_bytes)
            task = replace(task, with_peers=False)  # theirs are not as good
        else:
            low_bytes, low_overhead = probe, found.timeline.overhead
        if found.lower_bound_overhead > max_overhead:
            impossible_bytes = max(impossible_bytes, probe)
        if found.interrupted:
            return replace(best, interrupted=True), impossible_bytes
    return best, impossible_bytes


def _crossing(low_overhead: float, high_overhead: float, max_overhead: float) -> float:
    """Where extra time that falls evenly from the low end to the high one is as it may be, as a part of the way: near enough
    to the low end to gain much, not so near as to gain nothing where it is too much there."""
    way = low_overhead - high_overhead
    return min(0.5, max(0.125, (low_overhead - max_overhead) / way)) if math.isfinite(way) else 0.5


def _ruled_out(problem: Problem, max_overhead: float, high_bytes: int, deadline: float) -> int:
    """A budget that no schedule of that extra time can meet, nearly the largest that the one-window bound tells."""
    compiled, most_s = compile_problem(problem), max_overhead * problem.plain_time_s * (1 + 1e-5)
    low_bytes = least_possible_bytes(compiled) - 1
    if Relaxation(compiled, high_bytes).takes_long:
        return low_bytes
    while high_bytes - low_bytes > 1 + high_bytes // 256 and time.monotonic() < deadline:
        middle = (low_bytes + high_bytes) // 2
        outcome = Relaxation(compiled, middle).solve(deadline)
        if outcome.bound > most_s:
            low_bytes = middle
        else:
            high_bytes = middle
    return low_bytes
