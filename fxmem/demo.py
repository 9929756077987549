"""The demo: a model that people know, trained on real data twice, as it is and under a memory budget, step by step in turns."""

from __future__ import annotations

import copy
import difflib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from .api import transform
from .budget import parse_budget
from .codegen.planned import PlannedModule
from .errors import FxmemError, MissingExtraError
from .measuring import measure
from .torchvision_models import load_torchvision
from .units import format_bytes, format_percent, format_seconds

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise MissingExtraError(f'{error.name} is not installed: pip install "fxmem[demo]" brings what the demo needs') from error

SIDE = 96  # pixels; the digits' 8 x 8 are scaled up to it
SOLVER_SECONDS = 20.0


@dataclass
class Run:
    """One of the two trainings, and what became of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[torch.Tensor] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module) -> Run:
        return cls(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.losses.append(loss.detach().cpu())
        self.times_s.append(time.perf_counter() - start)
        self.optimizer.step()
        self.optimizer.zero_grad()


def run(name: str, budget: int | float | str | None, steps: int, batch: int, device: str) -> None:
    """Plan torchvision's model of that name, train it both ways and print what came out.

    Raises FxmemError for a model that torchvision does not have, and for a budget that cannot be read or met.
    """
    console = Console()
    parse_budget(budget)  # before anything that takes time
    torch.manual_seed(0)
    torch.backends.cudnn.deterministic = True  # so that two runs of the plain model agree on CUDA as well
    plain = _model(name).to(device)
    batches = list(_batches(steps, batch, device))
    console.print(f"{type(plain).__name__} ({name}) learns scikit-learn's digits on {_place(device)}")
    console.print(f"{steps} steps of {batch} images, {SIDE} x {SIDE}")
    columns = TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        planning = progress.add_task("planning", total=None)
        planned = transform(copy.deepcopy(plain), (batches[0][0],), budget=budget, time_limit_s=SOLVER_SECONDS, progress=False)
        progress.update(planning, total=1, completed=1)
        peaks = []
        for model in progress.track((plain, planned), description="measuring peaks"):
            peaks.append(measure(model, (batches[0][0],), repeats=1).peak_bytes)
        runs = Run.of(plain), Run.of(planned)
        for images, labels in progress.track(batches, description="training both in turns"):
            for each in runs:
                torch.manual_seed(len(each.losses))  # the same dropout for both
                each.step(images, labels)
    console.print(_table(planned, peaks, runs))
    console.print(_time(planned, runs))
    console.print(_equality(runs))


def _model(name: str) -> nn.Module:
    """torchvision's classifier of that name, for ten classes, with random weights."""
    models = load_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        raise FxmemError(
            f"torchvision has no classifier named {name!r}; close: {', '.join(close)}; all: torchvision.models.list_models()"
        )
    return models.get_model(name, num_classes=10)


def _batches(steps: int, batch: int, device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images [batch, 3, SIDE, SIDE] from 0 to 1 and their digits [batch], drawn anew for each step."""
    digits = load_digits()
    pixels, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (batch,))
        images = F.interpolate(pixels[chosen, None], size=(SIDE, SIDE), mode="bilinear")
        yield images.expand(-1, 3, -1, -1).contiguous().to(device), labels[chosen].to(device)


def _place(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"


def _table(planned: PlannedModule, peaks: list[int], runs: tuple[Run, Run]) -> Table:
    plan = planned.plan
    table = Table("", "plain", "planned")
    for column in table.columns[1:]:
        column.justify = "right"
    budget = "none" if plan.budget_bytes is None else format_bytes(plan.budget_bytes)
    table.add_row("budget", "", budget)
    table.add_row("peak, predicted", format_bytes(plan.baseline_peak_bytes), format_bytes(plan.predicted_peak_bytes))
    table.add_row("peak, measured", *map(format_bytes, peaks))
    table.add_row("time of a step (median)", *(format_seconds(statistics.median(each.times_s)) for each in runs))
    table.add_row("loss, first step", *(f"{each.losses[0]:.6f}" for each in runs))
    table.add_row("loss, last step", *(f"{each.losses[-1]:.6f}" for each in runs))
    return table


def _time(planned: PlannedModule, runs: tuple[Run, Run]) -> str:
    """The extra time, paired step by step, which cancels what slows the machine down for a while."""
    plan = planned.plan
    measured = statistics.median(b / a for a, b in zip(*(each.times_s for each in runs), strict=True)) - 1
    return (
        f"Extra time: {format_percent(measured, sign=True)} measured (median of paired steps), "
        f"{format_percent(plan.predicted_overhead, sign=True)} predicted. "
        f"Planning took {plan.capture_time_s + plan.solve_time_s:.0f} s ({plan.status})."
    )


def _equality(runs: tuple[Run, Run]) -> str:
    plain, planned = runs
    losses = torch.stack(plain.losses), torch.stack(planned.losses)
    states = plain.model.state_dict(), planned.model.state_dict()
    differ = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    if torch.equal(*losses) and not differ:
        return f"All {len(plain.losses)} losses, and all {len(states[0])} parameters and buffers after them, are bitwise equal."
    largest = (losses[0] - losses[1]).abs().max()
    return f"Not bitwise equal: losses differ by up to {largest:.3g}, as do {len(differ)} parameters and buffers."
