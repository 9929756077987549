"""The lecture's figures anew: memory of deep networks against their depth, by what frameworks did first and by fxmem.

`python -m benchmarks.lecture` plans CIFAR ResNets of 47 to 1,001 layers and LSTMs of 64 to 1,024 steps on meta tensors with
a device's roofline; nothing is executed. Methods: every result in bytes of its own ("no optimization"), operators in place,
shared tags, both (Chen et al. 2015), then with recomputes sqrt(N) segments and segments in segments (Chen et al. 2016), each
at the least peak that it reaches, and fxmem: the least peak at the extra time of sqrt(N), and the least time at its peak.

Bytes are those of what the step makes and drops again: parameters, inputs, gradients of parameters and outputs, which no
method can do without, are left out, and so are workspaces. Each network has a process of its own, stopped at `--limit`
seconds; rows are stored in benchmarks/results/lecture.json as they are ready, and what is stored with a figure is not done
again without `--again`. At the end the figures are drawn (`--draw`: that alone). `--quick` plans networks of a few layers.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass

from fxmem.codegen.calls import canonical_call
from fxmem.memory import intervals_of, max_live, share
from fxmem.prepared import prepare
from fxmem.problem import Problem
from fxmem.schedule import Schedule, plain_schedule, simulate
from fxmem.solvers import least_peak, solve
from fxmem.solvers.chen import nested_states, uniform_states
from fxmem.solvers.stages import Compiled, compile_problem
from fxmem.solvers.state import State

from .lecture_pictures import FOLDER as FIGURES
from .lecture_pictures import draw
from .models import Example, cifar_resnet, lstm_cells, on_meta
from .results import FOLDER, save_row, stored_rows

RESULTS = FOLDER / "lecture.json"
FAMILIES: dict[str, Callable[[int], Example]] = {
    "ResNet": lambda depth: on_meta(cifar_resnet, depth=depth)(),
    "LSTM": lambda steps: on_meta(lstm_cells, batch=64, steps=steps)(),
}
DEPTHS = {"ResNet": (47, 101, 200, 398, 1001), "LSTM": (64, 128, 256, 512, 1024)}
QUICK_DEPTHS = {"ResNet": (11, 20), "LSTM": (3, 6)}
SHARING = {  # in place, free tags
    "no optimization": (False, False),
    "in place": (True, False),
    "sharing": (False, True),
    "both": (True, True),
}
SQRT, RECURSIVE, SAME_TIME, SAME_PEAK = "sqrt(N)", "recursive", "fxmem, its time", "fxmem, its peak"
METHODS = (*SHARING, SQRT, RECURSIVE, SAME_PEAK, SAME_TIME)
LAYOUT = "{:<8}{:>6}{:>8}{:>10}  {:<18}{:>10}{:>10}{:>9}{:>10}  {}"
COLUMNS = LAYOUT.format("network", "depth", "ops", "prepared", "method", "MB", "peak, MB", "extra, %", "seconds", "outcome")


@dataclass(frozen=True)
class Row:
    """One network by one method. bytes: see the module's docstring; peak_bytes: of the whole step, where a schedule has one.
    extra_time: over the plain step's; bound: no schedule of that peak takes less, where that is known. seconds: of planning
    alone; prepare_s: of all before it. outcome: "ok", or why not."""

    network: str
    depth: int
    method: str
    operators: int = 0
    prepare_s: float = 0.0
    bytes: int | None = None
    peak_bytes: int | None = None
    extra_time: float | None = None
    bound: float | None = None
    seconds: float = 0.0
    outcome: str = "ok"

    @property
    def line(self) -> str:
        megabytes = ("" if size is None else f"{size / 1e6:.1f}" for size in (self.bytes, self.peak_bytes))
        extra = "" if self.extra_time is None else f"{100 * self.extra_time:.2f}"
        return LAYOUT.format(
            self.network, self.depth, self.operators, f"{self.prepare_s:.1f}", self.method, *megabytes, extra,
            f"{self.seconds:.1f}", self.outcome,
        )  # fmt: skip


def rows_of(network: str, depth: int, device: str, time_limit_s: float) -> Iterator[Row]:
    """A row for each of METHODS, in that order."""
    begin = time.perf_counter()
    example = FAMILIES[network](depth)
    args, kwargs = canonical_call(example.module, example.args, example.kwargs)
    problem = prepare(example.module, args, kwargs, device, implementations=()).lowered.problem
    known = dict(network=network, depth=depth, operators=len(problem.operators), prepare_s=time.perf_counter() - begin)
    for method, (inplace, free_tags) in SHARING.items():
        begin = time.perf_counter()
        found = share(problem, plain_schedule(problem), inplace=inplace, free_tags=free_tags)
        yield Row(**known, method=method, bytes=found.size_bytes, seconds=time.perf_counter() - begin, extra_time=0.0)
    schedules: dict[str, Schedule] = {}
    for method in METHODS[len(SHARING) :]:
        begin = time.perf_counter()
        schedule, bound = _schedule(problem, method, schedules, time_limit_s)
        seconds, schedules[method] = time.perf_counter() - begin, schedule
        inside, timeline = max_live(intervals_of(problem, schedule)).size_bytes, simulate(problem, schedule)
        yield Row(
            **known, method=method, bytes=inside, peak_bytes=timeline.peak_bytes, extra_time=timeline.overhead, bound=bound,
            seconds=seconds,
        )  # fmt: skip


def _schedule(problem: Problem, method: str, known: dict[str, Schedule], time_limit_s: float) -> tuple[Schedule, float | None]:
    """And a lower bound on the extra time at sqrt(N)'s peak, for the method that is about that."""
    if method in (SQRT, RECURSIVE):
        return least_of(problem, uniform_states if method == SQRT else nested_states), None
    theirs, starts = simulate(problem, known[SQRT]), list(known.values())
    if method == SAME_PEAK:
        found = solve(problem, theirs.peak_bytes, time_limit_s=time_limit_s, starts=starts)
        return found.schedule, found.lower_bound_overhead
    return least_peak(problem, max_overhead=theirs.overhead, time_limit_s=time_limit_s, starts=starts).schedule, None


def least_of(problem: Problem, states: Callable[[Compiled], Iterable[tuple[int, ...]]]) -> Schedule:
    """The schedule with the least peak among some states, as wishes for each stage; the cheapest of equals."""
    compiled = compile_problem(problem)
    tried = (State(compiled, 0, list(wishes)) for wishes in states(compiled))
    return min(tried, key=lambda state: (state.worst_bytes, state.time_s)).schedule()


def run(network: str, depth: int, options: argparse.Namespace) -> None:
    for row in rows_of(network, depth, options.device, options.time_limit):
        print(row.line, flush=True)
        _save(row, options.results)


def run_apart(network: str, depth: int, options: argparse.Namespace) -> None:
    """In a process that is stopped at the limit; what it has not told by then is stored as cut off."""
    told = ["--device", options.device, "--time-limit", str(options.time_limit), "--results", str(options.results)]
    command = [sys.executable, "-m", "benchmarks.lecture", "--one", network, str(depth), *told]
    try:
        subprocess.run(command, timeout=options.limit, check=True)
    except subprocess.TimeoutExpired:
        for method in _missing(network, depth, options.results):
            row = Row(network, depth, method, outcome=f"cut off after {options.limit:.0f} s for the network")
            print(row.line, flush=True)
            _save(row, options.results)


def _save(row: Row, path: pathlib.Path) -> None:
    save_row(path, asdict(row), ("network", "depth", "method"))


def _missing(network: str, depth: int, path: pathlib.Path) -> list[str]:
    stored = {r["method"] for r in stored_rows(path) if (r["network"], r["depth"], r["outcome"]) == (network, depth, "ok")}
    return [method for method in METHODS if method not in stored]


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.one:
        run(options.one[0], int(options.one[1]), options)
        return 0
    if not options.draw:
        print(COLUMNS, flush=True)
        for network in options.networks.split(","):
            for depth in (QUICK_DEPTHS if options.quick else DEPTHS)[network]:
                if options.again or _missing(network, depth, options.results):
                    (run if options.quick else run_apart)(network, depth, options)
    for path in draw(stored_rows(options.results), options.figures):
        print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.lecture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", default=",".join(FAMILIES), help="comma-separated (all: %(default)s)")
    parser.add_argument("--device", default="P100", help="the roofline that networks are planned with (%(default)s)")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for each of fxmem's plans (%(default)s)")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for all of one network (%(default)s)")
    parser.add_argument("--again", action="store_true", help="do what is stored already, too")
    parser.add_argument("--quick", action="store_true", help="a few layers and steps")
    parser.add_argument("--draw", action="store_true", help="draw what is stored, and nothing else")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="where rows are stored (%(default)s)")
    parser.add_argument("--figures", type=pathlib.Path, default=FIGURES, help="the folder of the figures (%(default)s)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
