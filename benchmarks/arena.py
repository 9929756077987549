"""Training steps and inference in an arena: allocations, page faults, resident memory, time and peaks.

`python -m benchmarks.arena` runs each model's training step plainly, by its plan without an arena, and by the same plan with
one, in turns, in one process for each model: whether all bits are equal; how many allocations of 128 KiB and more a step makes
(from there on glibc asks the system for memory), how many of them are for what the step hands out; page faults; the most that
is resident above what was before the step; seconds. Then the peak of inference, plainly and in an arena, under `no_grad`. Rows
are stored in benchmarks/results/arena.json, in place of those of the same model; `--json` prints them, a JSON object a line.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

import fxmem
from fxmem.budget import budget_from_text
from fxmem.measuring import backward_roots, distinct_bytes
from fxmem.torch_internals import cpu_memory_events, pytree

from .compare import difference, step_result
from .models import MODELS, Example, build
from .results import FOLDER, save_row

RESULTS = FOLDER / "arena.json"
LARGE_BYTES = 128 << 10
TRAINED, INFERRED = ("resnet50", "gpt2"), ("resnet50", "googlenet", "unet2d")
LAYOUT = "{:<12}{:<10}{:<8}{:>12}{:>13}{:>12}{:>9}{:>8}{:>14}{:>14}{:>10}{:>8}"
HEADS = (
    "model", "what", "way", "peak MB", "arena MB", "inside", "large", "faults", "resident MB", "seconds", "of plain", "equal",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One model, run one way.

    what: "training" or "inference". way: "plain", "plan" or "arena". peak_bytes: measured, all that is alive counted.
    arena_bytes, share_inside: of the plan. large_allocations: of a step, handed_out of them for outputs and gradients.
    page_faults, resident_bytes (above what was there before), time_s: medians over the steps. time_ratio: of the paired times
    over the plain module's. equal: whether outputs, gradients and buffers are the plain module's, bit for bit.
    """

    model: str
    what: str
    way: str
    sizes: str
    peak_bytes: int
    arena_bytes: int
    share_inside: float
    large_allocations: int
    handed_out: int
    page_faults: float
    resident_bytes: int | None
    time_s: float
    time_ratio: float
    equal: bool

    @property
    def line(self) -> str:
        resident = "" if self.resident_bytes is None else f"{self.resident_bytes / 1e6:.1f}"
        return LAYOUT.format(
            self.model, self.what, self.way, f"{self.peak_bytes / 1e6:.1f}", f"{self.arena_bytes / 1e6:.1f}",
            f"{self.share_inside:.0%}", self.large_allocations, f"{self.page_faults:.0f}", resident, f"{self.time_s:.3f}",
            f"{self.time_ratio:.3f}", "yes" if self.equal else "NO",
        )  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to run a model: what to call for one step or one inference, the plan behind it, and whether the bits agree."""

    name: str
    module: nn.Module
    run: Callable[[], object]
    plan: fxmem.Plan | None
    equal: bool

    def release(self) -> None:
        if isinstance(self.module, fxmem.PlannedModule):
            self.module.release_arena()


def training(example: Example, budget: float | str | None, time_limit_s: float) -> list[Way]:
    """The three ways to train."""
    module, ways, plain = example.module, [], step_result(example.module, example)
    plan = fxmem.plan(module, example.args, example.kwargs, budget=budget, time_limit_s=time_limit_s)
    for name in ("plain", "plan", "arena"):
        run = module
        if name != "plain":
            run = fxmem.transform(module, example.args, example.kwargs, plan=plan, arena=name == "arena")
        found = difference(plain, step_result(run, example))
        equal = found.equal_outputs and found.equal_gradients and found.equal_buffers
        ways.append(Way(name, run, lambda run=run: _step(run, example), getattr(run, "plan", None), equal))
    return ways


def inference(example: Example) -> list[Way]:
    """Plainly, and in an arena."""
    module = example.module.eval()
    planned = fxmem.transform(module, example.args, example.kwargs, arena=True, cost="roofline", time_limit_s=1.0)
    with torch.no_grad():
        pairs = zip(*(pytree.tree_leaves(run(*example.args, **example.kwargs)) for run in (module, planned)), strict=True)
        equal = all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
        plan = planned.inference_plan(*example.args, **example.kwargs)
    return [
        Way(name, run, lambda run=run: _infer(run, example), plan if run is planned else None, equal)
        for name, run in (("plain", module), ("arena", planned))
    ]


def _step(module: nn.Module, example: Example) -> object:
    roots = backward_roots(module(*example.args, **example.kwargs))
    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    module.zero_grad(set_to_none=True)
    return roots


def _infer(module: nn.Module, example: Example) -> object:
    with torch.no_grad():
        return module(*example.args, **example.kwargs)


def rows_of(name: str, what: str, ways: list[Way], example: Example, sizes: str, repeats: int) -> list[Row]:
    """Each way measured: events and resident memory one way after another, faults and seconds in turns."""
    inputs = (t for t in pytree.tree_leaves((example.args, example.kwargs)) if isinstance(t, torch.Tensor))
    before_bytes = distinct_bytes([*example.module.parameters(), *example.module.buffers(), *inputs])
    peaks, events, resident = {}, {}, {}
    for way in ways:
        way.release()
        peaks[way.name] = _highest(_events(way.run))
        events[way.name] = _events(way.run)
        way.release()
        resident[way.name] = _resident_bytes(way.run)
        way.release()
    timed: dict[str, list[tuple[float, int]]] = {way.name: [] for way in ways}
    for _ in range(repeats + 1):
        for way in ways:
            timed[way.name].append(_timed(way.run))
    rows = []
    for way in ways:
        arena = way.plan and way.plan.arena
        seconds, faults = zip(*timed[way.name][1:], strict=True)
        pairs = zip(seconds, (s for s, _ in timed["plain"][1:]), strict=True)
        rows.append(
            Row(
                name, what, way.name, sizes, before_bytes + peaks[way.name], arena.arena_bytes if arena else 0,
                arena.share if arena else 0.0, _large(events[way.name]), _handed_out(ways[-1].plan),
                statistics.median(faults), resident[way.name], statistics.median(seconds),
                statistics.median(ours / plain for ours, plain in pairs), way.equal,
            )
        )  # fmt: skip
    return rows


def _handed_out(plan: fxmem.Plan) -> int:
    told = ("a gradient that is handed out", "an output of the module")
    return sum(place.reason in told and place.size_bytes >= LARGE_BYTES for place in plan.arena.outside)


def _large(events: list[int]) -> int:
    return sum(size >= LARGE_BYTES for size in events)


def _events(run: Callable[[], object]) -> list[int]:
    gc.collect()
    return cpu_memory_events(run)[1]


def _highest(events: list[int]) -> int:
    running = highest = 0
    for size in events:
        running += size
        highest = max(highest, running)
    return highest


def _timed(run: Callable[[], object]) -> tuple[float, int]:
    """Seconds and minor page faults of one run."""
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    run()
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def _resident_bytes(run: Callable[[], object]) -> int | None:
    """The most that three runs have resident above what was before them; None where the system does not tell."""
    try:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        before_bytes = _status_bytes("VmHWM")
        for _ in range(3):
            run()
        return _status_bytes("VmHWM") - before_bytes
    except OSError:
        return None


def _status_bytes(key: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def run_model(name: str, what: str, options: argparse.Namespace) -> list[Row]:
    sizes = dict(pair.split("=") for pair in options.sizes.split(",") if pair)
    known = MODELS[name].__code__.co_varnames[: MODELS[name].__code__.co_argcount]
    sizes = {key: int(value) for key, value in sizes.items() if key in known}
    example = build(name, **sizes)
    ways = training(example, budget_from_text(options.budget), options.time_limit) if what == "training" else inference(example)
    return rows_of(name, what, ways, example, ", ".join(f"{k} {v}" for k, v in sizes.items()), options.repeats)


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    work = [(name, "training") for name in options.models.split(",") if name]
    work += [(name, "inference") for name in options.inference.split(",") if name]
    if not options.json:
        print(LAYOUT.format(*HEADS), flush=True)
    if len(work) > 1:  # a process for each: what one leaves in the allocator is not another's
        for name, what in work:
            one = ["--models", name, "--inference", ""] if what == "training" else ["--models", "", "--inference", name]
            rest = ["--budget", options.budget, "--sizes", options.sizes, "--repeats", str(options.repeats), "--json"]
            command = [sys.executable, "-m", "benchmarks.arena", *one, *rest, "--time-limit", str(options.time_limit)]
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            _show([Row(**json.loads(line)) for line in made.splitlines() if line.startswith("{")], options.json)
        return 0
    rows = [row for name, what in work for row in run_model(name, what, options)]
    for row in rows:
        save_row(RESULTS, asdict(row), ("model", "what", "way"))
    _show(rows, options.json)
    return 0 if all(row.equal for row in rows) else 1


def _show(rows: list[Row], as_json: bool) -> None:
    for row in rows:
        print(json.dumps(asdict(row)) if as_json else row.line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.arena", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(TRAINED), help="whose training is measured, comma-separated (%(default)s)")
    parser.add_argument("--inference", default=",".join(INFERRED), help="whose inference is (%(default)s)")
    parser.add_argument("--budget", default="none", help='of the plan: a fraction, bytes, "min" or "none" (%(default)s)')
    parser.add_argument("--sizes", default="", help='of the models, as in "batch=4,size=160"; by default their own')
    parser.add_argument("--repeats", type=int, default=7, help="steps that are timed, each way (%(default)s)")
    parser.add_argument("--time-limit", type=float, default=20.0, help="seconds for the solver (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
