"""Checkmate's linear program and two-phase rounding (Jain et al. 2020, section 5).

What is carried into a window of the backward is the relaxation's S, rounded at one half; what has to run again for that, and
no more, follows from the replay. The rounded schedule needs more memory than the fractional one: so the program is asked for
less of the budget until the schedule fits.
"""

from __future__ import annotations

from .base import Answer, Task, cheapest, register_solver
from .bound import MOST_VARIABLES, Relaxation, even_edges
from .stages import Compiled, compile_problem

WINDOWS_VARIABLES = 6_000  # windows are as many as stay below: more make it slower, and what is rounded no better
QUICK = 20_000  # stages x storages up to which several windows take a second or two
BUDGETS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)


@register_solver("checkmate_lp")
def checkmate_lp(task: Task) -> Answer:
    """The rounded relaxation at the largest part of the budget whose schedule fits."""
    compiled = compile_problem(task.problem)
    width = Relaxation(compiled, task.budget_bytes).width
    windows, log = max(1, min(len(compiled.stages), WINDOWS_VARIABLES // max(1, width))), []
    for part in BUDGETS:
        relaxation = Relaxation(compiled, int(part * task.budget_bytes), even_edges(compiled, windows))
        outcome = relaxation.solve(task.deadline)
        log.append(f"checkmate_lp: {windows} windows, {part} of the budget: {outcome.status}")
        if outcome.x is None:
            break
        found = cheapest(task, compiled, [_rounded(compiled, relaxation, outcome.x)])
        if found.schedule is not None:
            return Answer(found.schedule, log=tuple(log))
    return Answer(None, log=tuple(log))


def is_quick(compiled: Compiled) -> bool:
    """Whether it takes a small part of a minute: on a small graph, and on a large one, where there is one window."""
    width = Relaxation(compiled, 0).width
    return WINDOWS_VARIABLES // 2 < width <= MOST_VARIABLES or len(compiled.stages) * len(compiled.sizes) <= QUICK


def _rounded(compiled: Compiled, relaxation: Relaxation, x) -> tuple[int, ...]:
    """Wishes for each stage: what its window is handed or reads, and what it hands on."""
    unmodelled = compiled.everything & ~sum(1 << k for k in relaxation.bits)
    carried = [sum(1 << k for k in relaxation.bits if x[relaxation.s(w, k)] > 0.5) for w in range(len(relaxation.windows))]
    wishes = []
    for w, stages in enumerate(relaxation.windows):
        following = carried[w + 1] if w + 1 < len(carried) else 0
        for place, _ in enumerate(stages):
            made = following | _read(compiled, stages[place:]) if place else 0
            wishes.append(unmodelled | carried[w] | made)
    return tuple(wishes)


def _read(compiled: Compiled, stages: range) -> int:
    bits = 0
    for t in stages:
        bits |= compiled.stages[t].needs
    return bits
