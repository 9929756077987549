"""What operator implementations and operators in place save, what they cost, and how exact and how fast they are.

`python -m benchmarks.implementations` plans the models of `benchmarks.step` for a roofline at several budgets: by recompute
alone, with operators in place, with other implementations, with both, and with the accurate ones too. `--measure` runs them, at
the step's own sizes, on this machine instead. `--table` makes the table of all implementations, and `--speed` compares masks as
bits with a plain copy. `--monet` plans MONeT's five models at its batches and fractions of the plain peak (Shah et al. 2021,
one P100). Results are stored; `python -m benchmarks.report` puts them into the documentation.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

import fxmem
from fxmem.budget import Budget, budget_from_text, parse_budget
from fxmem.codegen.calls import canonical_call
from fxmem.decisions import Plan
from fxmem.errors import InfeasibleBudgetError
from fxmem.implementations import IMPLEMENTATIONS, bits, max_pool, programs, relu
from fxmem.planning import solve_for
from fxmem.prepared import Prepared, prepare
from fxmem.problem import Problem

from .implementation_cases import CASES, images
from .models import EXAMPLES, MODELS, SOLVER_MODELS, Example, build, on_meta
from .results import FOLDER, save_row

RESULTS = FOLDER / "implementations.json"
QUESTION = ("part", "model", "name", "device", "budget", "way")
WAYS: dict[str, dict[str, Any]] = {
    "recompute": {"implementations": (), "inplace": False},
    "in place": {"implementations": (), "inplace": True},
    "implementations": {"inplace": False},
    "all": {},
    "accurate": {"exactness": "accurate"},
}
MONET = {  # GiB at its smallest budget, GiB of PyTorch's own peak, and MONeT's extra time there
    "resnet50": (4.99, 15.06, 0.1195),
    "googlenet": (4.99, 14.93, 0.158),
    "unet": (5.01, 14.32, 0.115),
    "mobilenet_v2": (5.01, 14.46, 0.087),
    "vgg16": (5.51, 14.12, 0.091),
}
FREE = "free"  # nothing is recomputed, and implementations take UNMEASURABLE more time at most
UNMEASURABLE = "0.5 %"
MOST_NAMED = 4  # operators that one implementation serves
REPEATS = 3  # pairs of steps that are timed
SPEED_SHAPE = torch.Size((16, 64, 128, 128))
BUDGETS = (
    'comma-separated: fractions of the plain peak; "min"; "5 %%" for the least peak at that extra time, '
    f'"{FREE}" for that at {UNMEASURABLE}% with nothing recomputed'
)
LAYOUT = "{:<14}{:<8}{:>9}  {:<16}{:>9}{:>10}{:>10}{:>9}  {}"
COLUMNS = LAYOUT.format("model", "device", "budget", "way", "peak", "extra, %", "measured", "bound, %", "outcome")


def rows(
    name: str, example: Example, device: str, budgets: list[str], ways: list[str], measured: bool, limit_s: float
) -> Iterator[dict]:
    """A row for each way and budget of one model. Ways that come to the same are planned and measured once."""
    known: dict[tuple, list[dict]] = {}
    for way, recompute in itertools.product(ways, (True, False)):
        asked = [text for text in budgets if recompute == (text != FREE)]
        if not asked:
            continue
        prepared = _prepared(example, "measured" if measured else device, way, recompute)
        problems = tuple(_what_is_solved(program.lowered.problem) for program in prepared.programs)
        if problems in known:
            yield from (row | {"way": way} for row in known[problems])
            continue
        known[problems] = []
        for text, plan in _plans(prepared, asked, limit_s):
            row = {"part": "models", "model": name, "device": device, "budget": text, "way": way} | _promised(plan)
            if measured and isinstance(plan, Plan):
                row |= _measured(example, plan)
            known[problems].append(row)
            yield row


def _what_is_solved(problem: Problem) -> tuple:
    """A problem without the alternatives that solvers pass over."""
    useful, others = ({p for found in a.values() for p in found} for a in (problem.useful_alternatives, problem.alternatives))
    operators = tuple(o for p, o in enumerate(problem.operators) if p in useful or p not in others)
    return problem.storages, operators, problem.outputs


def _prepared(example: Example, cost: str, way: str, recompute: bool = True) -> Prepared:
    args, kwargs = canonical_call(example.module, example.args, example.kwargs)
    return prepare(example.module, args, kwargs, cost, recompute=recompute, **WAYS[way])


def _plans(prepared: Prepared, budgets: Iterable[str], limit_s: float) -> Iterator[tuple[str, Plan | InfeasibleBudgetError]]:
    """A plan for each budget, the smallest first: it starts the next."""
    asked = {text: _asked(text) for text in budgets}
    known: list[Plan] = []
    for text in sorted(asked, key=lambda text: asked[text].tightness(prepared.baseline.peak_bytes)):
        try:
            _, plan = solve_for(prepared, asked[text], "auto", limit_s, known)
        except InfeasibleBudgetError as error:
            yield text, error
            continue
        known.append(plan)
        yield text, plan


def _asked(text: str) -> Budget:
    text = UNMEASURABLE if text == FREE else text
    if text.endswith("%"):
        return parse_budget(None, float(text.removesuffix("%")) / 100)
    return parse_budget(budget_from_text(text))


def _promised(plan: Plan | InfeasibleBudgetError) -> dict:
    if isinstance(plan, InfeasibleBudgetError):
        return {"outcome": f"infeasible: the least peak is {plan.min_budget_bytes:,} bytes"}
    return {
        "outcome": "ok",
        "plain_peak_bytes": plan.baseline_peak_bytes,
        "peak_bytes": plan.predicted_peak_bytes,
        "extra_time": plan.predicted_overhead,
        "bound": plan.lower_bound_overhead,
        "chosen": len(_alternatives(plan.problem).intersection(plan.solution.schedule.steps)),
    }


def _measured(example: Example, plan: Plan) -> dict:
    planned = fxmem.transform(example.module, example.args, example.kwargs, plan=plan)
    peak_bytes = fxmem.measure(planned, example.args, example.kwargs, repeats=1).peak_bytes
    ratio = fxmem.measure_pair(example.module, planned, example.args, example.kwargs, repeats=REPEATS).ratio
    return {"measured_peak_bytes": peak_bytes, "measured_extra_time": ratio - 1}


def _alternatives(problem) -> set[int]:
    return {p for found in problem.alternatives.values() for p in found}


def monet(limit_s: float) -> Iterator[dict]:
    """MONeT's models, batches and smallest budgets, planned for its device: at its fraction of the plain peak, with PyTorch's
    own operators, with all bitwise implementations and with the accurate ones too; and in its bytes."""
    for name, (budget_gib, plain_gib, theirs) in MONET.items():
        example, fraction = SOLVER_MODELS[name](), f"{budget_gib / plain_gib:.3f}"
        for way, budgets in (("in place", [fraction]), ("all", [fraction, f"{budget_gib} GiB"]), ("accurate", [fraction])):
            for text, plan in _plans(_prepared(example, "P100", way), budgets, limit_s):
                row = {"part": "monet", "model": name, "device": "P100", "budget": text, "way": way, "theirs": theirs}
                yield row | _promised(plan)


def table() -> Iterator[dict]:
    """What each implementation serves and how exact it is, in float32."""
    for name, implementation in IMPLEMENTATIONS.items():
        torch.manual_seed(0)
        found = fxmem.check_implementation(name, CASES[name](), (images(),))
        yield {
            "part": "table",
            "name": name,
            "serves": _names(implementation.serves),
            "keeps": (implementation.choose.__doc__ or "").strip().split("\n")[0],
            "exactness": implementation.exactness,
            "is_bitwise": found.is_bitwise,
            "error": found.error,
            "plain_error": found.plain_error,
        }


def _names(targets: Sequence[Any]) -> list[str]:
    if len(targets) > MOST_NAMED:
        return ["pointwise operators again"]
    return [str(target).removesuffix(".default") for target in targets]


def speed(device: str) -> Iterator[dict]:
    """GB of values that pass in a second, beside a copy of them."""
    name = torch.cuda.get_device_name(device) if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for case, run in _speed_cases(device).items():
        for _ in range(3):
            run()
        seconds = statistics.median(_seconds(run, device) for _ in range(15))
        yield {"part": "speed", "name": case, "device": name, "gb_per_s": SPEED_SHAPE.numel() * 4 / seconds / 1e9}


def _speed_cases(device: str) -> dict[str, Callable[[], Any]]:
    """What is run on the same number of values each."""
    x = torch.randn(SPEED_SHAPE, device=device)
    channel = torch.rand(SPEED_SHAPE[1], device=device) + 0.5
    stride, shape, window = list(x.stride()), list(x.shape), ([3, 3], [2, 2], [1, 1], [1, 1])
    above, mask = bits.pack_above(x, stride, 0), x > 0
    packed = bits.pack_mask(mask, stride)
    aten, norm = torch.ops.aten, (x, channel, channel, channel, channel)
    pooled, indices = aten.max_pool2d_with_indices(x, *window)
    offsets = max_pool.offsets_in_window(indices, shape[-1], *window)
    program = "y0 = fxmem.batch_norm_again.default(x0, w1, w2, w3, w4); y1 = aten.add.Tensor(y0, x5); aten.relu.default(y1)"
    return {
        "copy": x.clone,
        "threshold_backward": lambda: aten.threshold_backward(x, x, 0),
        "pack_above": lambda: bits.pack_above(x, stride, 0),
        "keep_where": lambda: bits.keep_where(x, above, stride),
        "pack_mask": lambda: bits.pack_mask(mask, stride),
        "unpack_mask": lambda: bits.unpack_mask(packed, shape, stride),
        "scale_elsewhere": lambda: relu.scale_elsewhere(x, above, stride, 0.1),
        "max_pool2d_with_indices_backward": lambda: aten.max_pool2d_with_indices_backward(pooled, x, *window, False, indices),
        "offsets_in_window": lambda: max_pool.offsets_in_window(indices, shape[-1], *window),
        "backward_from_offsets": lambda: max_pool.backward_from_offsets(pooled, offsets, shape, *window, False),
        "batch norm, sum, relu": lambda: torch.relu_(torch.ops.fxmem.batch_norm_again(*norm).add_(x)),
        "chain of these three": lambda: programs.chain([*norm, x], program, False),
    }


def _seconds(run: Callable[[], Any], device: str) -> float:
    begin = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    del result
    return seconds


def line(row: dict) -> str:
    if row["part"] in ("table", "speed"):
        return ", ".join(f"{k}: {v}" for k, v in row.items() if k not in ("part", "keeps"))
    if row["outcome"] != "ok":
        return LAYOUT.format(row["model"], row["device"], row["budget"], row["way"], "", "", "", "", row["outcome"])
    measured = f"{100 * row['measured_extra_time']:+.1f}" if "measured_extra_time" in row else ""
    peak = f"{row['peak_bytes'] / row['plain_peak_bytes']:.3f}"
    numbers = peak, f"{100 * row['extra_time']:.2f}", measured, f"{100 * row['bound']:.2f}"
    note = f"MONeT: {100 * row['theirs']:.1f} %" if "theirs" in row else f"{row['chosen']} alternatives"
    return LAYOUT.format(row["model"], row["device"], row["budget"], row["way"], *numbers, note)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for what, names, known in (("model", options.models, EXAMPLES), ("way", options.ways, WAYS)):
        unknown = [name for name in names.split(",") if name not in known]
        if unknown:
            print(f"unknown {what} {unknown[0]!r}; {what}s: {', '.join(known)}", file=sys.stderr)
            return 2
    found: Iterator[dict]
    if options.table or options.speed:
        found = table() if options.table else speed(options.on)
    elif options.monet:
        found = monet(options.time_limit)
    else:
        found = (row for name in options.models.split(",") for row in _model_rows(name, options))
    if not (options.table or options.speed):
        print(COLUMNS, flush=True)
    for row in found:
        print(line(row), flush=True)
        save_row(RESULTS, row, QUESTION)
    return 0


def _model_rows(name: str, options: argparse.Namespace) -> Iterator[dict]:
    example = build(name) if options.measure else on_meta(EXAMPLES[name])()
    device = "this" if options.measure else options.device
    budgets, ways = options.budget.split(","), options.ways.split(",")
    return rows(name, example, device, budgets, ways, options.measure, options.time_limit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.implementations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated, of {', '.join(EXAMPLES)} (%(default)s)")
    parser.add_argument("--device", default="V100", help="roofline that the models are planned with")
    parser.add_argument("--budget", default="free,0.5,0.33,min", help=BUDGETS)
    parser.add_argument("--ways", default=",".join(WAYS), help=f"comma-separated (all: {', '.join(WAYS)})")
    parser.add_argument("--on", default="cpu", choices=("cpu", "cuda"), help="where --speed runs")
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for one plan")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--measure", action="store_true", help="run the steps on this machine")
    what.add_argument("--monet", action="store_true", help="MONeT's models at MONeT's smallest budgets")
    what.add_argument("--table", action="store_true", help="the table of all implementations")
    what.add_argument("--speed", action="store_true", help="masks as bits beside a copy")
    return parser


if __name__ == "__main__":
    sys.exit(main())
