"""Solvers: a Problem and a budget in, a Schedule out, judged by `fxmem.schedule.simulate`. No torch.

Each method is a file and a name in `SOLVERS`: `search` (annealing with an exact incremental simulator), `milp` (exact on
small graphs), those of others (`chen_sqrt`, `chen_greedy`, `recursive`, `rotor`, `checkmate_lp`, `per_block`, `torch_budget`),
`auto` (the default: the right ones of them, and a lower bound). `solve` asks one of them for the cheapest
schedule under a budget, `least_peak` for the smallest, `frontier` for the whole trade.
"""

from __future__ import annotations

from . import auto, checkmate, chen, given, per_block, rotor, search  # noqa: F401  (each registers itself)
from .base import SOLVERS, Solution, find_solver, register_solver
from .budgets import frontier, least_peak
from .driver import solve, solve_alone

__all__ = ["SOLVERS", "Solution", "find_solver", "frontier", "least_peak", "register_solver", "solve", "solve_alone"]
