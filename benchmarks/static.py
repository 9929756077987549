"""Offsets in one block of memory: of the models' training steps, or of stored instances.

`python -m benchmarks.static` plans the models of `benchmarks.step` on meta tensors, with the roofline of a device, plain and
for a budget (for the least peak, where a model has to stay above the budget), and places what their steps make. With
`--instances FILE...` it places CSVs of MiniMalloc's instead (`fxmem.memory.read_csv`), with the capacity that is to be reached
in each file's name (`A.1048576.csv`) or in `--capacity`; without either the least arena is looked for. A row says whether it
was reached, in how many seconds and how many nodes of the complete search, and what other allocators need. Rows are stored in
benchmarks/results/static.json, one for each instance and capacity; `--json` prints them, a JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from fxmem.codegen.calls import canonical_call
from fxmem.errors import CapacityError, FxmemError, InfeasibleBudgetError
from fxmem.memory import Interval, intervals_of, max_live, plan_offsets, read_csv
from fxmem.prepared import prepare
from fxmem.schedule import plain_schedule
from fxmem.solvers import solve

from .allocators import other_allocators
from .models import MODELS, on_meta
from .results import FOLDER, save_row, stored_rows

RESULTS = FOLDER / "static.json"
LAYOUT = "{:<20}{:>10}{:>14}{:>14}{:>14}{:>9}{:>9}{:>8}  {:<24}{}"
HEADS = ("instance", "intervals", "capacity", "max live", "arena", "ratio", "nodes", "seconds", "status", "others / max live")
COLUMNS = LAYOUT.format(*HEADS)


@dataclass(frozen=True)
class Row:
    """What was found for one instance.

    status: the plan's, or "impossible" where the capacity is proven to be too small; then there is no arena.
    others: bytes that other allocators need, by name.
    """

    instance: str
    intervals: int
    capacity: int | None
    max_live_bytes: int
    lower_bound_bytes: int
    arena_bytes: int | None
    status: str
    method: str
    nodes: int
    seconds: float
    others: dict[str, int]

    @property
    def reached(self) -> bool:
        """Whether the arena is within the capacity; without one, whether it is proven to be the least."""
        return self.status in ("optimal", "fits")

    @property
    def line(self) -> str:
        least = max(1, self.max_live_bytes)
        ratio = "" if self.arena_bytes is None else f"{self.arena_bytes / least:.3f}"
        others = ", ".join(f"{name} {size_bytes / least:.3f}" for name, size_bytes in self.others.items())
        return LAYOUT.format(
            self.instance, self.intervals, self.capacity or "", self.max_live_bytes, self.arena_bytes or "", ratio, self.nodes,
            f"{self.seconds:.2f}", self.status, others,
        )  # fmt: skip


def row_of(instance: str, intervals: Sequence[Interval], capacity: int | None, time_limit_s: float) -> Row:
    others, live_bytes = other_allocators(intervals), max_live(intervals).size_bytes
    try:
        plan = plan_offsets(intervals, capacity, time_limit_s)
    except CapacityError as error:
        return Row(
            instance, len(intervals), capacity, live_bytes, error.lower_bound_bytes, None, "impossible", "", 0, 0.0, others
        )
    return Row(
        instance, len(intervals), capacity, live_bytes, plan.lower_bound_bytes, plan.arena_bytes, plan.status, plan.method,
        plan.nodes, plan.time_s, others,
    )  # fmt: skip


def rows_of_model(name: str, fraction: float, device: str, time_limit_s: float) -> Iterator[Row]:
    """A model's step as it is traced, and planned for a fraction of the plain peak, or the least peak where that is more."""
    example = on_meta(MODELS[name])()
    args, kwargs = canonical_call(example.module, example.args, example.kwargs)
    prepared = prepare(example.module, args, kwargs, device)
    problem = prepared.lowered.problem
    yield row_of(f"{name}, plain", intervals_of(problem, plain_schedule(problem)), None, time_limit_s)
    try:
        solution = solve(problem, int(fraction * prepared.baseline.peak_bytes), time_limit_s=time_limit_s)
    except InfeasibleBudgetError as error:
        solution = solve(problem, error.min_budget_bytes, time_limit_s=time_limit_s)
    yield row_of(planned_name(name, fraction), intervals_of(problem, solution.schedule), None, time_limit_s)


def planned_name(model: str, fraction: float) -> str:
    return f"{model}, {fraction:g}"


def unanswered(names: Sequence[str], fraction: float) -> list[str]:
    """The models of which no planned step is stored."""
    stored = {row["instance"] for row in stored_rows(RESULTS)}
    return [name for name in names if planned_name(name, fraction) not in stored]


def rows_of_files(files: Sequence[str], capacity: int | None, time_limit_s: float) -> Iterator[Row]:
    for path in map(pathlib.Path, files):
        wanted = capacity if capacity is not None else capacity_in(path)
        yield row_of(path.name.removesuffix(".csv"), read_csv(path), wanted, time_limit_s)


def capacity_in(path: pathlib.Path) -> int | None:
    """The number before the file's suffix."""
    parts = path.name.split(".")
    return int(parts[-2]) if len(parts) > 2 and parts[-2].isdigit() else None


def main(arguments: list[str] | None = None) -> int:
    """0 where every instance was solved, 1 where one was not, 2 where one cannot be read."""
    options = _parser().parse_args(arguments)
    names = options.models.split(",")
    if not options.instances and not set(names) <= set(MODELS):
        print(f"unknown models; there are: {', '.join(MODELS)}", file=sys.stderr)
        return 2
    if options.resume:
        names = unanswered(names, options.budget)
    if options.instances:
        rows = rows_of_files(options.instances, options.capacity, options.time_limit)
    else:
        rows = (r for name in names for r in rows_of_model(name, options.budget, options.device, options.time_limit))
    if not options.json:
        print(COLUMNS, flush=True)
    solved = True
    try:
        for row in rows:
            solved &= row.reached
            print(json.dumps(asdict(row)) if options.json else row.line, flush=True)
            save_row(RESULTS, asdict(row), ("instance", "capacity"))
    except (FxmemError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if solved else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated (all: {', '.join(MODELS)})")
    parser.add_argument(
        "--budget", type=float, default=0.5, help="the fraction of the plain peak that is planned for (%(default)s)"
    )
    parser.add_argument("--device", default="P100", help="the roofline that plans are made with (%(default)s)")
    parser.add_argument("--instances", nargs="+", default=[], metavar="FILE", help="CSV files of intervals instead of models")
    parser.add_argument("--capacity", type=int, help="bytes; by default the number in each file's name")
    parser.add_argument(
        "--time-limit", type=float, default=60.0, help="seconds for one instance, and for planning its schedule"
    )
    parser.add_argument("--resume", action="store_true", help="leave out models whose rows are stored")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
