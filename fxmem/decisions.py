"""Plan: what was decided for one module, one kind of input and one budget: plain data, and the account that people read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .budget import Budget
from .memory import ArenaPlan
from .problem import Problem
from .report.account import account_of_frontier, account_of_plan
from .report.drawing import draw
from .report.plots import plot_frontier, plot_memory_map, plot_schedule, plot_timeline
from .report.snapshot import save_snapshot
from .report.summary import as_html, as_rich, as_text
from .saving import save_plan
from .solvers import Solution
from .units import format_bytes, format_percent


@dataclass(frozen=True)
class Origin:
    """What a plan was made for, and holds for alone.

    fxmem, torch: versions. device: "cpu", "meta", or the GPU's name. mode: "train" or "eval".
    inputs: (where in the call, dtype and shape or value) of each leaf.
    output_gradients, implementations, exactness, inplace, recompute: as given to `fxmem.transform`.
    withheld: (implementation, names of parameters and buffers) of guards that did not hold (see `OfferImplementations`).
    """

    fxmem: str = ""
    torch: str = ""
    device: str = ""
    mode: str = ""
    inputs: tuple[tuple[str, str], ...] = ()
    output_gradients: str | tuple[int, ...] | None = None
    implementations: tuple[str, ...] | None = None
    exactness: str = "bitwise"
    inplace: bool = True
    recompute: bool = True
    withheld: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, repr=False)
class Plan:
    """The decisions for one training step. All peaks are bytes alive at once, parameters, buffers and inputs included.

    budget_bytes: what the peak had to stay under; None where nothing was to be recomputed.
    baseline_peak_bytes, baseline_by_kind: the plain module under PyTorch's autograd, predicted in the same way.
    problem, solution: the torch-free problem that was solved, and the schedule that runs.
    cost: the name of the cost model. capture_time_s: seconds of capture, costs and everything else before the solver.
    asked: the budget as the user gave it. origin: what the plan holds for.
    arena: where the step's buffers lie, of a module transformed with `arena=True`; not saved with the plan, but made anew.
    """

    model: str
    budget_bytes: int | None
    baseline_peak_bytes: int
    baseline_by_kind: dict[str, int]
    problem: Problem
    solution: Solution
    cost: str
    capture_time_s: float
    asked: Budget = field(default_factory=Budget)
    origin: Origin = field(default_factory=Origin)
    arena: ArenaPlan | None = None

    @property
    def predicted_peak_bytes(self) -> int:
        """Peak of the planned step, its arena included, which `fxmem.measure` must find."""
        return self.solution.timeline.peak_bytes if self.arena is None else self.arena.peak_bytes

    @property
    def peak_by_kind(self) -> dict[str, int]:
        """Bytes at the predicted peak, by kind of storage."""
        return self.solution.timeline.peak_by_kind

    @property
    def predicted_overhead(self) -> float:
        """Extra time over forward and backward run once (0.1: ten percent)."""
        return self.solution.timeline.overhead

    @property
    def lower_bound_overhead(self) -> float:
        """No schedule of these operators within the budget has less extra time than this (on the smallest graphs: none that
        recomputes in program order before each operator of the backward)."""
        return self.solution.lower_bound_overhead

    @property
    def status(self) -> str:
        """How good the plan is known to be, and what cut the solver short."""
        return self.solution.status

    @property
    def solve_time_s(self) -> float:
        """Seconds that the solver took."""
        return self.solution.solve_time_s

    def summary(self) -> str:
        """One screen of text: peaks before and after by kind, extra time, status and gap, the largest storages at the peak,
        what is kept and recomputed by module, and which implementations were chosen."""
        return as_text(account_of_plan(self))

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan to a file (JSON), for `fxmem.transform(..., plan=path)` and `fxmem.load_plan`. Raises PlanError."""
        save_plan(self, path)

    def save_snapshot(self, path: str | os.PathLike) -> None:
        """Write the predicted timeline as a memory snapshot for https://pytorch.org/memory_viz, as
        `torch.cuda.memory._dump_snapshot` does of a real run; or, where the name ends in .html, as a page that shows it
        (PyTorch's viewer, which the browser fetches from a CDN).

        Raises PlanError where the file cannot be written.
        """
        save_snapshot(self, path)

    def plot_timeline(self):
        """Memory over the step, stacked by kind, with nothing recomputed and as planned: two matplotlib Axes (extra "plot")."""
        return plot_timeline(self)

    def plot_schedule(self, axes=None):
        """Operators over time: kept, run, run in place, run again. matplotlib Axes, drawn into `axes` where given."""
        return plot_schedule(self, axes)

    def plot_memory_map(self, axes=None):
        """The arena as address over time, coloured by kind; of a plan without one, as all its buffers would lie in one.
        matplotlib Axes, drawn into `axes` where given."""
        return plot_memory_map(self, axes)

    def draw(self, module: str | None = None, axes=None):
        """The graph of one module ("": of all), coloured by what becomes of each storage. matplotlib Axes.

        module: None for everything where that is small, else for the module that recomputes most.
        """
        return draw(self, module, axes)

    def __repr__(self) -> str:
        peaks = f"{format_bytes(self.baseline_peak_bytes)} -> {format_bytes(self.predicted_peak_bytes)}"
        return f"<Plan of {self.model}: peak {peaks}, extra time {format_percent(self.predicted_overhead)}>"

    def __str__(self) -> str:
        return self.summary()

    def __rich__(self):
        return as_rich(account_of_plan(self))

    def _repr_html_(self) -> str:
        return as_html(account_of_plan(self))


@dataclass(frozen=True, repr=False)
class Frontier(Sequence):
    """Plans from no recompute to the least reachable peak: a smaller peak never costs less time.

    peers: by the name of another method, its plans within the same budgets.
    """

    plans: tuple[Plan, ...]
    peers: dict[str, tuple[Plan, ...]] = field(default_factory=dict)

    def __getitem__(self, index):
        return self.plans[index]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def plot(self, axes=None):
        """Peak against extra time, with the peers where they were computed: matplotlib Axes (extra "plot")."""
        return plot_frontier(self, axes)

    def __repr__(self) -> str:
        return f"<Frontier of {len(self)} plans>"

    def __str__(self) -> str:
        return as_text(account_of_frontier(self))

    def __rich__(self):
        return as_rich(account_of_frontier(self))

    def _repr_html_(self) -> str:
        return as_html(account_of_frontier(self))
