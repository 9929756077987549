"""Peak memory and time of a training step: plain, planned by fxmem, and by PyTorch's own means.

Predicted peaks and times stand beside measured ones. Times are paired: in one process, the plain module and the other one
in turns, the median of the ratios. Each model has a process of its own, in which operators are timed once.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

import fxmem
from fxmem.budget import budget_from_text

from . import peers, results
from .compare import StepResult, difference, step_result
from .models import MODELS, Example, build
from .results import Row
from .tables import header, line, text_table

AT_CHECKPOINT = "checkpoint's peak"


@dataclass(frozen=True)
class Options:
    """What the rows of one model are made with."""

    device: str
    cost: str
    repeats: int
    time_limit_s: float
    batch: int | None


@dataclass(frozen=True)
class Bench:
    """One model's plain module, what its step leaves behind, and the options."""

    name: str
    example: Example
    plain: StepResult
    options: Options

    @classmethod
    def of(cls, name: str, options: Options) -> Bench:
        example = build(name, options.device, **({} if options.batch is None else {"batch": options.batch}))
        return cls(name, example, step_result(example.module, example), options)

    def plain_row(self) -> Row:
        measurement = self._measure(self.example.module, repeats=self.options.repeats)
        again = difference(self.plain, step_result(self.example.module, self.example))
        return Row(self.name, "plain", **measurement, **_fields(again))

    def planned_row(self, setting: str, budget: int | float | str | None) -> Row:
        row = Row(self.name, "fxmem", setting)
        start = time.perf_counter()
        try:
            planned = fxmem.transform(
                self.example.module, self.example.args, self.example.kwargs,
                budget=budget, cost=self.options.cost, time_limit_s=self.options.time_limit_s,
            )  # fmt: skip
        except fxmem.InfeasibleBudgetError as error:
            outcome = f"infeasible: the least peak is {error.min_budget_bytes:,} bytes"
            return replace(row, outcome=outcome, budget_bytes=error.budget_bytes)
        plan = planned.plan
        row = replace(
            row,
            plan_time_s=time.perf_counter() - start,
            solve_time_s=plan.solve_time_s,
            budget_bytes=plan.budget_bytes,
            predicted_peak_bytes=plan.predicted_peak_bytes,
            predicted_overhead=plan.predicted_overhead,
            lower_bound_overhead=plan.lower_bound_overhead,
            status=plan.status,
        )
        return self._measured(row, planned)

    def predicted_plain_row(self, row: Row) -> Row:
        """The plain row with the peak that fxmem predicts for it."""
        plan = fxmem.plan(self.example.module, self.example.args, self.example.kwargs, cost=self.options.cost)
        return replace(row, predicted_peak_bytes=plan.baseline_peak_bytes)

    def checkpoint_row(self) -> Row:
        return self._measured(Row(self.name, "checkpoint", "per block"), peers.checkpointed(self.example))

    def activation_budget_row(self, fraction: float) -> Row:
        with peers.activation_memory_budget(self.example, fraction) as compiled:
            return self._measured(Row(self.name, "activation_memory_budget", str(fraction)), compiled)

    def _measured(self, row: Row, module: nn.Module) -> Row:
        """`row` with what is measured of `module`, beside the plain one."""
        measurement = self._measure(module, repeats=1)
        pair = fxmem.measure_pair(
            self.example.module, module, self.example.args, self.example.kwargs, repeats=self.options.repeats, warmup=0
        )
        apart = difference(self.plain, step_result(module, self.example))
        return replace(row, **measurement | {"overhead": pair.ratio - 1, "time_s": pair.b_time_s}, **_fields(apart))

    def _measure(self, module: nn.Module, repeats: int) -> dict:
        measurement = fxmem.measure(module, self.example.args, self.example.kwargs, repeats=repeats)
        return {name: getattr(measurement, name) for name in ("peak_bytes", "before_bytes", "time_s")}


def _fields(apart) -> dict:
    return {("gradient_difference" if name == "gradient" else name): value for name, value in asdict(apart).items()}


def run_model(name: str, budgets: list[str], with_peers: bool, options: Options) -> None:
    """Measure one model in this process; each row is printed and saved as soon as it is known."""
    bench = Bench.of(name, options)

    def done(make: Callable[[], Row], method: str, setting: str = "") -> Row:
        try:
            row = make()
        except Exception as error:  # a method that fails is a row that says how; the others go on
            row = Row(name, method, setting, outcome=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
        gc.collect()
        torch.cuda.empty_cache()
        results.save(row, options.device)
        print(line(row), flush=True)
        return row

    done(lambda: bench.predicted_plain_row(bench.plain_row()), "plain")
    for budget in budgets:
        done(lambda budget=budget: bench.planned_row(budget, budget_from_text(budget)), "fxmem", budget)
    if with_peers:
        peer = done(bench.checkpoint_row, "checkpoint", "per block")
        if peer.is_ok:
            done(lambda: bench.planned_row(AT_CHECKPOINT, peer.peak_bytes), "fxmem", AT_CHECKPOINT)
        for fraction in peers.ACTIVATION_BUDGETS:
            done(lambda fraction=fraction: bench.activation_budget_row(fraction), "activation_memory_budget", str(fraction))


def main() -> int:
    arguments = _parser().parse_args()
    names = arguments.models.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        print(f"unknown models: {', '.join(unknown)}; there are {', '.join(MODELS)}", file=sys.stderr)
        return 2
    if len(names) == 1:
        print(header(), flush=True)
        options = Options(arguments.device, arguments.cost, arguments.repeats, arguments.time_limit, arguments.batch)
        run_model(names[0], arguments.budgets.split(","), arguments.peers, options)
        return 0
    codes = [subprocess.call([sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--models", name]) for name in names]
    print("\n" + text_table(results.load(results.path_of(arguments.device)), names))
    return max(codes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated (all: {', '.join(MODELS)})")
    parser.add_argument("--budgets", default="None,0.75,0.5,min", help="comma-separated: fractions, bytes, sizes, min, None")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--cost", default="measured", help="measured, roofline, or a device's name")
    parser.add_argument("--repeats", type=int, default=5, help="paired runs that the extra time is the median of")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for the solver")
    parser.add_argument("--batch", type=int, help="another batch size than the models' own")
    parser.add_argument("--peers", action="store_true", help="also torch.utils.checkpoint and activation_memory_budget")
    return parser


if __name__ == "__main__":
    sys.exit(main())
