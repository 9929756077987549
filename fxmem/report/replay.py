"""A schedule played through for people to look at: what lives at each step, for how long, and what became of it. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..problem import KINDS, Problem
from ..schedule import Schedule, Timeline, alive_during, extra_times_s, forward_length

PEAK_KINDS = (*KINDS, "workspace")
TITLES = dict(zip(PEAK_KINDS, ("parameters", "buffers", "inputs", "activations", "gradients", "workspace"), strict=True))


def bytes_by_kind(problem: Problem, schedule: Schedule, timeline: Timeline) -> dict[str, list[int]]:
    """For each kind of storage, and for what operators take inside ("workspace"), its bytes during each step."""
    series: dict[str, list[int]] = {kind: [] for kind in PEAK_KINDS}
    for alive, during in zip(alive_during(problem, schedule, timeline), timeline.during_bytes, strict=True):
        kinds = Counter()
        for storage in alive:
            kinds[problem.storages[storage].kind] += problem.storages[storage].size_bytes
        kinds["workspace"] = during - sum(kinds.values())
        for kind in PEAK_KINDS:
            series[kind].append(kinds[kind])
    return series


def step_times_s(problem: Problem, schedule: Schedule) -> list[float]:
    """Seconds of each step: the first run of a program operator (or of an alternative in its place), or a repeat."""
    first, times = set(range(problem.num_program)), []
    for index, extra_s in zip(schedule.steps, extra_times_s(problem, schedule), strict=True):
        place = problem.program_index(index)
        times.append(extra_s + (problem.operators[place].time_s if place in first else 0.0))
        first.discard(place)
    return times


def is_recompute(problem: Problem, schedule: Schedule) -> list[bool]:
    """Whether each step repeats something of the forward, variants and encoders among it."""
    forward_steps = forward_length(problem, schedule)
    return [
        step >= forward_steps and problem.program_index(index) not in problem.backward
        for step, index in enumerate(schedule.steps)
    ]


def kept_storages(problem: Problem, schedule: Schedule, timeline: Timeline) -> list[int]:
    """What waits for the backward when the forward is over; not what is there all along, nor what the module returns."""
    forward_steps = forward_length(problem, schedule)
    alive: set[int] = set()
    for index, frees in list(zip(schedule.steps, timeline.frees, strict=True))[:forward_steps]:
        alive.update(problem.operators[index].outputs)
        alive.difference_update(frees)
    return sorted(alive - problem.outputs)


@dataclass(frozen=True)
class ModuleShare:
    """What one module of the user's keeps for the backward, and makes again in it."""

    kept_bytes: int = 0
    recomputed_bytes: int = 0
    recomputed_s: float = 0.0


def shares_by_module(problem: Problem, schedule: Schedule, timeline: Timeline) -> dict[str, ModuleShare]:
    """By module path: bytes that wait for the backward, bytes that are made again in it, and the seconds which that takes."""
    kept, again, seconds = Counter(), Counter(), Counter()
    for storage in kept_storages(problem, schedule, timeline):
        kept[maker_of(problem, storage).module] += problem.storages[storage].size_bytes
    for index, repeats in zip(schedule.steps, is_recompute(problem, schedule), strict=True):
        if repeats:
            operator = problem.operators[index]
            again[operator.module] += sum(problem.storages[s].size_bytes for s in operator.outputs)
            seconds[operator.module] += operator.time_s
    return {name: ModuleShare(kept[name], again[name], seconds[name]) for name in {*kept, *again}}


def maker_of(problem: Problem, storage: int):
    """The operator that first makes a storage; None for what is there from the start."""
    makers = problem.producers[storage]
    return problem.operators[makers[0]] if makers else None


@dataclass(frozen=True)
class Chosen:
    """How often one implementation runs in a schedule, and what that takes: bytes that its encoders keep for the backward,
    their seconds in the forward, and the seconds that its operators take more than what they replace."""

    places: int
    code_bytes: int
    encoders_s: float
    slower_s: float


def chosen_implementations(problem: Problem, schedule: Schedule, timeline: Timeline) -> dict[str, Chosen]:
    """By name, the implementations of which a backward operator, or a maker of what one reads, runs."""
    places, code, encoders, slower = Counter(), Counter(), Counter(), Counter()
    for index, repeats in zip(schedule.steps, is_recompute(problem, schedule), strict=True):
        operator = problem.operators[index]
        if index in problem.encoders:
            encoders[operator.implementation] += 0.0 if repeats else operator.time_s
        elif operator.implementation:
            places[operator.implementation] += 1
            slower[operator.implementation] += problem.slower_s(index) if operator.replaces is not None else 0.0
    for storage in kept_storages(problem, schedule, timeline):
        code[maker_of(problem, storage).implementation] += problem.storages[storage].size_bytes
    names = sorted({*places, *encoders} - {""}, key=lambda name: (-places[name], name))
    return {name: Chosen(places[name], code[name], encoders[name], slower[name]) for name in names}
