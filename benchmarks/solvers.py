"""Extra time, peak, lower bound and seconds of every solver: on models planned without being built, or on stored instances.

`python -m benchmarks.solvers` plans the models on fake tensors, with rooflines of two devices, each operator run as PyTorch
runs it (see `benchmarks.implementations` for more). With `--instance FILE...` it
solves stored joint graphs instead; there, what exists before the step counts neither in the budget nor in the peak.
`--json` prints a JSON object a line: instance, device, budget (a fraction of the plain peak, or "min"), solver, extra_time
(recomputed time as a fraction of the plain step's), peak_fraction (of the plain peak), bound (a lower bound on extra_time, or
null), seconds, outcome ("ok", or why there is no schedule).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from fxmem.codegen.calls import canonical_call
from fxmem.errors import InfeasibleBudgetError
from fxmem.prepared import prepare
from fxmem.problem import Problem
from fxmem.schedule import Schedule, plain_schedule, simulate
from fxmem.solvers import SOLVERS, Solution, least_peak, solve, solve_alone
from fxmem.solvers.auto import PEERS

from .instances import read_instance
from .models import SOLVER_MODELS
from .results import FOLDER, save_row

RESULTS = FOLDER / "solvers.json"
QUESTION = ("instance", "device", "budget", "solver")
DEFAULT = ("auto", *PEERS, "torch_budget")
BUDGETS = "0.7,0.5,0.4,0.33,0.25,min"
LAYOUT = "{:<18}{:<8}{:>7}  {:<13}{:>9}{:>7}{:>9}{:>8}  {}"
COLUMNS = LAYOUT.format("instance", "device", "budget", "solver", "extra, %", "peak", "bound, %", "seconds", "outcome")


@dataclass(frozen=True)
class Case:
    """A problem, and what fractions of its plain peak are counted from: the bytes that do not count."""

    instance: str
    device: str
    problem: Problem
    plain_peak_bytes: int
    uncounted_bytes: int = 0
    partitioner: tuple[Schedule, ...] = ()  # what PyTorch's own would do, where the problem is a module's

    def budget_bytes(self, fraction: float) -> int:
        return self.uncounted_bytes + int(fraction * (self.plain_peak_bytes - self.uncounted_bytes))

    def fraction(self, peak_bytes: int) -> float:
        return (peak_bytes - self.uncounted_bytes) / (self.plain_peak_bytes - self.uncounted_bytes)


@dataclass(frozen=True)
class Row:
    """One answer; see the module's docstring."""

    instance: str
    device: str
    budget: str
    solver: str
    extra_time: float | None
    peak_fraction: float | None
    bound: float | None
    seconds: float
    outcome: str = "ok"

    @property
    def line(self) -> str:
        extra, bound = ("" if number is None else f"{100 * number:.2f}" for number in (self.extra_time, self.bound))
        peak = "" if self.peak_fraction is None else f"{self.peak_fraction:.3f}"
        names = self.instance, self.device, self.budget, self.solver
        return LAYOUT.format(*names, extra, peak, bound, f"{self.seconds:.1f}", self.outcome)


def rows_of(case: Case, budgets: list[str], solvers: list[str], time_limit_s: float) -> Iterator[Row]:
    """A row for each budget and solver, the smallest budget first: what `auto` finds there starts the next. The least peak is
    `auto`'s alone to look for, and what PyTorch's partitioner does is known of modules alone."""
    starts: list[Schedule] = []
    solvers = [s for s in solvers if s != "torch_budget" or case.partitioner]
    for budget in sorted(budgets, key=lambda b: 0.0 if b == "min" else float(b)):
        for solver in solvers:
            if budget != "min" or solver == "auto":
                yield _row(case, budget, solver, time_limit_s, starts)


def _row(case: Case, budget: str, solver: str, time_limit_s: float, starts: list[Schedule]) -> Row:
    begin = time.perf_counter()
    outcome = "nothing that fits"
    try:
        solution = _asked(case, budget, solver, time_limit_s, starts)
    except InfeasibleBudgetError as error:
        solution, outcome = None, f"infeasible: the least peak met is {case.fraction(error.min_budget_bytes):.3f}"
    seconds = time.perf_counter() - begin
    if solution is None:
        return Row(case.instance, case.device, budget, solver, None, None, None, seconds, outcome)
    bound = None
    if solver == "auto":
        starts.append(solution.schedule)
        bound = solution.lower_bound_overhead
    timeline = solution.timeline
    return Row(
        case.instance, case.device, budget, solver, timeline.overhead, case.fraction(timeline.peak_bytes), bound, seconds
    )  # fmt: skip


def _asked(case: Case, budget: str, solver: str, time_limit_s: float, starts: list[Schedule]) -> Solution | None:
    """`auto` begins from what it found before; the others answer by themselves, PyTorch's from its partitioner's schedules."""
    if budget == "min":
        return least_peak(case.problem, time_limit_s=time_limit_s)
    budget_bytes = case.budget_bytes(float(budget))
    if solver == "auto":
        return solve(case.problem, budget_bytes, time_limit_s=time_limit_s, starts=starts)
    return solve_alone(case.problem, budget_bytes, solver, case.partitioner if solver == "torch_budget" else (), time_limit_s)


def instance_case(path: str) -> Case:
    problem = read_instance(path)
    plain_peak_bytes = simulate(problem, plain_schedule(problem)).peak_bytes
    return Case(pathlib.Path(path).name.removesuffix(".json.gz"), "", problem, plain_peak_bytes, problem.fixed_bytes)


def model_cases(name: str, devices: list[str]) -> Iterator[Case]:
    """A model planned on meta tensors, from one capture: nothing of its size is allocated."""
    example = SOLVER_MODELS[name]()
    args, kwargs = canonical_call(example.module, example.args, example.kwargs)
    prepared = prepare(example.module, args, kwargs, devices[0], implementations=())
    for device in devices:
        prepared = prepared.under(device)
        schedules = prepared.partitioner_schedules()
        yield Case(name, device, prepared.lowered.problem, prepared.baseline.peak_bytes, partitioner=schedules)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    solvers = options.solvers.split(",")
    unknown = [f"solver {s!r}" for s in solvers if s not in SOLVERS]
    unknown += [f"model {m!r}" for m in options.models.split(",") if m not in SOLVER_MODELS]
    if unknown:
        print(
            f"unknown: {', '.join(unknown)}; solvers: {', '.join(SOLVERS)}; models: {', '.join(SOLVER_MODELS)}", file=sys.stderr
        )
        return 2
    cases: Iterator[Case] = map(instance_case, options.instance)
    if not options.instance:
        cases = (case for name in options.models.split(",") for case in model_cases(name, options.devices.split(",")))
    if not options.json:
        print(COLUMNS, flush=True)
    for case in cases:
        for row in rows_of(case, options.budget.split(","), solvers, options.time_limit):
            print(json.dumps(asdict(row)) if options.json else row.line, flush=True)
            if not options.instance:
                save_row(RESULTS, asdict(row), QUESTION)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.solvers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instance", nargs="+", default=[], metavar="FILE", help="gzipped JSON files instead of models")
    parser.add_argument("--models", default=",".join(SOLVER_MODELS), help=f"comma-separated (all: {', '.join(SOLVER_MODELS)})")
    parser.add_argument("--devices", default="P100,H100", help="rooflines that the models are planned with")
    parser.add_argument("--budget", default=BUDGETS, help='comma-separated fractions of the plain peak, or "min"')
    parser.add_argument("--solvers", default=",".join(DEFAULT), help=f"comma-separated (of {', '.join(SOLVERS)})")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for one answer")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
