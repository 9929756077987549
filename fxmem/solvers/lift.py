"""A higher lower bound for small graphs: where to cut the backward into windows.

One window asks for everything that is made again only once, however often a tight budget needs it. Cut at the right stage,
the program of `bound` sees two of those times; cut at many, its relaxation splits operators into fractions. So cuts are
chosen one after the other, each where it raises the integer program's bound most, on a coarse grid and then beside its best.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from .bound import Relaxation
from .stages import Compiled

MOST_VARIABLES = 600  # of the program with one window: some hundred operators; its integer program takes a second or less
SEARCHING_S = 60.0  # of the time limit are the search's: who gives no more wants a plan soon, not a proof
TRIES_PER_MINUTE = 8  # of the rest, so that the bound does not depend on how fast the machine is
MOST_NODES = 300
GRID = 6
WORTHWHILE = 1e-3


def lift(
    compiled: Compiled, budget_bytes: int, bound_s: float, enough_s: float, limit_s: float, deadline: float, log: list[str]
) -> float:
    """A bound of at least bound_s.

    enough_s: what is known to be possible, and so need not be exceeded. limit_s: seconds that the whole solution may take; sets
    how many programs are tried.
    """
    begin, tries, edges = time.monotonic(), int(TRIES_PER_MINUTE * (limit_s - SEARCHING_S) / 60), ()
    if tries <= 0 or Relaxation(compiled, budget_bytes).variables > MOST_VARIABLES:
        return bound_s
    known: dict[tuple[int, ...], float] = {}

    def bound_of(stage: int) -> float:
        cut = tuple(sorted({*edges, stage}))
        proven = max(known.values(), default=0.0) >= enough_s * (1 - 1e-5)
        if cut not in known and len(known) < tries and time.monotonic() < deadline and not proven:
            known[cut] = Relaxation(compiled, budget_bytes, cut).solve(deadline, integer=True, most_nodes=MOST_NODES).bound
        return known.get(cut, 0.0)

    best_s = bound_s
    while len(known) < tries and time.monotonic() < deadline and best_s < enough_s * (1 - 1e-5):
        stage, found_s = _best_cut(len(compiled.stages), bound_of)
        if found_s <= best_s * (1 + WORTHWHILE) or stage in edges:
            break
        best_s, edges = found_s, tuple(sorted((*edges, stage)))
    log.append(f"bound: windows that begin at stages {edges}: {best_s:.6g} s, {len(known)} programs, {_since(begin)}")
    return max(bound_s, best_s * (1 - 1e-6))


def _best_cut(stages: int, bound_of) -> tuple[int, float]:
    """The best stage of a grid, moved to better neighbours as the grid becomes finer."""
    step = max(1, stages // GRID)
    found: Sequence[int] = range(step, stages, step)
    best = max(found, key=bound_of, default=0)
    while step > 1:
        step //= 2
        best = max((best, best - step, best + step), key=lambda stage: bound_of(stage) if 0 < stage < stages else 0.0)
    return best, bound_of(best)


def _since(begin: float) -> str:
    return f"{time.monotonic() - begin:.1f} s"
