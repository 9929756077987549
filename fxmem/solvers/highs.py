"""One call of HiGHS (Huangfu and Hall 2018) on a linear or mixed-integer program in row form, with a start and limits.

Used directly rather than through cvxpy's own call, which takes no starting point and gives no bound when a limit ends it.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from dataclasses import dataclass

import numpy as np

# For integer programs, presolve is off, wherever it hides: in heuristics that solve a smaller program, and in restarts. It may
# cut the optimum off (rule 9, doubleton equations, of HiGHS 1.14 and 1.15, https://github.com/ERGO-Code/HiGHS/issues/3073; a
# test holds that), which would make bounds wrong and proofs void; and on rows of many different coefficients it can go on for
# ever, far beyond any time limit (HPresolve::strengthenInequalities of HiGHS 1.16). Bounds are as good without, and as fast.
FOR_INTEGERS = {
    "presolve": "off",
    "mip_heuristic_run_rins": False,
    "mip_heuristic_run_rens": False,
    "mip_heuristic_run_root_reduced_cost": False,
    "mip_allow_restart": False,
}

MEANING = {  # HiGHS's model status, in our words
    "kOptimal": "optimal",
    "kInfeasible": "infeasible",
    "kUnboundedOrInfeasible": "infeasible",
    "kTimeLimit": "time limit",
    "kIterationLimit": "limit",
    "kSolutionLimit": "limit",
    "kObjectiveBound": "limit",
    "kObjectiveTarget": "limit",
    "kInterrupt": "limit",
}


@dataclass(frozen=True)
class Program:
    """minimize cost @ x subject to row_lower <= A x <= row_upper and lower <= x <= upper, x[integer] integral.

    A in compressed rows (as scipy's csr): starts, columns, values.
    """

    cost: np.ndarray
    starts: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    row_lower: np.ndarray
    row_upper: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    integer: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """status: a value of MEANING, or "error: ..."; x: the best point or None; bound: a valid lower bound on the objective."""

    status: str
    x: np.ndarray | None
    bound: float


def minimize(
    program: Program,
    *,
    deadline: float = math.inf,
    most_nodes: int | None = None,
    start: np.ndarray | None = None,
) -> Outcome:
    """Solve with HiGHS in this process; never raises for what HiGHS does."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        return Outcome("time limit", None, -math.inf)
    try:
        return _run(program, left_s, most_nodes, start)
    except (ImportError, RuntimeError, ValueError, MemoryError) as error:
        return Outcome(f"error: {error}", None, -math.inf)


_loading = threading.Lock()


@functools.cache
def highspy():
    """The module, imported where it is used, so that a broken HiGHS costs a bound and not the import of the whole package.

    Its first solver prints a line about itself, whatever the options say (HiGHS 1.16 does so before it can be given any); it is
    made here, where nobody sees that: standard output belongs to the caller.
    """
    import highspy as module

    with _loading:
        try:
            kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        except OSError:
            return module  # there is no standard output
        os.dup2(nowhere, 1)
        try:
            module.Highs()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            os.close(nowhere)
    return module


def _run(program: Program, left_s: float, most_nodes: int | None, start: np.ndarray | None) -> Outcome:
    solver = highspy().Highs()
    options = {  # no "threads": HiGHS keeps one scheduler for the process and fails where a later call asks for another number
        "output_flag": False,
        "mip_rel_gap": 1e-9,
        "mip_abs_gap": 1e-9,
        "random_seed": 0,
    }
    if program.integer.any():
        options |= FOR_INTEGERS
    if math.isfinite(left_s):
        options["time_limit"] = left_s
    if most_nodes is not None:
        options["mip_max_nodes"] = most_nodes
    for name, value in options.items():
        solver.setOptionValue(name, value)
    if solver.passModel(_model(program)) == highspy().HighsStatus.kError:
        return Outcome("error: HiGHS refused the program", None, -math.inf)
    if start is not None:
        solution = highspy().HighsSolution()
        solution.col_value = [float(v) for v in start]
        solver.setSolution(solution)
    solver.run()
    return _outcome(solver, bool(program.integer.any()))


def _model(program: Program):
    lp = highspy().HighsLp()
    lp.num_col_, lp.num_row_ = len(program.cost), len(program.row_upper)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = program.cost, program.lower, program.upper
    lp.row_lower_, lp.row_upper_ = program.row_lower, program.row_upper
    lp.a_matrix_.format_ = highspy().MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = program.starts, program.columns, program.values
    if program.integer.any():
        kinds = highspy().HighsVarType
        lp.integrality_ = [kinds.kInteger if i else kinds.kContinuous for i in program.integer]
    return lp


def _outcome(solver, integral: bool) -> Outcome:
    info = solver.getInfo()
    status = MEANING.get(solver.getModelStatus().name, f"error: HiGHS ended with {solver.getModelStatus().name}")
    found = info.primal_solution_status == 2  # kSolutionStatusFeasible
    x = np.array(solver.getSolution().col_value) if found else None
    if status == "infeasible":
        return Outcome(status, None, math.inf)
    if integral:
        return Outcome(status, x, info.mip_dual_bound)
    return Outcome(status, x, info.objective_function_value if status == "optimal" else -math.inf)
