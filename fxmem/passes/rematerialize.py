"""The choice itself, as a pass: keep or recompute, then the graph written anew in the schedule's order."""

from __future__ import annotations

from torch import fx

from ..budget import Budget, parse_budget
from ..codegen.emit import emit
from ..lowering import lower
from ..schedule import plain_schedule, simulate
from ..solvers import Solution
from ..solving import choose
from .base import Pass


class Rematerialize(Pass):
    """Rewrites a joint graph so that its peak stays under a budget, at the least extra time found.

    budget, max_overhead: as for `fxmem.transform`; a fraction is one of the graph's own peak when nothing is recomputed.
    solution: a Solution of the lowered graph, where it is known already; then nothing is solved.
    Needs ShapeProp and Costs. The Solution stands in `graph_module.meta["fxmem_solution"]` afterwards. Recomputed nodes are
    called after the node that they repeat, and carry its name in `meta["fxmem_recomputes"]`.
    Raises BudgetError and InfeasibleBudgetError.
    """

    def __init__(
        self,
        budget: int | float | str | None = None,
        *,
        max_overhead: float | None = None,
        solver: str = "auto",
        time_limit_s: float = 60.0,
        solution: Solution | None = None,
    ):
        super().__init__()
        self.budget: Budget = parse_budget(budget, max_overhead)
        self.solver, self.time_limit_s, self.solution = solver, time_limit_s, solution

    def apply(self, graph_module: fx.GraphModule) -> bool:
        lowered = lower(graph_module)
        solution = self.solution
        if solution is None:
            plain_peak_bytes = simulate(lowered.problem, plain_schedule(lowered.problem)).peak_bytes
            solution = choose(lowered.problem, self.budget, plain_peak_bytes, self.solver, self.time_limit_s)
        storages = graph_module.meta["fxmem_storages"]
        graph_module.graph = emit(graph_module, lowered, solution.schedule, solution.timeline)
        graph_module.meta.update(fxmem_solution=solution, fxmem_storages=storages)
        return True
