"""Search: rounds of annealing from several seeds, each round from the best of the last.

One seed's result varies by a percentage point. So the first round begins from the advice of the linear relaxation
(see `bound`), once hot and mostly cool; the next reheat the best so far. Near the least peak such a walk does not come back
to what fits, or only at a high price: there, a round is made under a larger budget, and followed as the budget shrinks.
Where nothing fits even so, runs that weigh bytes above all look for the least peak (see `minimum`). Every schedule is judged
by `simulate`; should it see more bytes than the incremental evaluation did, the budget shrinks by the difference.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from ..schedule import simulate
from .annealing import Incumbent, Run
from .base import Answer, Task, register_solver
from .bound import hint
from .pool import Pool
from .segments import starting_states
from .stages import Compiled, compile_problem
from .state import State

SEEDS = 2  # of a later round: one for each of two processes
HOT, WARM, COOL, COLD = 5e-3, 1.5e-3, 5e-4, 3e-4  # temperatures at which runs begin, in fractions of the plain time
REHEATS = (COOL, WARM)  # in turns
MOST_REHEATS = 12
PATIENCE = 2  # rounds in a row that may save less than the part WORTHWHILE of the extra time
WORTHWHILE = 3e-3
FIRST_ROUND = ((HOT, 0.2), (COOL, 0.05), (COOL, 0.05), (COLD, 0.2))  # temperature, and what a byte too many weighs at first
DESCENT = (1.1, 1.05, 1.02, 1.01, 1.005, 1.002, 1.001)  # larger budgets on the way to one that is too tight to begin with
FAR = 1.5  # times the relaxation's bound: a first round that costs as much has lost its way
SQUEEZE_WEIGHT = 10.0  # what a byte too many weighs when only bytes matter
ATTEMPTS = 3


@register_solver("search")
def search(task: Task) -> Answer:
    """Rounds of annealing; no schedule where nothing that fits was met."""
    compiled, budget_bytes, log = compile_problem(task.problem), task.budget_bytes, []
    for _ in range(ATTEMPTS):
        with Pool(len(compiled.stages)) as pool:
            best = _rounds(task, compiled, budget_bytes, pool, log)
        if best.desired is None:
            return Answer(None, stopped=best.stopped, log=tuple(log))
        schedule = State(compiled, budget_bytes, list(best.desired)).schedule()
        excess_bytes = simulate(task.problem, schedule).peak_bytes - task.budget_bytes
        if excess_bytes <= 0:
            return Answer(schedule, stopped=best.stopped, log=tuple(log))
        budget_bytes -= excess_bytes
        log.append(f"search: the replay needs {excess_bytes:,} bytes more; trying with a budget smaller by as much")
    return Answer(None, log=tuple(log))


def effort(compiled: Compiled) -> int:
    """Moves of one run, by the number of decisions."""
    decisions = len(compiled.stages) * len(compiled.sizes)
    return int(min(9_000, 2_000 + 0.4 * decisions))


def first_states(task: Task, compiled: Compiled, budget_bytes: int) -> Incumbent:
    """The best of the starting states in either sense."""
    best = Incumbent()
    for desired in starting_states(compiled, task.starts):
        best.offer(State(compiled, budget_bytes, list(desired)))
    return best


def squeeze(
    task: Task, compiled: Compiled, budget_bytes: int, best: Incumbent, pool: Pool, deadline: float = math.inf
) -> Incumbent:
    """Look for the least peak down to budget_bytes, from the smallest state known, in at most two rounds.

    By default the task's time limit does not hold here: any plan is worth more than none in time.
    """
    for number, hot in enumerate((HOT, WARM)):
        run = Run(task.problem, budget_bytes, best.smallest, effort(compiled), 100 + SEEDS * number, hot, weight=SQUEEZE_WEIGHT)
        best = better([best, *pool.run_all(_seeds(run), deadline, task.progress)])
        if best.desired is not None or best.stopped:
            break
    return best


def better(incumbents: list[Incumbent]) -> Incumbent:
    """The best in either sense; of equally good ones the earlier."""
    cheapest = min(incumbents, key=lambda i: i.time_s)
    smallest = min(incumbents, key=lambda i: i.smallest_bytes)
    stopped = any(i.stopped for i in incumbents)
    return Incumbent(cheapest.desired, cheapest.time_s, smallest.smallest, smallest.smallest_bytes, stopped)


def _rounds(task: Task, compiled: Compiled, budget_bytes: int, pool: Pool, log: list[str]) -> Incumbent:
    """First from the relaxation's advice, or by descent; then from the best so far, as long as that saves anything."""
    advice, bound_s = hint(compiled, budget_bytes, task.deadline)
    first = _first_round(task, compiled, budget_bytes, advice, pool, log)
    if not first.stopped and first.time_s > FAR * bound_s:
        first = better([first, _descend(task, compiled, budget_bytes, pool, log)])
    best = better([first_states(task, compiled, budget_bytes), first])
    if best.desired is None:
        best = squeeze(task, compiled, budget_bytes, best, pool)
    if best.desired is None:
        log.append(f"search: nothing that fits; least peak met {best.smallest_bytes:,} bytes")
    idle = 0
    for number in range(MOST_REHEATS):
        if best.desired is None or best.stopped or idle == PATIENCE:
            break
        before_s = best.time_s
        hot = REHEATS[number % len(REHEATS)]
        run = Run(task.problem, budget_bytes, best.desired, effort(compiled), len(FIRST_ROUND) + SEEDS * (number + 1), hot)
        best = better([best, _round(task, _seeds(run), pool, log)])
        idle = 0 if best.time_s < before_s * (1 - WORTHWHILE) else idle + 1
    return best


def _first_round(
    task: Task, compiled: Compiled, budget_bytes: int, start: tuple[int, ...], pool: Pool, log: list[str]
) -> Incumbent:
    """From the relaxation's advice, hot and cool."""
    run = Run(task.problem, budget_bytes, start, effort(compiled), 0)
    runs = [replace(run, seed=seed, hot=hot, weight=weight) for seed, (hot, weight) in enumerate(FIRST_ROUND)]
    return _round(task, runs, pool, log)


def _descend(task: Task, compiled: Compiled, budget_bytes: int, pool: Pool, log: list[str]) -> Incumbent:
    """A first round under a larger budget, and from its best on under ever smaller ones."""
    wider_bytes = int(budget_bytes * DESCENT[0])
    advice, _ = hint(compiled, wider_bytes, task.deadline)
    best = _first_round(task, compiled, wider_bytes, advice, pool, log)
    if best.desired is None:
        return best
    for number, factor in enumerate((*DESCENT[1:], 1.0)):
        start, seed = best.desired or best.smallest, len(FIRST_ROUND) + SEEDS * (MOST_REHEATS + 1 + number)
        run = Run(task.problem, int(budget_bytes * factor), start, effort(compiled), seed, COOL, weight=0.2)
        best = _round(task, _seeds(run), pool, log)
    return best


def _round(task: Task, runs: list[Run], pool: Pool, log: list[str]) -> Incumbent:
    """The best of some runs, and a line about it in the log."""
    begin, unit_s = time.monotonic(), task.problem.plain_time_s or 1.0
    best = better(pool.run_all(runs, task.deadline, task.progress))
    found = "nothing that fits" if best.desired is None else f"extra time {100 * best.time_s / unit_s:.3f} %"
    budget = f"{runs[0].budget_bytes:,} bytes, {len(runs)} x {runs[0].moves} moves"
    log.append(f"search: {budget}: {found}, {time.monotonic() - begin:.1f} s")
    return best


def _seeds(run: Run) -> list[Run]:
    return [replace(run, seed=run.seed + k) for k in range(SEEDS)]
