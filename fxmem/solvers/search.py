"""Search: packing, then rounds of annealing from several seeds, each round from the best of the last.

The advice of the linear relaxation (see `bound`) seldom fits, by itself or in segments; packed (see `packing`), it does and is
good, and on thousands of operators that is as good as it gets. On a smaller graph annealing finds better
patterns; one seed's result varies by a percentage point, so it begins from the advice several times, once hot and mostly
cool, and then reheats the best so far. Each of its runs ends with packing.
Where packing meets the bound, nothing is left to search for. Where nothing fits even so, runs that weigh bytes above all look
for the least peak (see `minimum`). Every schedule is judged by `simulate`; should it see more bytes than the incremental
evaluation did, the budget shrinks by the difference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import or_
from typing import NamedTuple

from ..schedule import Schedule, simulate
from ..units import format_percent
from .annealing import Incumbent, Run
from .base import Answer, Task, register_solver
from .bound import hint
from .pool import Pool
from .segments import equal_segments, nothing_kept, starting_states
from .stages import Compiled, compile_problem
from .state import State, desires

MOVES_X_STAGES, LEAST_MOVES, MOST_MOVES = 1_000_000, 2_000, 8_000
SEEDS = 2  # of a later round: one for each of two processes
HOT, WARM, COOL = 5e-3, 1.5e-3, 5e-4  # temperatures at which runs begin, in fractions of the plain time
REHEATS = (WARM, COOL)  # in turns
FRESH = ((WARM, 0.05), (COOL, 0.05), (HOT, 0.2), *[(COOL, 0.05)] * 3)  # temperature, and what a byte too many weighs at first
RUNS_X_STAGES, LEAST_RUNS = 900, 2  # as many of FRESH begin a search, by the number of stages
MOST_FOR_FRESH = 600  # stages above which annealing from the advice sees too little to beat packing it
PACKED = 2  # of a round's best, one for each of two processes
MOST_ROUNDS = 12
SENSIBLE = 4.0  # times the extra time of the advice in segments: advice that can be taken as it is
NOT_FAR = 1.5  # times the best extra time: a start that is worth packing
NOT_FAR_UNFIT = 4.0  # the same of a start that does not fit
NEAR = 0.05  # over the bound: one more round is enough
WORTHWHILE = 5e-3  # of the extra time: a round that saves less is idle
IDLE_X_STAGES, MOST_IDLE = 200, 3  # idle rounds that a small graph bears, whose rounds take a second
FAR = 0.15  # over the bound: worth them, and a higher bound
IDLE_ROUNDS_S = 60.0  # of the time limit that allow one idle round: who gives ten minutes gets ten rounds beyond the best
SQUEEZE_WEIGHT = 10.0  # what a byte too many weighs when only bytes matter
SQUEEZE_MOVES = 9_000  # at least
ATTEMPTS = 3
# Given the least extra time so far, in seconds: schedules, and whether somebody interrupted the making of them.
MoreStarts = Callable[[float], tuple[list[Schedule], bool]]


@register_solver("search")
def search(task: Task, thorough: bool = True, more_starts: MoreStarts | None = None) -> Answer:
    """Rounds of annealing; no schedule where nothing that fits was met.

    thorough: as many as are worth it, and where nothing fits, looking for the least peak; otherwise one. more_starts: asked for
    further schedules to begin from, where packing the advice and the task's own has not met the bound.
    """
    compiled, budget_bytes, log = compile_problem(task.problem), task.budget_bytes, []
    for _ in range(ATTEMPTS):
        with Pool(len(compiled.stages)) as pool:
            best = _Search(task, compiled, budget_bytes, pool, log).run(thorough, more_starts)
        if best.desired is None:
            smallest = State(compiled, budget_bytes, list(best.smallest)).schedule()
            cut = dict(stopped=best.stopped, interrupted=best.interrupted)
            return Answer(None, **cut, log=tuple(log), smallest=smallest if thorough else None)
        schedule = State(compiled, budget_bytes, list(best.desired)).schedule()
        excess_bytes = simulate(task.problem, schedule).peak_bytes - task.budget_bytes
        if excess_bytes <= 0:
            return Answer(schedule, stopped=best.stopped, interrupted=best.interrupted, log=tuple(log))
        budget_bytes -= excess_bytes
        log.append(f"search: the replay needs {excess_bytes:,} bytes more; trying with a budget smaller by as much")
    return Answer(None, log=tuple(log))


def effort(compiled: Compiled) -> int:
    """Moves of one run: a move takes time by the number of stages, and a small graph has few moves."""
    stages = len(compiled.stages)
    return min(MOST_MOVES, LEAST_MOVES + 10 * stages * len(compiled.sizes), max(LEAST_MOVES, MOVES_X_STAGES // stages))


def first_states(task: Task, compiled: Compiled, budget_bytes: int) -> Incumbent:
    """The best of the starting states in either sense."""
    best, state = Incumbent(), State(compiled, budget_bytes)
    for desired in starting_states(compiled, task.starts):
        state.reset(list(desired), budget_bytes)
        best.offer(state)
    return best


class Advice(NamedTuple):
    """Wishes for each stage, and what follows from them."""

    worst_bytes: int
    time_s: float
    desired: tuple[int, ...]


def advised_states(task: Task, compiled: Compiled, budget_bytes: int) -> list[Advice]:
    """The linear relaxation's advice in the segments that ask for the smallest peak, and as it is or in the next best segments.

    The relaxation makes each operator again once, however long ago what it reads was freed. On a long chain that is advice to
    make all of it again for each stage; there it is of use only together with segments, of which what they keep is kept too.
    """
    advice = hint(compiled, budget_bytes, task.deadline)
    state = State(compiled, budget_bytes)

    def evaluated(wishes: Iterable[int]) -> Advice:
        state.reset(list(wishes), budget_bytes)
        return Advice(state.worst_bytes, state.time_s, tuple(state.desired))

    joined, alone = sorted(evaluated(map(or_, advice, wishes)) for wishes in equal_segments(compiled)), evaluated(advice)
    if not joined or alone.time_s <= joined[0].time_s * SENSIBLE:
        joined[1:] = [alone]
    return joined[:2]


def advice_packed(task: Task, compiled: Compiled, pool: Pool) -> Incumbent:
    """What packing makes of the relaxation's advice and of the best starting state, within the task's budget."""
    return _Search(task, compiled, task.budget_bytes, pool, [])._advice_packed()


def squeeze(task: Task, compiled: Compiled, budget_bytes: int, best: Incumbent, pool: Pool, deadline: float) -> Incumbent:
    """Look for the least peak down to budget_bytes in at most two rounds: from the smallest state known, then from the smallest
    by then and from nothing kept, which gets stuck elsewhere, but takes much more time."""
    moves, nothing = max(SQUEEZE_MOVES, effort(compiled)), nothing_kept(compiled)
    for number, hot in enumerate((HOT, WARM)):
        run = Run(task.problem, budget_bytes, best.smallest, moves, 100 + SEEDS * number, hot, weight=SQUEEZE_WEIGHT)
        runs = _seeds(run)
        if nothing and number:
            runs[-1] = replace(runs[-1], desired=nothing[0])
        best = better([best, *pool.run_all(runs, deadline, task.progress)])
        if best.desired is not None or best.stopped:
            break
    return best


def cheaper(task: Task, compiled: Compiled, state: State, pool: Pool) -> Incumbent:
    """A hot round from a state, for less extra time within the task's budget."""
    best = Incumbent()
    best.offer(state)
    run = Run(task.problem, task.budget_bytes, tuple(state.desired), effort(compiled), 0, HOT)
    return better([best, *pool.run_all(_seeds(run), task.deadline, task.progress)])


def better(incumbents: list[Incumbent]) -> Incumbent:
    """The best in either sense; of equally good ones the earlier."""
    cheapest = min(incumbents, key=lambda i: i.time_s)
    smallest = min(incumbents, key=lambda i: i.smallest_bytes)
    stopped, interrupted = any(i.stopped for i in incumbents), any(i.interrupted for i in incumbents)
    return Incumbent(cheapest.desired, cheapest.time_s, smallest.smallest, smallest.smallest_bytes, stopped, interrupted)


class _Search:
    """What the parts of one search share. first: the best starting states. fresh: a run from the advice, as it is where that is
    sensible."""

    def __init__(self, task: Task, compiled: Compiled, budget_bytes: int, pool: Pool, log: list[str]):
        self.task, self.compiled, self.budget_bytes, self.pool, self.log = task, compiled, budget_bytes, pool, log
        self.unit_s = task.problem.plain_time_s or 1.0
        self.advised = advised_states(task, compiled, budget_bytes)
        self.first = first_states(task, compiled, budget_bytes)
        self.fresh = Run(task.problem, budget_bytes, self.advised[-1].desired, effort(compiled), 0)

    def run(self, thorough: bool, more_starts: MoreStarts | None) -> Incumbent:
        """Packing, a round from the relaxation's advice or from what packing made of it, then rounds from the best so far."""
        best = self._advice_packed()
        if more_starts and not best.stopped and not self._is_settled(best):
            best = self._more_packed(best, *more_starts(best.time_s))
        if best.interrupted or self._is_settled(best) or (best.stopped and best.desired is not None):
            return best
        runs, patience = self._worthwhile(best, thorough)
        if runs and not best.stopped:
            best = better([best, self._round(runs)])
        if best.desired is None and thorough and not best.interrupted:
            deadline = math.inf if self.task.overtime else self.task.deadline
            # from the starting states it goes lower than from packed ones
            best = better([squeeze(self.task, self.compiled, self.budget_bytes, self.first, self.pool, deadline), best])
            if best.desired is not None and not best.stopped:
                best = better([best, *self._packed([best.desired])])
        if best.desired is None:
            self.log.append(f"search: nothing that fits; least peak met {best.smallest_bytes:,} bytes")
            return best
        return self._reheated(best, patience)

    def _run_all(self, runs: list[Run]) -> list[Incumbent]:
        return self.pool.run_all(runs, self.task.deadline, self.task.progress)

    def _packed(self, states: Iterable[tuple[int, ...]]) -> list[Incumbent]:
        found = self._run_all(_packs(self.fresh, states))
        self.log.append("search: packed " + ", ".join(map(self._in_percent, found)))
        return found

    def _advice_packed(self) -> Incumbent:
        """The best of the advice packed, and of the best starting state, packed too where the advice is not much better: beside
        it where that alone fits and takes less than another step's time; on large graphs, where packing two takes all the
        time, in the place of the second advice."""
        first = self.first
        states, start = [advice.desired for advice in self.advised], first.desired or first.smallest
        if len(start) > MOST_FOR_FRESH and first.desired and first.time_s <= self.advised[0].time_s * NOT_FAR:
            states[1:] = [start]
        elif first.time_s <= self.unit_s and all(advice.worst_bytes > self.budget_bytes for advice in self.advised):
            states = [states[-1], start, *states[:-1]]  # by the second process, whatever time it takes
        best = better([first, *self._packed(states)])
        start_s, near = (first.time_s, NOT_FAR) if first.desired else (self._time_s(start), NOT_FAR_UNFIT)
        if start not in states and (best.desired is None or start_s <= best.time_s * near):
            best = better([best, *self._packed([start])])
        return best

    def _time_s(self, state: tuple[int, ...]) -> float:
        return State(self.compiled, self.budget_bytes, list(state)).time_s

    def _more_packed(self, best: Incumbent, schedules: list[Schedule], interrupted: bool) -> Incumbent:
        """The best so far, or of some schedules, as they are and packed."""
        own = Incumbent(stopped=interrupted, interrupted=interrupted)
        for schedule in schedules:
            own.offer(State(self.compiled, self.budget_bytes, desires(self.compiled, schedule)))
        best = better([best, own])
        if not schedules or interrupted or own.time_s > best.time_s * NOT_FAR:
            return best
        return better([best, *self._packed([own.desired or own.smallest])])

    def _is_settled(self, best: Incumbent) -> bool:
        """Whether what was found is as good as the bound, or good enough."""
        return best.desired is not None and self.task.is_settled(best.time_s)

    def _worthwhile(self, best: Incumbent, thorough: bool) -> tuple[list[Run], int]:
        """The runs from the advice, or, where nothing fits yet, from the least peak so far; and how many idle rounds to bear
        after them."""
        stages, patience = len(self.compiled.stages), max(1, int(self.task.limit_s / IDLE_ROUNDS_S))
        runs = _varied(self.fresh, stages)
        if best.desired is None:
            return [replace(run, desired=best.smallest) for run in runs], patience
        if not thorough or best.time_s <= self.task.bound_s * (1 + NEAR):
            return runs[:SEEDS], min(1, patience - 1)
        if best.time_s > self.task.bound_s * (1 + FAR):
            patience = max(patience, min(MOST_IDLE, IDLE_X_STAGES // stages))
        return ([] if stages > MOST_FOR_FRESH else runs), patience

    def _reheated(self, best: Incumbent, patience: int) -> Incumbent:
        """Rounds from the best so far, as long as they save anything."""
        idle = 0
        for number in range(1, MOST_ROUNDS * patience):
            if best.stopped or idle == patience or self._is_settled(best):
                break
            before_s, seed = best.time_s, number * len(FRESH)
            reheated = replace(self.fresh, desired=best.desired, seed=seed, hot=REHEATS[number % len(REHEATS)])
            best = better([best, self._round(_seeds(reheated))])
            idle = idle + 1 if best.time_s > before_s * (1 - WORTHWHILE) else 0
        return best

    def _round(self, runs: list[Run]) -> Incumbent:
        """The best of some runs when packed, and a line about it in the log."""
        begin = time.monotonic()
        annealed = self._run_all(runs)
        fit = {i.desired: i.time_s for i in annealed if i.desired is not None}
        chosen = [] if any(i.stopped for i in annealed) else sorted(fit, key=fit.__getitem__)[:PACKED]
        best = better([*annealed, *self._run_all(_packs(runs[0], chosen))])
        what = f"{runs[0].budget_bytes:,} bytes, {len(runs)} x {runs[0].moves} moves"
        now = f"{self._in_percent(better(annealed))}, packed {self._in_percent(best)}" if fit else "nothing that fits"
        self.log.append(f"search: {what}: {now}, {time.monotonic() - begin:.1f} s")
        return best

    def _in_percent(self, incumbent: Incumbent) -> str:
        if incumbent.desired is None:
            return "nothing that fits"
        return f"extra time {format_percent(incumbent.time_s / self.unit_s, 3)}"


def _packs(run: Run, states: Iterable[tuple[int, ...]]) -> list[Run]:
    return [replace(run, desired=desired, moves=0, packed=True) for desired in states]


def _seeds(run: Run) -> list[Run]:
    return [replace(run, seed=run.seed + k) for k in range(SEEDS)]


def _varied(run: Run, stages: int) -> list[Run]:
    """The runs that begin from the advice, as many as the number of stages allows."""
    count = min(len(FRESH), RUNS_X_STAGES // stages)
    if run.problem.encoders:  # a move takes longer there
        count //= 2
    varied = FRESH[: max(LEAST_RUNS, count)]
    return [replace(run, seed=run.seed + k, hot=hot, weight=weight) for k, (hot, weight) in enumerate(varied)]
