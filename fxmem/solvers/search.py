"""Search: rounds of annealing from several seeds, each round from the best of the last.

One seed's result varies by a percentage point, so the first round runs several and the second reheats the best. Where
nothing fits, a round that weighs bytes above all looks for the least peak first (see `minimum`). Every schedule is judged
by `simulate`; should it see more bytes than the incremental evaluation did, the budget shrinks by the difference.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from ..schedule import simulate
from .annealing import Incumbent, Run
from .base import Answer, Task, register_solver
from .pool import run_all
from .stages import Compiled, compile_problem
from .starts import starting_states
from .state import State

SEEDS = 2  # per round: one for each of the two processes
REHEAT = 1.5e-3
SQUEEZE_WEIGHT = 10.0  # what a byte too many weighs when only bytes matter
ATTEMPTS = 3


@register_solver("search")
def search(task: Task) -> Answer:
    """Two rounds of annealing; no schedule where nothing that fits was met."""
    compiled, budget_bytes, log = compile_problem(task.problem), task.budget_bytes, []
    for _ in range(ATTEMPTS):
        best = _rounds(task, compiled, budget_bytes, log)
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
    return int(min(24_000, 2_000 + 0.5 * decisions))


def _rounds(task: Task, compiled: Compiled, budget_bytes: int, log: list[str]) -> Incumbent:
    begin = time.monotonic()
    best = first = _first(task, compiled, budget_bytes)
    moves, unit_s = effort(compiled), task.problem.plain_time_s or 1.0
    for number, hot in enumerate((Run.hot, REHEAT)):
        if best.desired is None:
            best = squeeze(task, compiled, budget_bytes, best)
            log.append(f"search: least peak met on the way {best.smallest_bytes:,} bytes")
            if best.desired is None:
                return best
        start = first.desired if number == 0 and first.desired else best.desired
        run = Run(task.problem, budget_bytes, start, moves, 2 * number, hot=hot)
        results = run_all([replace(run, seed=run.seed + k) for k in range(SEEDS)], task.deadline, task.progress)
        best = better([best, *results])
        log.append(f"search: round {number + 1}, {SEEDS} x {moves} moves, extra time {100 * best.time_s / unit_s:.3f} %, "
                   f"{time.monotonic() - begin:.1f} s")  # fmt: skip
    return best


def _first(task: Task, compiled: Compiled, budget_bytes: int) -> Incumbent:
    """The best of the starting states in either sense."""
    best = Incumbent()
    for desired in starting_states(compiled, task.starts):
        best.offer(State(compiled, budget_bytes, list(desired)))
    return best


def squeeze(task: Task, compiled: Compiled, budget_bytes: int, best: Incumbent) -> Incumbent:
    """Look for the least peak down to budget_bytes, from the smallest state known. Runs to its end whatever the time limit
    says where that has passed already: any plan is worth more than none in time."""
    deadline = task.deadline if best.desired else math.inf
    for number, hot in enumerate((Run.hot, REHEAT)):
        run = Run(task.problem, budget_bytes, best.smallest, effort(compiled), 100 + 2 * number, hot=hot, weight=SQUEEZE_WEIGHT)
        best = better([best, *run_all([replace(run, seed=run.seed + k) for k in range(SEEDS)], deadline, task.progress)])
        if best.desired is not None:
            break
    return best


def better(incumbents: list[Incumbent]) -> Incumbent:
    """The best in either sense; of equally good ones the earlier."""
    cheapest = min(incumbents, key=lambda i: i.time_s)
    smallest = min(incumbents, key=lambda i: i.smallest_bytes)
    stopped = any(i.stopped for i in incumbents)
    return Incumbent(cheapest.desired, cheapest.time_s, smallest.smallest, smallest.smallest_bytes, stopped)
