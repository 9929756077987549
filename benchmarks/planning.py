"""What planning takes: capture beside PyTorch's own tracing, and then the search, its memory and how good it is.

`python -m benchmarks.planning` plans the models of `benchmarks.solvers` on meta tensors, one process for each, and stores
what it prints. Capture is timed beside Dynamo and AOTAutograd alone on the same module (which it calls), twice in turns,
the faster of each. `--long` also solves with ten minutes' limit, which lets the search go on ten times as long
without finding anything better.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from fxmem.capture import capture, on_fake_tensors
from fxmem.codegen.calls import canonical_call
from fxmem.prepared import prepare
from fxmem.solvers import solve
from fxmem.torch_internals import dynamo_graph, joint_graph

from .models import SOLVER_MODELS, Example
from .results import FOLDER, save_row

RESULTS = FOLDER / "planning.json"
MODELS = "resnet50,gpt2_12,gpt2_48,gpt2_96"
LONG_S = 600.0
LAYOUT = "{:<14}{:>10}{:>9}{:>9}{:>7}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}"
COLUMNS = LAYOUT.format(
    "model", "operators", "torch s", "capture", "ratio", "passes", "solve s", "GB", "extra %", "bound %", "long %"
)


@dataclass(frozen=True)
class Row:
    """Planning of one model at one budget. Seconds: PyTorch's tracing alone, fxmem.capture, what else comes before a Problem
    is there (passes, costs, the plain peak), and solving. peak_rss: of the whole, in bytes. long_extra_time: with --long."""

    model: str
    device: str
    budget: float
    operators: int
    torch_s: float
    capture_s: float
    passes_s: float
    solve_s: float
    peak_rss: int
    extra_time: float
    bound: float
    long_extra_time: float | None = None
    long_s: float | None = None

    @property
    def line(self) -> str:
        long = "" if self.long_extra_time is None else f"{100 * self.long_extra_time:.2f}"
        return LAYOUT.format(
            self.model, self.operators, f"{self.torch_s:.1f}", f"{self.capture_s:.1f}", f"{self.capture_s / self.torch_s:.2f}",
            f"{self.passes_s:.1f}", f"{self.solve_s:.1f}", f"{self.peak_rss / 1e9:.2f}", f"{100 * self.extra_time:.2f}",
            f"{100 * self.bound:.2f}", long,
        )  # fmt: skip


def plan_one(name: str, fraction: float, device: str, time_limit_s: float, long: bool) -> Row:
    """All of it, in this process."""
    example = SOLVER_MODELS[name]()
    args, kwargs = canonical_call(example.module, example.args, example.kwargs)
    torch_s, capture_s = [], []
    for _ in range(2):
        torch_s.append(_seconds(lambda: _trace(example)))
        capture_s.append(_seconds(lambda: capture(example.module, args, kwargs)))
    prepared = prepare(example.module, args, kwargs, device, implementations=())
    problem, budget_bytes = prepared.lowered.problem, int(fraction * prepared.baseline.peak_bytes)
    found = solve(problem, budget_bytes, time_limit_s=time_limit_s)
    peak_rss = 1024 * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    longer = solve(problem, budget_bytes, time_limit_s=LONG_S) if long else None
    return Row(
        model=name,
        device=device,
        budget=fraction,
        operators=len(problem.operators),
        torch_s=min(torch_s),
        capture_s=min(capture_s),
        passes_s=prepared.seconds - capture_s[-1],
        solve_s=found.solve_time_s,
        peak_rss=peak_rss,
        extra_time=found.timeline.overhead,
        bound=found.lower_bound_overhead,
        long_extra_time=longer and longer.timeline.overhead,
        long_s=longer and longer.solve_time_s,
    )


def _trace(example: Example) -> None:
    """What torch.compile would do before its backend: Dynamo, and AOTAutograd's joint graph."""
    module, args, kwargs = on_fake_tensors(example.module, example.args, example.kwargs)
    graph_module, *_ = dynamo_graph(module, args, kwargs)
    joint_graph(graph_module, args, kwargs)


def _seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.one:
        print(json.dumps(asdict(plan_one(options.one, options.budget, options.device, options.time_limit, options.long))))
        return 0
    print(COLUMNS, flush=True)
    for name in options.models.split(","):
        command = [sys.executable, "-m", "benchmarks.planning", *(arguments or sys.argv[1:]), "--one", name]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        row = Row(**json.loads(printed.splitlines()[-1]))
        print(row.line, flush=True)
        save_row(RESULTS, asdict(row), ("model", "device", "budget"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.planning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=MODELS, help=f"comma-separated (of {', '.join(SOLVER_MODELS)})")
    parser.add_argument("--budget", type=float, default=0.5, help="fraction of the plain peak")
    parser.add_argument("--device", default="H100", help="roofline that the models are planned with")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for one plan")
    parser.add_argument("--long", action="store_true", help="solve a second time with ten minutes' limit")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
