"""The exact program on small graphs: rematerialization as a mixed-integer linear program over stages.

After Checkmate (Jain et al. 2020, equations 1 to 9) and MONeT (Shah et al. 2021, section 3): one stage for each backward
operator, binaries for what is carried into a stage and what is run again in it. Memory inside a stage is exact rather than
MONeT's running sum with the whole forward's liveness: each storage has a chain of presence variables, one after every
operator of the stage that makes or reads it, so it counts until its last use. Stated in cvxpy, solved by HiGHS.

Exact within this class: before each backward operator, recompute in program order (a variant right after the last of the
operators that make its outputs and the inputs that are made before them), each operator at most once. Recomputing earlier than
needed is in the class; running one operator twice for one stage, or another order in a stage, is not. Operator implementations
are MONeT's M[t, p]: one option for each backward operator, which needs only what that option reads.

Cost: stages x (storages + operators) binaries. Proves optimality up to some 2,000 of them in seconds.
"""

from __future__ import annotations

import math
import time
import warnings

import numpy as np

from ..problem import Problem
from ..schedule import simulate
from . import milp_model
from .base import Answer, Task, judge, register_solver
from .highs import FOR_INTEGERS, highspy
from .stages import Compiled, compile_problem

MOST_NODES = 4_000
ATTEMPTS = 4
PROVEN, INFEASIBLE, LIMIT, FAILED = "proven", "infeasible", "a limit was met", "failed"


@register_solver("milp")
def milp(task: Task) -> Answer:
    """The exact program, solved again with less memory as long as the simulator sees more than the budget."""
    compiled = compile_problem(task.problem, merged=False)
    known = judge(task, task.starts)
    budget_bytes, log, bound = task.budget_bytes, [], 0.0
    for attempt in range(ATTEMPTS):
        begin = time.monotonic()
        status, schedule, bound_now = _solve(task, compiled, budget_bytes, known and known[1].overhead)
        log.append(f"milp: {binaries(task.problem, compiled)} binaries, {status}, {time.monotonic() - begin:.1f} s")
        bound = bound_now if attempt == 0 else bound
        if schedule is None:
            break
        timeline = simulate(task.problem, schedule)
        excess_bytes = timeline.peak_bytes - task.budget_bytes
        if excess_bytes <= 0:
            proven = timeline.overhead <= bound + 1e-9
            return Answer(schedule, min(bound, timeline.overhead), proven, status == LIMIT, tuple(log))
        budget_bytes -= excess_bytes
        log.append(f"milp: the replay needs {excess_bytes:,} bytes more; again with as much less")
    return Answer(known and known[0], bound, False, status == LIMIT, tuple(log))


def binaries(problem: Problem, compiled: Compiled) -> int:
    """How many binaries the program of a problem has."""
    alternatives = sum(map(len, problem.useful_alternatives.values()))
    return len(problem.backward) * (len(compiled.sizes) + len(compiled.recomputes)) + alternatives + len(problem.encoders)


def _solve(task: Task, compiled: Compiled, budget_bytes: int, most_overhead: float | None):
    """State the program in cvxpy and let HiGHS solve it: status, schedule or None, lower bound on the overhead."""
    left_s = task.deadline - time.monotonic()
    if budget_bytes <= 0 or left_s <= 0:
        return (INFEASIBLE if budget_bytes <= 0 else LIMIT), None, 0.0
    import cvxpy as cp  # here: it takes longer to import than most plans to find

    v = milp_model.make_variables(compiled)
    binary = cp.Variable(v.choices, boolean=True)
    real = cp.Variable(max(1, v.count - v.choices), bounds=[0, 1])
    families = (
        milp_model.carried_or_made(v),
        milp_model.inputs_present(v),
        milp_model.one_option(v),
        milp_model.encoded_or_not_carried(v),
        milp_model.inplace_where_the_input_dies(v),
        milp_model.kept_for_a_use(v),
        milp_model.forward_fits(v, budget_bytes),
        milp_model.stages_fit(v, budget_bytes),
    )
    constraints = [c for rows in families for c in _rows(list(rows), v, binary, real)]
    unit_s = task.problem.plain_time_s or 1.0
    cost = np.zeros(v.choices)
    for (_, j), variable in v.run.items():
        cost[variable] = compiled.recomputes[v.slots[j]].time_s / unit_s
    for (t, end), variable in v.end.items():
        cost[variable] = compiled.stages[t].options[end].slower_s / unit_s
    for moment, variable in v.encode.items():
        cost[variable] = compiled.encoders[moment].time_s / unit_s
    if most_overhead is not None:
        constraints.append(cost @ binary <= most_overhead * (1 + 1e-9) + 1e-12)
    options = {"mip_rel_gap": 1e-7, "mip_abs_gap": 1e-9, "mip_max_nodes": MOST_NODES, "random_seed": 0}
    options |= FOR_INTEGERS
    if math.isfinite(left_s):
        options["time_limit"] = left_s
    program = cp.Problem(cp.Minimize(cost @ binary), constraints)
    try:
        with warnings.catch_warnings():  # of a limit that was met: the status tells
            warnings.simplefilter("ignore", UserWarning)
            highspy()  # in silence, before cvxpy does
            program.solve(solver=cp.HIGHS, **options)
    except Exception as error:  # whatever happens inside of a solver, the caller goes on with other plans
        return f"{FAILED}: {error}", None, 0.0
    info = program.solver_stats.extra_stats if program.solver_stats else None
    if program.status in (cp.INFEASIBLE, "infeasible_or_unbounded"):
        return INFEASIBLE, None, 0.0
    bound = max(0.0, info.mip_dual_bound) if info is not None and math.isfinite(info.mip_dual_bound) else 0.0
    if binary.value is None or info.primal_solution_status != 2:
        return LIMIT, None, bound
    return (PROVEN if program.status == cp.OPTIMAL else LIMIT), milp_model.read_schedule(v, binary.value), bound


def _rows(rows: list[milp_model.Row], v: milp_model.Variables, binary, real) -> list:
    """A family of rows as one cvxpy constraint."""
    import scipy.sparse as sparse

    if not rows:
        return []
    entries = [(i, column, value) for i, (row, _) in enumerate(rows) for column, value in row.items()]
    at, column, value = zip(*entries, strict=True) if entries else ((), (), ())
    matrix = sparse.csr_matrix((np.array(value, float), (np.array(at, int), np.array(column, int))), shape=(len(rows), v.count))
    bound = np.array([b for _, b in rows])
    left = matrix[:, : v.choices] @ binary
    if v.count > v.choices:
        left = left + matrix[:, v.choices :] @ real
    return [left <= bound]
