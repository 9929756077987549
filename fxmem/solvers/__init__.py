"""Solvers: a Problem and a budget in, a Schedule out, judged by `fxmem.schedule.simulate`. No torch.

Each method is a file and a name in `SOLVERS`: `search` (annealing with an exact incremental simulator), `milp` (exact on
small graphs), those of others (`chen_sqrt`, `chen_greedy`, `recursive`, `rotor`, `checkmate_lp`, `per_block`, `torch_budget`),
`auto` (the default: the right ones of them, and a lower bound). `solve` asks one of them for the cheapest
schedule under a budget, `least_peak` for the smallest, `frontier` for the whole trade.

Who calls whom:

    driver    one question: `auto` or a named method, then a refusal that names the least peak (`minimum`)
    budgets   questions of several budgets ("min", max_overhead, frontiers), each a question to `driver`
    auto      the methods of others, `bound`, `milp`, `search`, then `lift`, which raises the bound
    search    the rounds: `packing` (programs in `highs`) and `annealing` (by `moves`), in one process or two (`pool`)
    state     what both move through: wishes and what follows from them; `walks` within a stage, `stages` the constants

Their words: a *bit* is a forward storage. A *stage* is a part of the backward that ends with an operator that reads bits, a
*moment* an operator of the forward. A *wish* is to carry a bit into a stage, or a stage's *thrift*: to run its last operator by
the option that takes least memory rather than by the *quickest*. A *walk* is what a stage makes again of what it does not find.
A *late* input of a variant is made only after what the variant makes; an *optional* bit is one that nothing makes again, or
only such a variant, and that need not be carried all the same.
"""

from __future__ import annotations

from . import auto, checkmate, chen, per_block, rotor, search, torch_budget  # noqa: F401  (each registers itself)
from .base import SOLVERS, Solution, find_solver, register_solver
from .budgets import frontier, least_peak
from .driver import solve, solve_alone

__all__ = ["SOLVERS", "Solution", "find_solver", "frontier", "least_peak", "register_solver", "solve", "solve_alone"]
