"""Annealed local search over what to carry into each stage of the backward, with an exact incremental simulator.

A state wishes storages into stages (see `state`), a move changes some wishes (see `moves`), and simulated annealing
(Kirkpatrick, Gelatt and Vecchi 1983) accepts it by the extra time and, weighted, the bytes beyond the budget that the
schedule would need; the weight adapts so that the walk stays around the border of what fits. Guarantees nothing but that
what it returns was replayed exactly; effort is counted in moves, so that the same input gives the same schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from ..problem import Problem
from ..units import format_percent
from .moves import Moves
from .packing import pack
from .stages import compile_problem
from .state import State

COOL_EVERY = 256  # moves between steps of the temperature


@dataclass(frozen=True)
class Run:
    """One annealing run over `problem`: from which state, how many moves, from which to which temperature (in fractions of the
    plain time), and what a byte beyond the budget weighs at first. packed: whether the best is packed in the end."""

    problem: Problem
    budget_bytes: int
    desired: tuple[int, ...]
    moves: int
    seed: int
    hot: float = 5e-3
    cold: float = 2e-5
    weight: float = 0.05
    packed: bool = False


@dataclass
class Incumbent:
    """The best states that a run has met: the cheapest within the budget, and the one with the least peak."""

    desired: tuple[int, ...] | None = None
    time_s: float = math.inf
    smallest: tuple[int, ...] | None = None
    smallest_bytes: int = 1 << 62
    stopped: bool = False
    interrupted: bool = False

    def offer(self, state: State) -> None:
        """Note a state where it is the best in either sense."""
        if not state.excess_bytes and state.time_s < self.time_s - 1e-12:
            self.desired, self.time_s = tuple(state.desired), state.time_s
        worst_bytes = state.worst_bytes
        if worst_bytes < self.smallest_bytes:
            self.smallest, self.smallest_bytes = tuple(state.desired), worst_bytes


def anneal(run: Run, deadline: float = math.inf, progress: Callable[[str], None] | None = None) -> Incumbent:
    """Search from the run's state on. The deadline (time.monotonic) or KeyboardInterrupt end it early with what it has."""
    compiled = compile_problem(run.problem)
    state, best = State(compiled, run.budget_bytes, list(run.desired)), Incumbent()
    moves = Moves(compiled, Random(run.seed))
    best.offer(state)
    try:
        best.stopped = not _walk(state, run, moves, best, deadline, progress)
        if run.packed and not best.stopped:
            state.reset(list(best.desired or run.desired), run.budget_bytes)
            best.stopped = pack(state, moves, deadline)
            best.offer(state)
    except KeyboardInterrupt:
        best.stopped = best.interrupted = True
    return best


def _walk(state: State, run: Run, moves: Moves, best: Incumbent, deadline: float, progress) -> bool:
    """The walk itself; False where the deadline cut it short."""
    rng, unit_s = moves.rng, state.compiled.problem.plain_time_s or 1.0
    weight = max(run.weight, 2 / len(state.compiled.stages))  # on a small graph one operator is much of the time
    temperature = run.hot
    adapt_every = min(1024, max(64, run.moves // 100 // 64 * 64))
    cooling = (run.cold / run.hot) ** (COOL_EVERY / max(run.moves, COOL_EVERY))
    for count in range(1, run.moves + 1):
        before_s, before_bytes = state.time_s, state.excess_bytes
        for _ in range(moves.how_many()):
            state.change(moves.draw(state))
        worse = (state.time_s - before_s) / unit_s + weight * (state.excess_bytes - before_bytes) / state.budget_bytes
        if worse <= 0 or rng.random() < math.exp(-worse / temperature):
            state.keep()
            if state.excess_bytes < before_bytes or (state.time_s < best.time_s and not state.excess_bytes):
                best.offer(state)
        else:
            state.undo()
        if count % adapt_every == 0:
            weight *= 1.15 if state.excess_bytes else 0.95
        if time.monotonic() > deadline:  # a move takes anything from a tenth of a millisecond to a second
            return False
        if count % COOL_EVERY == 0:
            temperature *= cooling
            if progress and count % (16 * COOL_EVERY) == 0:
                progress(f"search: {count} of {run.moves} moves, best extra time {format_percent(best.time_s / unit_s, 2)}")
    return True
