"""A schedule, and the simulator that is the only judge of its peak and its time. No torch.

A schedule is the sequence in which operators run. What lives when follows from it: a storage lives from the step that makes
it to its last use before it is made again (or to the end, for outputs), and is freed right after that use.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator
from dataclasses import dataclass

from .errors import ProblemError
from .problem import KINDS, Operator, Problem


@dataclass(frozen=True)
class Schedule:
    """Operator indices in the order in which they run; a forward operator, variant or encoder may stand there any number of
    times, an alternative in the place of what it replaces."""

    steps: tuple[int, ...]


def plain_schedule(problem: Problem) -> Schedule:
    """Every operator once, in program order: nothing is recomputed."""
    return Schedule(tuple(range(problem.num_program)))


@dataclass(frozen=True)
class Timeline:
    """What a schedule costs, as `simulate` found it. All bytes include what is fixed.

    during_bytes[i]: bytes alive while step i runs (inputs, outputs, workspace, all that is still to be used).
    after_bytes[i]: bytes alive when step i is over and what died in it is freed.
    inplace[i]: the (input, output) pair that step i runs in place, or None.
    frees[i]: storages that die in step i, in increasing order (not those that live on in place).
    peak_by_kind: bytes at the peak by storage kind, and "workspace".
    """

    during_bytes: tuple[int, ...]
    after_bytes: tuple[int, ...]
    inplace: tuple[tuple[int, int] | None, ...]
    frees: tuple[tuple[int, ...], ...]
    peak_bytes: int
    peak_step: int
    peak_by_kind: dict[str, int]
    time_s: float
    overhead: float


def simulate(problem: Problem, schedule: Schedule) -> Timeline:
    """Replay `schedule` exactly, one step at a time.

    Raises ProblemError, naming the operator, where a step reads what is not alive, or a program operator is missing, out of
    order, or repeated where it may not be.
    """
    _check_order(problem, schedule)
    storages, producers = problem.storages, problem.producers
    sizes = [s.size_bytes for s in storages]
    dies = _deaths(problem, schedule)
    alive = {s for s, makers in enumerate(producers) if not makers}
    live_bytes = problem.fixed_bytes
    during, after, inplace = [], [], []
    peak_bytes, peak_step, at_peak = live_bytes, -1, (frozenset(alive), None)
    for step, index in enumerate(schedule.steps):
        operator = problem.operators[index]
        missing = [s for s in operator.inputs if s not in alive]
        if missing:
            raise ProblemError(f"step {step} runs {operator.name!r}, but its input {storages[missing[0]].name!r} is not alive")
        again = [s for s in operator.outputs if s in alive]  # a kept output is made a second time, and dropped at once
        made_bytes = sum(sizes[s] for s in operator.outputs)
        pair = inplace_pair(operator, dies[step], again)
        saved_bytes = min(sizes[pair[0]], sizes[pair[1]]) if pair else 0
        now = live_bytes + made_bytes - saved_bytes + operator.workspace_bytes
        alive.update(operator.outputs)
        if now > peak_bytes:
            peak_bytes, peak_step, at_peak = now, step, (frozenset(alive), pair)
        alive -= dies[step]
        live_bytes += made_bytes - sum(sizes[s] for s in again) - sum(sizes[s] for s in dies[step])
        during.append(now)
        after.append(live_bytes)
        inplace.append(pair)
    time_s = _time_s(problem, schedule)
    return Timeline(
        during_bytes=tuple(during),
        after_bytes=tuple(after),
        inplace=tuple(inplace),
        frees=tuple(tuple(sorted(d)) for d in dies),
        peak_bytes=peak_bytes,
        peak_step=peak_step,
        peak_by_kind=_by_kind(problem, *at_peak, peak_bytes),
        time_s=time_s,
        overhead=time_s / problem.plain_time_s - 1 if problem.plain_time_s else 0.0,
    )


def inplace_pair(operator: Operator, dying: Container[int], again: Container[int] = ()) -> tuple[int, int] | None:
    """The (input, output) pair that `operator` runs in place when the storages in `dying` die in it, or None.

    What is fixed or lives to the end never dies, so it is never written over. `again`: outputs that are alive already.
    """
    return next((p for p in operator.inplace if p[0] in dying and p[1] not in again), None)


def forward_length(problem: Problem, schedule: Schedule) -> int:
    """How many steps the forward has: up to its last operator, with the encoders among them. The rest is the backward's."""
    return schedule.steps.index(problem.num_forward - 1) + 1 if problem.num_forward else 0


def _check_order(problem: Problem, schedule: Schedule) -> None:
    """Every program operator, or an alternative to it, first runs in program order; backward operators and the not
    recomputable once; nothing runs again, and no variant runs, before the forward is over."""
    expected = 0
    for step, index in enumerate(schedule.steps):
        if not 0 <= index < len(problem.operators):
            raise ProblemError(f"step {step} names operator {index}, but there are {len(problem.operators)} operators")
        operator, place = problem.operators[index], problem.program_index(index)
        if place == expected:
            expected += 1
        elif problem.num_forward <= place < problem.num_program:
            raise ProblemError(f"step {step} runs backward operator {operator.name!r} twice or out of order")
        elif expected < index < problem.num_forward:
            raise ProblemError(f"step {step} runs {operator.name!r} before the forward reached it")
        elif expected < problem.num_forward and index not in problem.encoders:
            raise ProblemError(f"step {step} recomputes {operator.name!r} before the forward is over")
        elif not operator.recomputable:
            raise ProblemError(f"step {step} runs {operator.name!r} again, which is not recomputable")
    if expected < problem.num_program:
        raise ProblemError(f"the schedule never runs {problem.operators[expected].name!r}")


def _deaths(problem: Problem, schedule: Schedule) -> list[set[int]]:
    """For each step the storages whose last use, before they are made again or the step ends, it is."""
    fixed = {s for s, makers in enumerate(problem.producers) if not makers}
    needed = fixed | problem.outputs
    dies: list[set[int]] = [set()] * len(schedule.steps)
    for step in range(len(schedule.steps) - 1, -1, -1):
        operator = problem.operators[schedule.steps[step]]
        dies[step] = {s for s in (*operator.inputs, *operator.outputs) if s not in needed}
        needed.difference_update(s for s in operator.outputs if s not in problem.outputs)
        needed.update(operator.inputs)
    return dies


def extra_times_s(problem: Problem, schedule: Schedule) -> list[float]:
    """Seconds that each step adds to the plain step's: nothing for a program operator's first run, what it takes more for an
    alternative, all of its time for every other run."""
    extra = []
    first = set(range(problem.num_program))
    for index in schedule.steps:
        place = problem.program_index(index)
        extra.append(problem.slower_s(index) if place in first else problem.operators[index].time_s)
        first.discard(place)
    return extra


def _time_s(problem: Problem, schedule: Schedule) -> float:
    """Seconds of all steps."""
    time_s = problem.plain_time_s
    for extra_s in extra_times_s(problem, schedule):
        time_s += extra_s
    return time_s


def _by_kind(problem: Problem, alive: frozenset[int], pair: tuple[int, int] | None, peak_bytes: int) -> dict[str, int]:
    """Bytes at the peak by storage kind; what no storage accounts for is workspace."""
    kinds = dict.fromkeys(KINDS, 0)
    for storage in alive - ({pair[0]} if pair else set()):
        kinds[problem.storages[storage].kind] += problem.storages[storage].size_bytes
    return kinds | {"workspace": peak_bytes - sum(kinds.values())}


def alive_during(problem: Problem, schedule: Schedule, timeline: Timeline) -> Iterator[frozenset[int]]:
    """For each step the storages that hold bytes while it runs; of a pair in place, the output alone."""
    alive = {s for s, makers in enumerate(problem.producers) if not makers}
    for index, frees, pair in zip(schedule.steps, timeline.frees, timeline.inplace, strict=True):
        alive.update(problem.operators[index].outputs)
        if pair:
            alive.discard(pair[0])
        yield frozenset(alive)
        alive.difference_update(frees)


def alive_at_peak(problem: Problem, schedule: Schedule, timeline: Timeline) -> frozenset[int]:
    """The storages that hold bytes at the peak: at the start, what no operator makes."""
    if timeline.peak_step < 0:
        return frozenset(s for s, makers in enumerate(problem.producers) if not makers)
    return next(itertools.islice(alive_during(problem, schedule, timeline), timeline.peak_step, None))
